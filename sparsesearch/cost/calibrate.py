"""Measuring a device: `sparsesearch calibrate`. A CPU by `cpu_cases` and `cpu_fit`."""

from collections.abc import Callable
from pathlib import Path

import torch

from sparsesearch.cost.cpu_cases import FULL, QUICK, all_cases, measure
from sparsesearch.cost.cpu_fit import fitted
from sparsesearch.cost.table import TableCostModel
from sparsesearch.errors import SpecError

TIME_LIMIT_S = 70.0

Progress = Callable[[str, int, int], None]


def calibrate(
    device: str = "cpu",
    *,
    out: Path | None = None,
    quick: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> TableCostModel:
    """Measure this machine's dense SDPA, tile attention, estimators and mean values, in under 90 s.

    Args:
        device: `cpu`.
        out: where to write the JSON; None writes nothing.
        quick: a few shapes and seconds, for tests; extrapolates further.
        dtype: of queries, keys and values.
        seed: of the inputs and masks.
        progress: called with the stage, the seconds spent and the seconds planned.

    Raises:
        SpecError: the device cannot be calibrated.
    """
    if device != "cpu":
        raise SpecError(
            f"calibrate must be given device 'cpu', but got {device!r}. For a GPU that nobody has measured use "
            "roofline:<gpu> as the cost model."
        )
    shapes = QUICK if quick else FULL
    generator = torch.Generator().manual_seed(seed)
    cases = all_cases(shapes, generator)
    rounds = measure(cases, 5.0 if quick else TIME_LIMIT_S, dtype, generator, progress)
    model = TableCostModel(fitted(cases, shapes, dtype, {"seed": seed, "quick": quick, "rounds": rounds}))
    if out is not None:
        model.table.save(out)
    return model
