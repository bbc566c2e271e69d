from dataclasses import replace

import pytest

from sparsesearch.errors import SpecError
from sparsesearch.search.budget import Budget, parse_budget, parse_budgets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("density=0.25", Budget("density", 0.25)),
        (" density = 25% ", Budget("density", 0.25)),
        ("latency=0.5x", Budget("latency", 0.5)),
        ("kv_fraction=1", Budget("kv_fraction", 1.0)),
        ("density=0.25@8192+4096", Budget("density", 0.25, (4096, 8192))),
        ("ttft=120ms", Budget("ttft", 0.12, absolute=True)),
        ("ttft=0.5x@32768", Budget("ttft", 0.5, (32768,))),
        ("tpot=1.5e-2s", Budget("tpot", 0.015, absolute=True)),
        ("tpot=750us", Budget("tpot", 0.00075, absolute=True)),
        ("memory=24GB", Budget("memory", 24e9, absolute=True)),
        ("memory=0.5GiB", Budget("memory", 2.0**29, absolute=True)),
    ],
)
def test_reads_and_prints(text: str, expected: Budget) -> None:
    for budget in (parse_budget(text), parse_budget(str(expected))):
        assert budget.bound == pytest.approx(expected.bound, rel=1e-12)
        assert replace(budget, bound=expected.bound) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("density=0", r"0 < density <= 1 must hold .* got 0\."),
        ("density=1.5", r"0 < density <= 1"),
        ("density=-0.5", r"0 < density <= 1"),
        ("density=nan", r"0 < density <= 1"),
        ("density=150%", r"got 1\.5"),
        ("dencity=0.5", r"Did you mean 'density'\? Known: density, flops, kv_fraction, latency, memory"),
        ("density", r"must look like density=0\.25"),
        ("density=", r"must look like"),
        ("density=half", r"must be a number such as"),
        ("latency=3GB", r"must be a number such as .*10ms.* got 'latency=3GB'"),
        ("density=3ms", r"must be a number such as"),
        ("ttft=0ms", r"ttft must be limited to a positive amount"),
        ("memory=infGB", r"memory must be limited to a positive amount"),
        ("memory=1.2.3GB", r"must be a number such as"),
        ("density=0.5@", r"must look like"),
        ("density=0.5@0", r"positive token counts"),
    ],
)
def test_refuses_with_a_clear_sentence(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_budget(text)


def test_several() -> None:
    expected = (Budget("density", 0.25), Budget("latency", 0.5))
    assert parse_budgets("density=0.25, latency=0.5x") == expected
    assert parse_budgets(["density=0.25", "latency=0.5x"]) == expected
    with pytest.raises(SpecError, match="at least one budget"):
        parse_budgets(" , ")
