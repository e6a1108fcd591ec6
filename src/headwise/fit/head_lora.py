"""LoRA restricted to some heads, in PEFT's layout.

    W_q, W_k, W_v of chosen heads:   W[rows] += alpha / r * B[rows] A        A [r, in], B [rows, r]
    W_O of chosen heads:             W[:, columns] += alpha / r * B A[:, columns]

Hu et al. 2021 with the idea of Zhang et al. 2024 ("Interpreting and Improving Large Language Models in Arithmetic
Calculation"): fine-tune the heads that do the work, and no others. Reconstruction: that paper trains the heads' own
weights in full, its number of heads and learning rate are not known; low rank is ours.

Only the rows of B and the columns of A that belong to the heads are parameters. Elsewhere the change is no number that
could drift, it is not there: other heads keep their bits under weight decay and momentum, which a zeroed gradient does
not give. The folder holds full-size matrices with zeros outside, an ordinary adapter for `peft.PeftModel`.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.fit.objective import AnswerLoss, Objective, mean_loss
from headwise.fit.slices import VARIABLES, Slice, head_slices
from headwise.fit.taken_back import taken_back
from headwise.fit.training import Moment, Order, Schedule, Trained, generator, train
from headwise.heads import HeadSet, SiteId
from headwise.model.attached import AttachedModel
from headwise.model.finding.example import can_generate
from headwise.model.identity import weights_hash
from headwise.model.weights import replaced
from headwise.probes.encoding import ItemSet
from headwise.sweep.matched import matched_sets
from headwise.use.intervention import Intervention, finite, named_heads
from headwise.use.sharing.adapter import CONFIG, WEIGHTS, Adapter

Control = Literal["random-heads"]
SCHEDULE = Schedule(steps=200, learning_rate=2e-3)
_DRAWS = 200  # control sets that are looked through for one with as many parameters


@dataclass(frozen=True, eq=False, repr=False)
class HeadAdapter(Intervention):
    """A trained adapter of some heads: `with adapter(model): model.generate(...)`.

    Attributes:
        heads: the heads that it is restricted to.
        down: by qualified name of the layer, A `[rank, in]`; up: B `[out, rank]`; both 0 outside the heads' slices.
        alpha: the change is `alpha / rank * B A`.
        variables: letters of `qkvo`: which weights of the heads it changes.
    """

    id: ClassVar[str] = "head-adapter"
    heads: HeadSet
    down: Mapping[str, Float[Tensor, "rank in"]]
    up: Mapping[str, Float[Tensor, "out rank"]]
    alpha: float = 16.0
    variables: str = VARIABLES

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", named_heads(self.heads, self.id))
        object.__setattr__(self, "alpha", finite(self.alpha, f"{self.id}: alpha"))
        if self.down.keys() != self.up.keys() or not self.down:
            raise InputError(f"{self.id} takes A and B of the same layers, one or more")
        for name, a in self.down.items():
            b = self.up[name]
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] != self.rank:
                raise InputError(
                    f"{self.id}: {name} has A {[*a.shape]} and B {[*b.shape]}; expected [rank, in] and [out, rank], "
                    "of one rank in all layers"
                )

    @property
    def rank(self) -> int:
        return int(next(iter(self.down.values())).shape[0])

    def weights(self, model: AttachedModel) -> dict[str, Tensor]:
        """The changed weights by name of the parameter; those that it leaves as they are left out.

        Raises:
            InputError: heads that the model does not have.
            Refusal: weights of another shape, a change outside its heads, or layers that no part of can be changed.
        """
        slices = {each.module: each for each in head_slices(model, self.heads, self.variables)}
        if slices.keys() != self.down.keys():
            odd = sorted(slices.keys() ^ self.down.keys())[0]
            raise Refusal(f"the adapter does not fit {model.name}: {odd} belongs to one of the two; load its own model")
        changed = {}
        for name, part in slices.items():
            a, b = self.down[name], self.up[name]
            weight = model.model.get_parameter(f"{name}.weight")
            stored = (a.shape[1], b.shape[0]) if part.transposed else (b.shape[0], a.shape[1])
            if tuple(weight.shape) != stored:
                raise Refusal(
                    f"the adapter changes {name}, a weight {list(stored)}, and in {model.name} it is "
                    f"{[*weight.shape]}; load the model it was made for"
                )
            chosen = part.indices
            a, b = (a[:, chosen], b) if part.variables == "o" else (a, b[chosen])
            if _filled(self.down[name], self.up[name], part):
                raise Refusal(
                    f"the adapter changes {name} outside of {', '.join(self.heads.labels)}; it was made for other heads"
                )
            if bool(a.any()) and bool(b.any()):
                changed[f"{name}.weight"] = _added(weight.detach(), part, a, b, self.alpha / self.rank)
        return changed

    def merged(self, model: AttachedModel) -> nn.Module:
        """A copy of the model with the change in its weights: an ordinary checkpoint, `save_pretrained` and all.

        Raises:
            InputError, Refusal: as `weights`.
            PlanConflict: a plan is open on the model.
        """
        changed = self.weights(model)
        with model.aside():  # hooks would be copied along
            made = copy.deepcopy(model.model)
        with torch.no_grad():
            for name, tensor in changed.items():
                made.get_parameter(name).copy_(tensor)
        return made

    def save_pretrained(self, folder: str | Path, model: AttachedModel) -> Adapter:
        """Write the folder that `peft.PeftModel.from_pretrained(base, folder)` loads; `use.save` shares it.

        Raises:
            InputError: the folder exists and holds something.
            Refusal: it does not fit the model, or its layers are stored in both forms, for which PEFT has one switch.
        """
        self.weights(model)
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target} is there already; name a new or empty folder")
        forms = {each.transposed for each in head_slices(model, self.heads, self.variables)}
        if len(forms) > 1:
            raise Refusal("some of these layers store their weight [in, out], others [out, in]; PEFT takes one of both")
        target.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name in self.down:
            tensors[f"base_model.model.{name}.lora_A.weight"] = self.down[name].detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = self.up[name].detach().cpu().contiguous()
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": _task(model),
            "base_model_name_or_path": model.name,
            "revision": model.revision,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(self.down),
            "fan_in_fan_out": forms == {True},
            "bias": "none",
            "inference_mode": True,
        }
        (target / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return Adapter(target, self.heads)

    def _renamed(self, to: Mapping[Any, Any]) -> NoReturn:
        """Raises Refusal: what was trained for some heads means nothing in others."""
        raise Refusal(
            f"{self.id} was trained for its own heads; train one on others: fit_head_lora(control='random-heads')"
        )


@dataclass(frozen=True, eq=False)
class FittedAdapter:
    """An adapter and how it was trained.

    Attributes:
        adapter: the adapter.
        trained: losses, validations, number of parameters.
        control: which control it is; None for the heads that were asked for.
    """

    adapter: HeadAdapter
    trained: Trained
    control: Control | None = None


def fit_head_lora(
    model: AttachedModel,
    heads: Any,
    items: ItemSet,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    variables: str = VARIABLES,
    schedule: Schedule = SCHEDULE,
    objective: Objective | None = None,
    batch_size: int = 8,
    validation: ItemSet | None = None,
    control: Control | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    shown: Callable[[Moment], None] | None = None,
) -> FittedAdapter:
    """Train an adapter of `heads` on the answers of `items`; prompts are not learned. The model keeps its bits.

    Args:
        variables: `qkvo`, or `qo` where keys and values are shared with other heads (grouped queries) and are to stay.
        objective: what is made small (default: `AnswerLoss`; `Preference` prefers answers to their foils).
        validation: items on which the best step is chosen; others than `items`, and than those it is judged on.
        control: `random-heads`: train as many heads drawn at random in the same layers instead, with as many
            parameters; with k or v among the variables none of the same KV groups.
        folder, shown: as in `train`.

    Raises:
        InputError: heads that the model does not have, a rank that is none, validation on training items.
        Refusal: layers that no part of can be trained; no other heads for a control.
    """
    chosen = model.heads(heads)
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"rank={rank!r} must be a whole number, at least 1")
    if validation is not None and set(validation.ids) & set(items.ids):
        raise InputError("validation= holds items that are trained on; give others")
    if control is not None:
        chosen = random_heads_like(model, chosen, variables, seed=seed)
    loras = [_Lora.begun(model, part, rank, alpha / rank, seed) for part in head_slices(model, chosen, variables)]
    parameters = {name: parameter for each in loras for name, parameter in each.parameters.items()}
    order, objective = Order(len(items), batch_size, seed), objective or AnswerLoss()
    of_items = objective.on(model, items)
    held_out = None if validation is None else objective.on(model, validation)

    def adapted() -> AbstractContextManager[None]:
        return replaced(model, {name: tensor for each in loras for name, tensor in each.weights(model).items()})

    def loss(step: int) -> Tensor:
        with adapted():
            return taken_back(of_items(order.rows(step), ()), parameters.values())

    def validate() -> float:
        assert validation is not None
        assert held_out is not None
        with adapted():
            return mean_loss(held_out, len(validation), ())

    trained = train(
        parameters,
        loss,
        schedule,
        at_rest=model.model,
        validate=None if validation is None else validate,
        folder=folder,
        settings={
            "method": "head-lora",
            "weights": None if folder is None else weights_hash(model.model),
            "objective": repr(objective),
            "heads": list(chosen.labels),
            "variables": variables,
            "alpha": alpha,
            "items": list(items.ids),
            "validation": [] if validation is None else list(validation.ids),
            "batch_size": batch_size,
            "seed": seed,
        },
        shown=shown,
    )
    down, up = ({each.part.module: each.full(model, which) for each in loras} for which in ("down", "up"))
    return FittedAdapter(HeadAdapter(chosen, down, up, alpha, variables), trained, control)


def random_heads_like(model: AttachedModel, heads: HeadSet, variables: str = VARIABLES, *, seed: int = 0) -> HeadSet:
    """Random heads in the same layers whose adapter has as many parameters as that of `heads`.

    Raises:
        Refusal: there are none.
    """

    def groups(of: HeadSet) -> set[tuple[SiteId, int]]:
        return {(head.site, head.index // model.table.site(head.site).group_size) for head in of}

    stacks = {head.stack for head in heads}
    available = model.heads().filter(lambda head: head.stack in stacks)
    sharing = bool(set(variables) & set("kv"))
    if sharing:
        taken = groups(heads)
        available = available.filter(lambda head: not groups(HeadSet((head,))) & taken)
    drawn = matched_sets(heads, available, _DRAWS, seed)
    # As many heads in the same layers have as many rows and columns, but keys and values are as many as the groups.
    wanted = Counter(site for site, _ in groups(heads))
    fitting = [each for each in drawn.sets if not sharing or Counter(site for site, _ in groups(each)) == wanted]
    if drawn.match != "layers" or not fitting:
        raise Refusal(
            f"no other heads in the layers of {', '.join(heads.labels)} make an adapter of as many parameters; "
            "train fewer heads of a layer, or variables='qo'"
        )
    # The sets come in random order, but for those that were listed whole: the seed picks among the fitting ones.
    return fitting[int(torch.randint(len(fitting), (1,), generator=generator("head-lora control", seed)))]


@dataclass(frozen=True, eq=False)
class _Lora:
    """The trained part of A and B of one layer."""

    part: Slice
    factor: float
    down: nn.Parameter
    up: nn.Parameter
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def begun(cls, model: AttachedModel, part: Slice, rank: int, factor: float, seed: int) -> _Lora:
        """B is 0 and A as PEFT draws it, so that the model begins as it is."""
        n_in, n_out = _widths(model, part)
        whole = torch.empty(rank, n_in)
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator("head-lora", seed, part.module))
        columns = part.variables == "o"
        down = whole[:, part.indices] if columns else whole
        up = torch.zeros(n_out if columns else len(part.indices), rank)
        made = cls(part, factor, nn.Parameter(down.to(model.device)), nn.Parameter(up.to(model.device)))
        made.parameters.update({f"{part.module}.down": made.down, f"{part.module}.up": made.up})
        return made

    def weights(self, model: AttachedModel) -> dict[str, Tensor]:
        weight = model.model.get_parameter(f"{self.part.module}.weight")
        return {f"{self.part.module}.weight": _added(weight, self.part, self.down, self.up, self.factor)}

    def full(self, model: AttachedModel, which: str) -> Tensor:
        """A or B in full size, 0 where nothing was trained."""
        n_in, n_out = _widths(model, self.part)
        columns, rank = self.part.variables == "o", int(self.down.shape[0])
        if which == "down":
            own = self.down.detach()
            return own if not columns else own.new_zeros(rank, n_in).index_copy(1, self._indices, own)
        own = self.up.detach()
        return own if columns else own.new_zeros(n_out, rank).index_copy(0, self._indices, own)

    @property
    def _indices(self) -> Tensor:
        return self.part.indices.to(self.down.device)


def _added(weight: Tensor, part: Slice, down: Tensor, up: Tensor, factor: float) -> Tensor:
    """The weight as it is stored, with the change in the heads' slice; every other element keeps its bits."""
    change = factor * (up @ down)
    change = (change.T if part.transposed else change).to(weight.device)
    indices = part.indices.to(weight.device)
    own = weight.index_select(part.axis, indices)
    return weight.index_copy(part.axis, indices, (own.to(change.dtype) + change).to(weight.dtype))


