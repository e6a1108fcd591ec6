"""The card of a saved folder: what it is, what it was made on, what speaks for it, and how it is used.

The front matter is what the hub reads; `base_model` is there only for a model that the hub has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from torch import Tensor

from headwise.heads import Head, HeadSet, KVGroup
from headwise.use.intervention import Intervention
from headwise.use.sharing.made_on import MadeOn, named_members

if TYPE_CHECKING:
    from headwise.use.sharing.saved import Saved

TITLES = {
    "intervention": "an intervention on attention heads",
    "heads": "a set of attention heads",
    "verdict": "a verdict on attention heads",
    "scores": "scores of attention heads",
    "adapter": "an adapter of attention heads",
}


def card(saved: Saved) -> str:
    """The text of README.md."""
    parts = [
        f"---\n{_front_matter(saved).to_yaml()}\n---",
        f"# {_name(saved)}: {TITLES[saved.kind]}",
        _what(saved),
        f"## Heads\n\n{_heads(saved)}",
        f"## Evidence\n\n{_evidence(saved)}",
        f"## Use\n\n{_use(saved)}",
        f"## Licence\n\n{saved.licence or 'No licence is stated.'}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(saved: Saved) -> ModelCardData:
    named: dict[str, Any] = {"base_model": base_model(saved.made_on)} if base_model(saved.made_on) else {}
    if saved.licence:
        named["license"] = saved.licence
    kind = [] if saved.id == saved.kind else [saved.id]
    return ModelCardData(library_name="headwise", tags=["headwise", "attention-heads", saved.kind, *kind], **named)


def base_model(made_on: MadeOn) -> str | None:
    """The hub id of the model; None where its name is not one: of the zoo, of a folder, of a model in memory."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", made_on.model) is not None
    return made_on.model if is_id and (made_on.revision or "/" in made_on.model) else None


def _name(saved: Saved) -> str:
    return f"{saved.id} on {saved.made_on.model}"


def _what(saved: Saved) -> str:
    made = saved.made_on
    revision = f", revision `{made.revision}`" if made.revision else ""
    lines = [
        f"Made with headwise {made.versions.get('headwise', '')} on `{made.model}`{revision}, {made.dtype}, weights "
        f"`{made.weights_hash[:16]}`. On another model these heads mean something else; headwise refuses them there."
    ]
    if isinstance(saved.thing, Intervention):
        lines += ["", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in saved.thing.settings.items()]
    return "\n".join(lines)


def _heads(saved: Saved) -> str:
    named = [each for each in named_members(saved.thing) if isinstance(each, (Head, KVGroup))]
    labels = [each.label for each in sorted(named, key=lambda each: (each.kind, each))]
    sites = "\n".join(f"- {label}: {sizes}" for label, sizes in saved.made_on.sites.items())
    return f"{', '.join(labels) or 'It names no single heads.'}\n\nThe sites they are of:\n\n{sites}"


def _evidence(saved: Saved) -> str:
    found = saved.evidence
    if found is None:
        return (
            "None. Descriptive, not verified: nothing here shows that these heads matter. `headwise verify` tests it "
            "against matched random heads."
        )
    if found["kind"] == "verdict":
        opening = (
            f"`headwise verify` on {', '.join(found['heads'])}, against matched random heads: **{found['verdict']}**."
        )
    else:
        opening = "`use.evaluate`, against the same intervention on matched random heads:"
    return f"{opening}\n\n```text\n{found['text']}\n```"


def _use(saved: Saved) -> str:
    model = saved.made_on.model
    revision = f', revision="{saved.made_on.revision}"' if saved.made_on.revision else ""
    opening = f'import headwise as hw\n\nmodel = hw.load("{model}"{revision})'
    passages = saved.thing.named_spans if isinstance(saved.thing, Intervention) else ()
    columns = ", ".join(f'"{name}": [3, 4]' for name in passages)
    given = f", spans={{{columns}}}" if passages else ""
    counted = "  # columns of the tokens of the prompt" if passages else ""
    opening += '\nfound = hw.use.from_pretrained("FOLDER-OR-REPO", model=model)'
    then = {
        "intervention": 'inputs = model.tokenizer("...", return_tensors="pt")\n'
        f"with found(model{given}):{counted}\n    model.generate(**inputs)",
        "heads": "hw.verify(model, found)",
        "verdict": "print(found)",
        "scores": "found.top(10)",
        "adapter": "peft.PeftModel.from_pretrained(model.model, found.folder)",
    }[saved.kind]
    usage = f"```python\n{opening}\n{then}\n```"
    if saved.kind != "intervention":
        return usage
    options = "".join(f' --span {name}="WORDS OF THE PROMPT"' for name in passages)
    return f'{usage}\n\n```sh\nheadwise use FOLDER-OR-REPO {model} --prompt "..."{options} --compare\n```'


def _cell(value: Any) -> str:
    match value:
        case HeadSet():
            shown = ", ".join(value.labels)
        case Tensor():
            shown = f"a tensor {list(value.shape)}"
        case Mapping():
            shown = f"an entry for each of {', '.join(map(str, value))}"
        case float():
            shown = f"{value:g}"
        case _:
            shown = str(value)
    return shown.replace("|", "\\|").replace("\n", " ")


__all__ = ["base_model", "card"]
