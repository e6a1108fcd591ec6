"""Whether a module that hooks or buffers were put on is still the one that the model runs at its path."""

from __future__ import annotations

from torch import nn

from headwise.errors import PlanConflict


def require_in_place(root: nn.Module, path: str, module: nn.Module, what: str) -> None:
    """Raises PlanConflict if `module` is no longer at `path`: it was replaced, or wrapped (by an adapter, say).

    `what` says what is on it and would now be lost, or done to a part of the path only.
    """
    try:
        found: nn.Module | None = root.get_submodule(path)
    except AttributeError:
        found = None
    if found is not module:
        now = "nothing" if found is None else f"another {type(found).__name__}"
        raise PlanConflict(
            f"{path or 'the model'} has {what}, and {now} stands there now (replaced or wrapped inside the block), so "
            "results of this block cannot be trusted; change the model before the block and attach it anew"
        )
