"""An atlas as tables, in memory and as Parquet files that need no headwise to be read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas

from headwise.verify.evidence import Evidence
from headwise.verify.specialisation import specialisation
from headwise.verify.verdict import FamilyVerdict, JointVerdict, SingleVerdict

if TYPE_CHECKING:
    from headwise.atlas.opened import Atlas
    from headwise.atlas.store import Store

SCORES = ["method", "probe", "item", "stack", "layer", "call", "head", "label", "score"]
EFFECTS = ["probe", "metric", "set", "heads", "item", "clean", "value", "drop"]
CONTROLS = ["probe", "metric", "set", "control", "heads", "match", "effect"]
VERDICTS = ["probe", "metric", "mode", "scope", "set", "heads", "effect", "unit", "share", "excess", "low", "high"]
VERDICTS += ["p", "q", "controls", "ceiling", "match", "ruling", "reason"]
ITEMS = ["probe", "metric", "item", "half", "counts"]
TOGETHER = ["probe", "heads", "n_items", "share", "low", "high", "controls", "ceiling", "p", "holds"]
FUNCTIONAL = ["share", "heads", "probe", "base", "original", "scale_free", "random_original", "random_scale_free"]
PAIRS = ["heads_of", "against", "own", "other", "excess", "low", "high", "ceiling", "p", "double"]


def tables(atlas: Atlas) -> Mapping[str, pandas.DataFrame]:
    """Every table by name.

    - `scores`: one row per method, probe, finding item and head;
    - `effects`: one row per probe, set of heads and held-out item; `set` is `single`, or the method of the set;
    - `controls`: one row per control set of a joint knock-out, with its mean effect;
    - `verdicts`: one row per claim;
    - `items`: one row per item: on which half it is, and whether it counts (the model answers it);
    - `off_target`: as `Atlas.off_target`;
    - `together`: one row per behaviour whose heads were tried on fresh items of it, as shares of reach;
    - `pairs`: two rows per pair of behaviours whose heads were tried on fresh items of both: what the heads of each
      cost their own behaviour and the other (shares of reach), and whether it is a double dissociation;
    - `functional`: the dissociation score D of Li et al. 2023, one row per share of heads and behaviour, and the mean
      of random draws.
    """
    families = atlas.families()
    scores = [
        atlas.scores(method, probe).to_pandas().assign(method=method, probe=probe)[SCORES]
        for method, probe in atlas.scored
    ]
    return {
        "scores": _joined(scores, SCORES),
        "effects": _joined([_effects(evidence) for evidence, _ in families], EFFECTS),
        "controls": _joined([_controls(evidence) for evidence, _ in families], CONTROLS),
        "verdicts": _joined([_verdicts(*family) for family in families], VERDICTS),
        "items": _items(atlas),
        "off_target": atlas.off_target,
        "together": _together(atlas),
        "pairs": _pairs(atlas, families),
        "functional": _functional(atlas),
    }


def write_tables(atlas: Atlas, store: Store) -> None:
    """All tables as `tables/NAME.parquet`. Raises `Refusal` if the disk does not take them."""
    for name, table in tables(atlas).items():
        content = io.BytesIO()
        table.to_parquet(content, index=False)
        store.write(f"tables/{name}.parquet", content.getvalue())


def _joined(parts: list[pandas.DataFrame], columns: list[str]) -> pandas.DataFrame:
    filled = [part for part in parts if len(part)]
    return pandas.concat(filled, ignore_index=True) if filled else pandas.DataFrame(columns=columns)


def _effects(evidence: Evidence) -> pandas.DataFrame:
    sets = [("single", head.label, values) for head, values in zip(evidence.heads.heads, evidence.values, strict=True)]
    sets += [(joint.name, ", ".join(joint.heads.labels), joint.values) for joint in evidence.joints]
    n = len(evidence.item_ids)
    values = np.stack([each for *_, each in sets]) if sets else np.empty((0, n))
    return pandas.DataFrame(
        {
            "probe": evidence.family.probe,
            "metric": evidence.family.metric,
            "set": np.repeat([name for name, *_ in sets], n),
            "heads": np.repeat([heads for _, heads, _ in sets], n),
            "item": list(evidence.item_ids) * len(sets),
            "clean": np.tile(evidence.clean, len(sets)),
            "value": values.reshape(-1),
            "drop": evidence.drops(values).reshape(-1),
        },
        columns=EFFECTS,
    )


def _controls(evidence: Evidence) -> pandas.DataFrame:
    rows = [
        (
            evidence.family.probe,
            evidence.family.metric,
            joint.name,
            number,
            ", ".join(heads.labels),
            joint.controls.match,
            drop,
        )
        for joint in evidence.joints
        for number, (heads, drop) in enumerate(
            zip(joint.controls.sets, evidence.drops(joint.control_values).mean(axis=1).tolist(), strict=True)
        )
    ]
    return pandas.DataFrame(rows, columns=CONTROLS)


def _verdicts(evidence: Evidence, verdict: FamilyVerdict) -> pandas.DataFrame:
    claims: list[tuple[str, str, SingleVerdict | JointVerdict]] = [
        ("single", each.head.label, each) for each in verdict.singles
    ]
    claims += [(each.name, ", ".join(each.heads.labels), each) for each in verdict.joints]
    family = verdict.family
    rows = [
        {
            "probe": family.probe,
            "metric": family.metric,
            "mode": family.mode,
            "scope": family.scope,
            "set": name,
            "heads": heads,
            "effect": each.effect,
            "unit": verdict.unit,
            "share": each.effect / evidence.reach,
            "excess": each.against.excess,
            "low": each.against.ci[0],
            "high": each.against.ci[1],
            "p": each.against.p,
            "q": each.q,
            "controls": each.against.n,
            "ceiling": each.against.ceiling,
            "match": each.match,
            "ruling": each.ruling,
            "reason": each.reason,
        }
        for name, heads, each in claims
    ]
    return pandas.DataFrame(rows, columns=VERDICTS)


def _together(atlas: Atlas) -> pandas.DataFrame:
    rows = [
        (
            probe,
            ", ".join(each.heads.labels),
            each.n_items,
            each.share.value,
            each.share.low,
            each.share.high,
            len(each.controls),
            each.ceiling,
            each.p,
            each.holds,
        )
        for probe, each in atlas.together().items()
    ]
    return pandas.DataFrame(rows, columns=TOGETHER)


def _pairs(atlas: Atlas, families: list[tuple[Evidence, FamilyVerdict]]) -> pandas.DataFrame:
    found = specialisation(families, atlas.crossed()).pairs_to_pandas() if families else pandas.DataFrame()
    return found if len(found) else pandas.DataFrame(columns=PAIRS)


def _functional(atlas: Atlas) -> pandas.DataFrame:
    rows = [
        (
            each.alpha,
            each.n_heads,
            probe,
            each.base[place],
            each.original[place],
            each.scale_free[place],
            each.random_original[:, place].mean(),
            each.random_scale_free[:, place].mean(),
        )
        for each in atlas.functional_dissociation()
        for place, probe in enumerate(each.behaviours)
    ]
    return pandas.DataFrame(rows, columns=FUNCTIONAL)


def _items(atlas: Atlas) -> pandas.DataFrame:
    rows: list[tuple[str, str, str, str, bool | None]] = []
    for card in atlas.manifest.probes:
        counting = atlas.counting(card.id)
        rows += [(card.id, card.metric, id, "finding", None) for id in card.finding]
        rows += [
            (card.id, card.metric, id, "testing", None if counting is None else id in counting) for id in card.testing
        ]
    table = pandas.DataFrame(rows, columns=ITEMS)
    return table.assign(counts=table["counts"].astype("boolean"))
