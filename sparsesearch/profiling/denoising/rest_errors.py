"""Errors of candidates that are no sums over the tiles of a fixed order, because they have a rest term or cluster tokens: each is run.

A `cached` rest is measured at the middle of its period: its residual is taken so many steps before a captured one, in the same run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.kernels.ordered import StepMemory, attend
from sparsesearch.profiling.denoising.menu import video_grid
from sparsesearch.rules import Rule
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.runtime.diffusion.attention import LayerCall

RulesOf = Callable[[int, LayerCall], Sequence[Rule]]


@dataclass
class RestErrors:
    """The candidates of a menu that must be run.

    Attributes:
        candidates: the menu.
        rules_of: the rule of each head of a layer under the candidate of an index.
        captured: steps that are looked at.
        block_tokens: side of a tile.
    """

    candidates: Sequence[Rule]
    rules_of: RulesOf
    captured: frozenset[int]
    block_tokens: int
    _memories: dict[tuple[int, str, str], StepMemory] = field(default_factory=dict)

    @property
    def indices(self) -> list[int]:
        """Which candidates."""
        return [index for index, rule in enumerate(self.candidates) if must_run(rule)]

    def before(self, seen: LayerCall) -> None:
        """Shown every call: take the residuals that a captured step will need."""
        assert seen.call.step is not None
        step = seen.call.step[0]
        for index in self.indices:
            rule = self.candidates[index]
            if isinstance(rule, CachedRest) and any(step == max(later - rule.every // 2, 0) for later in self.captured):
                memory = StepMemory(step=step)
                self._memories[index, seen.path, seen.call.pass_name] = memory
                self._run(index, seen, memory)

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
            memory = self._memories.pop((index, seen.path, seen.call.pass_name))
            memory.step = seen.call.step[0] if seen.call.step else None
            share = 1 - 1 / rule.every  # the dense step has no error
        delta = self._run(index, seen, memory).float() - dense.float()
        wrong = torch.einsum("bhtd,hde,bhte->bh", delta, gram, delta)
        return (wrong / norm[:, None]).mean(0) * share, self._work(index, seen, memory)

    def _run(self, index: int, seen: LayerCall, memory: StepMemory) -> Tensor:
        grid = video_grid(seen.call.layout, self.block_tokens)
        return attend(seen.q, seen.k, seen.v, grid, self.rules_of(index, seen), scale=seen.scale, memory=memory)

    def _work(self, index: int, seen: LayerCall, memory: StepMemory) -> Float[Tensor, " H"]:
        rules, grid = self.rules_of(index, seen), video_grid(seen.call.layout, self.block_tokens)
        if not rules[0].dynamic:
            own = {rule: float(rule.work(rule.levels(grid), grid)) for rule in dict.fromkeys(rules)}
            return torch.tensor([own[rule] for rule in rules], device=seen.q.device)
        assert memory.chosen is not None
        (chosen,) = memory.chosen.values()
        return rules[0].work(chosen.all_levels(), grid).mean(0).to(seen.q.device)


def must_run(rule: Rule) -> bool:
    """Whether a candidate's output is no softmax over tiles of one order."""
    return not rule.replaces_output and (rule.rest != "drop" or rule.token_order.by_content)
