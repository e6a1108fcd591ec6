"""HTML that cannot be written unescaped: `tag` escapes every child and attribute that is not `Html` itself.

tag("td", "<s>", class_="number")    ->  <td class="number">&lt;s&gt;</td>
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

Child: TypeAlias = "str | Iterable[Child] | None"
"""What an element may hold: text, more of the same, or nothing."""

_EMPTY = ("br", "circle", "hr", "input", "line", "link", "meta", "path", "rect")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: str) -> Html:
    # Characters that HTML does not have are made visible, where a tokenizer has such tokens.
    return Html(html.escape("".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in text)))


def join(*children: Child) -> Html:
    """Children one after the other, strings escaped, None left out."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, str):
            parts.append(child if isinstance(child, Html) else escape(child))
        else:
            parts.append(join(*child))
    return Html("".join(parts))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """One element. `class_` is `class`, other underscores are hyphens; None and False leave an attribute out."""
    written = "".join(
        f" {attribute}" if value is True else f' {attribute}="{html.escape(_plain(value))}"'
        for attribute, value in ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
        if value is not None and value is not False
    )
    if name in _EMPTY and not children:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def cell(label: str, /, *children: Child, class_: str | None = None, **attributes: str | int | None) -> Html:
    """A cell of a table that narrow pages stack: its content in one box, its column's name as a label for it."""
    return tag("td", tag("div", *children), class_=class_, data_label=label, **attributes)


def _plain(value: str | float | bool | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
