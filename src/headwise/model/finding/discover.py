"""Finding the attention sites of a model by running it: no list of architectures, no module names to rely on.

One forward of an example under a recording handler at the seam gives every call with its geometry, kernel and z. A
module with a 2-D weight whose input equals z, value for value, is the output projection. Where none does (a gate stands
between), one head of z is shifted at each position and the model run again: the first such module whose input changes
is the projection, and the columns that changed are the head's. Rows times values are held against the kernel's z at
every call, and a decode step shows whether a site reads a cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.model.attention import multi_head
from headwise.model.attention.watching import Lost
from headwise.model.finding.denoiser_example import is_denoiser
from headwise.model.finding.example import can_generate, example_inputs, generate_two, shortened
from headwise.model.finding.naming import name_sites, stack_blocks
from headwise.model.finding.recording import Recorder, Seen, listening, one_line, quietly
from headwise.model.finding.shifting import SiteSeen, find_by_shifting
from headwise.model.finding.sublayers import Sublayers, find_sublayers, with_two_streams
from headwise.model.finding.token_spans import find_token_spans
from headwise.model.running.projection import first
from headwise.model.running.run import picture_token
from headwise.model.running.spans import IMAGE
from headwise.model.site import Capability, Kind, Site, TokenSpan, Unserved
from headwise.model.table import SiteTable

# The same for a projection of a sum against the sum of projections.
LINEAR_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


INSIDE = "its output projection is part of one fused call of torch, so what enters and leaves it is not seen"
OWN_SCORES = Capability(False, "the model makes its scores in code of its own, and what they are made of is not seen")


@dataclass(frozen=True)
class Discovery:
    """What one probe of a model found, and the inputs it was found with."""

    table: SiteTable
    example: dict[str, Any]


def discover(
    model: nn.Module, *, example: Mapping[str, Any] | None = None, tokenizer: Any = None, processor: Any = None
) -> Discovery:
    """Probe `model` and describe its sites; the model's mode, weights and random state are left as they were.

    Raises:
        InputError: no inputs could be made, or the model does not run on those given.
        Refusal: no attention was met, by any route; or torch would go past it in one fused step.
    """
    if example is not None and not isinstance(example, Mapping):
        raise InputError(f"example= is a {type(example).__name__}; pass a mapping of the model's inputs by name")
    inputs = dict(example) if example is not None else example_inputs(model, tokenizer)

    def run() -> Any:
        return model(**inputs)

    with quietly(model):
        recorder = Recorder(model)
        with recorder.listening():
            try:
                run()
            except (HeadwiseError, KeyboardInterrupt):
                raise
            except Exception as error:
                given = "the example given" if example is not None else "made-up inputs"
                raise InputError(
                    f"the probe forward failed on {given} ({type(error).__name__}: {one_line(error)}); "
                    "pass example={...}, inputs that this model runs on"
                ) from error
        if not recorder.seen:
            raise Refusal(_nothing_found(model, recorder.lost))
        _tell_cross_from_self(model, inputs, recorder.seen)
        sites = _grouped(recorder)
        _refuse_fused_layers(model, sites)
        find_token_spans(model, inputs, sites)
        for site in sites:
            if site.calls[0].kernel == multi_head.KERNEL:
                site.unhooked = INSIDE  # and linear by definition
                continue
            if not site.projections:
                find_by_shifting(model, run, site)
            for projection in site.projections:
                site.separable = _is_linear(site, projection) if site.separable else site.separable
            also = next((seen.also for seen in site.calls if seen.also is not None), None)
            if also is not None:
                path = next(path for path, module in model.named_modules() if module is also)
                site.separable = Capability(False, f"its z enters {path} as well, not its output projection alone")
        _leave_shared_projections(sites, recorder)
        if is_denoiser(model):
            sites = _without_slices(sites, recorder.lost)
        sites = _without_disordered(sites, recorder.lost)
        if not sites:
            raise Refusal(_nothing_found(model, recorder.lost))
        _find_caches(model, inputs, sites)

    paths = {id(module): path for path, module in model.named_modules()}
    named = name_sites(model, [(paths[id(site.module)], _kind(site)) for site in sites])
    described = tuple(
        sorted(
            (_describe(site, label, tower, paths) for site, (label, tower) in zip(sites, named, strict=True)),
            key=lambda site: site.id,
        )
    )

    def sublayers() -> Sublayers:
        with quietly(model):
            writes = {site.label: site.projection for site in described if site.projection is not None}
            found = find_sublayers(model, run, stack_blocks(model, described), writes)
            return with_two_streams(found, [site.id for site in described if site.kind == "joint"])

    met = frozenset() if picture_token(model) is None else frozenset({IMAGE})
    return Discovery(SiteTable(described, sublayers, _unserved(recorder.lost, sites, paths), met), inputs)


def _refuse_fused_layers(model: nn.Module, sites: Sequence[SiteSeen]) -> None:
    """Refuse layers of torch's own that attend in another way, and with other bits, where no gradients are wanted."""
    attending = {site.module for site in sites}
    for path, layer in model.named_modules():
        fused = isinstance(layer, nn.TransformerEncoderLayer) and not attending.isdisjoint(layer.modules())
        if fused and torch.backends.mha.get_fastpath_enabled():
            raise Refusal(
                f"{path or 'the model'} is a TransformerEncoderLayer, which torch may run as one fused step past all "
                "that reads and edits its heads; call torch.backends.mha.set_fastpath_enabled(False) and attach again"
            )


