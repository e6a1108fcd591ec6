"""What reads and edits require of the sites and blocks that they name, asked before anything runs."""

from __future__ import annotations

from collections.abc import Collection

from headwise.errors import InputError, Refusal
from headwise.model import edit as edits_module
from headwise.model.edit import Edit
from headwise.model.finding.sublayers import Block
from headwise.model.operations import Received
from headwise.model.positions import Columns, Positions
from headwise.model.read import Read
from headwise.model.running.spans import refuse_other_kinds
from headwise.model.site import Site


def _refuse_before_sum(site: Site, what: str, instead: str) -> None:
    """Raises Refusal at z of a product that is only part of what its head hands on."""
    if site.added:
        raise Refusal(
            f"{what} with point='pre_gate' cannot be served at {site.label}: something is added to its z before it is "
            f"projected, so that it is only a part of what its heads hand on; {instead}"
        )


def require_edit(site: Site, edit: Edit) -> None:
    """Raises Refusal, or InputError for a scope without meaning, where a site cannot serve an edit."""
    if edit.variable in edits_module.ROW_VARIABLES:
        _require(site, "rows", f"edit.{edit.name} on {edit.variable}", "z edits still work")
    if edit.variable == "z":
        _require(site, "separable", f"edit.{edit.name} on z", "reads and pattern edits still work")
        if edit.point == "pre_gate":
            _refuse_before_sum(site, f"edit.{edit.name} on z", "point='post_gate' edits all that enters the projection")
    if edit.variable in ("q", "k"):
        what = f"edit.{edit.name} on {edit.variable}"
        _require(site, "qk", what, "edits of scores, patterns, v and z still work")
    if edit.variable == "v":
        _require(site, "v", f"edit.{edit.name} on v", "edits of patterns and z still work")
    require_scope(site, edit, site.label)
    on_keys = edit.variable in edits_module.GROUP_VARIABLES
    what = f"edit.{edit.name}"
    refuse_other_kinds(site, what, edit.when.place, site.key_spans if on_keys else None)
    refuse_other_kinds(site, what, edit.queries)
    for keys in (None if isinstance(edit.keys, Received) else edit.keys, getattr(edit.operation, "to", None)):
        refuse_other_kinds(site, what, keys, site.key_spans)


def require_read(site: Site, read: Read, known: Collection[str]) -> None:
    """Raises Refusal where a site cannot serve a read, InputError for a span that is not among the `known` ones."""
    if read.variable in ("q", "k"):
        _require(site, "qk", f"read.{read.variable}", "read.scores, read.rows, read.v and read.z still work")
    if read.variable == "v":
        _require(site, "v", "read.v", "read.rows and read.z still work")
    if read.variable in ("scores", "rows", "statistics"):
        _require(site, "rows", f"read.{read.variable}", "read.z still works")
    if read.variable == "write":
        _require(site, "projection", "read.write", "read.z(point='pre_gate') still works")
    if read.variable in ("z", "gate") and read.point == "post_gate":
        _require(site, "separable", f"read.{read.variable}", "read.z(point='pre_gate') still works")
    if read.variable == "gate" and read.point == "pre_gate":
        _refuse_before_sum(site, "read.gate", "point='post_gate' takes all that enters the projection")
    if read.variable == "write" and read.grad and site.by_span:
        raise Refusal(
            f"read.write at {site.label}: image and text are projected apart, so there is no one tensor whose "
            "gradient it could be; read.z(grad=True) works"
        )
    refuse_other_kinds(site, f"read.{read.name}", read.queries, site.key_spans if read.variable in "kv" else None)
    for name in read.spans:
        if name not in known:
            raise InputError(f"read.statistics wants span {name!r}, and spans= does not give it")
        refuse_other_kinds(site, f"read.{read.name}", f"span:{name}", site.key_spans)


def require_scope(site: Site, edit: Edit, label: str) -> None:
    """Raises InputError for decode steps where none are seen; `label` is what is edited, a site or a block."""
    if edit.when.place == "decode" and not site.capabilities["cache"]:
        raise InputError(
            f"scope='decode' has no meaning at {label}: {site.capabilities['cache'].reason}; use scope='all'"
        )


def require_block(block: Block, variable: str) -> None:
    """Raises Refusal where a block has no such tensor to act on."""
    if block.calls > 1:
        raise Refusal(
            f"{block.label} runs {block.calls} times in one forward (layers that share their weights), so its "
            f"{variable} has no one value; reads and edits of heads tell the calls apart (L0, L0@1, ...)"
        )
    if variable == "mlp" and block.mlp is None:
        raise Refusal(f"{block.label} has no feed-forward write to act on: {block.reasons.get('mlp', 'none found')}")
    if variable != "mlp" and not block.residual:
        raise Refusal(f"{block.label} has no residual stream to act on: {block.reasons.get('residual', 'none found')}")


def require_span(name: Positions, known: Collection[str]) -> None:
    """Raises InputError for a named span that was not given with the block."""
    if isinstance(name, Columns):
        for each in name.named:
            require_span(each, known)
        return
    if not isinstance(name, str) or not name.startswith("span:"):
        return
    name = name.removeprefix("span:")
    if name not in known:
        given = ", ".join(sorted(known)) or "none"
        raise InputError(
            f"'span:{name}': no such span was given (spans given: {given}); pass spans={{...}} with the block"
        )


def _require(site: Site, capability: str, what: str, instead: str) -> None:
    found = site.capabilities[capability]
    if not found:
        raise Refusal(f"{what} cannot be served at {site.label}: {found.reason}; {instead}")
