"""Errors of candidates with a rest term: each is run as a plan would run it, because its output is no sum over tiles.

A `cached` rest is measured at the middle of its period: its residual is taken so many steps before a captured one, in the same run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.kernels.ordered import StepMemory, attend
from sparsesearch.profiling.denoising.menu import FlatCall, video_grid
from sparsesearch.rules import Rule
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.runtime.diffusion.attention import LayerCall

RulesOf = Callable[[int, LayerCall], Sequence[Rule]]


@dataclass
class RestErrors:
    """The candidates of a menu that have a rest term.

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
        return [index for index, rule in enumerate(self.candidates) if rule.rest != "drop" and not rule.replaces_output]

    def before(self, seen: LayerCall) -> None:
        """Shown every call: take the residuals that a captured step will need."""
        assert seen.call.step is not None
        step = seen.call.step[0]
        for index in self.indices:
            rule = self.candidates[index]
            if isinstance(rule, CachedRest) and any(step == max(later - rule.every // 2, 0) for later in self.captured):
                memory = self._memories[index, seen.path, seen.call.pass_name] = StepMemory(step=step)
                self._run(index, seen, memory)

    def errors(
        self, seen: LayerCall, dense: Float[Tensor, "B H T D"], gram: Float[Tensor, "H D D"], norm: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "H c"], Float[Tensor, "H c"]]:
        """Relative error and work of each candidate with a rest term, mean over the sequences of one call."""
        assert seen.call.step is not None
        found = [self._error(index, seen, dense, gram, norm) for index in self.indices]
        work = [self._work(index, seen) for index in self.indices]
        return torch.stack(found, 1), torch.stack(work, 1)

    def _error(self, index: int, seen: LayerCall, dense: Tensor, gram: Tensor, norm: Tensor) -> Float[Tensor, " H"]:
        rule, share = self.candidates[index], 1.0
        memory = StepMemory()
        if isinstance(rule, CachedRest):
            memory = self._memories.pop((index, seen.path, seen.call.pass_name))
            memory.step = seen.call.step[0] if seen.call.step else None
            share = 1 - 1 / rule.every  # the dense step has no error
        delta = self._run(index, seen, memory).float() - dense.float()
        wrong = torch.einsum("bhtd,hde,bhte->bh", delta, gram, delta)
        return (wrong / norm[:, None]).mean(0) * share

    def _run(self, index: int, seen: LayerCall, memory: StepMemory) -> Tensor:
        grid = video_grid(seen.call.layout, self.block_tokens)
        return attend(seen.q, seen.k, seen.v, grid, self.rules_of(index, seen), scale=seen.scale, memory=memory)

    def _work(self, index: int, seen: LayerCall) -> Float[Tensor, " H"]:
        rules = self.rules_of(index, seen)
        grid, (batch, heads) = video_grid(seen.call.layout, self.block_tokens), seen.q.shape[:2]
        if not rules[0].dynamic:
            own = {rule: float(rule.work(rule.levels(grid), grid)) for rule in dict.fromkeys(rules)}
            return torch.tensor([own[rule] for rule in rules], device=seen.q.device)
        q, k, _ = FlatCall.of(seen).ordered(rules[0].token_order)  # dynamic rules are not calibrated: one for all heads
        levels = rules[0].levels(grid, q.unflatten(0, (batch, heads)) * seen.scale, k.unflatten(0, (batch, heads)))
        return rules[0].work(levels, grid).expand(batch, heads).mean(0).to(seen.q.device)
