"""A report made by hand, with every kind of thing in it, and names that would do harm if they were not escaped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from headwise.atlas.report.view import (
    Alike,
    Behaviour,
    Claim,
    Dose,
    Example,
    Failure,
    Fresh,
    HeadMap,
    Kinds,
    Masked,
    Matrix,
    Off,
    Pair,
    Pattern,
    Report,
    Shot,
    Shown,
)
from headwise.verify.verdict import Ruling

EVIL = "<script>alert('x')</script>"
LAYERS, HEADS = 9, 8


def claim(
    *heads: str,
    effect: float = 3.0,
    ruling: Ruling = "verified",
    method: str = "",
    controls: tuple[float, ...] = (),
    reason: str = "",
    q: float = 0.0004,
    alone: int = 0,
    off: tuple[Off, ...] = (),
) -> Claim:
    mean = float(np.mean(controls)) if controls else 0.05
    return Claim(
        heads=heads,
        method=method,
        effect=effect,
        excess=effect - mean,
        low=effect - mean - 0.4,
        high=effect - mean + 0.4,
        ceiling=float(np.quantile(controls, 0.95)) if controls else 0.21,
        n_controls=len(controls) or 63,
        match="layers",
        p=q / 4,
        p_floor=0.0002,
        p_kind="studentised" if controls else "rank",
        q=q,
        ruling=ruling,
        reason=reason or "q is 0.0004, effect 3 is above 0.2 and above the controls' 95th percentile",
        controls=controls,
        alone=alone,
        off=off,
    )


def behaviour(
    probe: str,
    title: str,
    joints: tuple[Claim, ...],
    singles: tuple[Claim, ...],
    *,
    refusal: str = "",
    solved: float = 0.98,
    unit: str = "logits",
    metric: str = "logit-difference",
    clean: float = 4.2,
) -> Behaviour:
    return Behaviour(
        probe=probe,
        title=title,
        metric=metric,
        unit=unit,
        mode="zero",
        scope="all",
        n_items=31,
        family_size=len(joints) + len(singles),
        clean=clean,
        chance=0.0,
        solved=solved,
        smallest=0.05 * clean,
        refusal=refusal,
        joints=joints,
        singles=singles,
    )


def strip(draw: np.random.Generator, side: int) -> Shot:
    """A strip of six coloured panels on gray, in cells of the same size."""
    pixels = np.full((48, 48, 3), 150, np.uint8)
    for panel in range(6):
        top, left = divmod(panel, 3)
        pixels[24 * top + 4 : 24 * top + 20, 16 * left + 3 : 16 * left + 13] = draw.integers(0, 255, 3)
    across = 48 / side
    boxes = [(x * across, y * across, (x + 1) * across, (y + 1) * across) for y in range(side) for x in range(side)]
    return Shot((48, 48), pixels, np.array(boxes))


def report() -> Report:
    draw = np.random.default_rng(0)

    def controls(scale: float, n: int = 50) -> tuple[float, ...]:
        return tuple(float(v) for v in draw.standard_t(3, n) * scale)

    def rest(n: int, scale: float) -> tuple[Claim, ...]:
        return tuple(
            claim(
                f"L{draw.integers(LAYERS)}H{draw.integers(HEADS)}",
                effect=float(draw.normal() * scale),
                ruling="not verified",
                q=float(draw.uniform(0.2, 1)),
                reason="q is above 0.05: heads of this layer that were not chosen cost as much",
            )
            for _ in range(n)
        )

    off = (Off("text", 0.0123, "nats", 0.004, 0.021, 32),)
    ioi = behaviour(
        "ioi",
        "which name comes next",
        (
            claim("L5H1", "L6H3", "L7H0", effect=4.4, method="direct-logit", controls=controls(0.12), alone=2, off=off),
            claim(
                "L2H2", "L4H5", effect=0.31, method="induction", ruling="not verified", controls=controls(0.2), q=0.21
            ),
        ),
        (claim("L6H3", effect=2.9), claim("L5H1", effect=1.2, q=0.013), *rest(70, 0.08)),
    )
    ioi = replace(ioi, fresh=Fresh(("L5H1", "L6H3"), 0.91, 0.84, 0.98, 0.03, 8, 20, True))
    needle = behaviour(
        "needle",
        "a fact in a long text",
        (
            claim(
                "L3H0", "L3H5", "L4H2", "L4H7",
                effect=1.0, method="retrieval", controls=tuple(abs(c) for c in controls(0.02)), off=off,
            ),
        ),
        rest(72, 0.01),
        unit="accuracy",
        metric="exact-match",
        clean=1.0,
    )  # fmt: skip
    facts = behaviour(
        "facts",
        "capitals, continents, languages",
        (
            claim(
                "L8H0", "L8H1", effect=0.4, method="copying", ruling="undecidable", controls=controls(0.1, 12), q=0.08
            ),
        ),
        rest(72, 0.05),
    )
    arithmetic = behaviour(
        "arithmetic",
        "sums of two numbers",
        (),
        (),
        refusal="the model answers 3 of 64 items rightly, at least half are needed",
        solved=3 / 64,
    )
    conflict = behaviour(
        "conflict",
        f"context against memory {EVIL}",
        (claim("L7H4", "L6H3", effect=2.2, method="direct-logit", controls=controls(0.2), alone=1),),
        (claim("L7H4", effect=1.9, q=0.002), *rest(71, 0.1)),
    )
    behaviours = (ioi, needle, conflict, facts, arithmetic)
    rows = tuple(f"L{i}" for i in range(LAYERS))
    methods = ("induction", "previous-token", "retrieval", "direct-logit", "copying", "sink")
    maps = [
        HeadMap(
            name,
            "Olsson et al. 2022" if name == "induction" else "",
            "repeat",
            32,
            rows,
            (draw.beta(0.5, 4, (LAYERS, HEADS)) if i % 3 else draw.normal(0, 0.3, (LAYERS, HEADS))),
            True,
            ((5, 1), (6, 3)),
        )
        for i, name in enumerate(methods)
    ]
    effects = draw.normal(0, 0.05, (LAYERS, HEADS))
    effects[6, 3], effects[5, 1], effects[0, 0] = 2.9, 1.2, np.nan
    maps.append(HeadMap("knock-out effect", "logits", "ioi", 31, rows, effects, False, ((5, 1), (6, 3))))
    heads = ("L5H1", "L6H3", "L7H0", "L7H4", "L3H0")
    names = ("ioi", "needle", "conflict", "facts", "fewshot", "colored-objects", "repeat", "hash")
    shares = draw.normal(0, 0.03, (len(heads), len(names)))
    sure = np.zeros(shares.shape, dtype=bool)
    for row, column, value in ((0, 0, 0.29), (1, 0, 0.69), (1, 2, 0.5), (3, 2, 0.45), (4, 1, 1.04), (2, 6, -0.3)):
        shares[row, column], sure[row, column] = value, value > 0
    shares[4, 5] = np.nan
    text = ("When", "Mary", "and", "John", "went", "to", "the", "store", ",", "John", "gave", "a", "drink", "to")
    tokens = ("<s>", *(f" {word}" if i else word for i, word in enumerate(text)), EVIL, "\n")
    weights = draw.dirichlet(np.full(len(tokens), 0.15), 3)
    patterns = tuple(
        Pattern(head, tuple(float(w) for w in row), head != "L2H2")
        for head, row in zip(("L6H3", "L5H1", "L2H2"), weights, strict=True)
    )
    long = tuple(f" word{i}" for i in range(220))
    spread = draw.dirichlet(np.full(220, 0.05))
    x = (0.0, 0.25, 0.5, 0.75, 1.0)
    seen = (strip(draw, 6), strip(draw, 6), strip(draw, 4))
    looks = []
    for head, share in (("L6H3", 0.8), ("L5H1", 0.3), ("L2H2", 0.002)):
        cells = draw.dirichlet(np.full(88, 0.15)) * share
        parts = (cells[:36], cells[36:72], cells[72:])
        on_tokens = (*(float(part.sum()) for part in parts), (1 - share) / 2, (1 - share) / 2)
        looks.append(Pattern(head, on_tokens, head != "L2H2", tuple(tuple(map(float, part)) for part in parts)))
    album = ("[picture 1]", " [picture 2]", " [picture 3]", f" What is in panel 3 {EVIL}?", " Answer:")
    return Report(
        model=f"zoo:planted {EVIL}",
        n_heads=LAYERS * HEADS,
        asked=(
            Shown("Items per probe", "64, half for finding, half for testing"),
            Shown("Knock-out", "mode zero, scope all"),
            Shown("Behaviours", "5"),
            Shown("Methods", "15"),
            Shown("Seed", "0"),
            Shown("Model", "llama, 9 layers, 72 heads"),
        ),
        origin=(
            Shown("Weights", "sha256 3f0c9d0d66b1a1f6c0b5b3f8e7a2d4c19b0a7e6d5c4b3a291807f6e5d4c3b2a1"),
            Shown("headwise", "0.4.0"),
            Shown("torch", "2.13.0"),
            Shown("Kernel", "sdpa, float32, 2 threads"),
        ),
        command="headwise atlas zoo:planted --out ./atlas-planted --items 64 --seed 0 --mode zero --scope all",
        behaviours=behaviours,
        maps=tuple(maps),
        matrix=Matrix(
            names,
            heads,
            shares,
            sure,
            np.array([0.92, 0.71, np.nan, 0.88, 0.97]),
            "tau (Yanai et al. 2005): 1 for one behaviour only, 0 for all alike",
            (
                Pair("ioi", "needle", 0.98, 0.02, 0.81, 1.08, True),
                Pair("needle", "ioi", 1.0, 0.03, 0.88, 1.02, True),
            ),
            (Alike("ioi", "needle", 0.04, 0, 0.06, 1.0), Alike("ioi", "conflict", 0.41, 1, 0.06, 0.055)),
            (Masked(0.2, 14, 31.0, 42.5, -0.4, 0.1), Masked(0.3, 21, 18.25, 20.0, 1.5, 2.0)),
            n_pictures=3,
            kinds=Kinds(5, 4, 1, 0.56, 0.47, 6, 12),
        ),
        examples=(
            Example("ioi", "3fa9c1d2", tokens, " Mary", patterns),
            Example("text", "5e1d0c2b", tokens, "", patterns),
            Example("needle", "77ab01ff", long, " word9", (Pattern("L3H0", tuple(float(w) for w in spread), False),)),
            Example("panel", "0badcafe", album, " red star", tuple(looks), seen),
        ),
        doses=(
            Dose("ioi", "L5H1, L6H3, L7H0", "strength", "logits", 31, x, (0, 0.4, 1.4, 3.1, 4.4),
                 (0, 0.3, 1.2, 2.8, 4.1),
                 (0, 0.5, 1.6, 3.4, 4.7), (0, 0.05, 0.1, 0.12, 0.2)),
            Dose("needle", "retrieval, by rank", "heads out", "accuracy", 31, (1, 2, 3, 4, 5), (0, 0.02, 0.4, 1, 1)),
        ),
        refused=(Failure("find/copying/facts", f"values of zoo:planted are not linear {EVIL}"),),
        files=(Shown("manifest.json", "what was planned, before the first cell"), Shown("tables/", "Parquet tables")),
    )  # fmt: skip
