"""Any edit of heads in the place of a knock-out: what `measure_sets` does for many sets at once, of your own edit.

    doubled = Edited(lambda heads, rows: edit.bias(heads, math.log(2), keys="first", rows=rows))
    measure_sets(model, items, sets, doubled)

Every set has an edit of its own in its rows of the batch, so any variable can be edited, rows of patterns included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headwise.errors import InputError
from headwise.heads import HeadSet
from headwise.model.edit import Edit
from headwise.sweep.knockout import KnockOut, Mode


@dataclass(frozen=True, slots=True, init=False)
class Edited(KnockOut):
    """An edit of heads that stands where a knock-out does.

    It goes the way of `uniform`: a run begins at the first block that is edited, with its attention.

    Attributes:
        made: makes the edit of a set of heads in some rows of the batch (None: all of them), `made(heads, rows)`.
    """

    made: Callable[[HeadSet, Sequence[int] | None], Edit] = field(kw_only=True)
    mode: Mode = "uniform"

    def __init__(self, made: Callable[[HeadSet, Sequence[int] | None], Edit], scope: str = "all") -> None:
        """Raises InputError for what is no function."""
        if not callable(made):
            raise InputError(f"Edited takes a function (heads, rows) -> edit, not a {type(made).__name__}")
        KnockOut.__init__(self, "uniform", scope)
        object.__setattr__(self, "made", made)

    def edit(self, heads: HeadSet, rows: Sequence[int] | None = None) -> Edit:
        """The edit of `heads`, in all rows of a batch or in some."""
        return self.made(heads, rows)