def _filled(down: Tensor, up: Tensor, part: Slice) -> int:
    """How many rows (of o: columns) outside of the slice are not 0."""
    outside = torch.ones(down.shape[1] if part.variables == "o" else up.shape[0], dtype=torch.bool)
    outside[part.indices] = False
    lines = down.any(0) if part.variables == "o" else up.any(1)
    return int((lines.cpu() & outside).sum())


def _widths(model: AttachedModel, part: Slice) -> tuple[int, int]:
    """Inputs and outputs of the layer."""
    shape = model.model.get_parameter(f"{part.module}.weight").shape
    return (int(shape[0]), int(shape[1])) if part.transposed else (int(shape[1]), int(shape[0]))


def _task(model: AttachedModel) -> str | None:
    if getattr(model.model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if can_generate(model.model) else None


INTERVENTIONS = (
    InterventionEntry(
        id=HeadAdapter.id,
        title="LoRA restricted to some heads, in PEFT's layout",
        page="use/specialising.md#head-restricted-lora",
        paper="Hu et al., LoRA; Zhang et al., Interpreting and Improving LLMs in Arithmetic Calculation",
        year=2024,
        tier="B",
        status="reconstruction",
        cost="1 forward",
        made=HeadAdapter,
    ),
)

__all__ = ["FittedAdapter", "HeadAdapter", "fit_head_lora", "random_heads_like"]
