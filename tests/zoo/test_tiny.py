"""Every tiny model builds, runs, reaches all of its attention, and is rough enough for a wrong number to show."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from headwise import zoo
from headwise.catalogue import entries
from headwise.errors import InputError
from headwise.zoo.table import FEATURES, KINDS, TinyType
from headwise.zoo.tokens import VOCAB_SIZE

TYPES = {row.name: row for row in zoo.tiny_types()}
NAMES = [row.name for row in (*zoo.tiny_types(), *zoo.outside_registry())]
OUTSIDE = {row.name: row for row in zoo.outside_registry()}
ALL = TYPES | OUTSIDE

# Attention code that stands outside the registry in a model that otherwise uses it.
ELSEWHERE = {"tiny-siglip": ["vision_model.head.attention"]}

# LLaVA reads the last but one layer of its image tower, so nothing that happens in the last one is seen.
UNSEEN = {"tiny-llava": ["model.vision_tower.encoder.layers.2.self_attn"]}

# Parameters that a formula fills, without a draw: Mamba's decay rates, the sinusoidal positions of Whisper and FSMT,
# the ones that WavLM's gates start from.
FORMULA = ("mamba.A_log", "encoder.embed_positions.weight", "decoder.embed_positions.weight", "gru_rel_pos_const")

# These count positions from the first column unless told otherwise; TrOCR cannot be told.
COUNTS_PADDING = ("tiny-gpt2", "tiny-gpt_neo", "tiny-openai-gpt", "tiny-xglm")

Change = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def with_tag(*tags: str, among: Mapping[str, TinyType] = TYPES) -> list[str]:
    return [name for name, row in among.items() if row.tags & set(tags)]


@contextmanager
def seeing_calls(change_query: Change | None = None) -> Iterator[list[tuple[nn.Module, Tensor, Tensor, Tensor, dict]]]:
    """Module, q, k, v and options of every call of an attention function that the registry gave out."""
    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]]] = []
    look_up = AttentionInterface.get_interface

    def seen(self: AttentionInterface, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = look_up(self, implementation, default)

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
            calls.append((module, query, key, value, options))
            if change_query is not None:
                query = change_query(module, query, key, value, options)
            return function(module, query, key, value, *rest, **options)

        return attend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionInterface, "get_interface", seen)
        yield calls


def main_output(organism: zoo.Organism) -> Tensor:
    with torch.no_grad():
        output = organism.model(**organism.example)
    return next(output[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in output)


@pytest.mark.parametrize("name", NAMES)
def test_builds_small_and_runs_to_finite_outputs(name: str) -> None:
    organism = zoo.build(name)
    assert organism.name == name
    assert organism.model.config.model_type == ALL[name].model_type
    assert name.startswith(f"tiny-{organism.model.config.model_type}")
    assert type(organism.model).__name__ == ALL[name].classname
    assert not any(module.training for module in organism.model.modules())
    assert sum(parameter.numel() for parameter in organism.model.parameters()) < 500_000
    output = main_output(organism)
    assert output.isfinite().all()
    assert output.std() > 0.05


@pytest.mark.parametrize("name", TYPES)
def test_example_reaches_all_attention_through_the_registry(name: str) -> None:
    organism = zoo.build(name)
    with seeing_calls() as calls:
        main_output(organism)
    reached = {module for module, *_ in calls}

    def is_attention(module: nn.Module) -> bool:
        return "Attention" in type(module).__name__

    innermost = {
        path: module
        for path, module in organism.model.named_modules()
        if is_attention(module) and not any(is_attention(child) for child in list(module.modules())[1:])
    }
    missed = [path for path, module in innermost.items() if module not in reached]
    assert missed == ELSEWHERE.get(name, [])
    assert len(calls) >= len(reached) > 0


@pytest.mark.parametrize("name", OUTSIDE)
def test_types_outside_the_registry_never_ask_it(name: str) -> None:
    with seeing_calls() as calls:
        main_output(zoo.build(name))
    asking = {type(module).__name__ for module, *_ in calls}
    assert asking == ({"BigBirdPegasusDecoderAttention"} if name == "tiny-bigbird_pegasus" else set())


@pytest.mark.parametrize("name", TYPES)
def test_geometry_is_what_the_tags_say(name: str) -> None:
    tags = TYPES[name].tags
    assert tags <= set(KINDS) | set(FEATURES)
    assert len(tags & {"decoder", "encoder", "encoder-decoder", "vlm"}) == 1
    organism = zoo.build(name)
    with seeing_calls() as calls:
        main_output(organism)
    per_module = Counter(id(module) for module, *_ in calls)
    if "two-calls" in tags:
        assert set(per_module.values()) == {2}
    if "shared-layers" in tags:
        assert set(per_module.values()) == {3}
    heads = {(query.shape[1], key.shape[1]) for _, query, key, _, _ in calls}
    if tags & {"gqa"}:
        assert (4, 2) in heads
    if "mqa" in tags:
        assert (4, 1) in heads
    if "mha" in tags:
        assert all(n_heads == n_kv_heads for n_heads, n_kv_heads in heads)
    assert any(key.shape[3] != value.shape[3] for _, _, key, value, _ in calls) == ("mla" in tags)
    assert any(query.shape[2] != key.shape[2] for _, query, key, _, _ in calls) == ("cross" in tags)
    assert any(options.get("softcap") is not None for *_, options in calls) == ("softcap" in tags)
    assert any(options.get("s_aux") is not None for *_, options in calls) == ("sink" in tags)
    assert any(options.get("position_bias") is not None for *_, options in calls) == ("position-bias" in tags)
    assert all(max(key.shape[2] for _, _, key, _, _ in calls) >= 24 for _ in calls)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3", "tiny-mixtral", "tiny-gemma2", "tiny-gpt_oss", "tiny-t5"])
def test_heads_times_head_dim_is_not_the_hidden_size(name: str) -> None:
    organism = zoo.build(name)
    with seeing_calls() as calls:
        main_output(organism)
    assert all(query.shape[1] * query.shape[3] != organism.model.config.hidden_size for _, query, *_ in calls)


@pytest.mark.parametrize("name", TYPES)
def test_what_attention_looks_at_matters_at_every_module(name: str) -> None:
    organism = zoo.build(name)
    with seeing_calls() as calls:
        clean = main_output(organism)
    paths = {module: path for path, module in organism.model.named_modules()}
    for reached in {module: None for module, *_ in calls}:

        def attend_evenly(module: nn.Module, query: Tensor, *_: Any, reached: nn.Module = reached) -> Tensor:
            return query * 0 if module is reached else query

        with seeing_calls(attend_evenly):
            even = main_output(organism)
        change = float((even - clean).norm() / clean.norm())
        if paths[reached] in UNSEEN.get(name, []):
            assert change == 0
        else:
            assert change > 0.02, paths[reached]


@pytest.mark.parametrize("name", with_tag("window"))
def test_windows_are_shorter_than_the_example(name: str) -> None:
    organism = zoo.build(name)
    if name == "tiny-qwen2_5_vl":  # its windows are separate calls on a part of the image
        with seeing_calls() as calls:
            main_output(organism)
        lengths = Counter(key.shape[2] for module, _, key, _, _ in calls if key.shape[1] == 3)
        assert lengths == {16: 3, 8: 3, 48: 1, 24: 1}
        return
    clean = main_output(organism)
    text = organism.example["input_ids"].clone()
    text[0, 0] = 40
    ends_differ = []
    for window in (8, 512):
        parts = [
            organism.model.config,
            *(getattr(organism.model.config, key) for key in organism.model.config.sub_configs),
        ]
        for config in parts:
            if getattr(config, "sliding_window", None) is not None:
                config.sliding_window = window
            if name == "tiny-modernbert":
                config.local_attention = window
        again = main_output(organism)
        ends_differ.append(not torch.equal(again[0, -1], clean[0, -1]))
    assert ends_differ == [False, True]


def test_padding_is_on_the_side_the_kind_needs() -> None:
    for name, row in TYPES.items():
        mask = zoo.build(name).example.get("attention_mask")
        if mask is None:
            continue
        assert mask[0].all()
        assert not mask[1].all()
        assert bool(mask[1, -1]) == bool(row.tags & {"decoder", "vlm"}), name


@pytest.mark.parametrize("name", [name for name in with_tag("decoder", among=ALL) if name != "tiny-trocr"])
def test_the_padded_row_is_that_row_alone(name: str) -> None:
    organism = zoo.build(name)
    mask = organism.example["attention_mask"]
    real = mask[1].bool()
    if name in COUNTS_PADDING:
        organism.example["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = organism.model(input_ids=organism.example["input_ids"][1:, real]).logits[0]
    torch.testing.assert_close(main_output(organism)[1, real], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", with_tag("decoder", "vlm", "encoder-decoder", among=ALL))
def test_generates_from_the_example(name: str) -> None:
    organism = zoo.build(name)
    prompt = {key: value for key, value in organism.example.items() if not key.startswith("decoder_")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    written = organism.model.generate(**prompt, **options)[:, -4:]
    assert written.shape == (2, 4)
    assert organism.tokenizer is not None
    assert all(isinstance(text, str) for text in organism.tokenizer.batch_decode(written))
    assert int(written.max()) < VOCAB_SIZE


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_weights_and_nothing_else_is_drawn(name: str) -> None:
    torch.manual_seed(1)
    before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())
    first = zoo.build(name).model.state_dict()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())
    torch.manual_seed(2)
    again = zoo.build(name, seed=0).model.state_dict()
    other = zoo.build(name, seed=1).model.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    same = [
        key
        for key, _ in zoo.build(name).model.named_parameters()
        if torch.equal(first[key], other[key]) and not key.endswith(FORMULA)
    ]
    assert same == []


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_the_same_model_rounded(name: str) -> None:
    exact, rounded = zoo.build(name), zoo.build(name, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in rounded.example.values()} <= {torch.bfloat16, torch.int64}
    for (key, value), (_, coarse) in zip(exact.model.named_parameters(), rounded.model.named_parameters(), strict=True):
        assert torch.equal(value.bfloat16(), coarse), key
    for key, value in rounded.model.named_buffers():
        if key.endswith("inv_freq"):
            assert value.dtype == torch.float32, key
    # Not by oneDNN: its grouped convolution in bf16 is plainly wrong on processors with AMX (torch 2.13).
    with torch.backends.mkldnn.flags(enabled=False):
        expected, output = main_output(exact), main_output(rounded)
    assert output.dtype == torch.bfloat16
    # An indexer picks other keys, and a router other experts, where scores are close; then the output jumps.
    limit = 0.3 if ALL[name].tags & {"indexer", "moe"} else 0.06
    assert (output.float() - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_biases_are_not_what_they_start_as(name: str) -> None:
    for key, value in zoo.build(name).model.named_parameters():
        if value.ndim == 1 and value.numel() > 1:
            assert value.std() > 0.01, key


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bert", "tiny-llava"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_takes_the_kernel_that_is_asked_for(name: str, attn: str) -> None:
    organism = zoo.build(name, attn=attn)
    assert organism.model.config._attn_implementation == attn
    real = organism.example["attention_mask"].bool()  # a padded query has no right answer, and kernels differ on it
    torch.testing.assert_close(main_output(organism)[real], main_output(zoo.build(name))[real], rtol=1e-4, atol=1e-4)


def test_a_build_does_not_share_its_configuration() -> None:
    first, second = zoo.build("tiny-gemma3"), zoo.build("tiny-gemma3")
    first.model.config.text_config.layer_types[0] = "changed"
    assert second.model.config.text_config.layer_types[0] == "sliding_attention"
    assert zoo.build("tiny-gemma3").model.config.text_config.layer_types[0] == "sliding_attention"


@pytest.mark.parametrize("text", ["a b", "naïve café 😀", "  two  spaces\n"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bert"])
def test_any_text_survives_the_tokenizer(name: str, text: str) -> None:
    tokenizer = zoo.build(name).tokenizer
    assert tokenizer is not None
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_pads_a_batch_on_the_left_for_decoders_and_fits_the_vocabulary() -> None:
    tokenizer = zoo.build("tiny-llama").tokenizer
    assert tokenizer is not None
    batch = tokenizer(["a b", "abcde"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
    for name in NAMES:
        organism = zoo.build(name)
        assert (organism.tokenizer is None) == (not any("input_ids" in key for key in organism.example))
        if organism.tokenizer is not None:
            table = getattr(organism.model, "text_model", organism.model).get_input_embeddings().weight
            if any("tile" in each or "row_1" in each for each in organism.tokenizer.get_added_vocab()):
                assert VOCAB_SIZE < len(organism.tokenizer) <= len(table)  # names of tiles besides
            else:
                assert len(table) == len(organism.tokenizer) == VOCAB_SIZE


def test_saves_and_loads_as_an_ordinary_checkpoint(tmp_path: Any) -> None:
    organism = zoo.build("tiny-llama")
    organism.model.save_pretrained(tmp_path)
    assert organism.tokenizer is not None
    organism.tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(["a b", "abcde"], padding=True)
    assert tokens["input_ids"] == organism.tokenizer(["a b", "abcde"], padding=True)["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(**organism.example).logits, main_output(organism))


def test_covers_every_kind_and_feature_and_is_in_the_catalogue() -> None:
    assert len(TYPES) >= 34
    assert set(KINDS) | set(FEATURES) == set().union(*(row.tags for row in zoo.tiny_types() + zoo.outside_registry()))
    assert set(TYPES).isdisjoint(OUTSIDE)
    assert set(zoo.names()) <= {entry.id for entry in entries("models")}
    assert len(set(zoo.names())) == len(zoo.names())


@pytest.mark.parametrize(
    ("name", "attn", "says"),
    [
        ("tiny-lama", None, "no model 'tiny-lama'; did you mean .*tiny-llama"),
        ("tiny-gpt-oss", None, "did you mean .*tiny-gpt_oss"),
        ("?", None, "no model '\\?'; choose one of: organism, "),
        ("tiny-llama", "nonsense", "tiny-llama .*attn='nonsense'"),
        ("tiny-gemma2", "sdpa", "tiny-gemma2 .*attn='sdpa'"),
    ],
)
def test_bad_input_is_one_clear_line(name: str, attn: str | None, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        zoo.build(name, attn=attn)
    assert "\n" not in str(caught.value)
