"""Where the tokens of pictures stand, and what they look at, in the layouts of LLaVA, Qwen-VL, Gemma 3 and Idefics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import headwise as hw
from headwise import zoo
from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.probes.encoding import ItemSet, encode
from headwise.probes.item import Item, Message, Passage, Quote
from headwise.probes.layout import picture_reader, spans_in
from headwise.probes.outcome import observe
from headwise.probes.picture import Picture, Region
from headwise.sweep.knockout import KnockOut
from headwise.sweep.measuring import measure_sets

MODELS = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "smolvlm")


def picture(height: int, width: int, seed: int = 0) -> Picture:
    return Picture.drawn(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with hw.load(f"zoo:tiny-{request.param}") as loaded:
        yield loaded


def two_pictures() -> Item:
    passage = Passage().add("Look at <image>").add(" and").add(" <image>").add(" now say", "question")
    left = Region(0, (0, 0, 20, 24))
    return passage.item(
        " yes", foils=(" no",), pictures=(picture(24, 40), picture(16, 16, 1)), regions={"left": left}
    ).named("test")


def one_picture() -> Item:
    passage = Passage().add("<image>").add(" see this", "question")
    return passage.item(
        " red", foils=(" blue",), pictures=(picture(32, 32, 2),), regions={"left": Region(0, (0, 0, 16, 32))}
    ).named("test")


@pytest.fixture
def items(model: AttachedModel) -> ItemSet:
    return encode([two_pictures(), one_picture()], model)


def test_spans_are_the_tokens_they_name(model: AttachedModel, items: ItemSet) -> None:
    tokenizer, token = model.tokenizer, items.reader.token  # type: ignore[union-attr]
    for each in items:
        ids = torch.tensor(each.prompt)
        (question,) = each.spans["question"]
        assert tokenizer.decode(ids[list(question)]).strip() == (
            "now say" if len(each.item.pictures) == 2 else "see this"
        )
        of_pictures = [at for place in each.spans["image"] for at in place]
        assert of_pictures == (ids == token).nonzero()[:, 0].tolist()
        assert [each.spans[f"image:{n}"] for n in range(len(each.item.pictures))] == [(p,) for p in each.spans["image"]]
        (text,), (special,) = each.spans["text"], each.spans["special"]
        assert sorted([*of_pictures, *text, *special]) == list(range(len(ids)))
        words = "Look at  and  now say" if len(each.item.pictures) == 2 else " see this"
        assert tokenizer.decode(ids[list(text)]) == words


def test_a_prompt_is_what_the_processor_writes(model: AttachedModel, items: ItemSet) -> None:
    reader = items.reader
    assert reader is not None
    for each in items:
        text = reader.text(str(each.item.prompt))
        images = [p.image() for p in each.item.pictures]
        given = model.processor(text=[text], images=[images], return_tensors="pt")
        assert tuple(given["input_ids"][0].tolist()) == each.prompt
        for name, value in each.pixels.items():
            assert torch.equal(given[name], value)


def test_batches_equal_single_runs(model: AttachedModel, items: ItemSet) -> None:
    """Rows of other lengths, padded on the left, with other numbers of pictures of other sizes."""
    together = hw.measure(model, items, "logit-difference")
    for place in range(len(items)):
        alone = items.only([n == place for n in range(len(items))], "one")
        torch.testing.assert_close(
            hw.measure(model, alone, "logit-difference"), together[[place]], atol=2e-5, rtol=1e-5
        )


def test_a_run_is_the_model_s_own(model: AttachedModel, items: ItemSet) -> None:
    reader, first = items.reader, items.items[0]
    assert reader is not None
    images = [p.image() for p in first.item.pictures]
    text = reader.text(str(first.item.prompt))
    with torch.no_grad():
        own = model.model(**model.processor(text=[text], images=[images], return_tensors="pt")).logits[0, -1]
    outcome = observe(model, next(items.batches(1)), wants={"logits"})
    assert outcome.logits is not None
    torch.testing.assert_close(outcome.logits[0, 0], own.float(), atol=1e-6, rtol=0)


def test_pictures_matter_and_each_row_has_its_own(model: AttachedModel) -> None:
    def asked(seed: int) -> Item:
        return Passage().add("<image> so?").item(" a", foils=(" b",), pictures=(picture(16, 16, seed),)).named("t")

    def scored(seeds: tuple[int, ...]) -> torch.Tensor:
        return hw.measure(model, encode([asked(seed) for seed in seeds], model), "logit-difference")

    both = scored((0, 1))
    assert both[0] != both[1]
    torch.testing.assert_close(scored((1, 0)), both.flip(0), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("scope", ["all", "last", "span:image", "span:region:left"])
def test_knock_outs_of_many_sets_agree_with_one_by_one(model: AttachedModel, items: ItemSet, scope: str) -> None:
    sets = [hw.HeadSet.parse("L0H1"), hw.HeadSet.parse("L1H2, L2H0")]
    fast = measure_sets(model, items, sets, KnockOut(scope=scope), "logit-difference")
    for place, heads in enumerate(sets):
        slow = hw.measure(model, items, "logit-difference", edits=[hw.edit.zero(heads, scope=scope)])
        torch.testing.assert_close(fast[place], slow.double(), atol=2e-5, rtol=1e-5)
    assert (fast[0] != hw.measure(model, items, "logit-difference")).any()


def test_knock_outs_on_a_text_without_pictures(model: AttachedModel) -> None:
    """The tower does not run then, neither in the clean run nor in those that begin behind it."""
    texts = [Passage().add(text).item(" a", foils=(" b",)).named("t") for text in ("one two one", "up and")]
    items, heads = encode(texts, model), hw.HeadSet.parse("L1H2")
    sets = [hw.HeadSet.parse("L0H1"), heads]
    fast = measure_sets(model, items, sets, KnockOut(), "logit-difference")
    slow = hw.measure(model, items, "logit-difference", edits=[hw.edit.zero(heads)])
    torch.testing.assert_close(fast[1], slow.double(), atol=2e-5, rtol=1e-5)


def test_generation_sees_the_pictures(model: AttachedModel, items: ItemSet) -> None:
    together = observe(model, next(items.batches(2)), wants={"generation"}, new_tokens=4).generated
    assert together is not None
    for place, batch in enumerate(items.batches(1)):
        alone = observe(model, batch, wants={"generation"}, new_tokens=4).generated
        assert alone is not None
        assert alone[0].tolist() == together[place, : alone.shape[1]].tolist()


def test_a_conversation_with_pictures(model: AttachedModel) -> None:
    item = Item(
        prompt=(Message("user", "<image>What is it?"),),
        answer=" red",
        pictures=(picture(16, 16),),
        spans={"question": (Quote("What is it?"),)},
    ).named("chat")
    (encoded,) = encode([item], model)
    (question,) = encoded.spans["question"]
    assert model.tokenizer.decode([encoded.prompt[at] for at in question]) == "What is it?"
    assert len(encoded.spans["image"]) == 1


def test_a_prompt_of_one_s_own(model: AttachedModel, items: ItemSet) -> None:
    first = items.items[0]
    spans = spans_in(model.processor, str(first.item.prompt), first.item.pictures, first.item.regions)
    for name in ("image", "image:1", "region:left", "text", "special"):
        assert spans[name] == [[at for place in first.spans[name] for at in place]]


def test_runs_find_the_pictures_themselves(model: AttachedModel, items: ItemSet) -> None:
    """A block of scores on `span:image` needs no spans; it is the same as with them given, in prompt and decoding."""
    batch = next(items.batches(2, answers=False))
    given = {name: rows for name, rows in batch.spans.items() if name == "image"}
    bias = hw.edit.block("L1", keys="span:image")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.pixels}
    reader = items.reader
    assert reader is not None
    if reader.types:
        inputs[reader.types] = (batch.input_ids == reader.token).long()
    fill = model.tokenizer.pad_token_id
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": fill, "eos_token_id": None}
    plain = model.generate(**inputs, **asked, return_dict_in_generate=True, output_logits=True)
    with model.editing(bias, spans=given):
        told = model.generate(**inputs, **asked, return_dict_in_generate=True, output_logits=True)
    with model.editing(bias) as block:
        found = model.generate(**inputs, **asked, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(torch.stack(told.logits), torch.stack(found.logits))
    assert not torch.equal(torch.stack(plain.logits), torch.stack(found.logits))
    assert all(fired.calls >= 3 for fired in block.fired)


@pytest.mark.parametrize("size", [4, 20])
def test_a_prompt_in_pieces_has_the_same_pictures(size: int) -> None:
    with hw.load("zoo:tiny-llava") as loaded:
        asked = {**loaded.example, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        plain = loaded.generate(**asked)
        with loaded.editing(hw.edit.block("L0H0, L1H1, L2H1", keys="span:image")):
            whole, pieces = loaded.generate(**asked), loaded.generate(**asked, prefill_chunk_size=size)
    assert torch.equal(whole, pieces)
    assert not torch.equal(whole, plain)


def test_pictures_of_an_earlier_run_are_not_left_out_in_silence() -> None:
    """A second turn, with a picture in the cache of the first one, has no `image` of its own alone."""
    with hw.load("zoo:tiny-llava") as loaded:
        turn = {name: value[:1] for name, value in loaded.example.items()}
        cache = DynamicCache(config=loaded.model.config)
        with torch.no_grad():
            loaded(**turn, past_key_values=cache, use_cache=True)
        ids = torch.cat([turn["input_ids"]] * 2, dim=1)
        with (
            pytest.raises(InputError, match="its tokens hold no picture"),
            loaded.editing(hw.edit.block("L0H0", keys="span:image")),
        ):
            loaded.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=turn["pixel_values"],
                past_key_values=cache,
                max_new_tokens=1,
            )


def test_a_text_alone_has_no_image(model: AttachedModel) -> None:
    with (
        pytest.raises(InputError, match="its tokens hold no picture"),
        model.editing(hw.edit.block("L1", keys="span:image")),
    ):
        model(**model.tokenizer(["only words"], return_tensors="pt"))


# -- what each layout makes of a picture ---


def cells(name: str, image: Picture) -> torch.Tensor:
    with hw.load(f"zoo:tiny-{name}") as loaded:
        return picture_reader(loaded.processor).cells(image)


def test_llava_cuts_the_sides_off() -> None:
    """40 x 24 to 16 x 16: the shorter side becomes 16, so the middle 24 columns are seen, in cells of 6 x 6 pixels."""
    found = cells("llava", picture(24, 40))
    assert found.shape == (16, 4)
    assert found[0].tolist() == [8, 0, 14, 6]
    assert found[-1].tolist() == [26, 18, 32, 24]


def test_qwen_keeps_the_shape() -> None:
    """40 x 24 pixels are 10 x 6 patches of 4, two by two: 5 x 3 tokens of 8 pixels, row by row."""
    found = cells("qwen2_vl", picture(24, 40))
    assert found.shape == (15, 4)
    assert found[0].tolist() == [0, 0, 8, 8]
    assert found[4].tolist() == [32, 0, 40, 8]
    assert found[5].tolist() == [0, 8, 8, 16]


def test_gemma_squeezes() -> None:
    assert cells("gemma3", picture(24, 40)).tolist() == [
        [0, 0, 20, 12],
        [20, 0, 40, 12],
        [0, 12, 20, 24],
        [20, 12, 40, 24],
    ]


def test_idefics_tiles_and_then_all() -> None:
    """A picture of 32 x 32 in four tiles of 2 x 2 tokens, and once more as a whole."""
    found = cells("idefics3", picture(32, 32))
    assert found.shape == (20, 4)
    assert found[:4].tolist() == [[0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]]
    assert found[4].tolist() == [16, 0, 24, 8]  # the tile to the right
    assert found[8].tolist() == [0, 16, 8, 24]  # the one below
    assert found[16:].tolist() == [[0, 0, 16, 16], [16, 0, 32, 16], [0, 16, 16, 32], [16, 16, 32, 32]]


def test_a_region_between_the_tokens(model: AttachedModel) -> None:
    item = Passage().add("<image>").item(" a", pictures=(picture(32, 32),), regions={"dot": Region(0, (0, 0, 1, 1))})
    with pytest.raises(InputError, match="holds the middle of no token"):
        encode([item.named("t")], model)


# -- what cannot be ---


def test_a_model_without_eyes() -> None:
    with (
        hw.load("zoo:tiny-llama") as loaded,
        pytest.raises(Refusal, match="it has pictures, and the model has no processor"),
    ):
        encode([two_pictures()], loaded)


def test_a_processor_without_marks() -> None:
    class Deaf:
        """Prepares pictures and text apart, as CLIP's does."""

        tokenizer, image_processor = object(), object()

    with pytest.raises(Refusal, match="Deaf writes no pictures into a text: it has no image token"):
        picture_reader(Deaf())


