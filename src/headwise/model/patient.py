"""The model under examination: plain runs of it, plain hooks on it, and the heads drawn for edits.

Nothing here goes through the seam or a plan: it is the second way that the doctor's checks are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import InputError
from headwise.heads import Head, HeadSet, SiteId
from headwise.model.example import placeholder_tokens
from headwise.model.projection import first
from headwise.model.run import named_arguments
from headwise.model.site import Site

if TYPE_CHECKING:
    from headwise.model.attached import AttachedModel

SAMPLE = 4
"""Sites that are edited one at a time, so that the number of runs does not grow with the depth of the model."""


@dataclass(eq=False)
class Patient:
    """An attached model under examination, with one head of every site drawn for edits.

    Attributes:
        plain: the main output of a forward of the example, with the model out of the seam.
        wavering: largest relative difference of two such forwards; 0 where the model repeats itself bit for bit.
        unreached: pretrained parts of the model that the example does not run, by qualified name.
        dtype: the coarsest floating dtype of the model's parameters.

    Raises:
        InputError: the model's output on the example holds no finite number.
        PlanConflict: a plan is open on the model, it is running, or it was detached.
    """

    attached: AttachedModel
    seed: int
    plain: Tensor = field(init=False)
    wavering: float = field(init=False)
    unreached: tuple[str, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.drawn: dict[SiteId, int] = {
            site.id: int(torch.randint(site.n_heads, (1,), generator=generator)) for site in self.attached.sites
        }
        dtypes = {p.dtype for p in self.attached.model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
        self.dtype = max(dtypes or {self.attached.dtype}, key=lambda dtype: torch.finfo(dtype).eps)
        with self.attached.aside():
            with self.counting(path for path, _ in self.model.named_modules()) as calls:
                self.plain = self.run()
            again = self.run()
        if not bool(self.plain.isfinite().any()):
            raise InputError(
                f"in {self.dtype} the model returns no finite number on its example inputs, so nothing can be "
                "compared; load it in another dtype, or pass other inputs with attach(example=...)"
            )
        self.wavering = 0.0 if same(self.plain, again) else max(distance(again, self.plain), 1e-12)
        self.unreached = _unreached(self.model, calls)

    # -- what is examined -----------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self.attached.model

    @property
    def inputs(self) -> dict[str, Any]:
        return self.attached.example

    def sites(self, *capabilities: str) -> list[Site]:
        return [site for site in self.attached.sites if all(site.capabilities[name] for name in capabilities)]

    def heads(self, sites: Sequence[Site]) -> HeadSet:
        """The drawn head of each site."""
        return HeadSet(tuple(Head(site.id, self.drawn[site.id]) for site in sites))

    def why_not(self, *capabilities: str) -> str:
        """Why no site has these capabilities."""
        missing = [site.capabilities[name] for site in self.attached.sites for name in capabilities]
        return "; ".join(dict.fromkeys(part.reason for part in missing if part.reason)) or "no site allows it"

    @cached_property
    def text(self) -> dict[str, Tensor] | None:
        """Two rows of the example's tokens with their mask, where a decoder runs on tokens alone; no pictures."""
        ids, mask = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        if getattr(self.model.config, "is_encoder_decoder", False) or not self.sites("cache"):
            return None
        if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or len(ids) < 2:
            return None
        marks = torch.tensor(placeholder_tokens(self.model), device=ids.device)
        return {"input_ids": torch.where(torch.isin(ids, marks), ids[:, -1:], ids), "attention_mask": mask}

    # -- plain runs -----------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """The main output of one forward."""
        with torch.no_grad():
            return main_output(self.model(**(self.inputs if inputs is None else inputs)))

    def loss(self) -> Tensor:
        """A number that hangs on all of the main output, with its graph."""
        output = wide(main_output(self.model(**self.inputs)))
        weights = torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype)
        return (output.nan_to_num() * weights).sum()

    @cached_property
    def entering(self) -> dict[SiteId, Tensor]:
        """What enters every projection in a plain forward: `[row, width]` by site."""
        with self.seeing_projections(self.sites("projection")) as seen:
            self.run()
        return {label: rows for label, (rows, _) in seen.items()}

    # -- plain hooks ----------------------------------------------------------------------------------------------

    @contextmanager
    def seeing_projections(self, sites: Sequence[Site]) -> Iterator[dict[SiteId, tuple[Tensor, Tensor]]]:
        """What enters and leaves the projections of `sites`, calls joined, each as `[row, width]`."""
        seen: dict[SiteId, tuple[Tensor, Tensor]] = {}

        def see(module: nn.Module, site: Site, args: tuple[Any, ...], output: Any) -> None:
            new = tuple(part.detach().reshape(-1, part.shape[-1]) for part in (args[0], first(output)))
            old = seen.get(site.id)
            seen[site.id] = (
                (new[0], new[1]) if old is None else (torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]]))
            )

        with self._at_projections(sites, see, "register_forward_hook"):
            yield seen

    @contextmanager
    def multiplying(self, factors: Mapping[SiteId, float | Tensor]) -> Iterator[None]:
        """Multiply the drawn heads' slices of the projections' inputs, by plain hooks."""

        def cut(module: nn.Module, site: Site, args: tuple[Any, ...]) -> tuple[Any, ...]:
            columns = columns_of(site)[self.drawn[site.id]].to(args[0].device)
            factor, part = factors[site.id], args[0][..., columns]
            if isinstance(factor, Tensor):
                part = part * factor.to(part)
            else:  # NaN, which padding can hold, times 0 is not 0
                part = part * factor if factor else torch.zeros_like(part)
            return (args[0].index_copy(-1, columns, part), *args[1:])

        sites = [site for site in self.attached.sites if site.id in factors]
        with self._at_projections(sites, cut, "register_forward_pre_hook"):
            yield

    @contextmanager
    def counting(self, paths: Iterable[str]) -> Iterator[dict[str, int]]:
        """How often the modules of these qualified names are called ("" is the model)."""
        calls = dict.fromkeys(paths, 0)

        def count(path: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                calls[path] += 1

            return hook

        with _hooks(self.model.get_submodule(path).register_forward_pre_hook(count(path)) for path in calls):
            yield calls

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter asks for a gradient, so that a backward leaves none behind."""
        asking = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in asking:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)

    def _at_projections(self, sites: Sequence[Site], see: Callable[..., Any], register: str) -> Any:
        """Hooks on projections; one that serves several sites tells them apart by the order of its calls."""
        wanted = {site.id for site in sites}
        counts: dict[str, int] = {}

        def hook(path: str, own: list[Site]) -> Callable[..., Any]:
            def noted(module: nn.Module, *args: Any) -> Any:
                turn = counts[path] = counts.get(path, -1) + 1
                site = own[turn % len(own)]
                return see(module, site, *args) if site.id in wanted else None

            return noted

        own = {
            str(site.projection): [s for s in self.attached.sites if s.projection == site.projection] for site in sites
        }
        return _hooks(getattr(self.model.get_submodule(path), register)(hook(path, s)) for path, s in own.items())


def sampled(sites: Sequence[Site], most: int = SAMPLE) -> list[Site]:
    """At most `most` of the sites (one per stack if there are more stacks), spread evenly over each stack's depth."""
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(site.id.stack, []).append(site)
    if len(sites) <= most:
        return list(sites)
    share = max(1, most // len(stacks))
    chosen = []
    for listed in stacks.values():
        last, steps = len(listed) - 1, max(share - 1, 1)
        chosen += [listed[index] for index in sorted({last * step // steps for step in range(share)})]
    return chosen


def columns_of(site: Site) -> Tensor:
    """`[head, head_dim]` columns of the projection's input."""
    if site.columns is not None:
        return site.columns
    return torch.arange(site.n_heads * site.head_dim).reshape(site.n_heads, site.head_dim)


def slices_of(entering: Float[Tensor, "row width"], site: Site) -> Float[Tensor, "row head head_dim"]:
    """Each head's slice of what enters a projection."""
    return entering[:, columns_of(site).to(entering.device)]


def main_output(output: Any) -> Tensor:
    """Logits, else the last hidden state, else the first floating tensor of an output.

    Raises:
        InputError: there is none.
    """
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    values: Any = [output]
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, (tuple, list)):
        values = output
    found = next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
    if found is None:
        raise InputError(f"the model returned {type(output).__name__} without a tensor that runs could be compared by")
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, with NaN equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of `b`; positions that are NaN in both do not count."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = wide(a), wide(b)
    both = a.isnan() & b.isnan()
    a, b = a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)
    found = float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
    return float("inf") if found != found else found  # NaN in one of them is as far apart as can be


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def numbered(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Padded inputs with their positions as `generate` numbers them, where the model takes positions."""
    if "position_ids" not in named_arguments(model, (), {}):
        return dict(inputs)
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


@contextmanager
def _hooks(handles: Any) -> Iterator[None]:
    held: list[Any] = []
    try:
        held.extend(handles)
        yield
    finally:
        for handle in held:
            handle.remove()


def _unreached(model: nn.Module, calls: Mapping[str, int]) -> tuple[str, ...]:
    """Outermost pretrained parts of a model in which nothing was called."""
    from transformers import PreTrainedModel

    silent: list[str] = []
    for path, module in model.named_modules():
        below = path + "."
        if not path or not isinstance(module, PreTrainedModel) or any(path.startswith(o + ".") for o in silent):
            continue
        if not calls[path] and not any(count for name, count in calls.items() if name.startswith(below)):
            silent.append(path)
    return tuple(silent)
