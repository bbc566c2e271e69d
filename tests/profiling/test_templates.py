"""Bitmaps are scored on sequences that they were not made from."""

import torch

from sparsesearch.profiling.templates import FittedTemplates
from sparsesearch.rules.fixed_blocks import FixedBlocks

TEMPLATE = FixedBlocks(keep=0.3)
MODULES = ("a", "b")


def masses(count: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.rand(3, 9, 9, generator=generator) for _ in MODULES] for _ in range(count)]


def expected(found: list[list[torch.Tensor]], module: int) -> tuple[FixedBlocks, ...]:
    mean = torch.stack([own[module] for own in found]).mean(0)
    return tuple(TEMPLATE.calibrated(head) for head in mean)


def test_a_sequence_is_scored_by_the_rules_of_the_others() -> None:
    given = masses(5)
    found = FittedTemplates.fit([TEMPLATE], MODULES, given)
    for place, module in enumerate(MODULES):
        assert found.rules[TEMPLATE.label][module] == expected(given, place), "the plan's rules have seen all"
        for index in range(5):
            others = given[1::2] if index % 2 == 0 else given[::2]
            assert found.for_scoring(index)[TEMPLATE.label][module] == expected(others, place)


def test_a_single_sequence_is_scored_by_its_own() -> None:
    given = masses(1)
    found = FittedTemplates.fit([TEMPLATE], MODULES, given)
    assert found.for_scoring(0) is found.rules
    assert found.rules[TEMPLATE.label]["b"] == expected(given, 1)
