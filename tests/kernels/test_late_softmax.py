"""The branches of the late softmax, written in PTX: any order of magnitudes, rows that meet their first key late or never."""

from typing import Any

import numpy as np
import pytest
from ptx_quad import LANES, rounded_pair, run

from sparsesearch.kernels import hopper_softmax

MASKED = np.float32(-1e30 * 0.18)
NO_KEY, FRESH = (np.float32(getattr(x, "value", x)) for x in (hopper_softmax.NO_KEY, hopper_softmax.FRESH))


def ptx(built: Any) -> str:
    code = getattr(built, "value", built)[0]
    return str(getattr(code, "value", code))


def place(element: int) -> tuple[int, Any]:
    """Row and columns, by lane, of a thread's element in the layout of the matrix instructions."""
    return element // 2 % 2, 8 * (element // 4) + element % 2 + 2 * np.arange(LANES)


class Rows:
    """Two rows as a quad of lanes keeps them: reference, sums, and one accumulator per row."""

    def __init__(self, num: int, rounded: str) -> None:
        self.num, self.rounded = num, rounded
        self.m = np.full(2, NO_KEY)
        self.total, self.acc = np.zeros((2, LANES), np.float32), np.zeros((2, LANES), np.float32)
        self.rises = 0

    def block(self, scores: Any, values: Any) -> None:
        num, sums = self.num, self.num // 2 if self.rounded else self.num
        fresh = self.m < FRESH
        shown = (scores - np.where(fresh, 0, self.m)[:, None]).astype(np.float32)
        registers: dict[str, Any] = {}
        for element in range(num):
            row, columns = place(element)
            operands = (shown[row, columns], np.full(LANES, self.m[row]), self.total[row])
            registers |= {f"${sums + (2 + i) * num + element}": x.copy() for i, x in enumerate(operands)}
        run(ptx(hopper_softmax._late_softmax(num, self.rounded)), registers)
        weights = np.zeros(scores.shape, np.float32)
        for element in range(num):
            word = registers[f"${element // 2 if self.rounded else element}"]
            weights[place(element)] = rounded_pair(word, bool(element % 2)) if self.rounded else word
        rise = np.array([registers[f"${sums + num + 2 * row}"][0] for row in (0, 1)])
        self.total = np.stack([registers[f"${sums + 2 * row}"] for row in (0, 1)])
        registers = {f"${i}": self.acc[i // 2 % 2] for i in range(4)}
        registers |= {f"${8 + i}": np.full(LANES, rise[i // 2 % 2]) for i in range(4)}
        run(ptx(hopper_softmax._rescale(4)), registers)
        self.acc = np.stack([registers["$0"], registers["$2"]]) + (weights @ values)[:, None]
        self.m = np.where(fresh, rise, self.m + rise).astype(np.float32)
        self.rises += bool(rise.any())


@pytest.mark.parametrize("rounded", ["", "bf16x2"])
@pytest.mark.parametrize("growth", [0.0, 3.0, 60.0, 400.0])
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_agrees_with_the_exact_softmax(rounded: str, growth: float, late: bool) -> None:
    rng = np.random.default_rng(int(growth))
    for shift in (0.0, -500.0, 700.0):
        rows, keys = Rows(32, rounded), 64
        scores = rng.normal(size=(5, 2, keys)) * 2 + growth * rng.normal(size=(5, 1, 1)) + shift
        scores = scores.astype(np.float32)
        scores[1, 1, rng.random(keys) < 0.7] = MASKED
        if late:
            scores[:2, 0], scores[:, 1] = MASKED, MASKED  # one row without keys at first, one without any
        values = rng.normal(size=(5, keys)).astype(np.float32)
        for block in range(5):
            rows.block(scores[block], values[block])
        flat = scores.transpose(1, 0, 2).reshape(2, -1).astype(np.float64)
        for row in (0, 1):
            seen = flat[row] > -1e28
            assert np.isfinite(rows.acc[row]).all()
            if not seen.any():
                assert rows.total[row].sum() == 0
                continue
            top = flat[row][seen].max()
            exact = np.where(seen, np.exp2(flat[row] - top), 0)
            total = rows.total[row].sum()
            error = rows.acc[row, 0] / total - exact @ values.ravel() / exact.sum()
            assert abs(error) < (1e-2 if rounded else 1e-4)
            assert rows.m[row] + np.log2(total) == pytest.approx(top + np.log2(exact.sum()), abs=3e-4)
        assert rows.rises >= 1
        if growth == 0.0 and not late:
            assert rows.rises == 1, "the reference must stay where scores do not grow"
