"""Names of cells."""

from __future__ import annotations

import pytest

from headwise.atlas.cell import KINDS, Cell
from headwise.errors import InputError


@pytest.mark.parametrize(
    "id", ["clean/ioi", "find/induction/ioi", "map/ioi/L3@1", "joint/m/p", "offtarget/m/p", "dose/p", "examples/p"]
)
def test_an_id_says_all_of_a_cell(id: str) -> None:
    assert Cell.parse(id).id == id


def test_every_kind_has_an_id() -> None:
    assert len({Cell(kind=kind, probe="p", method="m", site="L0").id for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("id", ["clean", "clean/a/b", "map/ioi", "nothing/ioi", "find//ioi", ""])
def test_what_is_no_cell(id: str) -> None:
    with pytest.raises(InputError, match="names no cell"):
        Cell.parse(id)
