"""How many of the best heads to take, where the user does not say.

    stand_out(scores)            # 2, where two heads score 5.9 and 5.6 and all others about 0

Scores of methods have no common scale, so a threshold would be one per method. What can be asked of any of them is
where the list of heads breaks: the largest step down, relative to how far the heads behind it reach up.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from headwise.errors import InputError
from headwise.scores import HeadScores

SHARE = 4
"""At most one head in so many is taken: a set is tested against as many other heads of its layers."""

FAR, BEHIND = 8.0, 8
"""Beyond a quarter of the heads that have a score a step has to be so large, and so many heads have to be behind it."""


def stand_out(scores: HeadScores) -> int:
    """The number of heads, from the top of the list of means, that stand out from the rest.

    With means `m_1 >= m_2 >= ... >= m_n`, it is the `k` in `1 .. n / 4` with the largest `(m_k - m_{k+1}) / s_k`, where
    `s_k` is the root mean square of what the heads behind `k` have above their own median. A head that is left behind
    although it stands out makes `s_k` large, so a strong head does not hide a weaker one; heads with large negative
    scores do not count. Where no step is as large as the `s_k` behind it, nothing stands out and `k` is 1.

    Some methods give few heads a score (the weights of a head that writes nothing copy nothing). Heads without one do
    not stand out either, so `k` may go up to a quarter of them all. But with so few left a step is easily as large as
    `s_k` by chance: there it takes 8 times `s_k`, and 8 heads behind it. Of 16 scores without any structure (normal,
    uniform, Student's 3, exponential) 0.3 to 2.3 percent have such a step.

    Raises:
        InputError: no head has a score.
    """
    means = np.array([each.score for each in scores.ranked()])
    if not means.size:
        raise InputError(f"{scores!r} has no score of any head, so no head can be chosen")
    most = min(max(1, len(means) // SHARE), len(means) - 1)
    if most < 1:
        return 1
    every = sum(values.shape[1] * values.shape[2] for values in scores.values.values())
    furthest = max(most, min(every // SHARE, len(means) - BEHIND))
    steps = np.array([_step(means, k) for k in range(1, furthest + 1)])
    steps[most:][steps[most:] < FAR] = 0
    return int(steps.argmax()) + 1 if steps.max() >= 1 else 1


def _step(means: Float[np.ndarray, " head"], k: int) -> float:
    rest = means[k:]
    above = np.clip(rest - np.median(rest), 0, None)
    # Where the rest are all alike, any step is large; the range keeps the larger of two such steps in front.
    spread = max(float(np.sqrt(np.mean(above**2))), 1e-6 * float(np.ptp(means)))
    return float(means[k - 1] - means[k]) / spread if spread > 0 else 0.0
