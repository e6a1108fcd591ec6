"""A baked checkpoint on disk: written aside, loaded anew, compared, and named at the end.

Where a class has no place for a tensor a loader drops it without a word, so every tensor is compared bit for bit as
well: a small offset that was lost would hide in the tolerance of half precision.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

import headwise
from headwise.errors import InputError, PlanConflict, Refusal
from headwise.model.attached import AttachedModel, attach
from headwise.model.edit import Edit
from headwise.model.proving.patient import distance, main_output
from headwise.model.weights import replaced
from headwise.probes.encoding import ItemSet
from headwise.probes.outcome import observe
from headwise.use.baking.housing import House
from headwise.use.baking.origins import attended
from headwise.use.baking.report import FILE, BakeReport, Check

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of outputs, as a share of the largest output: what rounding the changed weights may take."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is to be saved, and what it is compared with: `source` under `edits`, with `weights` in place."""

    source: AttachedModel
    edits: tuple[Edit, ...]
    weights: Mapping[str, Tensor]
    house: House
    tensors: dict[str, Tensor]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside the block `source` computes what the saved model should."""
        with replaced(self.source, self.weights), self.source.editing(*self.edits) if self.edits else nullcontext():
            yield


def save(
    candidate: Candidate, report: BakeReport, folder: str | os.PathLike[str], items: ItemSet | None = None
) -> BakeReport:
    """See `Baked.save_pretrained`."""
    if items is not None and not isinstance(items, ItemSet):
        raise InputError(f"items= takes an ItemSet (hw.encode), not a {type(items).__name__}")
    if candidate.source.planned:
        raise PlanConflict("a plan of reads or edits is open on the model; leave its block, then save")
    target = new_folder(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise Refusal(
            f"{target.parent} cannot be written ({error.strerror or error}); choose another folder"
        ) from error
    try:
        _write(candidate, aside)
        checked = replace(report, check=_compare(candidate, aside, items))
        about = {"headwise": headwise.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
        (aside / FILE).write_text(checked.to_json(**about), encoding="utf-8")
        aside.chmod(0o777 & ~_umask())
        if target.exists():
            raise InputError(f"{target} exists by now; give a folder that does not")
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        raise Refusal(
            f"{target} cannot be written ({getattr(error, 'strerror', None) or error}); make room, or choose another"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return checked


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """The whole path of a folder to be made. Raises InputError for what exists, a link that leads nowhere too."""
    target = Path(folder).expanduser().absolute()
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists; give a folder that does not, it is made")
    return target


def _write(candidate: Candidate, folder: Path) -> None:
    model: Any = candidate.house.empty()
    model.load_state_dict(candidate.tensors, assign=True)
    model.tie_weights()
    model.config.dtype = candidate.source.dtype
    network = network_of(candidate.source)
    model.save_pretrained(folder)
    if getattr(network, "generation_config", None) is not None:
        # As it is: its own way of saving refuses settings that do nothing, such as a temperature of a greedy search.
        network.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
    for part in (candidate.source.tokenizer, candidate.source.processor):
        if part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)


def _compare(candidate: Candidate, folder: Path, items: ItemSet | None) -> Check:
    """Raises Refusal for a folder that is not what was baked."""
    source = candidate.source
    loaded = _loaded(candidate, folder)
    kept: Mapping[str, Tensor] = loaded.state_dict()
    for name, tensor in candidate.tensors.items():
        if name not in kept or not torch.equal(kept[name].cpu(), tensor.cpu()):
            raise Refusal(
                f"{name} is not in the saved checkpoint as it was baked, so that was deleted; this type cannot be baked"
            )
    loaded.to(source.device)
    pairs = [_on_example(loaded, candidate)]
    inputs = "the example inputs"
    if items is not None:
        pairs += _on_items(loaded, candidate, items)
        inputs += f" and {len(items)} items of {items.probe}"
    difference = max(distance(there, edited) for there, edited, _ in pairs)
    effect = max(distance(edited, plain) for _, edited, plain in pairs)
    tolerance = TOLERANCE[source.dtype]
    if not difference <= tolerance:
        raise Refusal(
            f"the saved checkpoint differs from the model under the edits by {difference:.2g} of its largest output, "
            f"more than {tolerance:.2g}, so it was deleted; report this, or bake in float32"
        )
    return Check(difference, tolerance, effect, inputs)


def _loaded(candidate: Candidate, folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = getattr(transformers, config.architectures[0])
    own = network_of(candidate.source).config
    model, report = architecture.from_pretrained(
        folder,
        dtype="auto",
        local_files_only=True,
        output_loading_info=True,
        attn_implementation=own._attn_implementation,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise Refusal(f"{sorted(report[what], key=str)[0]} of the saved checkpoint is of {what}, so it was deleted")
    return model.eval()


Runs = tuple[Tensor, Tensor, Tensor]
"""What the saved model gives, the model under the edits, and the model without."""


def _on_example(loaded: Any, candidate: Candidate) -> Runs:
    source = candidate.source

    def seen(output: Any) -> Tensor:
        found = main_output(output)
        return attended(found, source.example) if found.dim() >= 3 else found

    with torch.no_grad():
        plain = seen(source.model(**source.example))
        with candidate.in_force():
            edited = seen(source.model(**source.example))
        return seen(loaded(**source.example)), edited, plain


def _on_items(loaded: Any, candidate: Candidate, items: ItemSet) -> list[Runs]:
    source = candidate.source
    found: list[Runs] = []
    wants = frozenset({"logits"})
    with attach(loaded, source.tokenizer, example=source.example, name=source.name) as there:
        for batch in items.batches(8):
            plain = observe(source, batch, wants=wants)  # type: ignore[arg-type]
            with candidate.in_force():
                edited = observe(source, batch, wants=wants)  # type: ignore[arg-type]
            baked = observe(there, batch, wants=wants)  # type: ignore[arg-type]
            assert plain.logits is not None
            assert edited.logits is not None
            assert baked.logits is not None
            held = plain.predicting
            found.append((baked.logits[held], edited.logits[held], plain.logits[held]))
    return found


def network_of(model: AttachedModel) -> Any:
    """The model of transformers, inside a PEFT wrapper, too."""
    inner = getattr(model.model, "get_base_model", None)
    return inner() if callable(inner) else model.model


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = ["TOLERANCE", "Candidate", "new_folder", "save"]
