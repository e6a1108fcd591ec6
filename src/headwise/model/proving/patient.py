"""The model under examination: plain runs of it, plain hooks on it, and the heads drawn for edits.

Nothing here goes through the seam or a plan, but for the question what is refused: it is the second way that the
doctor's checks are held against.
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

from headwise.errors import InputError, Refusal
from headwise.heads import Head, HeadSet, SiteId
from headwise.model import read
from headwise.model.attention.watching import Watching
from headwise.model.finding.example import placeholder_tokens
from headwise.model.running.projection import first
from headwise.model.running.run import named_arguments
from headwise.model.site import Site

if TYPE_CHECKING:
    from headwise.model.attached import AttachedModel

_ASKED_FOR: dict[str, Callable[..., read.Read]] = {
    "v": read.v,
    "rows": read.rows,
    "qk": read.q,
    "projection": read.write,
}
"""Capabilities by which a check reads at many sites at once, and the read."""

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
        """The sites that have these capabilities, and on this example refuse none of them."""
        return [
            site
            for site in self.attached.sites
            if all(site.capabilities[name] and (site.id, name) not in self.refused for name in capabilities)
        ]

    def heads(self, sites: Sequence[Site]) -> HeadSet:
        """The drawn head of each site."""
        return HeadSet(tuple(Head(site.id, self.drawn[site.id]) for site in sites))

    def why_not(self, *capabilities: str) -> str:
        """Why no site has these capabilities."""
        asked = [(site, name) for site in self.attached.sites for name in capabilities]
        reasons = [site.capabilities[name].reason or self.refused.get((site.id, name), "") for site, name in asked]
        return "; ".join(dict.fromkeys(reason for reason in reasons if reason)) or "no site allows it"

    @cached_property
    def refused(self) -> dict[tuple[SiteId, str], str]:
        """What sites that have a capability refuse on this example, with the words that they refuse it in.

        A capability is measured site by site; whether tokens have names where a site reads them hangs on the run, too.
        """
        return {
            (label, name): reason
            for name, make in _ASKED_FOR.items()
            for label, reason in self._refusals(make, [site for site in self.attached.sites if site.capabilities[name]])
        }

    def _refusals(self, make: Callable[..., Any], sites: Sequence[Site]) -> list[tuple[SiteId, str]]:
        if not sites:
            return []
        try:
            with self.attached.reading(make([site.id for site in sites], reduce=_nothing)):
                self.run()
        except Refusal as refusal:
            if len(sites) == 1:
                return [(sites[0].id, str(refusal))]
            half = len(sites) // 2
            return [*self._refusals(make, sites[:half]), *self._refusals(make, sites[half:])]
        except Exception:  # what else goes wrong is for the check that meets it to tell
            return []
        return []

    @cached_property
    def text(self) -> dict[str, Tensor] | None:
        """Two rows of the example's tokens with their mask, where a decoder runs on tokens alone; no pictures."""
        ids, mask = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False) or not self.sites("cache"):
            return None
        if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.dim() != 2 or len(ids) < 2:
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
        """What enters and leaves the projections of `sites`, calls joined, each as `[row, width]`.

        Where kinds of tokens are projected apart, both are joined as they stand in z; a kind that nothing projects is
        left out.
        """
        seen: dict[SiteId, tuple[Tensor, Tensor]] = {}
        apart: dict[tuple[SiteId, str], list[Tensor]] = {}
        paths = {id(self.model.get_submodule(path)): path for site in sites for path in site.takers}

        def see(module: nn.Module, site: Site, args: tuple[Any, ...], output: Any) -> None:
            parts = [part.detach() for part in (args[0], first(output))]
            if site.by_span:
                apart[site.id, paths[id(module)]] = parts
                if not all((site.id, path) in apart for path in site.takers):
                    return
                kinds = [apart.pop((site.id, path)) for path in site.takers]
                parts = [torch.cat(kind, dim=1) for kind in zip(*kinds, strict=True)]
            if site.entering == "positions":
                parts = [part.transpose(0, 1) for part in parts]
            new = tuple(part.reshape(-1, part.shape[-1]) for part in parts)
            old = seen.get(site.id)
            seen[site.id] = (
                (new[0], new[1]) if old is None else (torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]]))
            )

        with self._at_projections(sites, see, "register_forward_hook"):
            yield seen

    @contextmanager
    def without_biases(self, sites: Sequence[Site]) -> Iterator[None]:
        """What the projections of `sites` return is less their bias, by plain hooks."""

        def take_off(module: nn.Module, site: Site, args: tuple[Any, ...], output: Any) -> Tensor:
            with torch.no_grad():
                return first(output) - first(module.forward(torch.zeros_like(args[0])))

        with self._at_projections(sites, take_off, "register_forward_hook"):
            yield

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
            changed = args[0].index_copy(-1, columns, part)
            if not args[0].is_contiguous():  # another layout would be multiplied by another kernel, with other bits
                changed = torch.empty_strided(
                    args[0].shape, args[0].stride(), dtype=changed.dtype, device=changed.device
                ).copy_(changed)
            return (changed, *args[1:])

        sites = [site for site in self.attached.sites if site.id in factors]
        with self._at_projections(sites, cut, "register_forward_pre_hook"):
            yield

    @contextmanager
    def at_products(self, sites: Sequence[Site], change: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
        """`change(site, z)` in place of the z that watched sites' own functions return, past any plan."""
        own: dict[nn.Module, list[Site]] = {}
        for site in self.attached.sites:
            own.setdefault(self.model.get_submodule(site.module), []).append(site)
        wanted, turns = {site.id for site in sites}, dict.fromkeys(own, -1)

        def attend(base: Callable[..., Any], module: nn.Module, *args: Any, **options: Any) -> tuple[Any, ...]:
            turns[module] += 1
            site = own[module][turns[module] % len(own[module])]
            z = base(module, *args, **options)[0]
            return (change(site, z) if site.id in wanted else z,)

        with self.attached.aside():
            watching = Watching([self.model.get_submodule(site.module) for site in sites], attend)
            try:
                yield
            finally:
                watching.remove()

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
            path: [other for other in self.attached.sites if path in other.takers]
            for site in sites
            for path in site.takers
        }
        return _hooks(getattr(self.model.get_submodule(path), register)(hook(path, s)) for path, s in own.items())


def _nothing(value: Any) -> None:
    return None


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


def taken(x: Float[Tensor, "batch position *others"], site: Site, n_taken: int) -> Tensor:
    """`[row, ...]` of the positions whose z is taken in, `n_taken` rows: not all where nothing takes one kind's in."""
    positions = n_taken // len(x)
    if site.by_span and site.spans[0].projection is None:
        return x[:, x.shape[1] - positions :].flatten(0, 1)
    return x[:, :positions].flatten(0, 1) if site.by_span else x.flatten(0, 1)


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
    found = next(_floating(output), None)
    if found is None:
        raise InputError(f"the model returned {type(output).__name__} without a tensor that runs could be compared by")
    return found


def _floating(output: Any) -> Iterator[Tensor]:
    """Floating tensors of an output, in order, also those inside lists of its own."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _floating(value)


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
