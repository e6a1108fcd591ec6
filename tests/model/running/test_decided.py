"""Numbers that the prompt decides: from z of the run and of a run without the picture, kept for what is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.model.operations import Here
from headwise.model.running.decided import with_markers
from headwise.zoo.tokens import IMAGE, IMAGE_END, IMAGE_START

MARKERS = (IMAGE_START, IMAGE_END)
SOME = "L0H1, L0H3, L2H0"


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "gemma3"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    organism = zoo.build(f"tiny-{request.param}")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as attached:
        yield attached


@pytest.fixture(scope="module")
def llava() -> Iterator[AttachedModel]:
    organism = zoo.build("tiny-llava")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as attached:
        yield attached


class Noting:
    """Chooses a number for each row and head, and keeps what it was shown."""

    def __init__(self, number: Callable[[Tensor], Tensor] = torch.ones_like) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.calls: list[str] = []
        self._number = number

    def __call__(self, last: Tensor, lacking: Tensor, here: Here) -> Tensor:
        self.seen[here.label] = last, lacking
        self.calls.append(here.label)
        return self._number(last[..., 0])


def main(model: AttachedModel) -> list[str]:
    return [site.label for site in model.sites if site.id.stack == model.table.stacks[0]]


def scaled(model: AttachedModel, choose: Any, scope: str = "last", heads: Any = None) -> hw.edit.Edit:
    return hw.edit.scale(heads or main(model), hw.edit.decided(choose, without="image", markers=MARKERS), scope=scope)


def last_z(model: AttachedModel, *edits: hw.edit.Edit, **inputs: Any) -> dict[str, Tensor]:
    with torch.no_grad(), model.reading(hw.read.z(main(model), queries=[-1])) as got:
        if edits:
            with model.editing(*edits):
                model(**inputs)
        else:
            model(**inputs)
    return {label: got.z[label][:, 0] for label in main(model)}


def bare(model: AttachedModel, row: int) -> Tensor:
    """The ids of one row without padding and picture."""
    ids = model.example["input_ids"][row][model.example["attention_mask"][row].bool()]
    return ids[~torch.isin(ids, torch.tensor([IMAGE, *MARKERS]))][None]


def number(rows: int, heads: int) -> Tensor:
    return 0.5 + torch.arange(rows * heads).reshape(rows, heads) % 3


def test_it_is_shown_the_run_and_a_run_of_the_text_alone(model: AttachedModel) -> None:
    noting = Noting()
    plain = last_z(model, **model.example)
    last_z(model, scaled(model, noting), **model.example)
    assert noting.calls == main(model)
    for row in range(2):  # the first is the longer one, the second is padded
        alone = last_z(model, input_ids=bare(model, row))
        for label, (last, lacking) in noting.seen.items():
            assert torch.allclose(last[row], plain[label][row], atol=1e-5)
            assert torch.allclose(lacking[row], alone[label][0], atol=1e-5), (label, row)
    assert any((last - lacking).abs().max() > 1e-3 for last, lacking in noting.seen.values())


def test_rows_of_the_text_alone_are_counted_from_their_first_token(llava: AttachedModel) -> None:
    """Rotary embeddings tell distances only, so what is handed on is looked at itself."""
    given: list[dict[str, Tensor]] = []
    watching = llava.model.register_forward_pre_hook(lambda *a: given.append(a[2]), with_kwargs=True)
    try:
        last_z(llava, scaled(llava, Noting()), **llava.example)
    finally:
        watching.remove()
    text = next(each for each in given if "pixel_values" not in each)
    mask, positions = text["attention_mask"].bool(), text["position_ids"]
    assert [int(row.sum()) for row in mask] == [bare(llava, row).shape[1] for row in range(2)]
    for row in range(2):
        assert positions[row][mask[row]].tolist() == list(range(int(mask[row].sum())))


def test_numbers_of_one_leave_every_bit(model: AttachedModel) -> None:
    with torch.no_grad():
        plain = model(**model.example).logits
        with model.editing(scaled(model, Noting())):
            assert torch.equal(model(**model.example).logits, plain)
        assert torch.equal(model(**model.example).logits, plain)


def test_the_numbers_are_factors_by_row_and_head(llava: AttachedModel) -> None:
    mixed = Noting(lambda like: number(*like.shape))
    per_row = [
        hw.edit.scale(f"{label}H{head}", float(number(2, 4)[row, head]), rows=[row], scope="last")
        for label in main(llava)
        for row in range(2)
        for head in range(4)
    ]
    decided = last_z(llava, scaled(llava, mixed), **llava.example)
    by_hand = last_z(llava, *per_row, **llava.example)
    for label in main(llava):
        assert torch.allclose(decided[label], by_hand[label], atol=1e-6)
        assert torch.allclose(mixed.seen[label][0] * number(2, 4)[..., None], decided[label], atol=1e-6)


def test_an_edit_of_an_earlier_layer_acts_on_the_run_and_not_on_the_one_without(llava: AttachedModel) -> None:
    strong, plain = Noting(lambda like: 3 * torch.ones_like(like)), Noting()
    last_z(llava, scaled(llava, strong), **llava.example)
    last_z(llava, scaled(llava, plain), **llava.example)
    assert torch.equal(strong.seen["L0"][0], plain.seen["L0"][0])
    assert (strong.seen["L1"][0] - plain.seen["L1"][0]).abs().max() > 1e-3
    assert all(torch.equal(strong.seen[label][1], plain.seen[label][1]) for label in main(llava))


def test_a_head_that_cannot_see_the_picture_is_the_same_without_it(llava: AttachedModel) -> None:
    """Nothing stands before the picture, so that what is behind it keeps its distances."""
    start = 2  # behind the start token and the marker
    ids, mask = llava.example["input_ids"][:1, start:], llava.example["attention_mask"][:1, start:]
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": llava.example["pixel_values"][:1]}
    blind, noting = hw.edit.block("L0H0, L0H1, L0H3", keys=edit_inside()), Noting()
    with (
        torch.no_grad(),
        llava.editing(blind, scaled(llava, noting), spans={"gone": slice(0, int((ids == IMAGE).sum()) + 1)}),
    ):
        llava(**inputs)
    moved = (noting.seen["L0"][0] - noting.seen["L0"][1]).norm(dim=-1)[0]
    assert moved[[0, 1, 3]].max() < 1e-5 < 1e-3 < moved[2]


def edit_inside() -> Any:
    return hw.edit.inside("span:gone")


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_written_has_the_numbers_of_the_prompt(llava: AttachedModel, cached: bool) -> None:
    noting, forwards = Noting(lambda like: number(*like.shape)), []
    counting = llava.model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    try:
        with llava.editing(scaled(llava, noting, heads=SOME)):
            written = llava.generate(
                **llava.example, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cached
            )
    finally:
        counting.remove()
    assert len(forwards) == 4 + 1  # one without the picture, and then what there is without all this
    assert noting.calls == ["L0", "L2"]
    ids, n = written[:, :-1], llava.example["input_ids"].shape[1]
    whole = dict(llava.example) | {
        "input_ids": ids,
        "attention_mask": torch.nn.functional.pad(llava.example["attention_mask"], (0, 3), value=1),
    }
    again = Noting(lambda like: number(*like.shape))
    with torch.no_grad(), llava.editing(scaled(llava, again, heads=SOME), prompt_length=n):
        positions = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = llava(**whole, position_ids=positions).logits
    assert torch.equal(logits[:, n - 1 :].argmax(-1), written[:, n:])
    for label, shown in noting.seen.items():  # what stands behind the prompt decides nothing
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(again.seen[label], shown, strict=True))


def test_a_step_that_is_only_multiplied_is_as_one_that_is_also_read(llava: AttachedModel) -> None:
    """Reads take the long way; what is multiplied and no more takes the short one."""

    def written() -> Tensor:
        found = llava.generate(
            **llava.example,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(found.logits)

    edit = scaled(llava, lambda last, lacking, here: number(*last.shape[:2]), heads=SOME)
    with llava.editing(edit):
        short = written()
    with llava.editing(edit), llava.reading(hw.read.z(SOME)):
        assert torch.equal(written(), short)
    assert not torch.allclose(written()[1:], short[1:], atol=1e-3)


def test_a_draft_by_the_model_s_first_layers_changes_nothing() -> None:
    """They decode before the model reads the prompt; greedily, what is written is as without a draft."""
    organism = zoo.build("tiny-llama")
    with hw.attach(organism.model, organism.tokenizer, example=organism.example) as llama:
        llama.model.generation_config.assistant_confidence_threshold = 0.0
        llama.model.generation_config.num_assistant_tokens = 4
        ids = torch.arange(5, 15)[None]
        decided = hw.edit.decided(lambda last, lacking, here: 3.0 * number(*last.shape[:2]), without="doc")

        def written(**options: Any) -> Tensor:
            found = llama.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
            return torch.stack(found.logits)

        with llama.editing(hw.edit.scale("L0H1, L0H2", decided, scope="last"), spans={"doc": [2, 3, 4]}):
            torch.testing.assert_close(written(assistant_early_exit=1), written(), atol=1e-4, rtol=1e-4)


def test_it_goes_with_beams_and_with_a_second_stream(llava: AttachedModel) -> None:
    alone = Noting()
    with torch.no_grad(), llava.editing(scaled(llava, alone)):
        llava(**llava.example)
    noting = Noting()
    with llava.editing(scaled(llava, noting)):
        llava.generate(**llava.example, max_new_tokens=2, num_beams=2, do_sample=False)
    assert torch.allclose(noting.seen["L1"][1][::2], alone.seen["L1"][1], atol=1e-5)
    beside = Noting(lambda like: number(*like.shape))
    with torch.no_grad(), llava.editing(scaled(llava, beside)), llava.dual(hw.edit.zero("L0H0")) as dual:
        first = llava(**llava.example).logits
    with torch.no_grad(), llava.editing(scaled(llava, Noting(lambda like: number(*like.shape)))):
        assert torch.allclose(llava(**llava.example).logits, first, atol=1e-5)
    assert dual.second is not None


def test_a_run_that_begins_behind_its_prompt_is_refused(llava: AttachedModel) -> None:
    with torch.no_grad():
        cache = llava(**llava.example, use_cache=True).past_key_values
        with pytest.raises(Refusal, match="decided by the prompt"), llava.editing(scaled(llava, Noting())):
            llava(input_ids=torch.full((2, 1), 20), past_key_values=cache)
        with pytest.raises(Refusal, match="decided by the prompt"), llava.editing(scaled(llava, Noting(), "decode")):
            llava.generate(**llava.example, max_new_tokens=3, min_new_tokens=3)


def test_what_cannot_be_meant_is_said(llava: AttachedModel) -> None:
    text = {name: llava.example[name][:, -6:] for name in ("input_ids", "attention_mask")}
    ends = {name: llava.example[name][:, :6] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        with pytest.raises(InputError, match="no span named 'image'"), llava.editing(scaled(llava, Noting())):
            llava(**text)
        with (
            pytest.raises(InputError, match="no token in this prompt"),
            llava.editing(scaled(llava, Noting()), spans={"image": []}),
        ):
            llava(**llava.example)
        with (
            pytest.raises(InputError, match="last token"),
            llava.editing(scaled(llava, Noting()), spans={"image": [4, 5]}),
        ):
            llava(**ends)
        wrong = Noting(lambda like: like[0])
        with pytest.raises(InputError, match="expected numbers"), llava.editing(scaled(llava, wrong)):
            llava(**llava.example)
        with (
            pytest.raises(Refusal, match="a part of the model does not run"),
            llava.editing(scaled(llava, Noting(), heads=["vision.L0H0"])),
        ):
            llava(**llava.example)
        plain = llava(**llava.example).logits  # what was raised in a run has left nothing behind
        with llava.editing(scaled(llava, Noting())):
            assert torch.equal(llava(**llava.example).logits, plain)
    with pytest.raises(InputError, match="by z after the gate"):
        hw.edit.scale("L0", hw.edit.decided(Noting(), without="image"), variable="q")
    with (
        pytest.raises(InputError, match="no such span"),
        llava.editing(hw.edit.scale("L0", hw.edit.decided(Noting(), without="nothing"))),
    ):
        pass


def test_markers_go_where_they_touch_the_span() -> None:
    ids = torch.tensor([[7, 1, 7, 6, 5, 5, 7, 2, 7]])
    span = ids == 5
    assert with_markers(ids, span, (6, 7)).tolist() == [[False, False, True, True, True, True, True, False, False]]
    assert torch.equal(with_markers(ids, span, ()), span)
