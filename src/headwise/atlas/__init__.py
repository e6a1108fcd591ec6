"""The main job: score every head, test what was found, keep all of it in a folder that can be opened and compared."""

from __future__ import annotations

from headwise.atlas.comparing import AtlasComparison
from headwise.atlas.examples import Example
from headwise.atlas.manifest import Manifest, Settings
from headwise.atlas.opened import Atlas, Dose, VerifiedHead
from headwise.atlas.running import Watching, atlas
from headwise.room import callable_as

callable_as(__name__, atlas)

__all__ = ["Atlas", "AtlasComparison", "Dose", "Example", "Manifest", "Settings", "VerifiedHead", "Watching", "atlas"]
