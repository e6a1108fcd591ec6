"""The direct path: from what a head writes to the logits, past every other head and feed-forward part.

    paths = direct_paths(model)
    with torch.no_grad(), paths.recording(tokens=1) as run:
        logits = model(**inputs).logits
    direction = run.directions(lambda raw: raw[:, -1, answer], logits)["L4"]     # [item, token, d_model]

The stream is a sum, and every norm that the sum or a write passes is a linear map once its scale is held at its value
of the run. So the logit is a sum over writes, and `direction` is what a write at a site is to be multiplied with: the
unembedding, taken back through the final norm, the blocks behind the site, and the site's own way to the stream (see
`ways`). Gains are part of it, and so is the centring of norms that centre.

The logits that are taken apart are those of the unembedding as it is, times what the model multiplies them with
(Granite, Cohere). A soft cap behind it (Gemma 2) is no multiple; there they are the logits before the cap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import Refusal
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.model.finding.norms import FinalNorm, NormAffine, float_dtype
from headwise.model.finding.sublayers import Block, first_tensor
from headwise.model.finding.ways import Way, norm_back

Raw = Float[Tensor, "item token vocab"]
Directions = Mapping[str, Float[Tensor, "item token d_model"]]

MULTIPLE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far from a multiple, as a share of the largest element, rounding may take a tensor; 1e-4 in wider types."""


@dataclass(frozen=True, eq=False)
class DirectPaths:
    """How the writes of one model's main stack reach its logits; made by `direct_paths`.

    Attributes:
        blocks: the stack's blocks in order, each with its ways.
        norm: the final norm, or None where the last block's output goes to the unembedding as it is.
        unembedding: the module that makes logits.
    """

    model: AttachedModel
    blocks: tuple[Block, ...]
    norm: FinalNorm | None
    unembedding: nn.Module

    @property
    def norms(self) -> tuple[FinalNorm, ...]:
        """Every norm on any path, the final one last."""
        ways = [way for block in self.blocks for way in block.ways.values() if isinstance(way, Way)]
        inner = {step.norm.module: step.norm for way in ways for step in way.steps}
        return (*inner.values(), *((self.norm,) if self.norm is not None else ()))

    def of_rows(self, rows: Float[Tensor, "row d_model"]) -> Mapping[str, Float[Tensor, "row d_model"]]:
        """Rows of the unembedding, or mixtures of them, as writes are to be multiplied with; by label as `directions`.

        No run is looked at: every norm has the scale 1, and what the model multiplies its logits with is left out.
        """
        affines = {norm.module: norm.affine(self.model.model) for norm in self.norms}
        scales = {module: rows.new_ones(len(rows), dtype=float_dtype(rows)) for module in affines}
        direction = rows.to(float_dtype(rows))
        if self.norm is not None:
            direction = norm_back(self.norm, direction, scales[self.norm.module], affines[self.norm.module])
        return DirectRun(self, 1)._before(direction, scales, affines)

    @contextmanager
    def recording(self, tokens: int) -> Iterator[DirectRun]:
        """Keep of the forward inside the block what freezes the norms, at the last `tokens` columns of each row."""
        run = DirectRun(self, tokens)
        root = self.model.model
        with ExitStack() as undo:

            def hook(module: nn.Module, keep: Callable[..., None]) -> None:
                undo.callback(module.register_forward_hook(keep, with_kwargs=True).remove)

            for norm in self.norms:
                hook(root.get_submodule(norm.module), run._keep(norm.module))
            hook(root.get_submodule(self.blocks[-1].module), run._keep("last block"))
            hook(self.unembedding, run._keep("unembedding"))
            yield run


