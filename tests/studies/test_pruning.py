import numpy as np
from scipy.stats import wilcoxon

from sparsesearch.studies.pruning import Rival, beaten_by


def test_a_clearly_worse_and_no_cheaper_plan_is_stopped() -> None:
    rng = np.random.default_rng(0)
    rival = Rival(3, 0.2, tuple(rng.random(12)))
    worse = [loss + 0.1 + 0.01 * rng.random() for loss in rival.losses[:8]]
    assert beaten_by(worse, 0.2, [rival]) is rival
    assert beaten_by(worse, 0.25, [rival]) is rival
    assert beaten_by(worse, 0.19, [rival]) is None, "a cheaper plan may lose more"
    assert beaten_by(worse[:3], 0.2, [rival]) is None, "too few sequences"
    assert beaten_by(rival.losses[:8], 0.2, [rival]) is None, "the same losses"


def test_the_threshold_is_that_of_the_signed_rank_test() -> None:
    """Just above and just below p, computed by scipy itself, with one rival and with two."""
    rival = Rival(0, 0.1, (0.0,) * 6)
    losses = [0.6, 0.5, 0.4, 0.3, 0.2, -0.1]
    p_value = wilcoxon(losses, alternative="greater").pvalue
    assert beaten_by(losses, 0.1, [rival], p_threshold=p_value * 1.01) is rival
    assert beaten_by(losses, 0.1, [rival], p_threshold=p_value * 0.99) is None
    second = Rival(1, 0.05, (0.05,) * 6)  # cheaper, slightly worse: also on the front
    assert beaten_by(losses, 0.1, [rival, second], p_threshold=p_value * 1.5) is None
    assert beaten_by(losses, 0.1, [rival, second], p_threshold=p_value * 2.01) is rival


def test_dominated_rivals_do_not_count() -> None:
    good, poor = Rival(0, 0.1, (0.0,) * 6), Rival(1, 0.1, (5.0,) * 6)
    losses = [0.6, 0.5, 0.4, 0.3, 0.2, -0.1]
    p_value = wilcoxon(losses, alternative="greater").pvalue
    assert beaten_by(losses, 0.1, [good, poor], p_threshold=p_value * 1.01) is good


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Equal plans: no more than p_threshold of them are stopped at one look, whatever the number of rivals."""
    rng = np.random.default_rng(1)
    stopped = 0
    for _ in range(300):
        base = rng.random(10)
        rivals = [Rival(i, 0.1 + 0.01 * i, tuple(base + rng.normal(0, 0.1, 10))) for i in range(3)]
        stopped += beaten_by(base + rng.normal(0, 0.1, 10), 0.2, rivals, p_threshold=0.1) is not None
    assert stopped <= 300 * 0.1 + 3 * np.sqrt(300 * 0.1 * 0.9)
