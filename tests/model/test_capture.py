"""What a reading brings back of whole runs: joined over the steps of `generate`, under names, and nothing unasked."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, NotFired
from headwise.model import read

close = torch.testing.assert_close
NEW = 6


def attached(name: str, **options: Any) -> tuple[hw.AttachedModel, dict[str, Tensor]]:
    organism = zoo.build(name, **options)
    return hw.attach(organism.model, organism.tokenizer, example=organism.example), organism.example


def generate(model: hw.AttachedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    produced: Tensor = model.generate(**inputs, **options)
    return produced


@contextmanager
def entering(model: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """What every call of a module was given, by a plain torch hook."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        yield seen
    finally:
        handle.remove()


def at_once(produced: Tensor, example: dict[str, Tensor]) -> dict[str, Tensor]:
    """One uncached forward over all that `generate` saw: the prompt and every new token but the last."""
    ids = produced[:, :-1]
    given = example["attention_mask"]
    mask = torch.nn.functional.pad(given, (0, ids.shape[1] - given.shape[1]), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


# -- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-mistral", "tiny-gemma2", "tiny-gpt_oss"])
def test_steps_join_to_what_one_uncached_forward_gives(name: str, cache: str) -> None:
    model, example = attached(name)
    reads = [read.z(), read.q(), read.k(), read.v(), read.residual(), read.mlp(), read.final_scale(), read.write("L1")]
    with model.reading(*reads, read.rows(None), read.statistics(wanted=["entropy", "top1", "mean_distance"])) as got:
        produced = generate(model, example, **({} if cache == "dynamic" else {"cache_implementation": "static"}))
    whole = at_once(produced, example)
    eager = zoo.build(name, attn="eager").model
    with torch.no_grad():
        dense = eager(**whole, output_attentions=True).attentions
        with model.reading(*reads, read.statistics(wanted=["entropy", "top1", "mean_distance"])) as once:
            model(**whole, use_cache=False)
    alive, length = whole["attention_mask"].bool(), whole["input_ids"].shape[1]
    for layer in ("L0", "L1", "L2"):
        for one in reads:
            if layer in getattr(once, one.name):
                found, expected = getattr(got, one.name)[layer], getattr(once, one.name)[layer]
                assert found.shape == expected.shape, one.name
                close(found[alive], expected[alive], atol=2e-5, rtol=1e-4, msg=f"{one.name} {layer}")
        pattern = dense[int(layer[1:])].transpose(1, 2)[alive]
        rows = got.rows[layer].transpose(1, 2)[alive]
        close(rows[..., :length], pattern, atol=2e-5, rtol=1e-4)  # by column of the sequence, window or not
        assert not rows[..., length:].any()  # the empty end of a static cache
        for what in ("entropy", "top1", "mean_distance"):
            found, expected = getattr(got.statistics[layer], what), getattr(once.statistics[layer], what)
            close(found.transpose(1, 2)[alive], expected.transpose(1, 2)[alive], atol=1e-4, rtol=1e-3)


def test_a_sliding_cache_has_let_its_first_columns_go() -> None:
    """The case that the test above has to align: in decode steps the kernel sees the last keys only."""
    model, example = attached("tiny-mistral")
    with model.reading(read.rows("L1")) as got:
        generate(model, example)
    last = got.rows.pieces("L1")[-1]
    assert last.shape == (2, 4, 1, 32 + NEW - 1)
    assert not last[..., : 32 + NEW - 1 - model.model.config.sliding_window].any()
    close(last.sum(-1), torch.ones(2, 4, 1))


def test_steps_have_growing_keys_and_pieces_give_them_one_by_one() -> None:
    model, example = attached("tiny-llama")
    with model.reading(read.rows("L1"), read.scores("L1"), read.z("L1"), read.k("L1")) as got:
        generate(model, example)
    pieces = got.rows.pieces("L1")
    assert [tuple(piece.shape[2:]) for piece in pieces] == [(32, 32), *((1, 33 + step) for step in range(NEW - 1))]
    joined = got.rows["L1"]
    assert joined.shape == (2, 4, 32 + NEW - 1, 32 + NEW - 1)
    assert torch.equal(joined[:, :, 33, :34], pieces[2][:, :, 0])
    assert not joined[:, :, 33, 34:].any()
    assert torch.isneginf(got.scores["L1"][:, :, 33, 34:]).all()
    assert torch.equal(torch.cat(got.z.pieces("L1"), dim=1), got.z["L1"])
    assert [piece.shape[1] for piece in got.k.pieces("L1")] == [32] + [1] * (NEW - 1)


def test_queries_across_steps() -> None:
    model, example = attached("tiny-llama")
    rows = (read.rows("L1"), read.rows("L1", queries="last", name="lasts"))
    two, decoded = read.rows("L1", queries=[35, 4], name="two"), read.z("L1", queries="decode", name="decoded")
    with model.reading(*rows, two, decoded, read.z("L1")) as got:
        generate(model, example)
    assert torch.equal(got.lasts["L1"], got.rows["L1"][:, :, 31:])  # where a token is predicted from
    assert torch.equal(got.two["L1"], got.rows["L1"][:, :, [4, 35], :36])  # in the order of the steps
    assert torch.equal(got.decoded["L1"], got.z["L1"][:, 32:])
    fired = {entry.what: (entry.calls, entry.positions) for entry in got.fired if entry.site == "L1"}
    assert fired["read.decoded"] == (NEW, 2 * (NEW - 1))
    assert fired["read.two"] == (NEW, 4)


def test_beams_are_read_as_the_rows_that_ran() -> None:
    model, example = attached("tiny-llama")
    with entering(model.model, "model.layers.1.self_attn.o_proj") as seen, model.reading(read.z("L1")) as got:
        generate(model, example, num_beams=3)
    assert [piece.shape[0] for piece in got.z.pieces("L1")] == [len(step) for step in seen]
    for piece, step in zip(got.z.pieces("L1"), seen, strict=True):
        assert torch.equal(piece.flatten(2), step)
    assert got.z["L1"].shape[:2] == (6, 32 + NEW - 1)


@pytest.mark.parametrize(
    ("name", "decoder"), [("tiny-bart", "model.decoder"), ("tiny-t5", "decoder"), ("tiny-whisper", "model.decoder")]
)
def test_an_encoder_is_read_once_and_cross_keys_with_it(name: str, decoder: str) -> None:
    model, example = attached(name)
    inputs = {key: value for key, value in example.items() if not key.startswith("decoder")}
    path = model.site("L1").projection
    assert path is not None
    reads = [read.z(), read.k("cross.L1"), read.rows("cross.L1"), read.rows("L1", name="own")]
    tokens: list[Tensor] = []  # whisper returns fewer than its decoder was given
    handle = model.model.get_submodule(decoder).register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"]), with_kwargs=True
    )
    with entering(model.model, path) as seen, model.reading(*reads) as got:
        generate(model, inputs)
    handle.remove()
    source = got.z["encoder.L1"].shape[1]
    assert len(got.z.pieces("encoder.L1")) == 1
    assert got.k["cross.L1"].shape[1] == source
    assert torch.equal(got.z["L1"].flatten(2), torch.cat(seen, dim=1))
    length = got.z["L1"].shape[1]
    assert got.rows["cross.L1"].shape == (2, 4, length, source)

    eager = zoo.build(name, attn="eager").model
    with torch.no_grad():
        dense = eager(**inputs, decoder_input_ids=torch.cat(tokens, dim=1), output_attentions=True)
    close(got.rows["cross.L1"], dense.cross_attentions[1], atol=1e-5, rtol=1e-4)
    close(got.own["L1"], dense.decoder_attentions[1], atol=1e-5, rtol=1e-4)


