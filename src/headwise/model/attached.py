"""A model with its heads in reach: `hw.attach(model)`, then `reading` and `editing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model.capture import Opened
from headwise.model.edit import Edit
from headwise.model.finding.discover import discover
from headwise.model.identity import weights_hash
from headwise.model.positions import SpanRows
from headwise.model.read import Read
from headwise.model.running.denoising import BRANCHES, Denoising, Guidance, checked_denoising
from headwise.model.running.dual import Dual, open_dual
from headwise.model.running.lowering import Lowered, open_lowered
from headwise.model.running.plan import Layer
from headwise.model.running.rescoring import Rescore, Rescoring, open_rescoring
from headwise.model.running.runner import Runner, refuse_dropout
from headwise.model.site import Site, Unserved
from headwise.model.table import SiteTable
from headwise.scores import Provenance

if TYPE_CHECKING:
    from headwise.model.proving.doctor import DoctorReport


class AttachedModel:
    """A transformers model whose attention heads can be read and edited; made by `attach`.

    Calls and `generate` go to the model itself, which stays what it was: nothing is replaced, no weight is copied, and
    outside `reading` and `editing` every kernel runs on untouched arguments. `detach()` (or leaving a `with` block)
    takes off what `attach` put on.

    Attributes:
        model: the model as it was given.
        tokenizer, processor: as given, or None.
        example: the inputs of the probe forward that found the sites.
        name, revision: where the model came from.
    """

    def __init__(
        self,
        model: nn.Module,
        table: SiteTable,
        example: Mapping[str, Any],
        *,
        tokenizer: Any = None,
        processor: Any = None,
        name: str = "",
        revision: str | None = None,
    ) -> None:
        self.model = model
        self.table = table
        self.example = dict(example)
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name
        self.revision = revision
        self._runner = Runner(model, table)

    # -- the model --------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, under the open plan."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.table.sites

    @property
    def unserved(self) -> tuple[Unserved, ...]:
        """Modules that seem to attend and could not be reached, with the reasons."""
        return self.table.unserved

    @property
    def device(self) -> torch.device:
        """Where inputs belong; parameters that are offloaded are nowhere between calls."""
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def planned(self) -> bool:
        """Whether a plan of reads or edits is open."""
        return self._runner.planned

    def answering(self, site: Site, entering: Tensor) -> Tensor:
        """What enters a projection, after edits of z of the open plan, where no attention runs in front of it."""
        return self._runner.answering(site, entering)

    def site(self, label: str) -> Site:
        """The site of a label such as `L4`. Raises InputError, with the nearest labels, if there is none."""
        return self.table.site(label)

    def heads(self, which: Any = None) -> HeadSet:
        """Heads by any name: labels, site labels (`L4`), stack names (`encoder`), KV groups; None is all of them."""
        return self.table.select(which, "head")

    def groups(self, which: Any = None) -> HeadSet:
        """KV groups by any name; None is all of them."""
        return self.table.select(which, "group")

    def provenance(
        self,
        method: str,
        settings: Mapping[str, Any] | None = None,
        *,
        probe: str | None = None,
        seed: int | None = None,
    ) -> Provenance:
        """Where scores made on this model now come from: model, revision, a hash of its weights, versions.

        Raises:
            Refusal: the weights are not in memory.
        """
        return Provenance(
            method=method,
            settings=dict(settings or {}),
            model=self.name,
            revision=self.revision,
            weights_hash=weights_hash(self.model),
            probe=probe,
            seed=seed,
        )

    def doctor(self, *, seed: int = 0) -> DoctorReport:
        """Prove on this model, dtype, device and kernel that reads and edits do what they say (see `doctor`)."""
        from headwise.model.proving.doctor import examine

        return examine(self, seed=seed)

    # -- plans ------------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(
        self,
        *reads: Read,
        spans: Mapping[str, SpanRows] | None = None,
        prompt_length: int | None = None,
        strict: bool = False,
    ) -> Iterator[Opened]:
        """Keep what `reads` ask for of every run inside the block; `got.z["L4"]` holds the latest run's.

        Args:
            spans: named columns: one list for all rows, or one per row; rows are expanded over beams.
            prompt_length: where the prompt ends, for decoding loops that do not use `generate` and fill the cache
                piece by piece, and for a prompt given together with its answer.
            strict: whether a read that met no position is an error, too.

        Raises:
            InputError, Refusal: something asked for does not exist or cannot be served; nothing has run.
            NotFired: on return of a run, or of the block, a site that was asked for never ran.
            PlanConflict: the model is running, or another thread has a plan open.
        """
        _require_all(reads, Read, "reading() takes reads such as hw.read.z()")
        with self._runner.open(Layer(reads, (), _named(spans), prompt_length, strict, Opened())) as opened:
            yield opened

    @contextmanager
    def editing(
        self,
        *edits: Edit,
        spans: Mapping[str, SpanRows] | None = None,
        prompt_length: int | None = None,
        strict: bool = False,
    ) -> Iterator[Opened]:
        """Carry `edits` out in every run inside the block; `spans`, `prompt_length`, `strict`, errors as in `reading`.

        Blocks nest: edits of outer ones come first, and a reading inside sees what the model used.
        """
        _require_all(edits, Edit, "editing() takes edits such as hw.edit.zero('L1H2')")
        reads = tuple(each for edit in edits for each in edit.reads)
        with self._runner.open(Layer(reads, edits, _named(spans), prompt_length, strict, Opened())) as opened:
            yield opened

    @contextmanager
    def dual(
        self,
        *second: Edit,
        combine: Callable[[Tensor, Tensor], Tensor] | None = None,
        mode: str = "batch",
        without: str | None = None,
        spans: Mapping[str, SpanRows] | None = None,
        prompt_length: int | None = None,
        strict: bool = False,
    ) -> Iterator[Dual]:
        """Run a second stream beside every run inside the block: contrast its logits, or patch from it.

        Args:
            second: the second stream's edits. Edits of the first stream are opened with `editing` inside or outside;
                the value `hw.edit.OTHER` in them is the second stream's tensor.
            combine: makes of both streams' logits, each `[batch, position, vocab]`, those that the run returns.
            mode: `batch`, both streams in one forward of twice the rows, or `caches`, one forward and cache each.
            without: a span of the prompt whose tokens the second stream does not have.
            spans, prompt_length, strict: as in `reading`.

        Raises:
            As `reading`; Refusal if the model has no second stream `without` a span; and PlanConflict if a dual run or
            a rescoring is open already.
        """
        if second:
            _require_all(second, Edit, "dual() takes edits of the second stream")
        with open_dual(self._runner, second, combine, mode, without, _named(spans), prompt_length, strict) as dual:
            yield dual

    @contextmanager
    def rescoring(self, rescore: Rescore, blocks: Sequence[str]) -> Iterator[Rescoring]:
        """Return other logits from every run inside the block, made of its own and of streams of the same forward.

        Args:
            rescore: takes the logits `[batch, position, vocab]` and, by block label, the residual stream before each
                block `[batch, position, d_model]` at the same positions (see `model.lens`); gives logits.
            blocks: labels such as `L4`.

        Raises:
            As `reading`, and PlanConflict if a dual run or a rescoring is open already.
        """
        with open_rescoring(self._runner, blocks, rescore) as rescoring:
            yield rescoring

    @contextmanager
    def denoising(
        self,
        *,
        guidance: Guidance | None = None,
        branches: Sequence[str] = BRANCHES,
        steps: int | None = None,
    ) -> Iterator[Denoising]:
        """Take the calls of a denoiser inside the block for one loop, so that scopes can name its steps and branches.

        Put it around the whole loop, and `editing` and `reading` inside it: `scope="steps:0-9 branch:conditional"`.
        A step is a stretch of calls with one timestep. Reads keep a value for every call of the loop, along a first
        axis; `got.fired` counts over the loop.

        Args:
            guidance: `batch`, the branches are equal parts of the rows of each call; `calls`, each has a call of its
                own in every step; None, there is no guidance.
            branches: names of the branches, in the order of the rows or calls.
            steps: how many steps the loop has; then a scope beyond them is refused at once, and a step too many is an
                error. Without it what never came is told when the block is left.

        Raises:
            InputError: a form of guidance, branches or steps that cannot be meant; in the loop, a timestep that turns
                back, and under `calls` a step with another number of calls than one (or two, ...) for each branch.
            NotFired, PlanConflict: as `reading`.
            Refusal: a dual run is open.
        """
        loop = checked_denoising(guidance, branches, steps)
        with self._runner.open(Layer((), (), {}, None, False, Opened(), denoising=loop)):
            yield loop
            loop.close()

    @contextmanager
    def lowered(self, heads: Any = None) -> Iterator[Lowered]:
        """Edits of z for a compiled model: `lowered.set(hw.edit.zero("L4H0"))` writes numbers that the graph reads.

        Compile the model inside the block; what was compiled before, of any model, is compiled anew on its next run.
        Edits of an `editing` block inside come first, and reads of z see what these left; `write` is what is written.

        Args:
            heads: the heads whose sites are prepared, by any name; None is every site that can be.

        Raises:
            Refusal: a site that was named cannot be lowered, or none can.
            PlanConflict: a plan is open on the model, or a site is lowered already.
        """
        with open_lowered(self, heads) as lowered:
            yield lowered

    # -- taking off -------------------------------------------------------------------------------------------------

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside the block the model runs as if it had never been attached.

        Raises:
            PlanConflict: a plan is open, the model is running, or it was detached.
            InputError: the model is in training mode with dropout.
        """
        with self._runner.aside():
            yield

    @contextmanager
    def unplanned(self) -> Iterator[None]:
        """Inside the block no plan is open, for runs that find something out about the model; then those that were are
        again, with all that they hold. Raises PlanConflict mid-run."""
        with self._runner.unplanned():
            yield

    @contextmanager
    def prompted(self, length: int) -> Iterator[None]:
        """Inside the block the prompt of a forward ends after so many columns, unless an open plan says otherwise: for
        a prompt that is run together with its answer under a plan that was opened before it was known."""
        before, self._runner.prompt_length = self._runner.prompt_length, length
        try:
            yield
        finally:
            self._runner.prompt_length = before

    def detach(self) -> None:
        """Take off everything that was put on; the model is as it was before `attach`. Raises PlanConflict mid-run."""
        self._runner.close()

    def __reduce__(self) -> Any:
        raise Refusal(
            "an attached model is not copied or pickled; copy its .model, with no plan open, and attach the copy"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{sum(s.n_heads for s in self.sites if s.id.stack == stack)} heads in {stack}"
            for stack in self.table.stacks
        )
        missed = f"; {len(self.unserved)} modules attend out of reach (.unserved)" if self.unserved else ""
        return f"<{type(self.model).__name__} {self.name!r}: {counts}{missed}>"


