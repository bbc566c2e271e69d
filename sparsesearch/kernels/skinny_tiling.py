"""How a product of few rows is cut into programs."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    Attributes:
        columns: lines of weights per program; two make one output column of a gated pair.
        inner: their columns per step.
        stages: steps in flight.
        warps: per program.
        ahead: cache lines of each line of weights that are asked for before the input is there, a power of 2.
    """

    columns: int
    inner: int
    stages: int
    warps: int
    ahead: int = 16

    def for_bytes(self, element_bytes: int) -> "Tiling":
        """As many bytes in flight for elements of another size than 2 bytes."""
        return replace(self, inner=max(16, self.inner * 2 // element_bytes))


def num_programs(lines: int, tiling: Tiling) -> int:
    """Programs that share so many lines of weights."""
    return -(-lines // tiling.columns)


def tiling_for(lines: int, inner: int, num_rows: int) -> Tiling:
    """How a product with so many lines of weights is cut."""
    return next(tiling for most, tiling in TILINGS if most is None or lines <= most)


TILINGS: tuple[tuple[int | None, Tiling], ...] = (
    (2112, Tiling(16, 256, 4, 1)),
    (5120, Tiling(32, 256, 4, 2)),
    (16384, Tiling(32, 256, 4, 2)),
    (65536, Tiling(64, 256, 3, 4)),
    (None, Tiling(64, 256, 3, 4)),
)
"""For up to so many lines: enough programs for every multiprocessor where lines are few, long steps where there are many."""
