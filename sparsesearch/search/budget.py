"""Budgets: how much of the dense cost a plan may use."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from sparsesearch.errors import SpecError, nearest

Metric = Literal["density", "kv_fraction", "latency", "params", "flops", "memory"]


@dataclass(frozen=True)
class Budget:
    """At every length, a plan's summed cost must be at most `bound` times that of the all-dense plan.

    Attributes:
        metric: what is limited: computed tiles, cached KV, seconds through a cost model; where the profile covers pruning, also the
            parameters, multiply-adds, or bytes of the layers.
        bound: share of dense, in (0, 1].
        lengths: the sequence lengths in tokens where it holds; None means all that were profiled.
    """

    metric: Metric
    bound: float
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise SpecError(f"a budget must limit a known metric, but got {self.metric!r}.{_known(self.metric)}")
        if not 0 < self.bound <= 1:
            raise SpecError(f"0 < {self.metric} <= 1 must hold (a share of dense), but got {self.bound:g}.")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise SpecError(f"the lengths of a budget must be positive token counts, but got {self.lengths}.")

    def __str__(self) -> str:
        at = "" if self.lengths is None else "@" + "+".join(str(length) for length in self.lengths)
        return f"{self.metric}={self.bound:g}{at}"


def parse_budget(text: str) -> Budget:
    """Read one budget: `density=0.25`, `kv_fraction=0.4`, `latency=0.5x`, `density=25%`, `density=0.25@4096+8192`.

    Raises:
        SpecError: the text has another form, the metric is unknown, or the bound is outside (0, 1].
    """
    match = re.fullmatch(r"\s*(?P<metric>\w+)\s*=\s*(?P<bound>[^@\s]+)\s*(@\s*(?P<lengths>[\d+\s]+))?", text)
    if match is None:
        raise SpecError(f"a budget must look like density=0.25 or latency=0.5x@4096, but got {text!r}.")
    metric = match["metric"]
    if metric not in get_args(Metric):
        raise SpecError(f"a budget must limit a known metric, but {text!r} names {metric!r}.{_known(metric)}")
    lengths = None
    if match["lengths"] is not None:
        lengths = tuple(sorted({int(part) for part in match["lengths"].split("+") if part.strip()}))
    return Budget(metric, _share(match["bound"], text), lengths)  # type: ignore[arg-type]  # checked above


def parse_budgets(texts: str | Iterable[str]) -> tuple[Budget, ...]:
    """Read several budgets that must all hold: one text with commas, or several texts.

    Raises:
        SpecError: there is none, or one of them cannot be read.
    """
    parts = [part for text in ([texts] if isinstance(texts, str) else texts) for part in text.split(",")]
    budgets = tuple(parse_budget(part) for part in parts if part.strip())
    if not budgets:
        raise SpecError("at least one budget must be given, such as density=0.25.")
    return budgets


def _share(text: str, whole: str) -> float:
    number, factor = text.removesuffix("x"), 1.0
    if text.endswith("%"):
        number, factor = text.removesuffix("%"), 100.0
    try:
        return float(number) / factor
    except ValueError as error:
        raise SpecError(
            f"the bound of a budget must be a number such as 0.25, 0.25x or 25%, but got {whole!r}."
        ) from error


def _known(metric: str) -> str:
    return nearest(metric, get_args(Metric))
