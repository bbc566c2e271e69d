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
        late: whether the next kernel is launched only when the last weights were read, or at once.
    """

    columns: int
    inner: int
    stages: int
    warps: int
    ahead: int = 16
    late: bool = False

    def for_bytes(self, element_bytes: int) -> "Tiling":
        """As many bytes in flight for elements of another size than 2 bytes."""
        return replace(self, inner=max(16, self.inner * 2 // element_bytes))


def num_programs(lines: int, tiling: Tiling) -> int:
    """Programs that share so many lines of weights."""
    return -(-lines // tiling.columns)


def tiling_for(lines: int, inner: int, num_rows: int) -> Tiling:
    """How a product with so many lines of weights is cut."""
    if num_rows == 1:
        ways = ONE_ROW if inner >= _LONG else ONE_SHORT_ROW
    else:
        ways = EIGHT_ROWS if num_rows <= 8 else SIXTEEN_ROWS
    return next(tiling for most, tiling in ways if most is None or lines <= most)


Ways = tuple[tuple[int | None, Tiling], ...]
"""A tiling for up to so many lines: enough programs for every multiprocessor where lines are few."""

_LONG = 2048
ONE_ROW: Ways = (
    (5120, Tiling(8, 1024, 4, 4, 16)),
    (None, Tiling(4, 2048, 3, 4, 0)),
)
ONE_SHORT_ROW: Ways = ((None, Tiling(8, 512, 4, 4, 4)),)
EIGHT_ROWS: Ways = (
    (2112, Tiling(16, 256, 4, 2, 8)),
    (5120, Tiling(16, 512, 4, 1, 16)),
    (16384, Tiling(16, 512, 4, 1, 0)),
    (65536, Tiling(32, 256, 4, 2, 0, late=True)),
    (None, Tiling(32, 256, 4, 2, 0)),
)
SIXTEEN_ROWS: Ways = (
    (2112, Tiling(16, 256, 4, 2, 8)),
    (5120, Tiling(64, 128, 5, 4, 0)),
    (16384, Tiling(32, 256, 4, 4, 0)),
    (None, Tiling(64, 128, 4, 4, 0)),
)
