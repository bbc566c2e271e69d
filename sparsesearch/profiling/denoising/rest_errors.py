"""Errors of candidates that are no sums over tiles of a fixed order, because of their rest term or because they cluster tokens: each is run.

A `cached` rest is measured at the middle of its period: its residual is taken so many steps before a captured one, in the same run.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.kernels.ordered import StepMemory, attend
from sparsesearch.rules import Rule
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.runtime.diffusion.attention import LayerCall, grids_of

RulesOf = Callable[[int, LayerCall, int], Sequence[Rule]]


@dataclass
class RestErrors:
    """The candidates of a menu that must be run.

    Attributes:
        candidates: the menu.
        rules_of: the rule of each head of a layer under the candidate of an index, as calibrated for the range of a captured step.
        captured: steps that are looked at, and how many steps the range of each has.
        block_tokens: side of a tile.
    """

    candidates: Sequence[Rule]
    rules_of: RulesOf
    captured: Mapping[int, int]
    block_tokens: int
    _memories: defaultdict[tuple[int, str, str, int], list[StepMemory]] = field(
        default_factory=lambda: defaultdict(list)  # in the order of the passes of a step
    )

    @property
    def indices(self) -> list[int]:
        """Which candidates."""
        return [index for index, rule in enumerate(self.candidates) if must_run(rule)]

    def before(self, seen: LayerCall) -> None:
        """Shown every call: take the residuals that a captured step will need."""
        step = self._step(seen)
        for index in self.indices:
            rule = self.candidates[index]
            if not isinstance(rule, CachedRest):
                continue
            for later in self.captured:
                if step == max(later - rule.every // 2, 0):
                    memory = StepMemory(step=step)
                    self._memories[index, seen.path, seen.call.pass_name, later].append(memory)
                    self._run(index, seen, memory, later)

    def errors(
        self, seen: LayerCall, dense: Float[Tensor, "B H T D"], gram: Float[Tensor, "H D D"], norm: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "H c"], Float[Tensor, "H c"]]:
        """Relative error and work of each candidate that must be run, mean over the sequences of one call."""
        found = [self._error(index, seen, dense, gram, norm) for index in self.indices]
        return torch.stack([error for error, _ in found], 1), torch.stack([work for _, work in found], 1)

    def _error(
        self, index: int, seen: LayerCall, dense: Tensor, gram: Tensor, norm: Tensor
    ) -> tuple[Float[Tensor, " H"], Float[Tensor, " H"]]:
        rule, share = self.candidates[index], 1.0
        memory = StepMemory(chosen={})
        if isinstance(rule, CachedRest):
            memory = self._memories[index, seen.path, seen.call.pass_name, self._step(seen)].pop(0)
            memory.step = self._step(seen)
            share = 1 - rule.dense_share(self._steps(seen))  # dense steps have no error
        delta = self._run(index, seen, memory, self._step(seen))[:, :, : dense.shape[2]].float() - dense.float()
        wrong = torch.einsum("bhtd,hde,bhte->bh", delta, gram, delta)
        return (wrong / norm[:, None]).mean(0) * share, self._work(index, seen, memory)

    def _run(self, index: int, seen: LayerCall, memory: StepMemory, step: int) -> Tensor:
        grids = grids_of(seen.call, seen.q.shape[0], self.block_tokens)
        return attend(seen.q, seen.k, seen.v, grids, self.rules_of(index, seen, step), scale=seen.scale, memory=memory)

    def _work(self, index: int, seen: LayerCall, memory: StepMemory) -> Float[Tensor, " H"]:
        rules, grid = self.rules_of(index, seen, self._step(seen)), grids_of(seen.call, 1, self.block_tokens)[0]
        if not rules[0].dynamic:
            own = {rule: float(rule.work(rule.levels(grid), grid, self._steps(seen))) for rule in dict.fromkeys(rules)}
            return torch.tensor([own[rule] for rule in rules], device=seen.q.device)
        assert memory.chosen is not None
        (chosen,) = memory.chosen.values()
        return rules[0].work(chosen.all_levels(), grid, self._steps(seen)).mean(0).to(seen.q.device)

    @staticmethod
    def _step(seen: LayerCall) -> int:
        assert seen.call.step is not None
        return seen.call.step[0]

    def _steps(self, seen: LayerCall) -> int:
        return self.captured[self._step(seen)]


def must_run(rule: Rule) -> bool:
    """Whether a candidate's output is no softmax over tiles, or their means, of one order."""
    return (rule.adds_rest and rule.rest != "taylor") or rule.token_order.by_content
