"""`hw.load`: a model from the hub, from a folder or from the zoo, attached and ready to be read and edited.

What comes from elsewhere is not trusted further than asked for: pickled weights and a checkpoint's own Python code are
refused unless permitted, and weights that the checkpoint lacks are an error, because transformers would fill them with
random numbers. A hub id becomes a folder in the local cache first, so both kinds pass the same checks, and a path is
never looked up on the network.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from headwise import zoo
from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.model.attached import AttachedModel, attach

ZOO = "zoo:"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

_log = logging.getLogger(__name__)


def load(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> AttachedModel:
    """Load a model in evaluation mode and attach to it.

    `name` is a hub id (`gpt2`, `owner/name`), a local folder, or `zoo:NAME`. `revision` is a branch, tag or commit of a
    hub id. `device` is a torch device (default `cpu`). `dtype` is `float32`, `bfloat16`, `float16`, `float64` or `auto`
    (default: what the checkpoint was saved in; float32 for the zoo). `attn` names the attention kernel (default:
    transformers' own choice). `allow_pickle` permits weights in `pytorch_model.bin` where there are none in
    safetensors; `trust_remote_code` permits the checkpoint's own Python code where transformers does not know the model
    type.

    Raises `InputError` if the name, an option or the checkpoint's content cannot be used, `Refusal` if something needs
    a permission or a package that is not there.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        what = "an empty name" if isinstance(name, str) else f"a {type(name).__name__}"
        raise InputError(f"load() takes a hub id, a folder or zoo:NAME, not {what}; hw.attach takes a model in memory")
    _check_options(device, dtype, attn)
    if isinstance(name, str) and name.startswith(ZOO):
        return _load_from_zoo(name, revision, device, dtype, attn)
    checkpoint = _find(name, revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    own_code = _check_config(checkpoint)
    _check_weights(checkpoint)
    model = _load_model(checkpoint, own_code, dtype, attn)
    if device is not None:
        with _readable(checkpoint, f"model cannot be moved to {device}"):
            model.to(device)
    processor = _load_processor(checkpoint, own_code)
    tokenizer = _load_tokenizer(checkpoint, model.config) or getattr(processor, "tokenizer", None)
    return attach(
        model.eval(),
        tokenizer=tokenizer,
        processor=processor,
        name=checkpoint.name,
        revision=checkpoint.revision,
    )


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A folder with a configuration and weights; `revision` is the commit, for a folder that came from the hub."""

    name: str
    folder: Path
    revision: str | None
    trust_remote_code: bool
    allow_pickle: bool

    def has(self, *files: str) -> bool:
        return any((self.folder / file).is_file() for file in files)

    def may_run_code_of(self, *files: str) -> bool:
        """Whether one of these files names code of its own and that is permitted.

        The permission is not handed on where it is not needed: transformers would run what `config.json` names as well.
        """
        return self.trust_remote_code and any("auto_map" in self.read_json(file) for file in files if self.has(file))

    def read_json(self, file: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.name}: {file} cannot be read as JSON ({error}); fetch or save it again") from error
        if not isinstance(content, dict):
            raise InputError(f"{self.name}: {file} must hold a JSON object, not {type(content).__name__}")
        return content


def _check_options(device: str | None, dtype: str | None, attn: str | None) -> None:
    if dtype not in (None, "auto", *DTYPES):
        raise InputError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}, auto")
    # A paged kernel updates the keys inside itself, so the interception would see a part of them.
    kernels = sorted({"eager", *(kernel for kernel in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in kernel)})
    if attn is not None and attn not in kernels:
        raise InputError(f"attn {attn!r} is not known; choose one of {', '.join(kernels)}")
    if device is not None:
        _check_device(device)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        accelerator = torch.accelerator.current_accelerator()
        found = ["cpu"]
        if accelerator is not None and torch.accelerator.is_available():
            found += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
        raise InputError(f"device {device!r} is not there; this machine has {', '.join(found)}") from error


def _load_from_zoo(
    name: str, revision: str | None, device: str | None, dtype: str | None, attn: str | None
) -> AttachedModel:
    if revision is not None:
        raise InputError(f"{name} is built by the package and has no revision {revision!r}; leave revision out")
    organism = zoo.build(name.removeprefix(ZOO), dtype=DTYPES.get(dtype or "float32", torch.float32), attn=attn)
    place = torch.device(device or "cpu")
    return attach(
        organism.model.to(place).eval(),
        tokenizer=organism.tokenizer,
        processor=organism.processor,
        example={key: tensor.to(place) for key, tensor in organism.example.items()},
        name=name,
    )


def _find(
    name: str | os.PathLike[str], revision: str | None, *, trust_remote_code: bool, allow_pickle: bool
) -> _Checkpoint:
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{name} is a folder here, and revision {revision!r} is for hub ids; leave revision out")
        return _Checkpoint(str(name), path, None, trust_remote_code, allow_pickle)
    if path.is_file():
        raise InputError(f"{name} is a file; give the folder that holds config.json and the weights")
    if not isinstance(name, str) or _looks_like_path(name):
        raise InputError(f"{str(name)!r} does not exist; give a folder, a hub id (owner/name) or zoo:NAME")
    folder = _fetch(name, revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    return _Checkpoint(name, folder, folder.name, trust_remote_code, allow_pickle)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1 or "\\" in name


def _fetch(name: str, revision: str | None, *, trust_remote_code: bool, allow_pickle: bool) -> Path:
    """The snapshot of a hub id in the local cache, downloaded where it is not there and there is a network."""
    wanted = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"] + ["*.py"] * trust_remote_code
    try:
        folder = _snapshot(name, revision, wanted)
        if allow_pickle and not any(folder.glob("*.safetensors")):
            folder = _snapshot(name, revision, [*wanted, "pytorch_model*.bin"])
    except GatedRepoError as error:
        raise Refusal(f"{name} is gated on the hub; accept its terms there and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r} on the hub; give a branch, tag or commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{name!r} is not a folder here and not a model on the hub{_zoo_hint(name)}; "
            "if it is private, log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise _unreachable(name, error) from error
    except Exception as error:  # the hub client's network errors belong to whichever http library it was built on
        if "httpx" not in type(error).__module__:
            raise
        raise _unreachable(name, error) from error
    return folder


def _snapshot(name: str, revision: str | None, wanted: list[str]) -> Path:
    # Subfolders hold copies for other frameworks.
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))


def _unreachable(name: str, error: Exception) -> InputError:
    return InputError(
        f"{name!r} is not a folder here{_zoo_hint(name)}, and as a hub id it is not in the cache and the hub cannot be "
        f"reached; check the path, or connect and try again ({type(error).__name__}: {_first_line(error)[:120]})"
    )


def _zoo_hint(name: str) -> str:
    close = get_close_matches(name, zoo.names(), n=1, cutoff=0.75)
    return f" (did you mean {ZOO}{close[0]}?)" if close else ""


def _check_config(checkpoint: _Checkpoint) -> bool:
    """Whether the model needs the checkpoint's own code."""
    if checkpoint.has("adapter_config.json"):
        raise Refusal(
            f"{checkpoint.name} is a PEFT adapter; load its base model with peft and give the result to headwise.attach"
        )
    if not checkpoint.has("config.json"):
        raise InputError(
            f"{checkpoint.name} has no config.json; give a folder written by save_pretrained (it holds "
            f"{_listing(checkpoint.folder)})"
        )
    config = checkpoint.read_json("config.json")
    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING_NAMES:
        return False
    if config.get("auto_map"):
        if not checkpoint.trust_remote_code:
            raise Refusal(
                f"{checkpoint.name} needs Python code of its own (model type {model_type!r} is not in transformers "
                f"{transformers.__version__}); read that code, then permit it with trust_remote_code=True "
                "(--trust-remote-code)"
            )
        return True
    if model_type is None:
        raise InputError(f"{checkpoint.name}: config.json names no model_type, so no model can be built from it")
    close = get_close_matches(str(model_type), CONFIG_MAPPING_NAMES, n=1)
    raise InputError(
        f"{checkpoint.name}: model type {model_type!r} is not in transformers {transformers.__version__}"
        f"{f' (nearest: {close[0]})' if close else ''}; it was saved by transformers "
        f"{config.get('transformers_version', 'of unknown version')}: install one that knows it"
    )


def _check_weights(checkpoint: _Checkpoint) -> None:
    if checkpoint.has("model.safetensors"):
        return
    if checkpoint.has("model.safetensors.index.json"):
        with _readable(checkpoint, "model.safetensors.index.json has no usable weight_map"):
            shards = set(checkpoint.read_json("model.safetensors.index.json")["weight_map"].values())
        # transformers picks the reader by the shard's ending, so an index can lead to a pickle.
        pickles = sorted(shard for shard in shards if not shard.endswith(".safetensors"))
        if pickles and not checkpoint.allow_pickle:
            raise _pickled(checkpoint, pickles[0])
        missing = sorted(shard for shard in shards if not (checkpoint.folder / shard).is_file())
        if missing or not shards:
            raise InputError(
                f"{checkpoint.name}: model.safetensors.index.json names {len(shards)} files of weights and "
                f"{len(missing)} are missing ({', '.join(missing[:3])}); fetch them again"
            )
        return
    if checkpoint.has("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if not checkpoint.allow_pickle:
            raise _pickled(checkpoint, "pytorch_model.bin")
        return
    others = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in checkpoint.folder.glob(ending))
    if others:
        raise Refusal(
            f"{checkpoint.name} has weights only in {others[0]}, which is a pickle and not in a form that transformers "
            "reads; convert it to model.safetensors"
        )
    raise InputError(
        f"{checkpoint.name} has a config.json and no weights; expected model.safetensors or "
        f"model.safetensors.index.json (it holds {_listing(checkpoint.folder)}; from the hub, pickled weights are only "
        "fetched with allow_pickle=True)"
    )


def _pickled(checkpoint: _Checkpoint, file: str) -> Refusal:
    return Refusal(
        f"{checkpoint.name} has weights only as a pickle ({file}), which can run code when it is read; "
        "use safetensors, or permit it with allow_pickle=True (--allow-pickle)"
    )


def _load_model(checkpoint: _Checkpoint, own_code: bool, dtype: str | None, attn: str | None) -> Any:
    with _readable(checkpoint, "configuration cannot be read"):
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=own_code
        )
    asked = {"attn_implementation": attn} if attn else {}
    lacking = ""
    for model_class in _classes(config, own_code):
        with _readable(checkpoint, "model cannot be loaded"):
            model, report = model_class.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype or "auto",
                local_files_only=True,
                trust_remote_code=own_code,
                use_safetensors=checkpoint.has("model.safetensors", "model.safetensors.index.json"),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they arrive in the report and not in a log
                **asked,
            )
        lacking = _lacking(checkpoint, model, report)
        if not lacking:
            return model
    raise InputError(lacking)