# -- what is kept -------------------------------------------------------------------------------------------------


def test_reduce_is_applied_to_each_call_and_its_results_are_listed() -> None:
    model, example = attached("tiny-llama")
    norm = read.z("L1", reduce=lambda z: z.norm(dim=-1).mean(dim=1), name="norm")
    largest = read.statistics("L1H2", reduce=lambda found: float(found.max.nan_to_num().amax()))
    with model.reading(norm, largest, read.z("L1")) as got:
        generate(model, example)
    expected = [piece.norm(dim=-1).mean(dim=1) for piece in got.z.pieces("L1")]
    assert len(got.norm["L1"]) == NEW
    for found, wanted in zip(got.norm["L1"], expected, strict=True):
        assert torch.equal(found, wanted)
    assert all(isinstance(value, float) for value in got.statistics["L1"])
    with pytest.raises(KeyError, match="'L1H2' was not read as z; there is L1"):
        got.norm["L1H2"]


def live_bytes() -> int:
    gc.collect()
    # Not those of graphs that other tests compiled, which have no memory of their own, nor sparse ones of packages.
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and type(thing) is not FakeTensor]
    tensors = [tensor for tensor in found if tensor.layout is torch.strided]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(
    ("one", "size"),
    [
        (read.z("L1"), 4 * 12),
        (read.z("L1H3"), 12),
        (read.z("L1", queries=[-1]), 4 * 12 / 32),
        (read.z("L1", reduce=lambda z: z[:, -1]), 4 * 12 / 32),  # a view is cut loose from what it is a view of
        (read.v("L1"), 2 * 12),
        (read.rows("L1H0", queries=[-1]), 1),
        (read.rows("L1", queries=[-1], reduce=lambda rows: rows[..., :1]), 4 / 32),
        (read.residual("L1"), 32),
    ],
)
def test_memory_holds_what_was_asked_for_and_not_a_byte_more(one: read.Read, size: float) -> None:
    """`size` is numbers per row and position; everything else that the forward made is gone."""
    model, example = attached("tiny-llama")
    with torch.no_grad(), model.reading(one) as got:
        model(**example, use_cache=False)
        before = live_bytes()
        got.captures[one.name].clear()
        held = before - live_bytes()
    assert held == 4 * 2 * 32 * size
    del got


