"""The rooms of the package: the one direction of imports, and that importing it leaves everything else as it was."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import headwise

PACKAGE = Path(headwise.__file__).parent
ROOT = Path(__file__).parents[1]

# A room may import the rooms above it in this list and itself. docs/architecture.md shows the same list.
ROOMS = (
    "room",
    "errors",
    "freed_memory",
    "whole_file",
    "catalogue",
    "heads",
    "heatmap",
    "scores",
    "model",
    "words",
    "zoo",
    "loading",
    "probes",
    "metrics",
    "sweep",
    "circuits",
    "find",
    "verify",
    "use",
    "fit",
    "atlas",
    "replications",
    "benches",
    "cli",
)

FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(source: str, package: str) -> Iterator[str]:
    """Every module that the source of a module in `package` imports, at any depth, by its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """The room of a module's full name; None outside of headwise and for what the package itself holds."""
    first, _, rest = module.partition(".")
    room = rest.split(".")[0]
    return room if first == "headwise" and room and not room.startswith("__") else None


def upward_imports(source: str, package: str, room: str) -> list[str]:
    allowed = ROOMS[: ROOMS.index(room) + 1]
    return [name for name in imports_of(source, package) if room_of(name) not in (None, *allowed)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_imports_upwards(file: Path) -> None:
    inside = file.relative_to(PACKAGE).with_suffix("").parts
    if inside in (("__init__",), ("__main__",)):
        return
    assert inside[0] in ROOMS, f"{file} is in no room; give it a place in ROOMS and in docs/architecture.md"
    package = ".".join(("headwise", *inside[:-1]))
    assert not upward_imports(file.read_text(encoding="utf-8"), package, inside[0])


@pytest.mark.parametrize(
    ("source", "package", "room"),
    [
        ("import headwise.cli", "headwise", "heads"),
        ("from headwise import loading", "headwise", "errors"),
        ("def late():\n    from headwise.loading import load", "headwise.model", "model"),
        ("from ..zoo import build", "headwise.model", "model"),
        ("from . import scores", "headwise", "heads"),
        ("from headwise.new_room import thing", "headwise.cli", "cli"),
    ],
)
def test_an_upward_import_is_seen_in_every_form(source: str, package: str, room: str) -> None:
    assert upward_imports(source, package, room)


@pytest.mark.parametrize(
    ("source", "package", "room"),
    [
        ("from headwise.errors import InputError", "headwise.model", "model"),
        ("from .site import Site", "headwise.model", "model"),
        ("from headwise import __version__", "headwise.cli", "cli"),
        ("import torch", "headwise", "errors"),
    ],
)
def test_a_downward_import_is_allowed(source: str, package: str, room: str) -> None:
    assert not upward_imports(source, package, room)


def test_the_architecture_page_shows_this_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^headwise/(\w+)(?:\.py|/) ", page, flags=re.MULTILINE)
    assert tuple(listed) == ROOMS


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_every_module_patches_nothing() -> None:
    """Every attribute of the classes and modules that an interception could sit on is the same object afterwards."""
    run_python(
        """
import importlib, pkgutil
import torch, transformers
from transformers import masking_utils, modeling_utils
from transformers.models.llama import modeling_llama

watched = {
    "torch.nn.functional": torch.nn.functional, "torch.nn.Module": torch.nn.Module, "torch.Tensor": torch.Tensor,
    "modeling_utils": modeling_utils, "masking_utils": masking_utils, "modeling_llama": modeling_llama,
    "AttentionInterface": modeling_utils.AttentionInterface, "PreTrainedModel": modeling_utils.PreTrainedModel,
    "GenerationMixin": transformers.GenerationMixin, "LlamaAttention": modeling_llama.LlamaAttention,
}
def snapshot():
    found = {(name, key): value for name, owner in watched.items() for key, value in vars(owner).items()}
    registry = modeling_utils.ALL_ATTENTION_FUNCTIONS
    found |= {("registry", key): registry[key] for key in registry.valid_keys()}
    hooks = torch.nn.modules.module
    found |= {("hooks", key): dict(value) for key, value in vars(hooks).items() if key.startswith("_global_")
              and isinstance(value, dict)}
    return found

def same(one, other):
    return one is other or (isinstance(one, dict) and not one and one == other)

before = snapshot()
import headwise
for module in pkgutil.walk_packages(headwise.__path__, "headwise."):
    importlib.import_module(module.name)
after = snapshot()
changed = [key for key in before | after if key not in before or not same(before[key], after.get(key))]
# Caches that Python, torch and transformers fill by themselves are no patches.
changed = [key for key in changed if not key[1].startswith(("__", "_abc_"))]
assert not changed, changed
"""
    )


def test_importing_headwise_does_not_import_model_files() -> None:
    """The model files of transformers come with a model, not with the package."""
    loaded = run_python(
        "import sys, transformers.modeling_utils\n"
        "before = set(sys.modules)\n"
        "import headwise\n"
        "print(*(m for m in set(sys.modules) - before if '.modeling_' in m and m.startswith('transformers.models.')))"
    )
    assert not loaded.split()


def test_no_module_is_named_for_nothing() -> None:
    vague = {"utils", "helpers", "helper", "manager", "data", "info", "misc", "common"}
    assert not [file for file in FILES if file.stem in vague or file.parent.name in vague]
