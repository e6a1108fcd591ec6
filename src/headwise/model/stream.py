"""What heads and feed-forward parts add to the residual stream, each by itself, in the units of the stream.

    writes = stream_writes(model)
    with model.reading(read.z(), read.mlp()) as got, writes.recording() as run:
        model(**inputs)
    run.of_heads("L4", got.z["L4"])             # [batch, position, head, d_model]
    run.of_feed_forward("L4", got.mlp["L4"])    # [batch, position, d_model]

`read.write` is what a head puts into its output projection's result. A factor (Granite) or a norm (Gemma 2) may come
before it is added. A norm is linear once its scale is held at its value of the run, so what one head adds is still a
number of its own, and the sum over the parts of a block is what the block adds, up to constants (biases).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import Refusal
from headwise.heads import SiteId
from headwise.model.attached import AttachedModel
from headwise.model.finding.norms import FinalNorm, NormAffine
from headwise.model.finding.sublayers import Block
from headwise.model.finding.ways import Way
from headwise.model.running.projection import write_of
from headwise.model.site import Site

SAME = 1e-3
"""How far from 1 the measured factor of a stream on itself may be."""


@dataclass(frozen=True, eq=False)
class StreamWrites:
    """How the parts of one model's main stack reach its stream; made by `stream_writes`.

    Attributes:
        blocks: the stack's blocks in order.
        sites: its attention sites, by their block's label; a block has one or none.
    """

    model: AttachedModel
    blocks: tuple[Block, ...]
    sites: Mapping[str, Site]

    @contextmanager
    def recording(self) -> Iterator[WritesOfRun]:
        """Keep of the forward inside the block the scales of the norms that writes pass."""
        root = self.model.model
        run = WritesOfRun(self, {norm.module: norm.affine(root) for norm in self._norms})
        with ExitStack() as undo:
            for norm in self._norms:
                module: nn.Module = root.get_submodule(norm.module)
                undo.callback(module.register_forward_pre_hook(run._keep(norm)).remove)
            yield run

    @property
    def _norms(self) -> tuple[FinalNorm, ...]:
        ways = [way for block in self.blocks for way in block.ways.values() if isinstance(way, Way)]
        return tuple({step.norm.module: step.norm for way in ways for step in way.steps}.values())


@dataclass(eq=False)
class WritesOfRun:
    """One forward, as far as writes need it."""

    writes: StreamWrites
    affines: Mapping[str, NormAffine]
    scales: dict[str, Float[Tensor, "batch position"]] = field(default_factory=dict)

    def of_heads(
        self, site: SiteId | str, z: Float[Tensor, "batch position head head_dim"]
    ) -> Float[Tensor, "batch position head d_model"]:
        """What each head of a site adds to the stream, from the z of all its heads."""
        found = self.writes.model.site(SiteId.parse(site).label)
        assert found.projection is not None
        projection = self.writes.model.model.get_submodule(found.projection)
        written = write_of(z, projection, found, tuple(range(found.n_heads)))
        return self._way(found.id.label).forth(written, self.scales, self.affines)

    def of_feed_forward(
        self, block: SiteId | str, added: Float[Tensor, "batch position d_model"]
    ) -> Float[Tensor, "batch position d_model"]:
        """What a feed-forward part adds to the stream, from what `read.mlp` gives."""
        label = SiteId.parse(block).label
        found = next(each for each in self.writes.blocks if each.label == label)
        return self._way("mlp", label).forth(added / found.mlp_scale, self.scales, self.affines)

    def at_last(self) -> WritesOfRun:
        """The same for values at the last column alone."""
        return replace(self, scales={name: scale[:, -1:] for name, scale in self.scales.items()})

    def _way(self, name: str, label: str | None = None) -> Way:
        ways = (block.ways[name] for block in self.writes.blocks if name in block.ways and label in (None, block.label))
        way = next(ways)
        assert isinstance(way, Way)
        return way

    def _keep(self, norm: FinalNorm) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            given = args[0] if args else None
            if not isinstance(given, Tensor) or given.dim() != 3:
                raise Refusal(
                    f"{norm.module} is not given [batch, position, d_model], so its scale cannot be held; "
                    "patch heads (circuits.patching.patch_map) instead"
                )
            self.scales[norm.module] = norm.scale(given.detach())

        return hook


def stream_writes(model: AttachedModel) -> StreamWrites:
    """How every head and feed-forward part of the main stack reaches the stream.

    Raises:
        Refusal: there are no blocks; a block's stream does not go on as it is; a site attends to another sequence, or
            is not the only one of its block, or its write cannot be followed.
    """
    stack = model.table.stacks[0]
    found = {SiteId.parse(label): block for label, block in model.table.sublayers.blocks.items()}
    blocks = tuple(found[id] for id in sorted(found) if id.stack == stack)
    name, instead = model.name, "patch heads (circuits.patching.patch_map) instead"
    if not blocks:
        raise Refusal(f"no list of blocks was found in {name}, so its parts add to no stream that is known; {instead}")
    for block in blocks:
        way = block.ways.get("stream", "the block returned no stream")
        why = way if isinstance(way, str) else "a norm is put on the sum" if way.steps else ""
        if not why and isinstance(way, Way) and abs(way.factor - 1) > SAME:
            why = f"the block multiplies it with {way.factor:.4g}"
        if why:
            raise Refusal(f"{block.label} of {name}: its stream is not a sum over parts: {why}; {instead}")
        if block.mlp is not None and isinstance(block.ways.get("mlp"), str):
            raise Refusal(f"{block.label} of {name}: how its feed-forward part adds cannot be told; {instead}")
    sites: dict[str, Site] = {}
    for site in model.sites:
        around = next((block for block in blocks if site.module.startswith(f"{block.module}.")), None)
        if around is None:
            continue
        if site.kind != "self" or around.label in sites:
            why = "attends to another sequence" if site.kind != "self" else f"is the second attention of {around.label}"
            raise Refusal(f"{site.label} of {name} {why}, which the graph of a decoder has no place for; {instead}")
        way = around.ways.get(site.label, f"its block has no projection of it ({site.projection})")
        if isinstance(way, str):
            raise Refusal(f"{site.label} of {name}: how it adds to the stream cannot be told: {way}; {instead}")
        sites[around.label] = site
    return StreamWrites(model, blocks, sites)
