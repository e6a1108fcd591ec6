"""The command line: `headwise doctor`, `headwise list`, `headwise bench`."""

from __future__ import annotations

from headwise.cli.app import main

__all__ = ["main"]
