"""What other methods minimise when they choose rules, on the same profile: their choice beside ours, at equal budget.

| objective | method | its own search | here |
|---|---|---|---|
| minference | Jiang et al. 2024, arXiv:2407.02490 | released code: per head, the pattern that retains most attention | dropped_mass over A-shape, vertical-slash and block-sparse rules |
| duo | Xiao et al. 2024, arXiv:2410.10819 | gates trained on answer tokens, dense or streaming per KV group | answer over dense and streaming KV groups |
| flexprefill | Lai et al. 2025, arXiv:2502.20766 | smallest sets with attention mass γ | dropped_mass over flex_prefill rules |
| xattention | Xu et al. 2025, arXiv:2503.16428 | thresholds per head by a dynamic programme over attention mass | dropped_mass over antidiagonal rules |

`moa` is a proxy of its own (see proxies). DuoAttention trains its gates on the distance of the last hidden states; the answer proxy is that
loss to second order around dense attention, on the log-odds. MInference compares at equal kernel FLOPs per head; the search spends one budget
over all heads, so give its space and the density of its rules to come closest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from sparsesearch.errors import SpecError
from sparsesearch.rules import Rule
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.shapes import Granularity


@dataclass(frozen=True)
class PublishedObjective:
    """A proxy, and the rules the method has.

    Attributes:
        proxy: a name of `proxies.PROXIES`.
        has: whether the method has a rule; dense always counts.
        space: the shipped search space with its rules.
        granularity: what the method decides on, if it cannot be chosen.
    """

    proxy: str
    has: Callable[[Rule], bool]
    space: str
    granularity: Granularity | None = None


def _fixed_window(rule: Rule) -> bool:
    return isinstance(rule, SinkWindow) and rule.window.b == 0


PUBLISHED = {
    "minference": PublishedObjective(
        "dropped_mass",
        lambda rule: rule.kind in ("vertical_slash", "pooled_topk") or _fixed_window(rule),
        "minference",
    ),
    "duo": PublishedObjective("answer", _fixed_window, "duo_attention", "kv_group"),
    "flexprefill": PublishedObjective("dropped_mass", lambda rule: rule.kind == "flex_prefill", "flex_prefill"),
    "xattention": PublishedObjective("dropped_mass", lambda rule: rule.kind == "antidiagonal", "xattention"),
}


def allowed(name: str, rules: Sequence[Rule], granularity: Granularity) -> Bool[ndarray, " C"]:
    """Which candidates a method may choose.

    Raises:
        SpecError: it decides on other units, or the candidates hold none of its rules.
    """
    method = PUBLISHED[name]
    if method.granularity not in (None, granularity):
        raise SpecError(f"objective {name!r} decides per {method.granularity}. Pass --unit {method.granularity}.")
    mask = np.array([rule.kind == "dense" or method.has(rule) for rule in rules])
    if mask.sum() == sum(rule.kind == "dense" for rule in rules):
        raise SpecError(
            f"objective {name!r} must have rules of its method to choose from, but the profile has none. Profile again with --space "
            f"{method.space}."
        )
    return mask
