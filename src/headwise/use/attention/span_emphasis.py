"""Span emphasis: heads that look at a passage of the prompt more than they would.

PASTA (Zhang et al., 2024, "Tell Your Model Where to Attend"; code: QingruZhang/PASTA): with the passage P, for chosen
heads, all rows and steps, and keys j of the prompt alone,

    exclude    s_j <- s_j + log a    for j outside P, a <= 1 (the paper's: 0.01)
    include    s_j <- s_j + log a    for j in P, a >= 1

which after softmax multiplies these weights by a and renormalises. Over the prompt, excluding with a is including with
1 / a; they differ in what generated tokens, which are never touched, are weighed against. Several passages are their
union. The released code adds log a once for each of them, so that a token outside two is down by a ^ 2, and where it
includes takes log a from the whole prompt again; `several = "compounding"` is that.

Context steering ("On the Loss of Context-awareness in General Instruction Fine-tuning", 2024; code:
YihanWang617/context_awareness) is the same with all heads, the text of the user, and a of 0.9 to 0.95.

Exact. Spans are columns of the padded rows and are given with the block (`spans=`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from headwise.catalogue import InterventionEntry
from headwise.errors import InputError, Refusal
from headwise.heads import HeadSet
from headwise.model import edit
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.positions import SpanRows
from headwise.model.scopes import parse_scope
from headwise.use.intervention import Intervention, finite, named_heads

Mode = Literal["exclude", "include"]
Several = Literal["union", "compounding"]


@dataclass(frozen=True, eq=False, repr=False)
class SpanEmphasis(Intervention):
    """Attend more to passages: `with SpanEmphasis("L2H1", "rule")(model, spans={"rule": [3, 4, 5]}): ...`.

    Attributes:
        heads: the heads; None for all of a model that has one stack.
        spans: names of the passages, one or several; their columns are given with the block.
        alpha: what weights are multiplied by; 1 changes nothing.
        mode: `exclude` puts down what lies outside (alpha up to 1), `include` raises what lies inside (from 1 on).
        several: how passages go together, see the top of this file.
        scope: queries whose rows are changed, in the words of `hw.edit`.
    """

    id: ClassVar[str] = "span-emphasis"
    heads: HeadSet | None
    spans: tuple[str, ...] | str
    alpha: float = 0.01
    mode: Mode = "exclude"
    several: Several = "union"
    scope: str = "all"

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", named_heads(self.heads, self.id))
        spans = (self.spans,) if isinstance(self.spans, str) else self.spans
        spans = tuple(spans) if isinstance(spans, Sequence) else ()
        if not spans or not all(isinstance(each, str) and each for each in spans):
            raise InputError(
                f"{self.id}: spans={self.spans!r} names no passage; give a name such as 'rule', or several"
            )
        object.__setattr__(self, "spans", spans)
        if self.mode not in ("exclude", "include"):
            raise InputError(f"{self.id}: mode={self.mode!r} is neither 'exclude' nor 'include'")
        alpha = finite(self.alpha, f"{self.id}: alpha", 0.0)
        if alpha == 0 or (alpha > 1 if self.mode == "exclude" else alpha < 1):
            fitting = "above 0 and up to 1" if self.mode == "exclude" else "from 1 on, such as 100"
            raise InputError(f"{self.id}: alpha={self.alpha!r} with mode={self.mode!r}; give a number {fitting}")
        object.__setattr__(self, "alpha", alpha)
        if self.several not in ("union", "compounding"):
            raise InputError(f"{self.id}: several={self.several!r} is neither 'union' nor 'compounding'")
        parse_scope(self.scope)

    @property
    def named_spans(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.spans, *super().named_spans)))

    def edits(self, model: AttachedModel) -> tuple[Edit, ...]:
        if self.heads is None and len(model.table.stacks) > 1:
            raise Refusal(
                f"{self.id}: a passage is columns of one text, and {model.name} has heads of "
                f"{', '.join(model.table.stacks)}; name heads, such as model.heads('{model.table.stacks[-1]}')"
            )
        heads = model.heads(self.heads)
        if self.alpha == 1:
            return ()
        named = [f"span:{name}" for name in self.spans]
        amount, chosen = math.log(self.alpha), edit.outside if self.mode == "exclude" else edit.inside
        if self.several == "union":
            return (edit.bias(heads, amount, keys=chosen(*named), scope=self.scope),)
        each = [edit.bias(heads, amount, keys=chosen(name), scope=self.scope) for name in named]
        if self.mode == "include":
            each.append(edit.bias(heads, -amount, keys="prompt", scope=self.scope))
        return tuple(each)


def context_steering(spans: Sequence[str] | str = "user", alpha: float = 0.9) -> SpanEmphasis:
    """All heads of the model put down what is not the user's text; the paper has alpha from 0.9 to 0.95."""
    return SpanEmphasis(None, spans, alpha)  # type: ignore[arg-type]


def role_columns(tokenizer: Any, messages: Sequence[dict[str, str]], role: str = "user") -> dict[str, SpanRows]:
    """Where the text of a role stands in a chat, as the `spans=` of one row: `{"user": [5, 6, ...]}`.

    The columns are those of `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`, with no padding. The
    words of the template around a message are not part of it.

    Raises:
        InputError: no message of that role, a tokenizer without a chat template or one that does not tell characters,
            or a template that does not show a message's text as it is.
    """
    texts = [each["content"] for each in messages if each["role"] == role]
    if not texts:
        raise InputError(
            f"no message is of the role {role!r}; there are {', '.join(sorted({m['role'] for m in messages}))}"
        )
    if not getattr(tokenizer, "chat_template", None) or not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "role_columns needs a fast tokenizer with a chat template; give the columns in spans= yourself"
        )
    written = str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    ranges, start = [], 0
    for each in messages:
        place = written.find(each["content"].strip(), start)
        if place < 0:
            raise InputError(
                f"the chat template does not write {each['content'][:40]!r} as it is; give the columns yourself"
            )
        start = place + len(each["content"].strip())
        if each["role"] == role:
            ranges.append((place, start))
    offsets = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    columns = [
        column
        for column, (first, stop) in enumerate(offsets)
        if any(max(first, low) < min(stop, high) for low, high in ranges)
    ]
    return {role: columns}


INTERVENTIONS = (
    InterventionEntry(
        id=SpanEmphasis.id,
        title="Raise the attention of heads to passages of the prompt",
        page="use/attention.md#span-emphasis",
        paper="Zhang et al., Tell Your Model Where to Attend (PASTA)",
        year=2024,
        tier="B",
        status="exact",
        cost="1 forward; rows of these heads recomputed",
        made=SpanEmphasis,
    ),
)