def _nothing_found(model: nn.Module, lost: Sequence[Lost]) -> str:
    looked = (
        f"no attention was found in {type(model).__name__}: in the probe forward no call came by the registry of "
        "transformers, no fused attention of torch ran, and no softmax was multiplied with values in a known way"
    )
    paths = {id(module): path for path, module in model.named_modules()}
    reasons = dict.fromkeys(f"{paths[id(each.module)] or 'the model'}: {each.reason}" for each in lost)
    return f"{looked} ({'; '.join(list(reasons)[:3])})" if reasons else looked


def _without_slices(sites: Sequence[SiteSeen], lost: list[Lost]) -> list[SiteSeen]:
    """The sites whose calls hold whole rows: slices mix rows and heads, and no projection takes one slice in."""
    calls = Counter(id(site.module) for site in sites)
    sliced = {id(site.module): site.module for site in sites if calls[id(site.module)] > 1 and not site.projections}
    for key, module in sliced.items():
        reason = f"it attends in {calls[key]} slices of rows and heads; switch attention slicing off and attach again"
        lost.append(Lost(module, reason, 4))
    return [site for site in sites if id(site.module) not in sliced]


def _without_disordered(sites: Sequence[SiteSeen], lost: list[Lost]) -> list[SiteSeen]:
    """The sites whose queries stand in the order of the positions: of others nobody could say what a row is of."""
    reason = "it picks the queries that attend, so that rows of its pattern and of z are not positions in order"
    modules = {id(site.module): site.module for site in sites if site.disordered}
    lost += [Lost(module, reason, 4) for module in modules.values()]
    return [site for site in sites if id(site.module) not in modules]


def _unserved(lost: Sequence[Lost], sites: Sequence[SiteSeen], paths: Mapping[int, str]) -> tuple[Unserved, ...]:
    """What looks like attention of its own and is no site: a softmax with an axis for heads is no router's."""
    served = {id(site.module) for site in sites}
    found = {paths[id(each.module)]: each.reason for each in lost if each.n_axes > 3 and id(each.module) not in served}
    return tuple(Unserved(path, reason) for path, reason in found.items())


def _tell_cross_from_self(model: nn.Module, inputs: Mapping[str, Any], calls: list[Seen]) -> None:
    """Correct the kinds where lengths alone mislead: cross-attention keeps its keys when its queries become fewer.

    The two sequences of an encoder-decoder may be equally long, and a trained prefix makes more keys than queries.
    """
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if not encoder_decoder and all(seen.kind == "self" for seen in calls):
        return
    try:
        shorter = shortened(model, inputs)
    except InputError:  # its inputs cannot be made up, and these are not given by position: lengths have to do
        return
    shapes: list[tuple[nn.Module, int, int]] = []

    def attend(base: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, *args: Any, **o: Any) -> Any:
        shapes.append((module, int(query.shape[2]), int(key.shape[2])))
        return base(module, query, key, *args, **o)

    try:
        with listening(model, attend, {seen.module: None for seen in calls if seen.route == "watched"}):
            model(**shorter)
    except (HeadwiseError, KeyboardInterrupt):
        raise
    except Exception:  # a model that does not take it: the lengths are all there is to go by
        return
    if [module for module, _, _ in shapes] != [seen.module for seen in calls]:
        return
    for seen, (_, n_queries, n_keys) in zip(calls, shapes, strict=True):
        if n_queries != seen.n_queries:
            seen.kind = "cross" if n_keys == seen.n_keys else "self"


def _grouped(recorder: Recorder) -> list[SiteSeen]:
    """Calls in sites: the pieces that one projection took in together are one site, other calls one each."""
    by_module: dict[int, list[list[Seen]]] = {}
    for seen in recorder.seen:
        sites = by_module.setdefault(id(seen.module), [])
        if sites and seen.taken_with is not None and seen.taken_with == sites[-1][0].taken_with:
            sites[-1].append(seen)
        else:
            sites.append([seen])
    return [
        SiteSeen(pieces, ordinal, projection=pieces[0].projection)
        for sites in by_module.values()
        for ordinal, pieces in enumerate(sites)
    ]


def _leave_shared_projections(sites: Sequence[SiteSeen], recorder: Recorder) -> None:
    """Watched sites whose projection takes in other tensors as well: a hook on it could not tell which is their z."""
    for module in {site.projection for site in sites if site.projection is not None}:
        served = [site for site in sites if site.projection is module]
        n_calls = recorder.entries[module]
        if served[0].watched and n_calls != len(served):
            for site in served:
                site.unhooked = f"its output projection runs {n_calls} times for {len(served)} calls of attention"


