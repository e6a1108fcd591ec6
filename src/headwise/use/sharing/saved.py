"""One folder for what is found and made: head sets, interventions, adapters, verdicts and scores.

    use.save(HeadScaling("L2H1", 2.0), "louder", model=model, evidence=verdict, licence="apache-2.0")
    steered = use.load("louder", model)

    headwise.json          what it is, its settings, and what model it was made on
    tensors.safetensors    the tensors that the settings name, where they name some
    adapter/               of an adapter: the folder as PEFT wrote it
    README.md              the card

The folder appears whole or not at all: it is written beside its place and renamed. Reading it runs no code of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as tensor_file

from headwise.errors import HeadwiseError, InputError, Refusal
from headwise.heads import Head, HeadSet, KVGroup, SiteId
from headwise.model.attached import AttachedModel
from headwise.scores import HeadScores
from headwise.use.intervention import Intervention
from headwise.use.sharing.adapter import Adapter
from headwise.use.sharing.card import card
from headwise.use.sharing.made_on import MadeOn, made_on, named_members
from headwise.use.sharing.stored_form import Reading, Writing
from headwise.use.sharing.supported import Evidence, told
from headwise.verify.result import Verdict

FORMAT, FORMAT_VERSION = "headwise.saved", 1
JSON, TENSORS, ADAPTER, CARD = "headwise.json", "tensors.safetensors", "adapter", "README.md"

Thing = Intervention | HeadSet | Verdict | HeadScores | Adapter
KINDS: dict[str, type] = {
    "intervention": Intervention,
    "heads": HeadSet,
    "verdict": Verdict,
    "scores": HeadScores,
    "adapter": Adapter,
}


@dataclass(frozen=True, eq=False)
class Saved:
    """What a folder holds.

    Attributes:
        kind: `intervention`, `heads`, `verdict`, `scores` or `adapter`.
        id: of an intervention and of the method behind scores its id in the catalogue; else the kind.
        thing: the value itself.
        made_on: the model it was made on.
        evidence: the verdict on its heads or the evaluation of it, as JSON; `kind` says which, `text` is it in words.
            None where there is none.
        licence: id of the licence; None where none is stated.
    """

    kind: str
    id: str
    thing: Any
    made_on: MadeOn
    evidence: Mapping[str, Any] | None
    licence: str | None


def save(
    thing: Thing,
    folder: str | os.PathLike[str],
    *,
    model: AttachedModel,
    evidence: Evidence | None = None,
    licence: str | None = None,
) -> Path:
    """Write an intervention, a head set, an adapter, a verdict or scores to a new folder, with its card.

    Args:
        thing: what to save.
        folder: a folder that does not exist yet, or is empty.
        model: the model it was made on; its name, revision, weights and the geometry of the named sites are kept.
        evidence: the verdict on exactly the heads that it names, or an evaluation of this intervention. Without it the
            card says "not verified".
        licence: id of a licence, such as `apache-2.0`; without one the card says that none is stated.

    Returns:
        The folder.

    Raises:
        InputError: something else; heads that the model does not have; evidence for something else; a folder that
            holds something.
        Refusal: a setting that cannot be stored; scores of other weights; weights that are not in memory; a disk that
            does not take it.
    """
    kind = next((name for name, of in KINDS.items() if isinstance(thing, of)), None)
    if kind is None:
        raise InputError(f"save takes {', '.join(KINDS)}, not a {type(thing).__name__}")
    if not isinstance(model, AttachedModel):
        raise InputError(f"save(model=...) takes the attached model it was made on, not a {type(model).__name__}")
    target = Path(folder)
    _require_free(target)
    _require_serves(thing, model)
    made = made_on(model, thing)
    if isinstance(thing, HeadScores) and thing.provenance.weights_hash not in (None, made.weights_hash):
        raise Refusal(f"these scores are of {thing.provenance.model} with other weights than {made}; give that model")
    writing = Writing()
    saved = Saved(kind, _id_of(thing), thing, made, told(evidence, thing, model), _checked(licence))
    form = _form(saved, writing)
    with _written_beside(target) as beside:
        files = {}
        if writing.tensors:
            files[TENSORS] = _write(beside / TENSORS, tensor_file.save(writing.tensors))
        if isinstance(thing, Adapter):
            for source in sorted(each for each in thing.folder.iterdir() if each.is_file()):
                name = f"{ADAPTER}/{source.name}"
                files[name] = _write(beside / name, source.read_bytes())
        _write(beside / CARD, card(saved).encode())
        _write(beside / JSON, (json.dumps(form | {"files": files}, indent=1, ensure_ascii=False) + "\n").encode())
    return target


def load(folder: str | os.PathLike[str], model: AttachedModel | None = None, *, anyway: bool = False) -> Any:
    """What a folder holds: the intervention, the head set, the adapter, the verdict or the scores.

    Args:
        folder: written by `save`.
        model: the model to use it on. It must be the one it was made on; None checks nothing.
        anyway: use it on a model of other weights, where all that it names exists and has the same shape.

    Raises:
        InputError: no such folder; files that are damaged, or of a newer headwise.
        Refusal: another model.
    """
    saved = read_saved(folder)
    if model is not None:
        if not isinstance(model, AttachedModel):
            raise InputError(f"load(model=...) takes an attached model, not a {type(model).__name__}")
        saved.made_on.require(model, str(folder), anyway=anyway)
        _require_serves(saved.thing, model)
    return saved.thing


def read_saved(folder: str | os.PathLike[str]) -> Saved:
    """All that a folder says: what it holds, and where that is from. Raises InputError as `load` does."""
    if not isinstance(folder, (str, os.PathLike)):
        raise InputError(f"{folder!r} is not a folder; give the path of one that use.save wrote")
    folder = Path(folder)
    form = _read_json(folder)
    contents = _read_files(folder, form.get("files"))
    try:
        tensors = tensor_file.load(contents[TENSORS]) if TENSORS in contents else {}
        reading, kind = Reading(tensors), form["kind"]
        if kind == "adapter":
            thing: Any = Adapter(folder / ADAPTER, reading.value(form["holds"]))
        else:
            thing = reading.value(form["holds"])
        if not _is_of(kind, thing):
            raise InputError(f"{folder / JSON} is of the kind {kind!r} and holds a {type(thing).__name__}")
        made = MadeOn.from_dict(form["made_on"])
        evidence, licence = form["evidence"], _checked(form["licence"])
        if form["id"] != _id_of(thing):
            raise InputError(f"{folder / JSON} is of the id {form['id']!r} and holds {_id_of(thing)!r}")
        if evidence is not None and not isinstance(evidence, dict):
            raise InputError(f"the evidence in {folder / JSON} is {evidence!r}, which no verdict or evaluation is")
        return Saved(kind, _id_of(thing), thing, made, evidence, licence)
    except HeadwiseError as error:
        raise type(error)(f"{folder}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder} is damaged ({type(error).__name__}: {error}); save or fetch it again") from None


# -- what is written ------------------------------------------------------------------------------------------------


def _form(saved: Saved, writing: Writing) -> dict[str, Any]:
    thing = saved.thing
    held = thing.heads if isinstance(thing, Adapter) else thing
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": saved.kind,
        "id": saved.id,
        "holds": writing.intervention(held) if isinstance(held, Intervention) else writing.form(held, ""),
        "made_on": saved.made_on.to_dict(),
        "evidence": saved.evidence,
        "licence": saved.licence,
    }


def _id_of(thing: Thing) -> str:
    match thing:
        case Intervention():
            return thing.id
        case HeadScores():
            return thing.provenance.method
        case _:
            return next(name for name, of in KINDS.items() if isinstance(thing, of))


def _is_of(kind: Any, thing: Any) -> bool:
    return kind in KINDS and isinstance(thing, KINDS[kind])


def _require_serves(thing: Thing, model: AttachedModel) -> None:
    """That every head it names is there, in the shapes that it needs; nothing runs."""
    match thing:
        case Intervention():
            thing.edits(model)
            thing.beside(model)
        case Adapter():
            thing.require_fits(model)
        case HeadScores():
            model.heads(thing.heads)
    members = named_members(thing)
    for kind, select in ((Head, model.heads), (KVGroup, model.groups)):
        if named := [each for each in members if isinstance(each, kind)]:
            select(HeadSet.parse(named))
    for site in (each for each in members if isinstance(each, SiteId)):
        model.site(site.label)


def _checked(licence: str | None) -> str | None:
    if licence is not None and (not isinstance(licence, str) or not licence.strip() or len(licence.split()) > 1):
        raise InputError(f"licence={licence!r} is not the id of a licence, such as apache-2.0 or cc-by-4.0")
    return licence.lower() if licence else None


# -- the folder -----------------------------------------------------------------------------------------------------


def _require_free(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        what = "is a file" if not target.is_dir() else "holds something already"
        raise InputError(f"{target} {what}; give a new folder, or take that one away first")


@contextlib.contextmanager
def _written_beside(target: Path) -> Iterator[Path]:
    """A folder beside the target, which takes its name when all is written and flushed."""
    beside = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, target)
    except OSError as error:
        raise Refusal(f"{target} cannot be written ({error.strerror or error}); nothing was left there") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(path: Path, content: bytes) -> str:
    """Write and flush a file; its hash."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / JSON
    try:
        form = json.loads(path.read_bytes())
    except OSError:
        raise InputError(f"{folder} {_instead(folder)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); save or fetch it again") from None
    if not isinstance(form, dict) or form.get("format") != FORMAT:
        raise InputError(f"{path} does not describe what headwise saved")
    version = form.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{folder} has format_version {version!r}, this headwise reads {FORMAT_VERSION}; use the "
            "headwise that wrote it, or a newer one"
        )
    return form


def _instead(folder: Path) -> str:
    if not folder.is_dir():
        return "is not a folder; give one that use.save wrote"
    if (folder / "adapter_config.json").is_file():
        return f"is a PEFT adapter without {JSON}; save it with use.save(use.Adapter(folder), ...)"
    if (folder / "scores.json").is_file():
        return "holds scores that HeadScores.save wrote; read them with HeadScores.load"
    if (folder / "config.json").is_file():
        return "is a checkpoint; hw.load loads it"
    return f"holds no {JSON}; give a folder that use.save wrote"


def _read_files(folder: Path, files: Any) -> dict[str, bytes]:
    """The files beside the JSON, each checked against its hash."""
    contents = {}
    for name, digest in (files if isinstance(files, dict) else {}).items():
        parts = Path(name).parts
        if name != TENSORS and (len(parts) != 2 or parts[0] != ADAPTER or ".." in parts):
            raise InputError(f"{folder / JSON} names {name!r}, which is no file of such a folder")
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise InputError(f"{folder} lacks {name} ({error.strerror}); save or fetch it again") from None
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise InputError(f"{folder / name} is not the file that {JSON} names; save or fetch it again")
    return contents


__all__ = ["Saved", "load", "read_saved", "save"]
