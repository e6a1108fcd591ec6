"""Head files of other projects, in and out: the scores of Retrieval_Head and the patterns of DuoAttention.

    scores = read_retrieval_head("llama-2-7b-80k.json", model)       # nightdessert/Retrieval_Head, head_score/*.json
    write_retrieval_head(scores, "mine.json")
    pattern = read_duo_attention("attn_patterns/...", model)         # mit-han-lab/duo-attention
    write_duo_attention(pattern, "mine")

Neither says which model it is of. With `model` the shape is compared; that it is the same model, only you know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from headwise.errors import InputError, Refusal
from headwise.heads import MAIN, Head, HeadSet, KVGroup, SiteId
from headwise.model.attached import AttachedModel
from headwise.model.site import Site
from headwise.scores import HeadScores, Provenance

DUO_TABLE, DUO_CONFIG = "full_attention_heads.tsv", "config.json"
DUO_SINK, DUO_RECENT = 128, 256
"""What the released patterns were trained with."""
DUO_BEYOND = 0.05
"""How far a gate may lie outside 0 to 1: the last step of training leaves some there, and their reader clips them."""


# -- Retrieval_Head -------------------------------------------------------------------------------------------------


def read_retrieval_head(path: str | Path, model: AttachedModel | None = None) -> HeadScores:
    """Scores from a JSON `{"LAYER-HEAD": [one score per trial, ...], ...}`, heads and layers counted from 0.

    A score can be above 1: the released code counts a token each time it is copied.

    Args:
        model: compared with the file where it is given: the file has exactly the heads of its main stack.

    Raises:
        InputError: a file that is missing or of another form; heads left out, lists of unequal length, or negative
            scores; heads that the model does not have.
    """
    form = _json_of(Path(path))
    if not isinstance(form, dict) or not form:
        raise InputError(f'{path} holds no scores; expected {{"LAYER-HEAD": [score, ...]}}')
    lists: dict[Head, list[float]] = {}
    for key, scores in form.items():
        found = re.fullmatch(r"([0-9]+)-([0-9]+)", key)
        if found is None or not isinstance(scores, list) or not all(map(_is_number, scores)):
            raise InputError(f'{path}: {key!r} is no entry "LAYER-HEAD": [score, ...]')
        lists[Head.of(int(found[1]), int(found[2]))] = [float(score) for score in scores]
    trials = {len(scores) for scores in lists.values()}
    if len(trials) > 1 or trials == {0}:
        raise InputError(f"{path}: heads have from {min(trials)} to {max(trials)} scores; every head has one per trial")
    worst = min(lists, key=lambda head: min(lists[head]))
    if min(lists[worst]) < 0 or not all(np.isfinite(scores).all() for scores in lists.values()):
        raise InputError(f"{path}: {worst} has the score {min(lists[worst])}; scores are finite and 0 or more")
    heads = HeadSet(tuple(lists))
    _require_whole(heads, str(path))
    if model is not None:
        _require_heads_of(heads, model, str(path))
    sites = heads.sites
    width = max(len(heads.at(site)) for site in sites)
    values = np.full((trials.pop(), len(sites), width), np.nan)
    for head, scores in lists.items():
        values[:, sites.index(head.site), head.index] = scores
    name = None if model is None else model.name
    return HeadScores(
        {MAIN: values},
        {MAIN: sites},
        tuple(f"trial-{number}" for number in range(len(values))),
        Provenance("retrieval", {"file": Path(path).name, "form": "Retrieval_Head"}, model=name),
    )


def write_retrieval_head(scores: HeadScores, path: str | Path) -> None:
    """Write scores as that JSON, heads in order. Items on which no head has a score are left out.

    Raises:
        InputError: scores of another stack than the main one, or of further calls of a module; negative scores, which
            that file does not have; an item on which only some heads have a score.
        Refusal: the file cannot be written.
    """
    if scores.stacks != (MAIN,) or any(site.call for site in scores.sites[MAIN]):
        raise InputError(f"a file of Retrieval_Head has one stack of layers; these scores are of {scores.heads}")
    columns = {head: scores.of(head) for head in scores.heads.heads}
    counted = np.isfinite(np.stack(list(columns.values())))
    kept = counted.any(0)
    if not counted[:, kept].all():
        item = scores.item_ids[int(np.argmin(counted.all(0) | ~kept))]
        raise InputError(f"on {item!r} only some heads have a score; that file has every head in every trial")
    entries = {f"{head.layer}-{head.index}": column[kept].astype(float).tolist() for head, column in columns.items()}
    worst = min(entries, key=lambda key: min(entries[key]))
    if min(entries[worst]) < 0:
        raise InputError(f"head {worst} has the score {min(entries[worst])}; scores of that file are 0 or more")
    _write(Path(path), json.dumps(entries) + "\n")


# -- DuoAttention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DuoPattern:
    """Which KV groups attend to everything, and which to the first and the latest positions only.

    Attributes:
        alpha: `[layer, KV group]`, from 0 (streaming) to 1 (full attention).
        sink, recent: how many first and latest positions a streaming group keeps.

    Raises:
        InputError: not a matrix, or values out of range.
    """

    alpha: Float[np.ndarray, "layer group"]
    sink: int = DUO_SINK
    recent: int = DUO_RECENT

    def __post_init__(self) -> None:
        alpha = np.array(self.alpha, dtype=np.float64)
        if alpha.ndim != 2 or not alpha.size:
            raise InputError(f"alpha has the shape {list(alpha.shape)}; expected [layer, KV group]")
        if not (np.isfinite(alpha).all() and alpha.min() >= 0 and alpha.max() <= 1):
            raise InputError(f"alpha goes from {alpha.min():g} to {alpha.max():g}; gates are from 0 to 1")
        for name in ("sink", "recent"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name}={value!r} is not a number of positions")
        alpha.setflags(write=False)
        object.__setattr__(self, "alpha", alpha)

    def full(self, sparsity: float = 0.5) -> HeadSet:
        """The KV groups that keep full attention when a share `sparsity` of all is to stream.

        Those whose gate is at least the `sparsity` quantile of all gates, as in the released code, but that equal
        gates there are parted at random and here stay together. Raises InputError for a share that is none.
        """
        if not 0 <= sparsity <= 1:
            raise InputError(f"sparsity={sparsity!r} is not a share from 0 to 1")
        kept = self.alpha >= np.quantile(self.alpha, sparsity) if sparsity < 1 else np.zeros_like(self.alpha, bool)
        return HeadSet(tuple(KVGroup.of(int(layer), int(group)) for layer, group in np.argwhere(kept)), "group")

    def scores(self, model: AttachedModel) -> HeadScores:
        """The gates as scores, one item; the heads of a group share its gate. Raises InputError for another shape."""
        sites = _grid(model)
        _require_shape(self.alpha.shape, sites, model, "the pattern")
        values = np.repeat(self.alpha, sites[0].group_size, axis=1)[None]
        about = Provenance("duo-attention", {"sink": self.sink, "recent": self.recent}, model=model.name)
        return HeadScores({MAIN: values}, {MAIN: tuple(site.id for site in sites)}, ("alpha",), about)

    @classmethod
    def of(
        cls, scores: HeadScores, model: AttachedModel, *, sink: int = DUO_SINK, recent: int = DUO_RECENT
    ) -> DuoPattern:
        """The pattern that scores from 0 to 1 stand for; a group has the largest mean of its heads.

        Raises:
            InputError: scores that are not of the main stack of this model, or out of range.
        """
        sites = _grid(model)
        if scores.stacks != (MAIN,):
            raise InputError(f"a pattern of DuoAttention has one stack; these scores are of {', '.join(scores.stacks)}")
        _require_heads_of(scores.heads, model, "the scores")
        means = scores.mean()[MAIN].reshape(len(sites), sites[0].n_kv_heads, -1)
        return cls(means.max(axis=-1), sink, recent)


def read_duo_attention(path: str | Path, model: AttachedModel | None = None) -> DuoPattern:
    """A pattern from a folder with `full_attention_heads.tsv` and `config.json`, or from such a table alone.

    The table has a row for each layer and a column for each KV group. Gates up to 0.05 outside 0 to 1 are clipped, as
    in the released code; beyond that the table is of something else.

    Args:
        model: compared with the table where it is given: as many layers and KV groups.

    Raises:
        InputError: no such file; rows of unequal length; what is no number or out of range; another shape than the
            model's.
    """
    path = Path(path)
    table = path / DUO_TABLE if path.is_dir() else path
    rows = [line.split("\t") for line in _text_of(table).splitlines() if line.strip()]
    if not rows or len({len(row) for row in rows}) > 1:
        raise InputError(f"{table} has rows of {sorted({len(row) for row in rows})} columns; expected one length")
    try:
        alpha = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{table} holds what is no number ({error}); expected a table with tabs between") from None
    if not (np.isfinite(alpha).all() and alpha.min() >= -DUO_BEYOND and alpha.max() <= 1 + DUO_BEYOND):
        raise InputError(f"{table} goes from {alpha.min():g} to {alpha.max():g}; gates are from 0 to 1")
    if model is not None:
        _require_shape(alpha.shape, _grid(model), model, str(table))
    sizes = (DUO_SINK, DUO_RECENT)
    if path.is_dir():
        config = _json_of(path / DUO_CONFIG)
        try:
            sizes = (config["sink_size"], config["recent_size"])
        except (KeyError, TypeError):
            raise InputError(f"{path / DUO_CONFIG} lacks sink_size or recent_size") from None
    return DuoPattern(np.clip(alpha, 0, 1), *sizes)


def write_duo_attention(pattern: DuoPattern, folder: str | Path) -> None:
    """Write the two files to a folder, which is made if need be.

    Raises:
        InputError: the folder holds one of these files already, as a checkpoint does.
        Refusal: a file cannot be written.
    """
    folder = Path(folder)
    for name in (DUO_TABLE, DUO_CONFIG):
        if (folder / name).exists():
            raise InputError(f"{folder / name} is there already; give a new folder")
    table = "".join("\t".join(f"{gate:.18e}" for gate in row) + "\n" for row in pattern.alpha)
    _write(folder / DUO_TABLE, table)
    _write(folder / DUO_CONFIG, json.dumps({"sink_size": pattern.sink, "recent_size": pattern.recent}) + "\n")


# -- shapes and files -----------------------------------------------------------------------------------------------


def _require_whole(heads: HeadSet, what: str) -> None:
    for site in heads.sites:
        indices = heads.at(site)
        if indices != tuple(range(len(indices))):
            raise InputError(f"{what} lacks heads of {site}: it has {len(indices)} up to head {indices[-1]}")


def _require_heads_of(heads: HeadSet, model: AttachedModel, what: str) -> None:
    own = HeadSet(tuple(head for head in model.heads() if head.stack == MAIN and not head.call))
    if heads != own:
        odd = (heads ^ own).labels[0]
        where = "has, and the model has not" if odd in heads else "lacks, and the model has"
        raise InputError(f"{what} is not of {model.name}: {odd} it {where} ({len(heads)} heads against {len(own)})")


def _grid(model: AttachedModel) -> Sequence[Site]:
    """The sites of the main stack, where they are one for each layer and all of one shape."""
    sites = [site for site in model.sites if site.id.stack == MAIN]
    shapes = {(site.n_heads, site.n_kv_heads) for site in sites}
    if [site.id for site in sites] != [SiteId(layer=layer) for layer in range(len(sites))] or len(shapes) != 1:
        raise InputError(f"{model.name} has layers of several shapes or without attention, and that table has no such")
    return sites


def _require_shape(shape: Sequence[int], sites: Sequence[Site], model: AttachedModel, what: str) -> None:
    here = (len(sites), sites[0].n_kv_heads)
    if tuple(shape) != here:
        raise InputError(
            f"{what} has {shape[0]} layers of {shape[1]} KV groups, and {model.name} has {here[0]} of {here[1]}; it is "
            "of another model"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _json_of(path: Path) -> Any:
    try:
        return json.loads(_text_of(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON ({error})") from None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refusal(f"{path} cannot be written ({error.strerror or error})") from error


__all__ = ["DuoPattern", "read_duo_attention", "read_retrieval_head", "write_duo_attention", "write_retrieval_head"]
