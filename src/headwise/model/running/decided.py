"""Numbers that the prompt decides: what heads bring to its last token, beside what they bring without a span of it.

Before the first forward of a run the prompt runs once without the span: its tokens are dropped, and what is left is a
prompt of its own, with no plan open on the model. When the forward itself comes to a site, the numbers are chosen from
z at the last token of both, so an edit of an earlier layer has acted on the one and not on the other. They are kept for
the run: a decoding step has the prompt's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from headwise.errors import InputError, NotFired, Refusal
from headwise.model import read
from headwise.model.capture import Opened
from headwise.model.operations import Decided, Here, Scale
from headwise.model.positions import Frame
from headwise.model.running.plan import Layer, Operations, Placed
from headwise.model.running.run import Run, parameter_names, picture_token

if TYPE_CHECKING:
    from headwise.model.running.runner import Runner
    from headwise.model.running.valuework import Stage
    from headwise.model.site import Site


def run_lacking(runner: Runner, run: Run, arguments: Mapping[str, Any]) -> None:
    """Make the runs without spans that the plan of `run` needs, if a prompt begins; `arguments` are the forward's.

    Raises:
        InputError: no such tokens in the prompt, nothing else in it, or its last token among them.
        Refusal: a model that does not continue text, a prompt that is not given in ids, or heads that do not run
            without the span.
    """
    frame = run.foreseen(runner.model, arguments, runner.known_prompt)
    if frame is None or frame.past or frame.total < frame.prompt:
        return  # told where the numbers are asked for
    for key, (decision, heads) in run.plan.decided.items():
        if key in run.lacking:  # without a cache every step is given the prompt
            continue
        inputs = _inputs(runner.model, arguments, frame, decision)
        layer = Layer((read.z(heads, queries=[-1]),), (), {}, None, False, Opened())
        try:
            with runner.interrupted(), torch.no_grad(), runner.open(layer) as got:
                runner.model(**inputs)
        except NotFired as error:
            raise Refusal(
                f"without {decision.without!r} a part of the model does not run, so nothing can be decided there "
                f"({error}); give heads of the stack that goes on with the prompt"
            ) from None
        run.lacking[key] = got.z


def decide(
    placed: Placed, stage: Stage, value: Decided, current: Float[Tensor, "batch position head dim"]
) -> Float[Tensor, "batch 1 head 1"]:
    """The numbers for an edit's heads at one site.

    Raises:
        InputError: the function gave something else than a number for each row and head.
        Refusal: the prompt was not seen whole by this run, or the run has gone on with another number of rows.
    """
    run, what = stage.run, f"edit.{placed.edit.name} at {stage.id.label}"
    place = (*placed.key, value.run, stage.stream, stage.chunk)
    if place not in run.decided:
        lacking, window = run.lacking.get(value.run), stage.window
        if lacking is None or window is None or window.frame.past:
            raise Refusal(
                f"{what}: its numbers are decided by the prompt, and this run does not show it the whole prompt in one "
                "forward of the whole model; use generate() or one forward, and a scope with the prompt's last token"
            )
        index = window.frame.prompt_end[:, None, None, None].expand(-1, 1, *current.shape[2:])
        last = current.detach().gather(1, index.to(current.device))[:, 0]
        held = lacking.heads_at(stage.site.id)
        other = lacking[stage.site.id][:, 0, [held.index(head) for head in placed.heads]]
        if len(other) != len(last):
            raise Refusal(f"{what}: the prompt has {len(other)} rows and this call {len(last)}; leave its edits out")
        with torch.no_grad():
            run.decided[place] = _checked(value.choose(last, other, _here(placed, stage)), last, what)
    numbers = run.decided[place]
    if len(numbers) != stage.batch:
        raise Refusal(
            f"{what}: its numbers were decided for {len(numbers)} rows, and the run goes on with {stage.batch}; use a "
            "way to generate that keeps its rows"
        )
    return numbers[:, None, :, None].to(current)


def kept_factors(
    placed: Placed, x: Float[Tensor, "batch position head dim"], stage: Stage
) -> Float[Tensor, "batch 1 head 1"] | None:
    """Factors of all heads in a decoding step, where an edit does nothing but to multiply by what was decided; else
    None. A step is short, and what is done at each is felt."""
    edit, window = placed.edit, stage.window
    factor = decided_factor(placed)
    if factor is None or window is None or window.frame.past < max(window.frame.prompt, 1):
        return None
    if edit.when.place not in ("all", "last") or edit.when.timed or edit.queries is not None or edit.rows is not None:
        return None
    place = (*placed.key, factor.run, stage.stream, stage.chunk)
    numbers = stage.run.decided.get(place)
    if numbers is None or len(numbers) != stage.batch or not isinstance(edit.strength, float) or edit.strength != 1:
        return None
    kept = (*place, x.dtype)
    if kept not in stage.run.decided:
        factors = torch.ones(len(numbers), 1, x.shape[2], 1, dtype=x.dtype, device=x.device)
        factors[:, 0, list(placed.heads), 0] = numbers.to(x)
        stage.run.decided[kept] = factors
    return stage.run.decided[kept]


def decided_factor(placed: Placed) -> Decided | None:
    """What an edit multiplies by, where the prompt decides it."""
    operation = placed.edit.operation
    return operation.factor if type(operation) is Scale and isinstance(operation.factor, Decided) else None


def settled_factors(operations: Operations, z: Float[Tensor, "batch position head dim"], stage: Stage) -> Tensor | None:
    """Factors of all heads, if to multiply z by them is all that is done at a site from this call of the run on."""
    listed = operations.edits.get("z", [])
    if len(listed) != 1 or len(operations.edits) != 1 or operations.reads or decided_factor(listed[0]) is None:
        return None
    plain = stage.stream is None and not stage.site.chunked and stage.site.route == "registry"
    return kept_factors(listed[0], z, stage) if plain and stage.run.plan.denoising is None else None


def factors_now(run: Run, site: Site, query: Float[Tensor, "batch head query dim"], chunk: int) -> Tensor | None:
    """The factors of a site that is settled, in a step behind the prompt; a run may show it again (a draft decodes in
    the same modules before the model reads the prompt)."""
    factors, frame = run.settled.get(site.id), run.frames.get(site.tower)
    if factors is None or frame is None or chunk or frame.past < max(frame.prompt, 1):
        return None
    return factors if (len(factors), frame.length) == (len(query), query.shape[2]) else None


def _here(placed: Placed, stage: Stage) -> Here:
    from headwise.model.running.valuework import here_of  # it asks for `decide` in turn

    return here_of(placed, stage, "values", 1)


def _checked(numbers: Any, last: Tensor, what: str) -> Float[Tensor, "batch head"]:
    if not isinstance(numbers, Tensor) or numbers.shape != last.shape[:2]:
        gave = list(numbers.shape) if isinstance(numbers, Tensor) else type(numbers).__name__
        raise InputError(f"{what}: the function of decided() gave {gave}; expected numbers {list(last.shape[:2])}")
    return numbers


def _inputs(network: Any, arguments: Mapping[str, Any], frame: Frame, decision: Decided) -> dict[str, Any]:
    """The prompt without the span, flush right; nothing else of what the forward was given."""
    name, ids = type(network).__name__, arguments.get("input_ids")
    if getattr(network.config, "is_encoder_decoder", False) or not isinstance(ids, Tensor):
        raise Refusal(f"{name} is not given a prompt to go on with in input_ids, so no span can be left out of it")
    rows = [ids[row, kept] for row, kept in enumerate(_kept(ids, frame, decision))]
    token = picture_token(network)
    if token is not None and any(bool(torch.eq(row, token).any()) for row in rows):
        raise Refusal(
            f"without {decision.without!r} pictures are left in the prompt, and that run has none; leave out 'image'"
        )
    width = max(map(len, rows))
    shorter: dict[str, Any] = {
        "input_ids": torch.stack([pad(row, (width - len(row), 0)) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]),
    }
    names = parameter_names(type(_inner(network)).forward)
    if "position_ids" in names and min(map(len, rows)) < width:
        shorter["position_ids"] = (shorter["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return shorter | ({"logits_to_keep": 1} if "logits_to_keep" in names else {})


def _kept(ids: Int[Tensor, "batch column"], frame: Frame, decision: Decided) -> Bool[Tensor, "batch column"]:
    """The columns of each row's prompt that are left."""
    prompt = frame.mask & (frame.columns <= frame.prompt_end[:, None])
    gone = frame.span(decision.without) & prompt
    if not bool(gone.any()):
        raise InputError(
            f"span {decision.without!r} has no token in this prompt, so nothing can be decided by leaving it out; give "
            "a prompt that has some"
        )
    gone = with_markers(ids, gone, decision.markers) & prompt
    if bool(gone.gather(1, frame.prompt_end[:, None]).any()):
        raise InputError(
            f"span {decision.without!r} holds a prompt's last token, which is what the next one is told from; let "
            "something stand behind it"
        )
    return prompt & ~gone


def with_markers(
    ids: Int[Tensor, "batch column"], span: Bool[Tensor, "batch column"], markers: Sequence[int]
) -> Bool[Tensor, "batch column"]:
    """A span and the markers that stand next to it, or next to one that does."""
    marking = torch.isin(ids, ids.new_tensor(markers))
    while True:
        wider = span | (marking & (pad(span, (1, -1)) | pad(span, (-1, 1))))
        if bool((wider == span).all()):
            return span
        span = wider


def _inner(network: Any) -> Any:
    base = getattr(network, "get_base_model", None)
    return base() if callable(base) else network