@pytest.mark.parametrize("make", [read.k, read.v])
def test_keys_of_a_step_do_not_keep_the_cache_alive(make: Any) -> None:
    model, example = attached("tiny-llama")
    with model.reading(make("L1", name="kept")) as got:
        generate(model, example)
    for piece in got.kept.pieces("L1"):
        assert piece.untyped_storage().nbytes() == piece.nbytes


def test_no_tensor_of_an_unread_site_outlives_the_forward() -> None:
    model, example = attached("tiny-llama")
    seen: list[Any] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
        for name, module in model.model.named_modules()
        if name.endswith("_proj")
    ]
    with torch.no_grad(), model.reading(read.z("L1H0"), read.rows("L2H1", queries="last")) as got:
        model(**example, use_cache=False)
        gc.collect()
        assert len(seen) == 3 * 7
        assert not [reference for reference in seen if reference() is not None]
    assert list(got.z) == ["L1"]
    for handle in handles:
        handle.remove()


def test_only_the_latest_run_is_kept() -> None:
    model, example = attached("tiny-llama")
    other = {name: value[:1] for name, value in example.items()}
    with torch.no_grad(), model.reading(read.z("L1")) as got:
        model(**example)
        first = got.z["L1"]
        model(**other)
        assert got.z["L1"].shape[0] == 1
        assert [entry.calls for entry in got.fired] == [1]
        close(got.z["L1"], first[:1], atol=1e-6, rtol=1e-5)
        generate(model, example)
        assert got.z["L1"].shape[:2] == (2, 32 + NEW - 1)
        model(**example)  # fewer steps than before: none of the old ones stays
    assert torch.equal(got.z["L1"], first)


# -- names --------------------------------------------------------------------------------------------------------


def test_reads_are_found_by_name_site_and_head() -> None:
    model, example = attached("tiny-llama")
    reads = (read.z("L1H3 L1H0 L2"), read.k("L1"), read.mlp("L0"), read.rows("L1H2"), read.z("L0 L1", name="all"))
    with torch.no_grad(), model.reading(*reads) as got:
        model(**example)
    assert list(got.z) == ["L1", "L2"]
    assert list(got.all) == ["L0", "L1"]
    assert got.z["L1"].shape == (2, 32, 2, 12)
    assert torch.equal(got.z["L1H3"], got.all["L1"][:, :, 3])
    place = got.z.heads_at(hw.SiteId.parse("L1")).index(3)
    assert torch.equal(got.z["L1H3"], got.z["L1"][:, :, place])
    assert torch.equal(got.z[hw.SiteId.parse("L1")], got.z["L1"])
    assert torch.equal(got.rows["L1H2"], got.rows["L1"][:, 0])
    assert torch.equal(got.k["L1G1"], got.k["L1"][:, :, 1])
    for wrong, label in [
        (got.z, "L1H1"),  # not asked for
        (got.z, "L0"),
        (got.z, "L1G0"),  # z is of heads
        (got.k, "L1H1"),  # keys are of groups: head 1 has those of group 0
        (got.mlp, "L0H0"),
        (got.z, "nonsense"),
        (got.z, hw.SiteId.parse("L0")),
    ]:
        with pytest.raises(KeyError, match=f"was not read as {wrong.variable}; there is L"):
            wrong[label]
    with pytest.raises(AttributeError, match="nothing named 'q' was asked for; there is z, k, mlp, rows, all"):
        _ = got.q


def test_names_that_clash_are_refused_and_nothing_stays_open() -> None:
    model, example = attached("tiny-llama")
    with pytest.raises(InputError, match="two reads are named 'z'; give one of them name="):  # noqa: SIM117
        with model.reading(read.z("L0"), read.z("L1")):
            pass
    with torch.no_grad(), model.reading(read.z("L0"), read.z("L1", name="upper")) as got:
        model(**example)
    assert got.upper["L1"].shape == got.z["L0"].shape


