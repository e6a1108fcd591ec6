"""The report of an atlas: one HTML file that opens by double-click and asks nothing of the network.

write_report(atlas)                 # report.html in the atlas's folder
write_page(report, path)            # the same from a `Report` made by hand
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.atlas.report.page import page
from headwise.atlas.report.reading import report_of
from headwise.atlas.report.view import Report

if TYPE_CHECKING:
    from headwise.atlas.opened import Atlas

__all__ = ["Report", "page", "report_of", "write_page", "write_report"]

NAME = "report.html"


def write_report(atlas: Atlas, path: Path | None = None, *, command: str = "") -> Path:
    """Write the report of an atlas, finished or not, and say where it lies: by default in the atlas's folder.

    `command` is what repeats the run; by default it is made from the manifest. Raises `OSError` as the disk does.
    """
    return write_page(report_of(atlas, command=command), path or atlas.folder / NAME)


def write_page(report: Report, path: Path) -> Path:
    """Write the page whole: another process sees the old file or the new one. Raises `OSError` as the disk does."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(page(report), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
