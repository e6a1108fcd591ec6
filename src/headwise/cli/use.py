"""`headwise use FOLDER MODEL --prompt TEXT`: a model writes with a saved intervention, and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headwise.cli import options
from headwise.cli.console import print_json, print_tables, quiet, say
from headwise.cli.loading import Loading, load_model

if TYPE_CHECKING:
    from headwise.model.attached import AttachedModel
    from headwise.use.intervention import Intervention


def use(
    folder: Annotated[str, typer.Argument(help="What `use.save` wrote: a folder, or owner/name on the hub.")],
    model: Annotated[str, typer.Argument(help="A hub id, a local folder, or zoo:NAME (see `headwise list models`).")],
    prompt: Annotated[str, typer.Option("--prompt", help="What the model goes on from.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="How many tokens at most.")] = 40,
    span: Annotated[
        list[str] | None,
        typer.Option("--span", metavar="NAME=WORDS", help="A passage of the prompt that the intervention names."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Write without the intervention, too.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Permit a model of other weights where shapes fit.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    attn: options.Attn = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Let MODEL go on from a prompt, greedily, with the intervention that FOLDER holds.

    A model that it was not made on is refused.
    """
    with quiet():
        # Imported here, so that `headwise --help` does not wait for torch.
        from headwise.use.sharing.hub import fetched
        from headwise.use.sharing.saved import load, read_saved

        # What can be wrong in the folder and the words is found before a model is loaded.
        place = fetched(folder)
        held = read_saved(place).thing
        _require_intervention(held, folder)
        passages = _passages(span or (), prompt)
        _require_passages(held, passages)
        attached = load_model(model, Loading(device, dtype, revision, attn, allow_pickle, trust_remote_code))
        intervention: Intervention = load(place, attached, anyway=anyway)
        inputs = _inputs(attached, prompt)
        spans = _columns(attached, prompt, passages)
        say(f"writing with {intervention.id}")
        with intervention(attached, spans=spans):
            written = _write(attached, inputs, max_new_tokens)
        plain = _write(attached, inputs, max_new_tokens) if compare else None
    if json:
        print_json(
            {
                "intervention": intervention.id,
                "model": attached.name,
                "prompt": prompt,
                "text": _text(attached, written),
                "tokens": written,
                "plain": None if plain is None else {"text": _text(attached, plain), "tokens": plain},
            }
        )
        return
    table = Table("", "text", title=f"headwise use {folder} {attached.name}", title_justify="left", show_lines=True)
    table.add_row("prompt", prompt)
    table.add_row(intervention.id, _text(attached, written))
    if plain is None:
        print_tables(table)
        return
    table.add_row("without", _text(attached, plain))
    print_tables(table, _difference(written, plain))


def _require_intervention(thing: Any, folder: str) -> None:
    from headwise.errors import Refusal
    from headwise.use.intervention import Intervention
    from headwise.use.sharing.adapter import Adapter

    if isinstance(thing, Adapter):
        raise Refusal(f"{folder} holds an adapter: put it on its model with peft, and save that (merge_and_unload)")
    if not isinstance(thing, Intervention):
        raise Refusal(f"{folder} holds a {type(thing).__name__}, which changes nothing; give a saved intervention")


def _passages(given: Sequence[str], prompt: str) -> dict[str, tuple[int, int]]:
    """Name of each passage -> its characters. Raises InputError for words that are not there, or not once."""
    from headwise.errors import InputError

    found = {}
    for each in given:
        name, equals, words = each.partition("=")
        if not (name and equals and words):
            raise InputError(f"--span {each!r} is not NAME=WORDS, such as rule='Answer in French.'")
        if prompt.count(words) != 1:
            raise InputError(f"--span {name}: {words!r} is {prompt.count(words)} times in the prompt; it must be once")
        found[name] = (prompt.index(words), prompt.index(words) + len(words))
    return found


def _require_passages(intervention: Intervention, given: Mapping[str, Any]) -> None:
    """Raises InputError where a passage that the intervention names is missing, or one is given that it does not."""
    from headwise.errors import InputError

    needed = intervention.named_spans
    if missing := [name for name in needed if name not in given]:
        raise InputError(
            f"{intervention.id} acts on the passage {missing[0]!r} of the prompt; say which words that is with --span "
            f"{missing[0]}=WORDS"
        )
    if odd := [name for name in given if name not in needed]:
        known = f"; it names {', '.join(needed)}" if needed else ""
        raise InputError(f"--span {odd[0]}: {intervention.id} names no such passage{known}; leave it out")


def _inputs(model: AttachedModel, prompt: str) -> Mapping[str, Any]:
    from headwise.errors import InputError, Refusal

    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, so it cannot read a prompt; use a model that has one")
    can_generate = getattr(model.model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise Refusal(f"{model.name} does not write ({type(model.model).__name__} has no generate); use a decoder")
    inputs = model.tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise InputError("--prompt has no tokens; give some words")
    return {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask") if name in inputs}


def _columns(model: AttachedModel, prompt: str, passages: Mapping[str, tuple[int, int]]) -> dict[str, list[int]] | None:
    """The tokens of each passage. Raises Refusal for a tokenizer that does not tell characters."""
    from headwise.errors import Refusal

    if not passages:
        return None
    if not getattr(model.tokenizer, "is_fast", False):
        raise Refusal(f"the tokenizer of {model.name} does not tell which characters a token is of; leave --span out")
    offsets = model.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    return {
        name: [column for column, (first, stop) in enumerate(offsets) if max(first, low) < min(stop, high)]
        for name, (low, high) in passages.items()
    }


def _write(model: AttachedModel, inputs: Mapping[str, Any], limit: int) -> list[int]:
    """The ids that the model writes, greedily."""
    written = model.generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1)
    encoder_decoder = getattr(getattr(model.model, "config", None), "is_encoder_decoder", False)
    start = 0 if encoder_decoder else inputs["input_ids"].shape[1]
    return [int(token) for token in written[0, start:]]


def _text(model: AttachedModel, tokens: Sequence[int]) -> str:
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))


def _difference(written: Sequence[int], plain: Sequence[int]) -> str:
    if list(written) == list(plain):
        return "The intervention changes nothing here."
    same = next(
        (n for n, (one, other) in enumerate(zip(written, plain, strict=False)) if one != other),
        min(len(written), len(plain)),
    )
    return f"The first {same} tokens are the same." if same else "They part at the first token."