def test_before_a_run_and_outside_of_its_positions_it_is_said_that_there_is_nothing() -> None:
    model, example = attached("tiny-llama")
    with torch.no_grad(), model.reading(read.z("L1"), read.z("L1", queries=[40], name="beyond")) as got:
        with pytest.raises(NotFired, match="L1 has no z value: nothing has run yet"):
            got.z["L1"]
        generate(model, example)  # it might have come to column 40
        with pytest.raises(NotFired, match=r"L1 has no z value: .*the run held none of its positions"):
            got.beyond["L1"]


# -- nesting ------------------------------------------------------------------------------------------------------


def test_a_reading_under_edits_sees_what_the_model_used() -> None:
    model, example = attached("tiny-llama")
    path = "model.layers.1.self_attn.o_proj"
    edits = (hw.edit.scale("L1H1", 3.0), hw.edit.uniform("L1H2"), hw.edit.scale("L1G1", 0.5, variable="v"))
    with torch.no_grad(), model.reading(read.z("L1")) as plain:
        model(**example)
    with (
        torch.no_grad(),
        entering(model.model, path) as used,
        model.editing(edits[0], edits[2]),
        model.editing(edits[1]),
        model.reading(read.z("L1"), read.rows("L1"), read.v("L1")) as got,
    ):
        model(**example)
    assert torch.equal(got.z["L1"].flatten(2), used[0])
    close(got.z["L1H1"], 3 * plain.z["L1H1"])
    visible = torch.tril(torch.ones(32, 32))
    close(got.rows["L1H2"][0], visible / visible.sum(-1, keepdim=True))
    close(got.z["L1H2"][0], got.rows["L1H2"][0] @ got.v["L1G1"][0], atol=1e-6, rtol=1e-5)


def test_an_outer_reading_keeps_its_values_while_inner_blocks_open_and_close() -> None:
    model, example = attached("tiny-llama")
    with torch.no_grad(), model.reading(read.z("L1")) as outer:
        model(**example)
        first = outer.z["L1"]
        with model.editing(hw.edit.zero("L1H0")):
            assert outer.z["L1"] is not None
            model(**example)
            assert not outer.z["L1H0"].any()
        assert not outer.z["L1H0"].any()
        assert torch.equal(outer.z["L1"][:, :, 1:], first[:, :, 1:])
        with pytest.raises(InputError), model.reading(read.z("L9")):
            pass
        model(**example)
    assert torch.equal(outer.z["L1"], first)


# -- as a donor ---------------------------------------------------------------------------------------------------


def test_a_donor_that_does_not_say_its_positions_is_refused() -> None:
    model, example = attached("tiny-llama")
    with torch.no_grad(), model.reading(read.z("L1", queries=[-1]), read.z("L1", reduce=len, name="length")) as donor:
        model(**example)
    for source in (donor.z, donor.length):
        with pytest.raises(InputError, match="the donor was read with queries= or reduce="):  # noqa: SIM117
            with model.editing(hw.edit.patch("L1H0", source, queries=[0])):
                model(**example)


def test_a_patched_pattern_is_what_a_narrow_read_sees() -> None:
    model, example = attached("tiny-mistral")
    swapped = {**example, "input_ids": example["input_ids"].flip(0)}
    with torch.no_grad(), model.reading(read.rows("L1")) as donor:
        model(**swapped)
    edits = (hw.edit.patch("L1H2", donor.rows, variable="pattern"), hw.edit.uniform("L1H1", rows=[0]))
    reads = (read.rows("L1", queries=[-1]), read.rows("L1", name="all"))
    with torch.no_grad(), model.editing(*edits) as edited, model.reading(*reads) as got:
        model(**example)
    close(got.rows["L1"], got.all["L1"][:, :, -1:])
    close(got.rows["L1H2"][:, 0], donor.rows["L1H2"][:, -1])
    close(got.rows["L1H1"][0, 0, -8:], torch.full((8,), 1 / 8))  # the window
    assert got.rows["L1H1"][1].max() > 0.15
    assert [entry.positions for entry in edited.fired] == [64, 32]


def test_rows_of_a_sliding_cache_are_donated_by_column() -> None:
    model, example = attached("tiny-mistral")
    with model.reading(read.rows("L1"), read.z("L2")) as donor:
        produced = generate(model, example)
    patch = hw.edit.patch("L1", donor.rows, variable="pattern")
    with model.editing(patch), model.reading(read.rows("L1"), read.z("L2")) as got:
        again = generate(model, example)
    assert torch.equal(produced, again)
    close(got.rows["L1"], donor.rows["L1"])
    close(got.z["L2"], donor.z["L2"], atol=1e-5, rtol=1e-4)
