"""`hw.bake`: edits put into the weights for good, as an ordinary checkpoint; or a refusal that says why not.

    baked = hw.bake(model, HeadScaling("L2H1", 2.0))
    print(baked.report)
    baked.save_pretrained("folder")          # written, loaded anew, compared, and only then called done

Every form is exact algebra: the saved model computes what the attached one computes under the edits, to rounding.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headwise.errors import InputError, PlanConflict, Refusal
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel, attach
from headwise.model.identity import weights_hash
from headwise.probes.encoding import ItemSet
from headwise.use.baking.forms import Asked, Form, NoForm, form_of, in_order, listed, overwritten
from headwise.use.baking.housing import House, as_llama, own_house, with_biases, with_fewer_heads
from headwise.use.baking.origins import Entries, Origins
from headwise.use.baking.report import BakeReport, Line, Removal
from headwise.use.baking.saving import Candidate, save
from headwise.use.baking.weights import OnZ, Weights, counted, on_z, why_no_columns


@dataclass(frozen=True, eq=False)
class Baked:
    """Weights with edits in them, not yet written; made by `bake`.

    Attributes:
        report: a line for every edit.
        tensors: the whole state; what was not changed is the model's own memory.
    """

    report: BakeReport
    tensors: dict[str, Tensor]
    _candidate: Candidate

    def save_pretrained(self, folder: str | os.PathLike[str], items: ItemSet | None = None) -> BakeReport:
        """Write the checkpoint, load it anew, and compare what it computes with the model under the edits.

        Compared are the outputs on the model's example inputs, and the logits at the answers of `items`. It is written
        beside `folder` and takes that name when it has passed; what did not pass is deleted.

        Returns:
            The report, with what was measured; it lies in the folder as `headwise-bake.json`, too.

        Raises:
            InputError: the folder exists; items that are none.
            PlanConflict: a plan is open on the model.
            Refusal: the saved model does not compute the same, or lost a tensor; or the disk did not take it.
        """
        return save(self._candidate, self.report, folder, items)


def bake(model: AttachedModel, edits: Any = (), *, remove: bool = False, leave_out: bool = False) -> Baked:
    """Put edits and interventions into the weights of a copy; `model` stays as it is.

    Args:
        model: attached, with no plan open. Adapters of PEFT are merged.
        edits: an edit, an intervention, or a list of both; they compose in a run's order.
        remove: take KV groups whose heads are all silent out of the weights, so that these become smaller. Where the
            number of them differs between layers no configuration can say it: their columns stay, as zeros, and the
            report says so.
        leave_out: bake what can be baked and name the rest in the report, in place of refusing all of it.

    Raises:
        InputError: no edits, heads that the model does not have, nothing to remove.
        Refusal: an edit without a form in weights, with the reason; weights that are quantised or not in memory.
        PlanConflict: a plan is open.
    """
    _require_bakeable(model)
    asked = listed(model, edits)
    with _merged(model) as (plain, merged):
        if not asked and not merged:
            raise InputError("bake() was given no edits; pass an edit, an intervention, or a list of them")
        baking = _Baking(plain, own_house(plain.model))
        baking.settle(asked)
        if baking.against and not leave_out:
            why = "; ".join(f"{each.name}: {reason}" for each, reason in baking.against.items())
            raise Refusal(
                f"cannot be baked: {why}. Use it in a run (model.editing), or bake the rest with leave_out=True"
            )
        baking.put()
        removal = baking.remove() if remove else None
        first = (
            (Line("the adapters of PEFT", "exact", "merged into the matrices they are put on", merged),)
            if merged
            else ()
        )
        report = BakeReport(
            (*first, *map(baking.line, asked)),
            model.name,
            model.revision,
            weights_hash(model.model),
            baking.house.architecture.__name__,
            baking.house.how,
            removal,
        )
        baked = [each.edit for each in asked if each.edit is not None and each not in baking.against]
        tensors = baking.weights.tensors
        weights = {name: tensor for each in baking._of_weights for name, tensor in each.weights.items()}
        return Baked(report, tensors, Candidate(model, tuple(baked), weights, baking.house, tensors))


class _Baking:
    """One call of `bake`, on a model without adapters."""

    def __init__(self, model: AttachedModel, house: House) -> None:
        self.model = model
        self.house = house
        self.origins = Origins(model)
        self.weights = Weights(model.model)
        self.asked: tuple[Asked, ...] = ()
        self.against: dict[Asked, str] = {}
        self.forms: dict[Asked, Form] = {}
        self.through_values: dict[str, list[tuple[Entries, Tensor]]] = {}
        self.sharper: dict[Asked, list[tuple[Entries, float]]] = {}
        self.constants: dict[Asked, list[tuple[str, Tensor]]] = {}

    # -- what can be done -----------------------------------------------------------------------------------------

    def settle(self, asked: tuple[Asked, ...]) -> None:
        """Find the form of each, and the reasons against those that have none."""
        self.asked = asked
        for each in asked:
            others = [name for one in asked if one is not each for name in one.weights]
            if each.why_not:
                self.against[each] = each.why_not
            elif twice := sorted(each.weights.keys() & set(others)):
                self.against[each] = f"another one puts {twice[0]} in place as well; merge one of them first"
            elif each.edit is not None:
                try:
                    form = form_of(self.model, each)
                    self._measure(form)
                    self.forms[each] = form
                except NoForm as reason:
                    self.against[each] = str(reason)
        self.against |= overwritten(self._exact)
        while reasons := self._place_offsets():
            self.against |= reasons

    @property
    def _exact(self) -> list[Form]:
        return [form for each, form in self.forms.items() if each not in self.against]

    def _of(self, form: Form) -> dict[str, OnZ]:
        """What one form alone does to z."""
        return on_z(self.model.table, self.model.model, form.on_z)

    def _measure(self, form: Form) -> None:
        """Raises NoForm for what only a run can tell."""
        for site in form.sites if form.on_z else ():
            _reject(why_no_columns(self.model.model, site))
            if form.variable in ("v", "pattern"):
                _reject(self.origins.carries(site, form.variable))
            if form.variable == "v" and (found := self._of(form).get(site.label)) is not None and found.moves:
                _reject(self.origins.weighs_to_one(site))
        for at, factors in form.sharper.items():
            changes = self.origins.times(self.model.site(at.label), factors)
            if isinstance(changes, str):
                raise NoForm(changes)
            self.sharper.setdefault(form.asked, []).extend(changes)
        for (variable, block), constant in form.added.items():
            before = variable == "residual_pre"
            bias = self.origins.stream_bias(
                "residual_post" if before else variable, self._block_before(block) if before else block
            )
            if isinstance(bias, str):
                raise NoForm(bias)
            name, factor = bias
            self.constants.setdefault(form.asked, []).append((name, constant / factor))

    def _block_before(self, label: str) -> str:
        here = SiteId.parse(label)
        before = [id for each in self.model.table.sublayers.blocks if (id := SiteId.parse(each)).stack == here.stack]
        earlier = [id.label for id in sorted(before) if id.layer < here.layer]
        if not earlier:
            raise NoForm(f"before {label} stand the embeddings, to which no bias is added")
        return earlier[-1]

    def _place_offsets(self) -> dict[Asked, str]:
        """Where offsets of z go; the reasons against edits whose offset can go nowhere."""
        self.through_values = {}
        moved = {label: each for label, each in self._combined().items() if each.moves}
        state = self.weights.tensors
        lacking = {label: each for label, each in moved.items() if f"{each.site.projection}.bias" not in state}
        if not lacking:
            return {}
        wanted = [f"{each.site.projection}.bias" for each in lacking.values()]
        house = with_biases(self.house, state, wanted)
        if isinstance(house, House):
            self.house = house
            return {}
        values = {label: self._through_values(each) for label, each in lacking.items()}
        self.through_values = {label: each for label, each in values.items() if not isinstance(each, str)}
        rest = {label: why for label, why in values.items() if isinstance(why, str)}
        if not rest:
            return {}
        llama = as_llama(self.house, state, wanted)
        if isinstance(llama, House):
            self.house, self.through_values = llama, {}
            return {}
        return {
            form.asked: f"its offset has no bias to go to: {house}; {why}; {llama}"
            for label, why in rest.items()
            for form in self._exact
            if (found := self._of(form).get(label)) is not None and found.moves
        }

    def _through_values(self, found: OnZ) -> list[tuple[Entries, Tensor]] | str:
        """The offset as biases of v, where all heads of a KV group share it."""
        site, values = found.site, found.of_values()
        if isinstance(values, str):
            return values
        if site.gated or site.added:
            return f"{site.label}: what is added to v is changed on its way to z"
        if why := self.origins.weighs_to_one(site):
            return why
        biases: list[tuple[Entries, Tensor]] = []
        for group, constant in enumerate(values):
            if bool(constant.any()):
                entries = self.origins.value_biases(site, group)
                if isinstance(entries, str):
                    return entries
                biases.append((entries, constant))
        return biases

    def _combined(self) -> dict[str, OnZ]:
        return on_z(self.model.table, self.model.model, in_order(self._exact))

    # -- doing it -------------------------------------------------------------------------------------------------

    @property
    def _of_weights(self) -> list[Asked]:
        return [each for each in self.asked if each.weights and each not in self.against]

    def put(self) -> None:
        """Change the weights."""
        for each in self._of_weights:
            for name, tensor in each.weights.items():
                self.weights.put(name, tensor)
        combined = self._combined()
        if self.house.created:
            first = next(each for each in combined.values() if each.moves)
            self.weights.create(self.house.created, like=f"{first.site.projection}.weight")
        for label, found in combined.items():
            if found.moves and label not in self.through_values:
                self.weights.project_offset(found)
            for entries, constant in self.through_values.get(label, ()) if found.moves else ():
                self.weights.add(entries.name, constant, entries.indices)
            if found.scales:
                self.weights.scale_columns(found)
        for form in self._exact:
            for entries, factor in self.sharper.get(form.asked, ()):
                self.weights.multiply(entries, factor)
            for name, constant in self.constants.get(form.asked, ()):
                self.weights.add(name, constant)

    def remove(self) -> Removal:
        """Take silent groups out, or say why their columns stay."""
        silent = {
            label: found.silent.nonzero().flatten().tolist()
            for label, found in self._combined().items()
            if bool(found.silent.any())
        }
        if not silent:
            raise InputError(
                "there is no KV group to remove: zero all heads of at least one (hw.edit.zero('L4H0,L4H1'))"
            )
        names = tuple(
            self.model.site(label).groups.groups[group].label for label, many in silent.items() for group in many
        )
        before = counted(self.weights.tensors)
        why = self._slice(silent)
        after = counted(self.weights.tensors)
        return Removal(names, not why, why, (before[0], after[0]), (before[1], after[1]))

    def _slice(self, silent: dict[str, list[int]]) -> str:
        """Why the columns stay; empty if they were taken out."""
        stay = "the columns stay, as zeros: "
        counts = {len(silent.get(site.label, ())) for site in self.model.sites}
        first = self.model.sites[0]
        if len(counts) > 1 or self.model.unserved:
            return f"{stay}another number of groups in each layer is nothing that a configuration can say"
        if len({(site.n_heads, site.n_kv_heads, site.head_dim, site.qk_dim) for site in self.model.sites}) > 1:
            return f"{stay}the layers have heads of several shapes"
        if counts == {first.n_kv_heads}:
            return f"{stay}no layer would have a head left"
        house = with_fewer_heads(self.house, first, next(iter(counts)))
        if isinstance(house, str):
            return f"{stay}{house}"
        smaller = self.weights.without(self.origins, silent)
        if isinstance(smaller, str):
            return f"{stay}{smaller}"
        try:
            shapes = house.shapes()
        except Refusal as refusal:
            return f"{stay}{refusal}"
        for name in house.created:  # zeros, of as many rows as are left
            if name in shapes and not bool(smaller[name].any()):
                smaller[name] = smaller[name].new_zeros(shapes[name])
        odd = next((name for name, tensor in smaller.items() if shapes.get(name) != tensor.shape), None)
        if odd is not None or shapes.keys() != smaller.keys():
            return f"{stay}with fewer heads {house.architecture.__name__} has another shape of {odd}"
        self.house, self.weights.tensors = house, smaller
        return ""

    # -- saying it ------------------------------------------------------------------------------------------------

    def line(self, asked: Asked) -> Line:
        if asked in self.against:
            return Line(asked.name, "impossible", self.against[asked])
        form = self.forms.get(asked)
        if asked.weights:
            return Line(asked.name, "exact", "what was trained is added to the weights", tuple(asked.weights))
        if form is None:
            return Line(asked.name, "exact", "changes nothing")
        done: list[str] = []
        tensors: list[str] = []
        for label, found in self._of(form).items():
            if found.scales:
                done.append("columns of the output projection")
                tensors.append(f"{found.site.projection}.weight")
            if found.moves and label in self.through_values:
                done.append("bias of v")
                tensors += [entries.name for entries, _ in self.through_values[label]]
            elif found.moves:
                done.append("bias of the output projection")
                tensors.append(f"{found.site.projection}.bias")
        if names := [entries.name for entries, _ in self.sharper.get(asked, ())]:
            done.append("what makes the queries")
            tensors += names
        if names := [name for name, _ in self.constants.get(asked, ())]:
            done.append("bias of what writes to the stream")
            tensors += names
        return Line(
            asked.name, "exact", ", ".join(dict.fromkeys(done)) or "changes nothing", tuple(dict.fromkeys(tensors))
        )


# -- what is baked -----------------------------------------------------------------------------------------------


def _require_bakeable(model: AttachedModel) -> None:
    if not isinstance(model, AttachedModel):
        raise InputError(f"bake() takes an attached model (hw.load, hw.attach), not a {type(model).__name__}")
    if model.planned:
        raise PlanConflict("a plan of reads or edits is open on the model; leave its block, then bake")
    network: Any = model.model
    first = next(iter(dict(network.named_parameters())), "the model")
    if getattr(getattr(network, "config", None), "quantization_config", None) is not None:
        raise _quantised(model, first)
    for name, weight in network.named_parameters():
        if weight.is_meta:
            raise Refusal(f"{name} of {model.name} is offloaded; load the whole model into memory, then bake")
        if not weight.is_floating_point() or hasattr(weight.data, "__tensor_flatten__"):
            raise _quantised(model, name)
    # Only now: of packed parameters a state dict would be made by unpacking them.
    for name, entry in network.state_dict().items():
        if not isinstance(entry, Tensor) or entry.is_quantized:
            raise _quantised(model, name)


def _quantised(model: AttachedModel, name: str) -> Refusal:
    return Refusal(
        f"{name} of {model.name} is quantised, and columns of packed weights cannot be changed alone; dequantise "
        "the model first (model.dequantize(), or load the weights that it was made of), then bake"
    )


@contextmanager
def _merged(model: AttachedModel) -> Iterator[tuple[AttachedModel, tuple[str, ...]]]:
    """The model, or a copy of it with its PEFT adapters merged, and the names of the matrices that were changed.

    Raises:
        Refusal: an adapter that is switched off or does not merge.
    """
    network: Any = model.model
    inner = getattr(network, "get_base_model", None)
    if not callable(inner):
        yield model, ()
        return
    if any(getattr(module, "disable_adapters", False) is True for module in network.modules()):
        raise Refusal(
            f"the adapters of {model.name} are switched off, and merged they would act; switch them on, or attach "
            "get_base_model()"
        )
    copied = copy.deepcopy(network)
    try:
        plain: nn.Module = copied.merge_and_unload()
    except Exception as error:
        raise Refusal(
            f"the adapter of {model.name} does not merge into its weights ({type(error).__name__}: {error}); only "
            "what is linear in them, such as LoRA, can be baked"
        ) from error
    own = dict(inner().named_modules())
    changed = tuple(
        f"{name}.weight"
        for name, module in own.items()
        if name and name in dict(plain.named_modules()) and type(module) is not type(plain.get_submodule(name))
    )
    with attach(
        plain.eval(), model.tokenizer, example=model.example, name=model.name, revision=model.revision
    ) as attached:
        yield attached, changed or ("all matrices that an adapter is on",)


def _reject(reason: str) -> None:
    if reason:
        raise NoForm(reason)


__all__ = ["Baked", "bake"]