# -- capabilities --------------------------------------------------------------------------------------------


def _is_linear(site: SiteSeen, projection: nn.Module) -> Capability:
    """Whether a projection of all heads is the sum of the projections of two halves of them (bias taken once)."""
    call = site.calls[0]
    if call.width and call.width != call.n_heads * call.head_dim:
        return Capability(False, f"its projection takes {call.width} columns for {call.n_heads} x {call.head_dim}")
    width = site.width or call.n_heads * call.head_dim
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator).to(device=call.z.device, dtype=call.z.dtype)
    half = torch.zeros(width, dtype=torch.bool, device=x.device)
    columns = torch.arange(width) if site.columns is None else site.columns.reshape(-1)
    half[columns[: len(columns) // 2].to(x.device)] = True
    try:
        with torch.no_grad():
            whole, nothing = first(projection(x)), first(projection(torch.zeros_like(x)))
            parts = first(projection(torch.where(half, x, 0))) + first(projection(torch.where(half, 0, x)))
    except Exception as error:
        return Capability(False, f"its projection does not run on rows alone ({one_line(error)})")
    if site.d_model not in (0, whole.shape[-1]):
        return Capability(False, f"its projections return {site.d_model} and {whole.shape[-1]} columns")
    site.d_model = int(whole.shape[-1])
    error_size = float((whole + nothing - parts).abs().max() / whole.abs().max().clamp(min=1e-12))
    if error_size <= LINEAR_TOLERANCE.get(precision(projection, call.z), 1e-2):
        return Capability(True)
    return Capability(False, f"its output projection is not linear (parts differ from the whole by {error_size:.1e})")


def precision(projection: nn.Module, z: Tensor) -> torch.dtype:
    """The dtype that a projection computes in, or one as coarse as what it does.

    Packed weights are multiplied in half precision, whatever z is; torch's dynamic ones round z to eight bits.
    """
    weight = getattr(projection, "weight", None)
    if callable(weight) or (isinstance(weight, Tensor) and not weight.is_floating_point()):
        return torch.bfloat16
    parameter = next((p for p in projection.parameters() if p.is_floating_point() and not p.is_meta), z)
    return parameter.dtype


def _find_caches(model: nn.Module, inputs: Mapping[str, Any], sites: list[SiteSeen]) -> None:
    """One decode step after the example: sites that then see more keys than queries read a cache."""
    lengths: dict[int, list[tuple[int, int]]] = {}

    def attend(base: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, *args: Any, **o: Any) -> Any:
        lengths.setdefault(id(module), []).append((int(query.shape[2]), int(key.shape[2])))
        return base(module, query, key, *args, **o)

    reason = "the model has no key-value cache"
    if can_generate(model):
        try:
            with listening(model, attend, [module for site in sites for module in site.watched]):
                generate_two(model, inputs)
            reason = "it sees no cached keys in decode steps"
        except (HeadwiseError, KeyboardInterrupt):
            raise
        except Exception as error:
            reason = f"generating two tokens failed ({type(error).__name__}: {one_line(error)})"
    for site in sites:
        seen = lengths.get(id(site.module), [])
        decoding = bool(seen) and seen[-1][0] == 1 < seen[-1][1] and len(seen) > 1
        site.cache = Capability(True) if decoding else Capability(False, reason)


def _describe(site: SiteSeen, label: Any, tower: str, paths: Mapping[int, str]) -> Site:
    call = site.calls[0]
    hooked = bool(site.separable) and not site.unhooked
    projection = paths[id(site.projection)] if site.projection is not None and hooked else None
    missing = site.separable.reason or site.unhooked or "no output projection was found"
    spans = tuple(
        TokenSpan(span.name, projection if span.projection is None else paths[id(span.projection)])
        for span in site.spans
    )
    return Site(
        id=label,
        module=paths[id(site.module)],
        kind=_kind(site),
        n_heads=call.n_heads,
        n_kv_heads=call.n_kv_heads,
        qk_dim=call.qk_dim,
        head_dim=call.head_dim,
        d_model=site.d_model,
        kernel=call.kernel,
        tower=tower,
        projection=projection,
        gated=site.gated,
        added=site.added,
        columns=site.columns,
        chunked=site.chunked,
        causal=call.causal,
        route=call.route,
        entering=call.entering,
        spans=spans,
        key_spans=site.key_spans,
        joined_in=None if site.joined_in is None else paths[id(site.joined_in)],
        capabilities={
            "z": Capability(True),
            "qk": Capability(True) if call.qk_dim else OWN_SCORES,
            "v": call.values,
            "rows": call.rows,
            "separable": site.separable,
            "projection": Capability(True) if site.projections and hooked else Capability(False, missing),
            "cache": site.cache,
        },
    )


def _kind(site: SiteSeen) -> Kind:
    return "self" if site.chunked else site.calls[0].kind
