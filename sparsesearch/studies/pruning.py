"""Pruning with several objectives: stop evaluating a plan once another one, no dearer, is significantly better on the same sequences.

Optuna's `WilcoxonPruner` compares with the best trial, which a study with two objectives does not have, and `Trial.report` refuses such
studies. The test is the same, the rival another: each finished trial whose cost is not larger.

Source: signed-rank test, Wilcoxon 1945, Biometrics Bulletin 1(6); as a pruner: optuna.pruners.WilcoxonPruner. Differs: rivals are the trials
of no larger cost that none of the others dominates, and the threshold is divided by their number (Bonferroni).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon


@dataclass(frozen=True)
class Rival:
    """A finished trial: its cost, and its loss on each sequence, in the study's order of sequences."""

    number: int
    cost: float
    losses: tuple[float, ...]


def beaten_by(
    losses: Sequence[float],
    cost: float,
    rivals: Sequence[Rival],
    *,
    p_threshold: float = 0.1,
    least_sequences: int = 4,
) -> Rival | None:
    """The rival that is significantly better on the sequences so far and no dearer; None when the trial should go on.

    Args:
        losses: of this trial on the first sequences.
        cost: of this trial.
        rivals: finished trials.
        p_threshold: of the one-sided test, shared among the rivals.
        least_sequences: fewer are never tested.
    """
    count = len(losses)
    able = [rival for rival in rivals if rival.cost <= cost and len(rival.losses) >= count]
    front = [one for one in able if not any(_dominates(other, one, count) for other in able)]
    if count < least_sequences or not front:
        return None
    for rival in sorted(front, key=lambda one: (float(np.mean(one.losses[:count])), one.number)):
        difference = np.asarray(losses) - np.asarray(rival.losses[:count])
        if difference.mean() <= 0 or not difference.any():
            continue
        p_value = float(wilcoxon(difference, alternative="greater", zero_method="zsplit").pvalue)
        if p_value < p_threshold / len(front):
            return rival
    return None


def _dominates(a: Rival, b: Rival, count: int) -> bool:
    better = (float(np.mean(a.losses[:count])), a.cost, a.number)
    worse = (float(np.mean(b.losses[:count])), b.cost, b.number)
    return (
        better[0] <= worse[0]
        and better[1] <= worse[1]
        and better != worse
        and (better[:2] != worse[:2] or better < worse)
    )