def test_a_forgotten_picture_is_told() -> None:
    item = Item(prompt="<image> so?", answer=" a").named("t")
    with hw.load("zoo:tiny-llava") as loaded, pytest.raises(InputError, match="the item no picture; add pictures"):
        encode([item], loaded)


def test_deciding_without_one_picture_of_two_is_refused() -> None:
    def even(last: torch.Tensor, lacking: torch.Tensor, here: object) -> torch.Tensor:
        return torch.ones(last.shape[:2])

    with hw.load("zoo:tiny-llava") as loaded:
        first = encode([two_pictures()], loaded)
        batch = next(first.batches(1))
        one = hw.edit.scale("L1H0", hw.edit.decided(even, without="image:0"))
        with pytest.raises(Refusal, match="pictures are left in the prompt"), loaded.editing(one, spans=batch.spans):
            loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pixels)


def test_a_span_may_not_take_the_name_of_a_picture(model: AttachedModel) -> None:
    item = Passage().add("<image>").add(" word", "image").item(" a", pictures=(picture(16, 16),)).named("t")
    with pytest.raises(InputError, match="span 'image' is the name of tokens"):
        encode([item], model)


def test_twins_with_other_pictures(model: AttachedModel) -> None:
    one, other = picture(16, 16), picture(16, 16, 1)
    prompt = Passage().add("<image> so?")
    item = prompt.item(" a", twin=prompt, twin_answer=" b", pictures=(one,), twin_pictures=(other,)).named("t")
    items = encode([item], model)
    (each,) = items
    assert each.twin is not None
    assert each.twin.prompt == each.prompt
    assert items.twins().items[0].item.pictures == (other,)
    alone = encode([Passage().add("<image> so?").item(" b", pictures=(other,)).named("u")], model)
    torch.testing.assert_close(
        hw.measure(model, items.twins(), "answer-log-probability"), hw.measure(model, alone, "answer-log-probability")
    )
    same = prompt.item(" a", twin=prompt, twin_answer=" b", pictures=(one,), twin_pictures=(one,)).named("t")
    with pytest.raises(InputError, match="its twin is the same to this tokenizer"):
        encode([same], model)


def test_inputs_along_the_tokens_are_refused() -> None:
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    tokenizer = zoo.build("tiny-llava").tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    tokenizer.image_token = "<|image|>"
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<|image|>")
    small = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=2)
    with pytest.raises(Refusal, match="gives cross_attention_mask along the tokens"):
        picture_reader(MllamaProcessor(small, tokenizer))
