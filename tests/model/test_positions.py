"""Positions: absolute columns under padding, caches and beams, against loops over one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.model.positions import Columns, Frame, Window, check_scope, checked_span, locate_queries

CPU = torch.device("cpu")
SELECTORS: list[Any] = [
    "first",
    "last",
    "prompt",
    "decode",
    "span:s",
    0,
    -1,
    [-1, -2],
    [1, 4],
    slice(1, 5),
    slice(0, None, 2),
]


@st.composite
def sequences(draw: st.DrawFn, side: str = "either") -> tuple[list[list[bool]], int]:
    """Rows of attended flags, padded on one side of the prompt, and the prompt's length; decoded ones are attended."""
    prompt, decoded = draw(st.integers(1, 8)), draw(st.integers(0, 5))
    left = side == "left" or (side == "either" and draw(st.booleans()))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        pads = draw(st.integers(0, prompt - 1))
        flags = [False] * pads + [True] * (prompt - pads)
        rows.append((flags if left else flags[::-1]) + [True] * decoded)
    return rows, prompt


def frame_of(rows: list[list[bool]], prompt: int, past: int = 0, total: int | None = None, **more: Any) -> Frame:
    mask = torch.tensor(rows)[:, :total]
    settings: dict[str, Any] = {"generating": True, "spans": {"s": [0, 2, 9]}} | more
    return Frame(past, mask.shape[1] - past, len(mask), CPU, mask, prompt, **settings)


def expected(selector: Any, row: list[bool], prompt: int) -> list[bool]:
    """The definition, for one row of the whole sequence."""
    width = len(row)
    tokens = [column for column, attended in enumerate(row) if attended]
    last = max(column for column in tokens if column < prompt)

    def column_of(position: int) -> int:
        return position if position >= 0 else last + 1 + position

    if selector == "first":
        chosen = {tokens[0]}
    elif selector == "last":
        chosen = {last, *range(prompt, width)}
    elif selector == "prompt":
        chosen = set(range(prompt))
    elif selector == "decode":
        chosen = set(range(prompt, width))
    elif selector == "span:s":
        chosen = {0, 2, 9}
    elif isinstance(selector, slice):
        chosen = set(range(width)[selector])
    else:
        chosen = {column_of(position) for position in ([selector] if isinstance(selector, int) else selector)}
    return [column in chosen for column in range(width)]


@given(sequences(), st.sampled_from(SELECTORS))
def test_a_selector_is_its_definition_in_every_row(case: tuple[list[list[bool]], int], selector: Any) -> None:
    rows, prompt = case
    chosen = frame_of(rows, prompt).select(selector)
    assert chosen is not None
    assert chosen.tolist() == [expected(selector, row, prompt) for row in rows]


@given(sequences(), st.sampled_from(SELECTORS), st.data())
def test_any_way_of_decoding_selects_what_the_whole_sequence_does(
    case: tuple[list[list[bool]], int], selector: Any, data: st.DataObject
) -> None:
    """Steps of one or several columns after the prompt, each with the mask up to itself."""
    rows, prompt = case
    whole = frame_of(rows, prompt).select(selector)
    done, seen = 0, []
    while done < len(rows[0]):
        step = prompt if done == 0 else data.draw(st.integers(1, len(rows[0]) - done))
        frame = frame_of(rows, prompt, past=done, total=done + step)
        seen.append(Window.of_call(frame, step, frame.total, cross=False).queries(frame.select(selector)))
        done += step
    assert torch.equal(torch.cat([part for part in seen if part is not None], dim=1), whole)


@given(sequences("left"), st.sampled_from(["first", "last", "prompt", "decode", -1, [1, 4]]), st.data())
def test_a_prompt_that_comes_in_pieces_ends_where_it_ends(
    case: tuple[list[list[bool]], int], selector: Any, data: st.DataObject
) -> None:
    rows, prompt = case
    pads = max(row.index(True) for row in rows)
    first = data.draw(st.integers(pads + 1, prompt))  # "first" needs the first token of every row
    whole = frame_of(rows, prompt).select(selector)
    parts = [frame_of(rows, prompt, total=first), frame_of(rows, prompt, past=first)] if first < len(rows[0]) else []
    seen = [Window.of_call(part, part.length, part.total, False).queries(part.select(selector)) for part in parts]
    if seen:
        assert torch.equal(torch.cat(seen, dim=1), whole)  # type: ignore[arg-type]


