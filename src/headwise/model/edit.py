"""What can be changed: `hw.edit.zero("L4H0")`, `hw.edit.scale(heads, 2.0, scope="decode")` ...

An edit is one operation on one variable (q, k, v, score, pattern, z, mlp, residual) of some heads, at some positions.
It is a plain value; `model.editing(...)` resolves it against the sites of a model. Edits compose in the order given,
within the order of the computation: k and v, q, score, pattern, z, residual. Where an edit does not reach (other
heads, other positions, other rows) the kernel's own bits stay.

Options of every edit:
    scope     `all`, `prompt`, `decode`, `last`, `span:NAME`; for k and v the scope is of key columns; in a denoising
              loop also `steps:0-9` and `branch:NAME`, and several words with blanks between them
    queries   a further choice of query positions;  keys: of key columns (score and pattern edits only): columns,
              `"first"`, `inside(...)`, `outside(...)`, and what the run itself shows, `received(above)`
    rows      rows of the batch (before beams are expanded); None is all
    strength  0 is no edit, 1 the full one, between and beyond by straight line; a number or one per head
    stream    `first` or `second`, in a dual run

A value may be a number, a tensor `[n_heads]` or `[n_heads, dim]` in the order of the head set (`[dim]` for one head),
a mapping from head label to number or tensor, a function `(current, here) -> tensor`, or what a reading captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index as as_index
from typing import Any, Literal

from torch import Tensor

from headwise.catalogue import Entry, register
from headwise.errors import InputError
from headwise.model import operations as op
from headwise.model.positions import Columns, Positions, checked_positions
from headwise.model.read import HeadLike, Point, Read
from headwise.model.scopes import Scope, parse_scope

Variable = Literal["q", "k", "v", "score", "pattern", "z", "mlp", "residual_pre", "residual_post"]
VARIABLES = ("q", "k", "v", "score", "pattern", "z", "mlp", "residual_pre", "residual_post")
ROW_VARIABLES = frozenset({"score", "pattern"})
GROUP_VARIABLES = frozenset({"k", "v"})
BLOCK_VARIABLES = frozenset({"mlp", "residual_pre", "residual_post"})

Value = op.Value
Keys = Positions | op.Received


@dataclass(frozen=True, eq=False)
class Edit:
    """One operation on one variable of some heads in some scope; made by the functions of this module."""

    name: str
    variable: str
    operation: op.Operation
    heads: HeadLike
    scope: str = "all"
    queries: Positions = None
    keys: Keys = None
    rows: tuple[int, ...] | None = None
    strength: Value = 1.0
    point: Point = "post_gate"
    stream: Literal["first", "second"] = "first"
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[Read, ...] = ()
    """What has to be read in the same run for its value to be known; the `reduce` of each hands it on."""

    def __post_init__(self) -> None:
        parse_scope(self.scope)
        object.__setattr__(self, "queries", checked_positions(self.queries, "queries"))
        if not isinstance(self.keys, op.Received):
            object.__setattr__(self, "keys", checked_positions(self.keys, "keys"))
        if self.variable not in VARIABLES:
            raise InputError(f"variable={self.variable!r} is not one of {', '.join(VARIABLES)}")
        if self.point not in ("post_gate", "pre_gate"):
            raise InputError(f"point={self.point!r} is neither 'post_gate' nor 'pre_gate'")
        if self.stream not in ("first", "second"):
            raise InputError(f"stream={self.stream!r} is neither 'first' nor 'second'")
        if self.keys is not None and self.variable not in ROW_VARIABLES:
            raise InputError(f"keys= selects columns of score and pattern edits; this edit is on {self.variable}")
        if self.queries is not None and self.variable in GROUP_VARIABLES:
            raise InputError(f"a {self.variable} edit acts on key columns: use scope= (also span:NAME), not queries=")
        if self.decisions and (self.variable != "z" or self.point != "post_gate"):
            raise InputError(f"edit.{self.name}: decided() goes by z after the gate; the edit is on {self.variable}")
        if not self.operation.serves(self.variable):
            raise InputError(f"edit.{self.name} does not act on {self.variable}")

    @property
    def when(self) -> Scope:
        """The scope taken apart: where, and in a denoising loop at which steps and in which branch."""
        return parse_scope(self.scope)

    @property
    def decisions(self) -> tuple[op.Decided, ...]:
        """What the prompt decides of it."""
        return tuple(value for value in (*self.operation.values, self.strength) if isinstance(value, op.Decided))

    @property
    def reads_other(self) -> bool:
        """Whether a value is taken from the second stream of a dual run."""
        return any(value is op.OTHER for value in (*self.operation.values, self.strength))

    def __repr__(self) -> str:
        shown = {"scope": self.scope, **self.settings}
        return f"edit.{self.name}({self.heads!s}, {', '.join(f'{k}={_short(v)}' for k, v in shown.items())})"


def zero(heads: HeadLike, variable: Variable = "z", **options: Any) -> Edit:
    """Knock heads out by setting the variable to 0."""
    return _edit("zero", variable, op.Set(0.0), heads, options)


def scale(heads: HeadLike, factor: Value, variable: Variable = "z", **options: Any) -> Edit:
    """Multiply. On `score` a factor is an inverse temperature; on `pattern` with `keys=` it re-weights columns
    without renormalising."""
    return _edit("scale", variable, op.Scale(factor), heads, options, factor=factor)


def add(heads: HeadLike, value: Value, variable: Variable = "z", **options: Any) -> Edit:
    """Add a number, a vector per head `[n_heads, head_dim]`, or what a reading captured."""
    return _edit("add", variable, op.Add(value), heads, options)


def set(heads: HeadLike, value: Value, variable: Variable = "z", **options: Any) -> Edit:
    """Put a value in place: a number, `[n_heads]`, `[n_heads, head_dim]`, or one of the other forms of a value."""
    return _edit("set", variable, op.Set(value), heads, options)


def mix(heads: HeadLike, value: Value, weight: Value, variable: Variable = "z", **options: Any) -> Edit:
    """Straight-line mix, (1 - weight) * current + weight * value; both numbers, `[n_heads]` or `[n_heads, dim]`."""
    return _edit("mix", variable, op.Mix(value, weight), heads, options)


def patch(heads: HeadLike, source: Any, variable: Variable = "z", **options: Any) -> Edit:
    """Put the value of another run in place, column by column.

    `source` is what a reading captured of the same variable: `with model.reading(hw.read.z()) as donor: ...` and then
    `hw.edit.patch("L4H0", donor.z)`; or `hw.edit.OTHER`, the second stream of a dual run.
    """
    return _edit("patch", variable, op.Set(source), heads, options)


def mean(heads: HeadLike, reference: op.ReferenceValues, **options: Any) -> Edit:
    """Knock heads out by their mean z over a reference set (`hw.reference(model, batches)`)."""
    _require_reference("mean", reference)
    return _edit("mean", "z", op.Mean(reference), heads, _after_gate("mean", options), reference=reference)


def resample(heads: HeadLike, reference: op.ReferenceValues, seed: int = 0, **options: Any) -> Edit:
    """Knock heads out by putting the z of a random attended position of the reference set in place.

    The draw depends on seed, row and column alone: heads of one position share the donor, and runs with and without a
    cache draw the same.
    """
    _require_reference("resample", reference)
    options = _after_gate("resample", options)
    return _edit("resample", "z", op.Resample(reference, seed), heads, options, reference=reference, seed=seed)


def uniform(heads: HeadLike, **options: Any) -> Edit:
    """Knock heads out by equal attention over the visible keys (DeCoRe's masking)."""
    return _edit("uniform", "pattern", op.Uniform(), heads, options)


def bias(heads: HeadLike, amount: Value, *, keys: Keys = None, **options: Any) -> Edit:
    """Add to scores before softmax. `amount = log g` equals re-weighting the columns by g and renormalising."""
    return _edit("bias", "score", op.Add(amount), heads, {"keys": keys, **options}, amount=amount)


def block(heads: HeadLike, *, keys: Keys = None, **options: Any) -> Edit:
    """Hide keys from heads: their scores become -inf. They stay hidden for the edits that come after.

    Raises InputError for a strength other than 1: a key is hidden or not; `bias` and `reweight` do it by degrees.
    """
    if options.get("strength", 1.0) != 1.0:
        raise InputError("edit.block hides a key or does not, so it has no strength; use bias or reweight for degrees")
    return _edit("block", "score", op.Set(float("-inf")), heads, {"keys": keys, **options})


def reweight(heads: HeadLike, factor: Value, *, keys: Keys = None, **options: Any) -> Edit:
    """Multiply pattern columns by a factor and renormalise each row to the sum it had."""
    return _edit("reweight", "pattern", op.Reweight(factor), heads, {"keys": keys, **options}, factor=factor)


def redistribute(heads: HeadLike, share: Value, *, keys: Keys, to: Positions = None, **options: Any) -> Edit:
    """Take a share of each row's mass on `keys` and give it to `to` (None: all other visible keys) in proportion.

    Raises InputError for a share outside 0 to 1, and where `keys` is None.
    """
    if keys is None:
        raise InputError("edit.redistribute needs keys=, the columns whose mass is shared out")
    if isinstance(share, (int, float)) and not 0 <= share <= 1:
        raise InputError(f"share={share!r} is not a share; give a number from 0 to 1")
    to = checked_positions(to, "to")
    return _edit("redistribute", "pattern", op.Redistribute(share, to), heads, {"keys": keys, **options}, share=share)


def rewrite(heads: HeadLike, function: Callable[[Any, Any], Any], **options: Any) -> Edit:
    """Replace pattern rows by `function(pattern, here)`, an arbitrary pattern `[batch, head, query, key]`."""
    if not callable(function):
        raise InputError(f"edit.rewrite takes a function (pattern, here) -> pattern, not a {type(function).__name__}")
    return _edit("rewrite", "pattern", op.Set(function), heads, options)


OTHER = op.OTHER


def inside(*named: str) -> Columns:
    """As `keys=` (or `queries=`): columns of the prompt in any of these, `inside("span:rule", "span:name")`."""
    return Columns(_words("inside", named))


def outside(*named: str) -> Columns:
    """As `keys=` (or `queries=`): columns of the prompt in none of these."""
    return Columns(_words("outside", named), outside=True)


def received(above: float = 0.1, *, skip: int = 1) -> op.Received:
    """As `keys=`: the keys to which the prompt's tokens give more than this share on average, head by head, but for
    the first `skip` of them. Decoding steps have the prompt's keys."""
    return op.Received(above, skip)


def last_row(choose: Callable[[Any, Any], Tensor]) -> op.LastRow:
    """As `keys=`: the keys that `choose(row, here)` marks in the row of the prompt's last token.

    `row` is `[batch, head, key]`, of the heads of the edit at one site, and so is what comes back, True at the keys.
    It is asked once, when the prompt runs; decoding steps have the prompt's keys.
    """
    if not callable(choose):
        raise InputError(f"edit.last_row takes a function (row, here), not a {type(choose).__name__}")
    return op.LastRow(choose=choose)


def decided(choose: Callable[[Any, Any, Any], Tensor], *, without: str, markers: Sequence[int] = ()) -> op.Decided:
    """As the value of an edit of z: numbers by row and head that the prompt decides and the whole run keeps.

    Before the first forward of a run the prompt runs once more without a span, as if its tokens were not there, with no
    plan open. `choose(last, lacking, here)` is given z of the edited heads at the prompt's last token in both runs,
    `[batch, head, dim]`, and gives `[batch, head]`. The scope must hold that token (`last`, `prompt`, `all`).

    Args:
        without: name of the span.
        markers: ids that go with it where they stand next to it, such as the marks around a picture.
    """
    if not callable(choose):
        raise InputError(f"edit.decided takes a function (last, lacking, here), not a {type(choose).__name__}")
    return op.Decided(choose, without, tuple(markers))


def _words(function: str, named: tuple[str, ...]) -> tuple[str, ...]:
    if not named or not all(isinstance(each, str) for each in named):
        raise InputError(f"edit.{function} takes names of places, such as 'span:name'; it was given {named!r}")
    for each in named:
        checked_positions(each, f"edit.{function}")
    return named


def _edit(
    name: str, variable: str, operation: op.Operation, heads: HeadLike, options: dict[str, Any], **settings: Any
) -> Edit:
    allowed = {"scope", "queries", "keys", "rows", "strength", "point", "stream"}
    unknown = sorted(options.keys() - allowed)
    if unknown:
        raise InputError(f"edit.{name} has no option {unknown[0]!r}; it takes {', '.join(sorted(allowed))}")
    if heads is None:
        raise InputError(f"edit.{name} needs heads; name them, or pass model.heads() for all")
    if options.get("rows") is not None:
        options = {**options, "rows": _rows(options["rows"])}
    return Edit(name, variable, operation, heads, settings=settings, **options)


def _rows(rows: Any) -> tuple[int, ...]:
    try:
        listed = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if any(isinstance(row, bool) for row in listed):
            raise TypeError
        return tuple(as_index(row) for row in listed)
    except TypeError:
        raise InputError(
            f"rows={rows!r} is not a list of rows of the batch, such as [0, 2] (a mask is not one)"
        ) from None


def _require_reference(name: str, reference: Any) -> None:
    if not (hasattr(reference, "mean") and hasattr(reference, "draw")):
        raise InputError(
            f"edit.{name} takes a reference set, hw.reference(model, batches), not a {type(reference).__name__}"
        )


def _after_gate(name: str, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("point", "post_gate") != "post_gate":
        raise InputError(f"edit.{name} puts in place what a reference set holds, z after the gate; leave point= out")
    return options


def _short(value: Any) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else str(value)


for _function in (
    zero,
    scale,
    add,
    set,
    mix,
    patch,
    mean,
    resample,
    uniform,
    bias,
    block,
    reweight,
    redistribute,
    rewrite,
):
    register(
        Entry(
            id=_function.__name__,
            kind="edits",
            title=(_function.__doc__ or "").strip().splitlines()[0],
            page=f"edits.md#{_function.__name__}",
        )
    )