def attach(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    processor: Any = None,
    example: Mapping[str, Any] | None = None,
    name: str = "",
    revision: str | None = None,
) -> AttachedModel:
    """Reach the heads of a model that is in memory.

    One or two small forwards find its attention sites, their geometry and what is safe to do there. The model itself is
    left as it is.

    Args:
        model: any transformers >= 5 model (also inside a PEFT wrapper), or a denoiser of diffusers. Attention is
            reached through the registry of transformers, or, in models with code of their own, at the functions of
            torch that it is made of; `Site.route` says which.
        tokenizer, processor: kept beside the model for what needs text or pictures.
        example: inputs of the probe forward; needed for models whose inputs cannot be made up from the
            configuration, and to reach a tower that text alone does not run.

    Raises:
        InputError: not a model, a model in training mode with dropout, or inputs that the model does not run on.
        Refusal: no attention was met, by any route.
        PlanConflict: the model is attached already.
    """
    if isinstance(model, AttachedModel):
        raise InputError("this is an attached model already; use it as it is")
    if not isinstance(model, nn.Module):
        raise InputError(f"attach() takes a transformers model, not a {type(model).__name__}; hw.load() takes a name")
    if tokenizer is not None and not callable(tokenizer):
        raise InputError(
            f"tokenizer= is a {type(tokenizer).__name__}; pass a tokenizer (it is called with text), or None"
        )
    refuse_dropout(model)
    found = discover(model, example=example, tokenizer=tokenizer, processor=processor)
    name = name or str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return AttachedModel(
        model, found.table, found.example, tokenizer=tokenizer, processor=processor, name=name, revision=revision
    )


def _require_all(given: tuple[Any, ...], kind: type[Read] | type[Edit], expected: str) -> None:
    wrong = next((each for each in given if not isinstance(each, kind)), None)
    if wrong is not None or not given:
        what = "nothing" if not given else f"a {type(wrong).__name__}"
        raise InputError(f"{expected}, one argument each; it was given {what}")


def _named(spans: Mapping[str, SpanRows] | None) -> dict[str, SpanRows]:
    if spans is not None and not isinstance(spans, Mapping):
        raise InputError(f"spans= takes a mapping from name to columns, not a {type(spans).__name__}")
    return dict(spans or {})