@given(sequences(), st.integers(1, 20), st.integers(0, 3), st.data())
def test_key_columns_follow_a_sliding_and_a_static_cache(
    case: tuple[list[list[bool]], int], kept: int, spare: int, data: st.DataObject
) -> None:
    rows, prompt = case
    frame = frame_of(rows, prompt)
    chosen = frame.select([1, 3, -1])
    assert chosen is not None
    kept = min(kept, frame.total)
    sliding = Window.of_call(frame, 1, kept, cross=False).keys(chosen)
    assert torch.equal(sliding, chosen[:, frame.total - kept :])
    static = Window.of_call(frame, 1, frame.total + spare, cross=False).keys(chosen)
    assert static is not None
    assert torch.equal(static[:, : frame.total], chosen)
    assert not static[:, frame.total :].any()


def test_cross_keys_are_counted_in_the_source() -> None:
    source = frame_of([[True] * 3 + [False] * 2, [True] * 5], prompt=5, generating=False)
    frame = frame_of([[True] * 4] * 2, prompt=1, past=3, source=source)
    window = Window.of_call(frame, 1, 5, cross=True)
    assert window.key_frame is source
    assert window.keys(source.select("last")).tolist() == [[False, False, True, False, False], [False] * 4 + [True]]
    with pytest.raises(Refusal, match="was not seen in the run"):
        _ = Window.of_call(frame_of([[True]], 1), 1, 5, cross=True).key_frame


