"""The lens: what the unembedding would say of any residual stream (nostalgebraist 2020, "the logit lens").

    seen = lens(model)
    with model.reading(read.residual(where="pre")) as got:
        model(**inputs)
    seen.logits(got.residual_pre["L4"])                  # through the final norm, as the last stream goes
    seen.logits(got.residual_pre["L4"], normed=False)    # W_U alone, as DoLa's code has it

Of the last block's output the lens gives the model's own logits. What a model puts between its final norm and the
unembedding, and behind it, is measured on a forward: a factor (Granite, Cohere), a soft cap `c tanh(x / c)` (Gemma 2).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.model.direct import MULTIPLE, multiple_of, unembedding_of
from headwise.model.finding.norms import FinalNorm
from headwise.model.finding.sublayers import first_tensor

FAR = 1e3
"""A raw logit beyond any soft cap that is in use (Gemma 2 has 30)."""


@dataclass(frozen=True, eq=False)
class Lens:
    """From a stream to logits; made by `lens`.

    Attributes:
        norm: the final norm, or None where the last block's output goes to the unembedding as it is.
        unembedding: the module that makes logits.
        before: what its input is multiplied with.
        behind: what its output is multiplied with.
        cap: the soft cap on top of that; None is no cap.
    """

    model: AttachedModel
    norm: FinalNorm | None
    unembedding: nn.Module
    before: float = 1.0
    behind: float = 1.0
    cap: float | None = None

    def logits(
        self, stream: Float[Tensor, "*position d_model"], *, normed: bool = True
    ) -> Float[Tensor, "*position vocab"]:
        """The logits of a stream, with the graph that it has. In a model without a final norm `normed` says nothing.

        Raises:
            InputError: not `[..., d_model]` of floats.
        """
        d_model = self.d_model
        if not isinstance(stream, Tensor) or not stream.is_floating_point() or stream.shape[-1:] != (d_model,):
            gave = list(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
            raise InputError(f"the lens takes a residual stream [..., {d_model}] in floats, not {gave}")
        # Not called as modules: what is hooked on them is for the run's own stream.
        if normed and self.norm is not None:
            stream = _forward(self.model.model.get_submodule(self.norm.module), stream)
        raw = _forward(self.unembedding, stream if self.before == 1.0 else stream * self.before)
        raw = raw if self.behind == 1.0 else raw * self.behind
        return raw if self.cap is None else torch.tanh(raw / self.cap) * self.cap

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        sites = [site for site in self.model.sites if site.id.stack == self.model.table.stacks[0]]
        return next(site.d_model for site in sites if site.d_model)


def lens(model: AttachedModel) -> Lens:
    """The lens of a model's main stack. Runs the model once, on its example.

    Raises:
        Refusal: no unembedding, or what lies between the last block and the logits is not a final norm, factors and a
            soft cap.
        PlanConflict: the model is running.
    """
    unembedding, stack = unembedding_of(model), model.table.stacks[0]
    if unembedding is None:
        raise Refusal(f"{model.name} has no unembedding, so its streams say nothing in tokens; use a language model")
    labels = sorted(id for id in map(SiteId.parse, model.table.sublayers.blocks) if id.stack == stack)
    if not labels:
        raise Refusal(f"no list of blocks was found in {model.name}, so it has no known stream to look at")
    norm = model.table.sublayers.final_norms.get(stack)
    end = _end(model, labels[-1].label, unembedding)
    with torch.no_grad():
        entering = end.stream if norm is None else _forward(model.model.get_submodule(norm.module), end.stream)
    # Some models flatten rows; another width is another space (a projection stands in between).
    before = multiple_of(end.given.reshape(-1, end.given.shape[-1]), entering.reshape(-1, entering.shape[-1]))
    behind = _behind(end.raw, end.logits)
    if before is None or behind is None:
        where = "the last block and the unembedding" if before is None else "the unembedding and the logits"
        raise Refusal(f"what lies between {where} of {model.name} is no norm, factor or soft cap; it has no lens")
    return Lens(model, norm, unembedding, before, *behind)


@dataclass(frozen=True, eq=False)
class _End:
    """The end of one forward: the last block's output, what the unembedding took and gave, and the logits."""

    stream: Tensor
    given: Tensor
    raw: Tensor
    logits: Tensor


def _end(model: AttachedModel, last: str, unembedding: nn.Module) -> _End:
    """A plain forward in which the unembedding gives raw logits from nothing to far beyond any cap."""
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return None
        half = torch.logspace(-2, 3, output.shape[-1] // 2, base=10).to(output)
        ramp = torch.cat([half, -half, output.new_zeros(output.shape[-1] % 2)])
        kept.update(given=args[0], raw=ramp.expand_as(output))
        return kept["raw"].clone()

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if (stream := first_tensor(output)) is not None:
            kept["stream"] = stream

    block = model.model.get_submodule(model.table.block(last).module)
    with torch.no_grad(), model.unplanned(), ExitStack() as undo:
        undo.callback(unembedding.register_forward_hook(keep).remove)
        undo.callback(block.register_forward_hook(behind).remove)
        logits = getattr(model(**model.example), "logits", None)
    if not isinstance(logits, Tensor) or not {"given", "stream"} <= kept.keys():
        raise Refusal(f"{model.name} makes no logits of its last block on its example, so it has no lens")
    return _End(logits=logits, **kept)


def _behind(raw: Tensor, logits: Tensor) -> tuple[float, float | None] | None:
    """The factor and the soft cap (None: no cap) that make logits of raw ones; None where it is neither."""
    if raw.shape != logits.shape:
        return None
    if (factor := multiple_of(logits, raw)) is not None:
        return factor, None
    x, y = (each.reshape(-1, each.shape[-1])[0].double() for each in (raw, logits))
    small = x.abs() <= 10 * x[x != 0].abs().min()  # far below a cap tanh is its argument
    factor = float((x[small] * y[small]).sum() / x[small].square().sum())
    factor = 1.0 if abs(factor - 1) <= MULTIPLE.get(logits.dtype, 1e-4) else factor
    low, high = float(y.abs().max()), 100 * abs(factor) * FAR
    for _ in range(100):  # c tanh(f x / c) grows with c
        cap = (low + high) / 2
        low, high = (cap, high) if cap * float(torch.tanh(x.max() * factor / cap)) < float(y.max()) else (low, cap)
    room = MULTIPLE.get(logits.dtype, 1e-4) * float(y.abs().max())
    return (factor, cap) if float((cap * torch.tanh(x * factor / cap) - y).abs().max()) <= room else None


def _forward(module: nn.Module, stream: Tensor) -> Tensor:
    returned = first_tensor(module.forward(stream))
    assert returned is not None
    return returned
