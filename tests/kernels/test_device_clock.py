"""The clock from counters: what they mean, and on a GPU that it is one that GPUs have."""

import pytest
import torch

from sparsesearch.kernels.device_clock import hz_between, stamp


def test_cycles_over_nanoseconds_of_what_was_read_twice() -> None:
    before = torch.tensor([[1000, 50], [0, 0], [7000, 60], [5, 90]])
    after = torch.tensor([[1000 + 1980, 1050], [9, 9], [7000 + 1600, 1060], [0, 0]])
    assert hz_between(before, after) == pytest.approx(1.6e9)  # the lower of two medians, as torch has it
    assert hz_between(before[:1], after[:1]) == pytest.approx(1.98e9)
    assert hz_between(before[1:2], after[1:2]) is None
    assert hz_between(before, before) is None
    assert hz_between(before[:0], before[:0]) is None


@pytest.mark.gpu
def test_a_gpu_has_a_clock() -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    before = stamp()
    for _ in range(40):
        a @ a
    found = hz_between(before, stamp())
    assert found is not None
    assert 0.5e9 < found < 3e9
