"""`load`: what it accepts, which class it picks, and the one line for everything it cannot use.

Attaching itself is tested with `headwise.model.attached`; here `attach` only records what it was handed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from headwise import loading
from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.loading import load
from headwise.zoo.tokens import byte_tokenizer

IDS = torch.tensor([[1, 5, 9, 2, 7]])


@dataclass
class Attached:
    """What `attach` was handed."""

    model: PreTrainedModel
    tokenizer: Any = None
    processor: Any = None
    example: dict[str, torch.Tensor] | None = None
    name: str | None = None
    revision: str | None = None
    logits: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.logits = self.model(IDS)[0]


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "attach", Attached)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=300,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint of a tiny Llama."""
    llama().save_pretrained(tmp_path / "tiny")
    byte_tokenizer("left").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def one_line(error: HeadwiseError) -> str:
    text = str(error)
    assert "\n" not in text
    return text


class TestAFolder:
    def test_it_computes_what_was_saved(self, folder: Path) -> None:
        got: Any = load(str(folder))
        with torch.no_grad():
            torch.testing.assert_close(got.logits, llama()(IDS)[0], rtol=0, atol=0)
        assert type(got.model) is LlamaForCausalLM
        assert not got.model.training
        assert (got.name, got.revision, got.processor) == (str(folder), None, None)
        assert got.tokenizer("abc")["input_ids"] == byte_tokenizer("left")("abc")["input_ids"]

    def test_a_path_object_and_a_folder_without_a_tokenizer(self, folder: Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()
        got: Any = load(folder)
        assert got.tokenizer is None

    def test_the_checkpoints_own_dtype_is_the_default(self, folder: Path) -> None:
        llama().to(torch.bfloat16).save_pretrained(folder)
        for dtype, expected in ((None, torch.bfloat16), ("auto", torch.bfloat16), ("float64", torch.float64)):
            got: Any = load(folder, dtype=dtype)
            assert got.model.dtype == expected

    def test_the_kernel_is_the_one_asked_for(self, folder: Path) -> None:
        for attn in ("eager", "sdpa"):
            got: Any = load(folder, attn=attn)
            assert got.model.config._attn_implementation == attn

    def test_the_device_is_the_one_asked_for(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        places: list[object] = []
        monkeypatch.setattr(LlamaForCausalLM, "to", lambda model, place: places.append(place) or model)
        load(folder, device="cpu")
        load(folder)
        assert places == ["cpu"]

    def test_a_local_path_is_never_looked_up_on_the_network(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attempts: list[object] = []

        def refuse(*arguments: object, **_: object) -> None:
            attempts.append(arguments)
            raise OSError("no network in this test")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        load(folder)
        for missing in (folder / "nowhere", "./nowhere", "~/no/such/folder", "a/b/c", "nowhere/"):
            with pytest.raises(InputError, match="does not exist; give a folder"):
                load(missing)
        assert not attempts


class TestTheClass:
    def test_it_is_the_one_that_the_checkpoint_names(self, tmp_path: Path) -> None:
        LlamaModel(llama().config).save_pretrained(tmp_path)
        assert type(load(tmp_path).model) is LlamaModel

    def test_without_a_name_it_is_the_task_whose_weights_are_there(self, folder: Path) -> None:
        edit_config(folder, architectures=...)
        assert type(load(folder).model) is LlamaForCausalLM

    def test_without_a_name_and_a_head_it_is_the_base_model(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
        BertModel(BertConfig(**sizes, vocab_size=50)).save_pretrained(tmp_path)
        edit_config(tmp_path, architectures=...)
        assert type(load(tmp_path).model) is BertModel

    def test_a_name_that_is_no_model_class_is_not_called(self, folder: Path) -> None:
        edit_config(folder, architectures=["Trainer"])
        assert type(load(folder).model) is LlamaForCausalLM


class TestWeights:
    def test_tied_weights_are_not_missing(self, tmp_path: Path) -> None:
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)).save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        model = load(tmp_path).model
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_a_missing_tensor_is_named(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.self_attn.q_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"1 tensors of LlamaForCausalLM .*layers\.1\.self_attn\.q_proj") as caught:
            load(folder)
        assert "random numbers" in one_line(caught.value)

    def test_a_tensor_of_another_shape_is_named_with_both_shapes(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = torch.ones(7)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"model\.norm\.weight is \(7,\), expected \(32,\)") as caught:
            load(folder)
        one_line(caught.value)

    @pytest.mark.parametrize("content", [b"", b"junk" * 9])
    def test_a_corrupt_file(self, folder: Path, content: bytes) -> None:
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="model cannot be loaded: SafetensorError") as caught:
            load(folder)
        one_line(caught.value)

    def test_a_folder_without_any(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputError, match=r"has a config\.json and no weights; expected model\.safetensors"):
            load(folder)

    def test_shards_are_read_and_a_missing_one_is_named(self, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path, max_shard_size="40KB")
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(shards) > 1
        got: Any = load(tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(got.logits, llama()(IDS)[0], rtol=0, atol=0)
        shards[0].unlink()
        with pytest.raises(InputError, match=f"1 are missing \\({shards[0].name}\\)"):
            load(tmp_path)
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
        with pytest.raises(InputError, match="has no usable weight_map"):
            load(tmp_path)


class TestPickles:
    @pytest.fixture
    def pickled(self, folder: Path) -> Path:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder

    def test_they_are_refused_unless_permitted(self, pickled: Path) -> None:
        with pytest.raises(Refusal, match=r"only as a pickle \(pytorch_model\.bin\).*--allow-pickle") as caught:
            load(pickled)
        one_line(caught.value)
        got: Any = load(pickled, allow_pickle=True)
        with torch.no_grad():
            torch.testing.assert_close(got.logits, llama()(IDS)[0], rtol=0, atol=0)

    def test_safetensors_are_used_where_there_are_both(self, folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"never read")
        load(folder, allow_pickle=True)

    def test_an_index_cannot_lead_to_one(self, pickled: Path) -> None:
        names = torch.load(pickled / "pytorch_model.bin", weights_only=True)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
        (pickled / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(Refusal, match="only as a pickle"):
            load(pickled)

    def test_one_that_transformers_does_not_read(self, pickled: Path) -> None:
        (pickled / "pytorch_model.bin").rename(pickled / "weights.pt")
        with pytest.raises(Refusal, match=r"only in weights\.pt, which is a pickle"):
            load(pickled, allow_pickle=True)

    def test_a_corrupt_one(self, pickled: Path) -> None:
        (pickled / "pytorch_model.bin").write_bytes(b"junk" * 9)
        with pytest.raises(InputError, match="model cannot be loaded") as caught:
            load(pickled, allow_pickle=True)
        one_line(caught.value)


class TestTheConfiguration:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("{not json", r"config\.json cannot be read as JSON"),
            ("[1, 2]", r"config\.json must hold a JSON object, not list"),
            ("{}", "names no model_type"),
            ('{"model_type": "lama"}', r"'lama' is not in transformers .*nearest: llama"),
            ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size.*expected int, got str"),
        ],
    )
    def test_what_cannot_be_read(self, folder: Path, content: str, said: str) -> None:
        (folder / "config.json").write_text(content)
        with pytest.raises(InputError, match=said) as caught:
            load(folder)
        one_line(caught.value)

    def test_a_folder_without_one(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"has no config\.json.*it holds nothing"):
            load(tmp_path)

    def test_a_file_instead_of_a_folder(self, folder: Path) -> None:
        with pytest.raises(InputError, match="is a file; give the folder"):
            load(folder / "model.safetensors")

    def test_an_adapter(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(Refusal, match="PEFT adapter; load its base model"):
            load(folder)

    def test_a_corrupt_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(InputError, match="tokenizer cannot be loaded") as caught:
            load(folder)
        one_line(caught.value)


class TestCodeOfItsOwn:
    CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({witness!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where transformers copies such code to before it runs it."""
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    @pytest.fixture
    def witness(self, folder: Path, tmp_path: Path) -> Path:
        """The file that exists once the checkpoint's code has run."""
        witness = tmp_path / "ran"
        (folder / "own.py").write_text(self.CODE.format(witness=str(witness)))
        edit_config(folder, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
        return witness

    def test_it_is_refused_unless_permitted(self, folder: Path, witness: Path) -> None:
        edit_config(folder, model_type="own-llama", architectures=["OwnModel"])
        with pytest.raises(Refusal, match=r"needs Python code of its own .*--trust-remote-code") as caught:
            load(folder)
        one_line(caught.value)
        assert not witness.exists()
        got: Any = load(folder, trust_remote_code=True)
        assert type(got.model).__name__ == "OwnModel"
        assert witness.exists()

    @pytest.mark.parametrize("permitted", [False, True])
    def test_it_does_not_run_where_transformers_knows_the_type(
        self, folder: Path, witness: Path, permitted: bool
    ) -> None:
        assert type(load(folder, trust_remote_code=permitted).model) is LlamaForCausalLM
        assert not witness.exists()

    @pytest.mark.parametrize("permitted", [False, True])
    def test_a_tokenizers_code_runs_only_if_permitted(self, folder: Path, tmp_path: Path, permitted: bool) -> None:
        code = "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        code += f"Path({str(tmp_path / 'ran')!r}).touch()\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        (folder / "own_tokenizer.py").write_text(code)
        file = folder / "tokenizer_config.json"
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
        with contextlib.suppress(InputError):
            load(folder, trust_remote_code=permitted)
        assert (tmp_path / "ran").exists() == permitted


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (
                {"dtype": "float8"},
                "dtype 'float8' is not known; choose one of float32, bfloat16, float16, float64, auto",
            ),
            ({"device": "gpu"}, "device 'gpu' is not there; this machine has cpu"),
            ({"device": "cuda:99"}, "device 'cuda:99' is not there; this machine has cpu"),
            ({"attn": "fast"}, "attn 'fast' is not known; choose one of eager, flash_attention_2.*sdpa"),
            ({"revision": "main"}, "revision 'main' is for hub ids"),
        ],
    )
    def test_one_that_is_not_known(self, folder: Path, options: dict[str, str], said: str) -> None:
        with pytest.raises(InputError, match=said) as caught:
            load(folder, **options)  # type: ignore[arg-type]
        one_line(caught.value)

    def test_a_kernel_whose_package_is_missing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(*_: object, **__: object) -> None:
            raise ImportError("FlashAttention2 is not installed.\nMore lines.")

        monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", missing)
        with pytest.raises(Refusal, match="a package is missing: FlashAttention2 is not installed") as caught:
            load(folder, attn="flash_attention_2")
        one_line(caught.value)


class TestTheZoo:
    def test_a_model_with_its_tokenizer_and_example(self) -> None:
        got: Any = load("zoo:tiny-llama", dtype="bfloat16", attn="eager")
        assert (got.name, got.model.dtype) == ("zoo:tiny-llama", torch.bfloat16)
        assert got.model.config._attn_implementation == "eager"
        assert got.tokenizer is not None
        assert got.example is not None
        assert got.example["input_ids"].shape[0] == 2

    def test_an_unknown_name_is_told_the_nearest(self) -> None:
        with pytest.raises(InputError, match="tiny-llama"):
            load("zoo:tiny-lama")

    def test_it_has_no_revisions(self) -> None:
        with pytest.raises(InputError, match="has no revision 'main'"):
            load("zoo:tiny-llama", revision="main")


class Response:
    """The part of an HTTP answer that the hub's errors read."""

    headers: ClassVar[dict[str, str]] = {}
    request = None
    status_code = 404


class TestAHubId:
    @pytest.mark.parametrize(
        ("error", "kind", "said"),
        [
            (RepositoryNotFoundError, InputError, "not a folder here and not a model on the hub"),
            (RevisionNotFoundError, InputError, "no revision 'v9' on the hub"),
            (GatedRepoError, Refusal, "is gated on the hub"),
        ],
    )
    def test_what_the_hub_says_becomes_one_line(
        self,
        error: Callable[..., Exception],
        kind: type[HeadwiseError],
        said: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def answer(*_: object, **__: object) -> str:
            raise error("404\nlong story", response=Response())

        monkeypatch.setattr(loading, "snapshot_download", answer)
        with pytest.raises(kind, match=said) as caught:
            load("owner/name", revision="v9")
        one_line(caught.value)

    def test_a_name_that_cannot_be_one(self) -> None:
        with pytest.raises(InputError, match="not a folder here and not a model on the hub"):
            load("two words")

    def test_pickles_are_not_even_fetched_unless_permitted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def answer(name: str, *, allow_patterns: list[str], **_: object) -> str:
            asked.extend(allow_patterns)
            return str(tmp_path)

        monkeypatch.setattr(loading, "snapshot_download", answer)
        for permitted in (False, True):
            with pytest.raises(InputError, match=r"no config\.json"):
                load("owner/name", allow_pickle=permitted, trust_remote_code=permitted)
            assert ("pytorch_model*.bin" in asked, "*.py" in asked) == (permitted, permitted)

    def test_without_a_network_the_cache_serves_and_the_rest_is_one_line(self, folder: Path, tmp_path: Path) -> None:
        """In a fresh process, because the hub client reads its settings once; its hub is a port that nothing hears."""
        commit = "0123456789abcdef0123456789abcdef01234567"
        cached = tmp_path / "home" / "hub" / "models--owner--tiny"
        (cached / "snapshots").mkdir(parents=True)
        folder.rename(cached / "snapshots" / commit)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
        code = """
from headwise import loading
loading.attach = lambda model, **rest: (type(model).__name__, rest["name"], rest["revision"])
print(*loading.load("owner/tiny"))
for name in ("owner/other", "tiny-llama"):
    try:
        loading.load(name)
    except loading.InputError as error:
        print(error)
"""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        loaded, other, zoo = done.stdout.splitlines()
        assert loaded == f"LlamaForCausalLM owner/tiny {commit}"
        assert "not a folder here" in other
        assert "not in the cache and the hub cannot be reached" in other
        assert "did you mean zoo:tiny-llama?" in zoo