@dataclass(eq=False)
class DirectRun:
    """One forward, as far as direct paths need it."""

    paths: DirectPaths
    tokens: int
    taken: dict[str, Tensor] = field(default_factory=dict)
    returned: dict[str, Tensor] = field(default_factory=dict)

    def directions(
        self, score: Callable[[Raw], Float[Tensor, " item"]], logits: Float[Tensor, "item token vocab"]
    ) -> Directions:
        """What writes are to be multiplied with, by site label; `mlp.L0` and `stream.L0` for what else is added.

        `mlp.L0` is for the output of block L0's feed-forward module, `stream.L0` for the stream before that block.

        Args:
            score: takes raw logits at the last `tokens` columns, gives a number per item that is linear in them.
            logits: what the model returned, at the same columns.

        Raises:
            Refusal: what lies between the last block and the logits is no norm and no multiple.
        """
        root = self.paths.model.model
        affines = {norm.module: norm.affine(root) for norm in self.paths.norms}
        scales = {norm.module: norm.scale(self.taken[norm.module]) for norm in self.paths.norms}
        direction = self._of_unembedding(score) * self._behind(logits)
        norm = self.paths.norm
        if norm is not None:
            direction = norm_back(norm, direction, scales[norm.module], affines[norm.module])
        return self._before(direction, scales, affines)

    def uncapped(self, logits: Float[Tensor, "item token vocab"]) -> Float[Tensor, "item token vocab"]:
        """The logits that `directions` are of: those that the model returned, or those before a soft cap of them."""
        raw = self.returned["unembedding"]
        return logits if multiple_of(logits, raw) is not None else raw.to(float_dtype(raw))

    def _before(
        self, direction: Tensor, scales: Mapping[str, Tensor], affines: Mapping[str, NormAffine]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for block in reversed(self.paths.blocks):
            for name, way in block.ways.items():
                if isinstance(way, Way):
                    label = f"{name}.{block.label}" if name in ("mlp", "stream") else name
                    found[label] = way.back(direction, scales, affines)
            direction = found[f"stream.{block.label}"]
        return found

    def _of_unembedding(self, score: Callable[[Raw], Tensor]) -> Float[Tensor, "item token d_model"]:
        """The gradient of the score by what the unembedding was given."""
        matrix = plain_matrix(self.paths.unembedding)
        if matrix is None:
            return self._slope(lambda x: score(self._raw(x)), self.taken["unembedding"])
        raw = self.returned["unembedding"]
        return through_matrix(self._slope(lambda raw: score(raw.to(float_dtype(raw))), raw), matrix)

    def _slope(self, score: Callable[[Tensor], Float[Tensor, " item"]], at: Tensor) -> Tensor:
        """The gradient of a score that must be linear, at the value of the run."""
        with torch.enable_grad():
            leaf = at.detach().clone().requires_grad_()
            scores = score(leaf)
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        gradient = gradient.to(float_dtype(gradient))
        with torch.no_grad():
            parts = torch.where(gradient == 0, 0, gradient * leaf)
            rest = scores - score(torch.zeros_like(leaf)) - parts.sum((1, 2))
        largest = float(self.returned["unembedding"].abs().max())
        room = MULTIPLE.get(leaf.dtype, 1e-4) * (parts.abs().sum((1, 2)) + largest)
        if not bool((rest.abs() <= room).all()):
            raise Refusal(
                f"the unembedding of {self.paths.model.name} is not linear in what it takes, so the logits are no sum "
                "over heads; use knock-out"
            )
        return gradient

    def _raw(self, x: Tensor) -> Raw:
        raw = first_tensor(self.paths.unembedding.forward(x))
        assert raw is not None
        return raw.to(float_dtype(raw))

    def _behind(self, logits: Tensor) -> float:
        """The factors between the final norm and the unembedding, and behind it."""
        name = self.paths.model.name
        stream = self.returned["last block" if self.paths.norm is None else self.paths.norm.module]
        before = multiple_of(self.taken["unembedding"], stream)
        if before is None:
            what = "the last block" if self.paths.norm is None else "the final norm"
            raise Refusal(
                f"what the unembedding of {name} takes is not what {what} returns, so heads have no direct path to the "
                "logits; use knock-out"
            )
        raw = self.returned["unembedding"]
        behind = multiple_of(logits, raw)
        if behind is None and not _keeps_order(raw, logits):
            raise Refusal(
                f"the logits of {name} are not those of its unembedding, nor a multiple or a soft cap of them, so "
                "heads have no direct path to them; use knock-out"
            )
        return before * (1.0 if behind is None else behind)

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            returned = first_tensor(output)
            if given is not None:
                self.taken[name] = self._columns(given)
            if returned is not None:
                self.returned[name] = self._columns(returned)

        return hook

    def _columns(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise Refusal(
                f"{self.paths.model.name} normalises its stream as rows of shape {list(x.shape)}, not as [item, "
                "position, d_model], so its norms cannot be held; use knock-out"
            )
        return x[:, -self.tokens :].detach().clone()


def direct_paths(model: AttachedModel) -> DirectPaths:
    """How every head of the main stack reaches the logits.

    Raises:
        Refusal: a block's stream or a site's write does not go on by factors and norms alone; no unembedding.
    """
    stack = model.table.stacks[0]
    found = {SiteId.parse(label): block for label, block in model.table.sublayers.blocks.items()}
    blocks = tuple(found[id] for id in sorted(found) if id.stack == stack)
    if not blocks:
        raise Refusal(f"no list of blocks was found in {model.name}, so heads have no known path to its logits")
    ways = {name: way for block in blocks for name, way in block.ways.items() if name not in ("mlp", "stream")}
    for block in blocks:
        stream = block.ways.get("stream", "the block returned no stream")
        if isinstance(stream, str):
            raise Refusal(f"{block.label} of {model.name}: the stream cannot be followed through it: {stream}")
    for site in model.sites:
        way = ways.get(site.label, f"its block has no projection of it ({site.projection})")
        if site.id.stack == stack and isinstance(way, str):
            raise Refusal(f"{site.label} of {model.name}: how it writes to the stream cannot be told: {way}")
    unembedding = unembedding_of(model)
    if unembedding is None:
        raise Refusal(f"{model.name} has no unembedding, so there are no logits to take apart; use knock-out")
    return DirectPaths(model, blocks, model.table.sublayers.final_norms.get(stack), unembedding)


def unembedding_of(model: AttachedModel) -> nn.Module | None:
    """The module that makes logits; None in a model that has none."""
    inner = getattr(model.model, "get_base_model", None)
    network: Any = inner() if callable(inner) else model.model
    asked = getattr(network, "get_output_embeddings", None)
    module = asked() if callable(asked) else None
    return module if isinstance(module, nn.Module) else None


def plain_matrix(module: nn.Module | None) -> Float[Tensor, "vocab d_model"] | None:
    """The weights of a plain linear layer; None where its forward or its weights are something else's (quantised,
    offloaded, wrapped), whose gradient has to be taken through them."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return None
    in_memory = type(module.weight) is nn.Parameter and not module.weight.is_meta
    return module.weight.detach() if in_memory else None


def through_matrix(
    gradient: Float[Tensor, "item token vocab"], matrix: Float[Tensor, "vocab d_model"]
) -> Float[Tensor, "item token d_model"]:
    """A gradient by logits, taken back through the unembedding. A score looks at a few logits: only their rows of the
    matrix are needed, and not a pass through all of it, which is felt beside one forward."""
    looked_at = (gradient != 0).flatten(0, -2).any(0)
    if bool(looked_at.all()):
        return gradient @ matrix.to(gradient)
    return gradient[..., looked_at] @ matrix[looked_at].to(gradient)


def multiple_of(x: Tensor, of: Tensor) -> float | None:
    """c, where x = c * of; None where it is no multiple. Rows that are no number (padding) say nothing."""
    if x.shape != of.shape:
        return None
    if torch.equal(x, of) and bool(of.any()):
        return 1.0
    tolerance = max(MULTIPLE.get(each.dtype, 1e-4) for each in (x, of))
    x, of = x.double(), of.double()
    kept = x.isfinite().all(-1) & of.isfinite().all(-1)
    x, of = x[kept], of[kept]
    if not bool(of.any()):
        return None
    c = float((x * of).sum() / of.square().sum())
    return c if c and float((x - c * of).abs().max()) <= tolerance * float(x.abs().max()) else None


def _keeps_order(raw: Tensor, logits: Tensor) -> bool:
    """Whether larger raw logits are never smaller logits: what a soft cap does, applied to each alone."""
    if raw.shape != logits.shape:
        return False
    rows, capped = raw.reshape(-1, raw.shape[-1]), logits.reshape(-1, raw.shape[-1])
    ordered = capped.gather(-1, rows.argsort(-1))
    slack = MULTIPLE.get(raw.dtype, 1e-5) * float(ordered.abs().max())
    return bool((ordered.diff(dim=-1) >= -slack).all())