# -- spans and beams ---------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=3), st.integers(1, 3))
def test_spans_of_rows_are_repeated_over_their_beams(spans: list[list[int]], beams: int) -> None:
    batch = len(spans) * beams
    chosen = frame_of([[True] * 8] * batch, 8, spans={"s": spans}, items=len(spans)).span("s")
    for row in range(batch):
        assert chosen[row].nonzero()[:, 0].tolist() == sorted({c for c in spans[row // beams] if c < 8})


def test_one_list_or_slice_of_columns_is_for_every_row() -> None:
    for span in ([2, 3], slice(2, 4), (2, 3), [[2, 3], [2, 3]], [slice(2, 4), [2, 3]]):
        frame = frame_of([[True] * 5] * 2, 5, spans={"s": checked_span("s", span)})
        assert frame.span("s").tolist() == [[False, False, True, True, False]] * 2


@pytest.mark.parametrize(
    "span",
    [torch.tensor([2, 3]), torch.tensor([[2, 3], [2, 3]]), range(2, 4), torch.tensor([2, 3]).numpy()],
    ids=["tensor", "rows", "range", "array"],
)
def test_columns_may_come_as_numbers_of_any_kind(span: Any) -> None:
    assert frame_of([[True] * 5] * 2, 5, spans={"s": checked_span("s", span)}).span("s").nonzero().shape == (4, 2)


@pytest.mark.parametrize(
    "span",
    [3, "abc", [-1], [[1], [-2]], [1.5], [1, [2]], slice(-3, None), slice(5, 1, -1), torch.tensor([True, False]), None],
    ids=str,
)
def test_what_are_no_columns_is_refused_in_one_line(span: Any) -> None:
    with pytest.raises(InputError, match=r"span 'needle' is .*expected columns counted from 0") as error:
        checked_span("needle", span)
    assert "\n" not in str(error.value)


def test_a_span_for_another_number_of_rows_is_refused() -> None:
    with pytest.raises(InputError, match="span 's' has 2 rows, and the run has 3"):
        frame_of([[True] * 4] * 3, 4, spans={"s": [[0], [1]]}).span("s")


def test_a_span_that_was_not_given_is_refused_with_those_that_were() -> None:
    with pytest.raises(InputError, match=r"no span named 'needle'.*spans given: a, b.*pass spans=\{"):
        frame_of([[True]], 1, spans={"b": [0], "a": [0]}).in_scope("span:needle")


@pytest.mark.parametrize("scope", ["everything", "span:", "", None, 3])
def test_a_scope_that_does_not_exist_is_refused(scope: Any) -> None:
    with pytest.raises(InputError, match=r"is not one of all, prompt, decode, last, span:NAME"):
        check_scope(scope)


def test_negative_slices_are_refused() -> None:
    with pytest.raises(InputError, match="negative bound or step"):
        frame_of([[True] * 4], 4).select(slice(-2, None))


# -- masks as selectors, and reads -------------------------------------------------------------------------------------


def test_a_mask_of_the_prompt_names_no_decoded_column() -> None:
    frame = frame_of([[True] * 6] * 2, prompt=4)
    mask = torch.tensor([[True, False, True, False]])
    chosen = frame.select(mask)
    assert chosen is not None
    assert chosen.tolist() == [[True, False, True, False, False, False]] * 2


def test_without_a_mask_everything_is_attended() -> None:
    frame = Frame(0, 4, 2, CPU, None, prompt=4)
    assert frame.first.tolist() == [0, 0]
    assert frame.prompt_end.tolist() == [3, 3]


def test_last_is_the_last_attended_token_only_unless_something_is_being_generated() -> None:
    rows = [[False, True, True, True], [True, True, True, True]]
    plain, generating = (frame_of(rows, 3, generating=flag).in_scope("last") for flag in (False, True))
    assert plain is not None
    assert generating is not None
    assert plain.tolist() == [[False, False, True, False]] * 2
    assert generating.tolist() == [[False, False, True, True]] * 2


@given(sequences(), st.lists(st.integers(-3, 8), min_size=1, max_size=3))
def test_located_queries_are_the_columns_asked_for(case: tuple[list[list[bool]], int], positions: list[int]) -> None:
    rows, prompt = case
    frame = frame_of(rows, prompt)
    ends = [max(c for c in range(prompt) if row[c]) for row in rows]
    wanted = [[p if p >= 0 else end + 1 + p for p in positions] for end in ends]
    inside = [[0 <= column < frame.total for column in row] for row in wanted]
    if any(flags != inside[0] for flags in inside):
        with pytest.raises(Refusal, match="read row by row"):
            locate_queries(frame, positions)
        return
    found = locate_queries(frame, positions)
    if not any(inside[0]):
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == [[c for c, held in zip(row, inside[0], strict=True) if held] for row in wanted]


def test_what_a_word_names_is_told_once_for_all_layers_of_a_forward() -> None:
    rows = [[False, True, True, True], [True, True, True, True]]
    frame, following = frame_of(rows, 3), frame_of(rows, 3)
    found = locate_queries(frame, "last")
    assert found is not None
    assert locate_queries(frame, "last") is found
    assert frame.in_scope("last") is frame.select("last")
    assert locate_queries(following, "last") is not found


def test_what_was_told_in_inference_mode_may_meet_a_graph_later() -> None:
    frame = frame_of([[True] * 4] * 2, 4)
    with torch.inference_mode():
        kept = [frame.in_scope("last"), frame.select(Columns(("last",))), locate_queries(frame, "last")]
    assert not any(each is None or each.is_inference() for each in kept)


def test_all_positions_are_all_queries() -> None:
    frame = frame_of([[True] * 4] * 2, 4)
    found = locate_queries(frame, "all")
    assert found is not None
    assert found.tolist() == [[0, 1, 2, 3]] * 2


def test_a_selector_with_unlike_counts_is_refused_for_reads() -> None:
    frame = frame_of([[True] * 4] * 2, 4, spans={"s": [[0], [1, 2]]})
    with pytest.raises(Refusal, match=r"selects \[1, 2\] positions"):
        locate_queries(frame, "span:s")


def columns(mask: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_what_a_plain_run_will_never_come_to_is_refused_and_a_prompt_in_pieces_is_waited_for() -> None:
    plain, piece = frame_of([[True] * 4], 4, generating=False), frame_of([[True] * 4], 6, generating=False)
    for frame in (plain, piece):
        assert frame.select([3]) is not None
    with pytest.raises(InputError, match="position 5 lies beyond the run, which has 4 columns"):
        plain.select([5])
    chosen = piece.select([5])
    assert chosen is not None
    assert not chosen.any()


def test_positions_past_the_sequence_choose_nothing_yet() -> None:
    frame = frame_of([[True] * 4], 4)
    chosen = frame.select([2, 7])
    assert chosen is not None
    assert columns(chosen) == [[2]]
    assert locate_queries(frame, [7]) is None
