"""The model that a command works on: the options that say how it is loaded, and the loading."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from headwise.cli.console import say

if TYPE_CHECKING:
    from headwise.model.attached import AttachedModel


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is loaded, as the command line says it; see `headwise.loading.load`. In the order of the options."""

    device: str | None
    dtype: str | None
    revision: str | None
    attn: str | None
    allow_pickle: bool
    trust_remote_code: bool


def load_model(name: str, how: Loading) -> AttachedModel:
    """The model of that name, attached; says on stderr that it is being loaded. Raises as `load`."""
    say(f"loading {name}")
    # Imported here, so that `headwise --help` does not wait for torch.
    from headwise.loading import load

    return load(name, **asdict(how))