def _lacking(checkpoint: _Checkpoint, model: Any, report: dict[str, Any]) -> str:
    """In words, what transformers filled with random numbers; empty if nothing."""
    missing = sorted(report["missing_keys"])
    if missing:
        return (
            f"{checkpoint.name}: {len(missing)} tensors of {type(model).__name__} are not in the weights (first: "
            f"{missing[0]}) and would be random numbers; correct `architectures` in config.json or complete the weights"
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        tensor, saved, expected = mismatched[0]
        return (
            f"{checkpoint.name}: {len(mismatched)} tensors have another shape than config.json says (first: {tensor} "
            f"is {tuple(saved)}, expected {tuple(expected)}); the two files do not belong together"
        )
    return ""


def _classes(config: Any, own_code: bool) -> list[Any]:
    """The class that the checkpoint names; where it names none, the Auto classes that fit, from tasks to base model."""
    for architecture in () if own_code else getattr(config, "architectures", None) or ():
        named = getattr(transformers, architecture, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return [named]
    tasks = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForSpeechSeq2Seq,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModel,
    )
    own = config.auto_map if own_code else {}
    fitting = [task for task in tasks if task.__name__ in own or type(config) in task._model_mapping]
    return fitting or [transformers.AutoModel]


def _load_tokenizer(checkpoint: _Checkpoint, config: Any) -> Any | None:
    if not checkpoint.has("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"):
        return None
    with _readable(checkpoint, "tokenizer cannot be loaded"):
        return transformers.AutoTokenizer.from_pretrained(
            checkpoint.folder,
            config=config,
            local_files_only=True,
            trust_remote_code=checkpoint.may_run_code_of("tokenizer_config.json"),
        )


def _load_processor(checkpoint: _Checkpoint, own_code: bool) -> Any | None:
    if not checkpoint.has("processor_config.json", "preprocessor_config.json"):
        return None
    try:
        with _readable(checkpoint, "processor cannot be loaded"):
            own_code = own_code or checkpoint.may_run_code_of("processor_config.json", "preprocessor_config.json")
            return transformers.AutoProcessor.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=own_code
            )
    except Refusal as refusal:
        # The model itself is complete: only images or sound have to be prepared by the caller.
        _log.warning("%s", refusal)
        return None


@contextmanager
def _readable(checkpoint: _Checkpoint, trouble: str) -> Iterator[None]:
    """Turns what transformers raises over a checkpoint into one line; a package that is missing is a `Refusal`."""
    try:
        yield
    except HeadwiseError:
        raise
    except ImportError as error:
        raise Refusal(
            f"{checkpoint.name}: {trouble}: a package is missing: {_first_line(error)}; install it"
        ) from error
    except Exception as error:
        raise InputError(
            f"{checkpoint.name}: {trouble}: {type(error).__name__}: {_first_line(error)}; a file may be damaged, "
            "or a git-LFS pointer: fetch it again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # huggingface_hub's validation errors say which field on the first line and what is wrong with it on the second.
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
