"""Budgets: how much a plan may spend, as a share of dense or in absolute units."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from sparsesearch.errors import SpecError, nearest

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_BYTES = {"GB": 1e9, "MB": 1e6, "KB": 1e3, "GiB": 2.0**30, "MiB": 2.0**20}

METRICS: dict[str, dict[str, float]] = {
    "density": {},
    "kv_fraction": {},
    "latency": _SECONDS,
    "ttft": _SECONDS,
    "tpot": _SECONDS,
    "memory": _BYTES,
    "params": {},
    "flops": {},
}
"""What a budget on the command line may limit -> the units that make its bound absolute, and their size in s or bytes.

density: computed tiles of the prefill; kv_fraction: cached keys and values; latency: the workloads' weighted total; ttft and tpot: seconds
to the first token and per output token; memory: keys and values, with the weights where they are known.
Of removals, params and flops: of the layers (embeddings and norms, which no removal touches, not counted)."""

PRICED_BY_DEVICE = ("latency", "ttft", "tpot")
"""Metrics in seconds: what they cost is a cost model's prediction."""


@dataclass(frozen=True)
class Budget:
    """At every point, a plan's cost must be at most `bound`.

    Attributes:
        metric: what is limited: a cost of the score table.
        bound: share of the all-dense plan's cost, in (0, 1]; or seconds or bytes when `absolute`.
        lengths: the sequence lengths in tokens where it holds; None means wherever the metric is priced.
        absolute: `bound` is in the metric's own unit and not a share.
    """

    metric: str
    bound: float
    lengths: tuple[int, ...] | None = None
    absolute: bool = False

    def __post_init__(self) -> None:
        if self.absolute and not 0 < self.bound < math.inf:
            raise SpecError(f"{self.metric} must be limited to a positive amount, but got {self.bound:g}.")
        if not self.absolute and not 0 < self.bound <= 1:
            units = METRICS.get(self.metric, {})
            hint = f" An amount has a unit: {', '.join(units)}." if units else ""
            raise SpecError(f"0 < {self.metric} <= 1 must hold (a share of dense), but got {self.bound:g}.{hint}")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise SpecError(f"the lengths of a budget must be positive token counts, but got {self.lengths}.")

    def __str__(self) -> str:
        at = "" if self.lengths is None else "@" + "+".join(str(length) for length in self.lengths)
        return f"{self.metric}={self.amount(self.bound)}{at}"

    def amount(self, bound: float) -> str:
        """A bound as it is written: 0.25, 120ms, 24GB."""
        units = METRICS.get(self.metric, {})
        if not self.absolute or not units:
            return f"{bound:.12g}"
        unit, size = next(((unit, size) for unit, size in units.items() if bound >= size), (list(units)[-1], 0.0))
        return f"{bound / (size or units[unit]):.12g}{unit}"

    def holds_at(self, length: int) -> bool:
        """Whether it limits the metric at a point of this length."""
        return self.lengths is None or length in self.lengths


def parse_budget(text: str) -> Budget:
    """Read one budget: `density=0.25`, `latency=0.5x`, `density=25%@4096+8192`, `ttft=120ms@32768`, `memory=24GB`.

    Raises:
        SpecError: the text has another form, the metric is unknown, or the bound is out of range.
    """
    match = re.fullmatch(r"\s*(?P<metric>\w+)\s*=\s*(?P<bound>[^@\s]+)\s*(@\s*(?P<lengths>[\d+\s]+))?", text)
    if match is None:
        raise SpecError(f"a budget must look like density=0.25 or latency=0.5x@4096, but got {text!r}.")
    metric = match["metric"]
    if metric not in METRICS:
        raise SpecError(f"a budget must limit a known metric, but {text!r} names {metric!r}.{nearest(metric, METRICS)}")
    lengths = None
    if match["lengths"] is not None:
        lengths = tuple(sorted({int(part) for part in match["lengths"].split("+") if part.strip()}))
    bound, absolute = _bound(match["bound"], METRICS[metric], text)
    return Budget(metric, bound, lengths, absolute)


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


def _bound(text: str, units: dict[str, float], whole: str) -> tuple[float, bool]:
    """The number in a share (0.25, 0.25x, 25%) or an absolute amount (120ms), and which of the two it is."""
    match = re.fullmatch(r"(?P<number>[+-]?(?:nan|inf|[\d.]+(?:e[+-]?\d+)?))(?P<unit>[A-Za-z%]*)", text)
    shares = {"": 1.0, "x": 1.0, "%": 100.0}
    try:
        if match is None or match["unit"] not in {**shares, **units}:
            raise ValueError(text)
        number, unit = float(match["number"]), match["unit"]
    except ValueError as error:
        known = "0.25, 0.25x or 25%" + "".join(f", 10{name}" for name in units)
        raise SpecError(f"the bound of a budget must be a number such as {known}, but got {whole!r}.") from error
    return (number / shares[unit], False) if unit in shares else (number * units[unit], True)
