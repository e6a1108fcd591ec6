"""Finding the attention sites of a model by running it: no list of architectures, no module names to rely on.

One forward of an example under a recording handler at the seam gives every call with its geometry, kernel and z. A
module with a 2-D weight whose input equals z, value for value, is the output projection. Where none does (a gate stands
between), one head of z is shifted at each position and the model run again: the first such module whose input changes
is the projection, and the columns that changed are the head's. Rows times values are held against the kernel's z at
every call, and a decode step shows whether a site reads a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.model.example import can_generate, example_inputs, generate_two, shortened
from headwise.model.naming import name_sites, stack_blocks
from headwise.model.projection import first
from headwise.model.recording import Recorder, Seen, listening, one_line, quietly
from headwise.model.shifting import SiteSeen, find_by_shifting
from headwise.model.site import Capability, Kind, Site
from headwise.model.sublayers import Sublayers, find_sublayers
from headwise.model.table import SiteTable

# The same for a projection of a sum against the sum of projections.
LINEAR_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
        Refusal: no attention was met at the registry.
    """
    if example is not None and not isinstance(example, Mapping):
        raise InputError(f"example= is a {type(example).__name__}; pass a mapping of the model's inputs by name")
    inputs = dict(example) if example is not None else example_inputs(model, tokenizer)

    def run() -> Any:
        return model(**inputs)

    with quietly(model):
        recorder = Recorder(model)
        with listening(model, recorder.attend), recorder.watching():
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
            raise Refusal(
                f"no attention call of {type(model).__name__} came by transformers' attention registry; "
                "headwise reaches models that take their attention from it (part of the older model files do not)"
            )
        _tell_cross_from_self(model, inputs, recorder.seen)
        sites = _grouped(recorder)
        for site in sites:
            if site.projection is None:
                find_by_shifting(model, run, site)
            if site.projection is not None:
                site.separable = _is_linear(site)
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
            return find_sublayers(model, run, stack_blocks(model, described), writes)

    return Discovery(SiteTable(described, sublayers), inputs)


def _tell_cross_from_self(model: nn.Module, inputs: Mapping[str, Any], calls: list[Seen]) -> None:
    """Correct the kinds where lengths alone mislead: cross-attention keeps its keys when its queries become fewer.

    The two sequences of an encoder-decoder may be equally long, and a trained prefix makes more keys than queries.
    """
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if not encoder_decoder and all(seen.kind == "self" for seen in calls):
        return
    shapes: list[tuple[nn.Module, int, int]] = []

    def attend(base: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, *args: Any, **o: Any) -> Any:
        shapes.append((module, int(query.shape[2]), int(key.shape[2])))
        return base(module, query, key, *args, **o)

    try:
        with listening(model, attend):
            model(**shortened(model, inputs))
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


# -- capabilities --------------------------------------------------------------------------------------------


def _is_linear(site: SiteSeen) -> Capability:
    """Whether the projection of all heads is the sum of the projections of two halves of them (bias taken once)."""
    assert site.projection is not None
    call = site.calls[0]
    if not site.gated and call.width != call.n_heads * call.head_dim:
        return Capability(False, f"its projection takes {call.width} columns for {call.n_heads} x {call.head_dim}")
    width = call.width or int(_matrix_width(site))
    parameter = next((p for p in site.projection.parameters() if p.is_floating_point()), None)
    like = call.z if parameter is None or parameter.is_meta else parameter
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator).to(device=call.z.device, dtype=call.z.dtype)
    half = torch.zeros(width, dtype=torch.bool, device=x.device)
    columns = torch.arange(width) if site.columns is None else site.columns.reshape(-1)
    half[columns[: len(columns) // 2].to(x.device)] = True
    try:
        with torch.no_grad():
            whole, nothing = first(site.projection(x)), first(site.projection(torch.zeros_like(x)))
            parts = first(site.projection(torch.where(half, x, 0))) + first(site.projection(torch.where(half, 0, x)))
    except Exception as error:
        return Capability(False, f"its projection does not run on rows alone ({one_line(error)})")
    site.d_model = int(whole.shape[-1])
    error_size = float((whole + nothing - parts).abs().max() / whole.abs().max().clamp(min=1e-12))
    if error_size <= LINEAR_TOLERANCE.get(like.dtype, 1e-2):
        return Capability(True)
    return Capability(False, f"its output projection is not linear (parts differ from the whole by {error_size:.1e})")


def _matrix_width(site: SiteSeen) -> int:
    call = site.calls[0]
    return call.n_heads * call.head_dim if site.columns is None else int(site.columns.max()) + 1


def _find_caches(model: nn.Module, inputs: Mapping[str, Any], sites: list[SiteSeen]) -> None:
    """One decode step after the example: sites that then see more keys than queries read a cache."""
    lengths: dict[int, list[tuple[int, int]]] = {}

    def attend(base: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, *args: Any, **o: Any) -> Any:
        lengths.setdefault(id(module), []).append((int(query.shape[2]), int(key.shape[2])))
        return base(module, query, key, *args, **o)

    reason = "the model has no key-value cache"
    if can_generate(model):
        try:
            with listening(model, attend):
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
    projection = None if site.projection is None or not site.separable else paths[id(site.projection)]
    missing = Capability(False, site.separable.reason or "no output projection was found")
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
        columns=site.columns,
        chunked=site.chunked,
        causal=call.causal,
        capabilities={
            "z": Capability(True),
            "rows": call.rows,
            "separable": site.separable,
            "projection": Capability(True) if projection is not None else missing,
            "cache": site.cache,
        },
    )


def _kind(site: SiteSeen) -> Kind:
    return "self" if site.chunked else site.calls[0].kind
