"""One attention layer under a plan: what its rules are at this step, on which grid, and when it is left to the model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.kernels.dispatch import Backend, choose_backend
from sparsesearch.kernels.ordered import StepMemory
from sparsesearch.kernels.ordered import attend as attend_rules
from sparsesearch.kernels.schedule import Span
from sparsesearch.layout import Layout
from sparsesearch.plan import Plan
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.denoising_call import Call, CallSource

Rules = tuple[Rule, ...]


@dataclass(frozen=True)
class LayerCall:
    """What a probe is shown of one self-attention call, in the model's order of tokens.

    Attributes:
        path: the attention module.
        q: queries; times `scale` they give scores.
        k: keys.
        v: values.
        scale: factor on q·k.
        rules: what the plan says for each head at this step.
        call: the forward pass.
    """

    path: str
    q: Float[Tensor, "B H T D"]
    k: Float[Tensor, "B H T D"]
    v: Float[Tensor, "B H T D"]
    scale: float
    rules: Rules
    call: Call


Probe = Callable[[LayerCall], Tensor | None]


@dataclass
class SparseLayer:
    """Answers the attention calls of one module; see `specialise.Attend`.

    Attributes:
        path: the module's path in the plan.
        plan: the plan; its schedule says which rules hold at which step.
        calls: who knows the call in progress.
        backend: as in `kernels.dispatch`.
        probe: shown every self-attention call; what it returns, if anything, replaces the output.
        taken: backend that served the last sparse call.
    """

    path: str
    plan: Plan
    calls: CallSource
    backend: Backend
    probe: Probe | None = None
    taken: Backend | None = None
    _kept: dict[str, tuple[int, StepMemory]] = field(default_factory=dict)

    @cached_property
    def rules(self) -> tuple[Rules, ...]:
        """Per range of the schedule; the last ones hold outside all ranges."""
        schedule = self.plan.schedule
        ranges = [] if schedule is None else [schedule.assignments(place) for place in range(len(schedule.ranges))]
        heads = dict(zip(self.plan.base_model.modules, self.plan.base_model.num_heads, strict=True))[self.path]
        dense = (Dense().label,) * heads
        tables = [*ranges, self.plan.assignments]
        known = {Dense().label: Dense(), **self.plan.rules}
        return tuple(tuple(known[name] for name in table.get(self.path, dense)) for table in tables)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor | None:
        """None where the model's own attention is to run: all heads dense, or a call to other keys (image prompts)."""
        call = self.calls.current
        if call is None:
            raise UnsupportedModelError(
                f"{self.path} must be called through its transformer under a sparse plan, but was called on its own."
            )
        if key.shape[2] != query.shape[2]:
            return None
        if query.shape[2] != call.layout.num_tokens:
            raise UnsupportedModelError(
                f"{self.path} must attend over the {call.layout.num_tokens} tokens of its input, but got {query.shape[2]} queries and "
                f"{key.shape[2]} keys. Remove what changes its tokens, such as token merging."
            )
        if (
            mask is not None
            and call.key_lengths is None
            and not bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())
        ):
            raise UnsupportedModelError(
                f"{self.path}: an attention mask that is not the text's padding is not supported."
            )
        rules = self.rules[self._range(call)]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if self.probe is not None:
            answer = self.probe(LayerCall(self.path, query, key, value, factor, rules, call))
            if answer is not None:
                return answer
        if all(isinstance(rule, Dense) for rule in rules):
            return None
        return self.attend(query, key, value, rules, call, factor)

    def _range(self, call: Call) -> int:
        schedule = self.plan.schedule
        if schedule is None:
            return -1
        if call.step is None:
            raise UnsupportedModelError(
                "a plan with a step schedule must know the denoising step, but neither the pipeline's cache context nor its scheduler tells "
                "it. Apply the plan to the pipeline, or call `applied.at_step(index, num_steps)` before every step."
            )
        place = schedule.range_index(*call.step, chunk=call.chunk)
        return -1 if place is None else place

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rules: Rules, call: Call, scale: float) -> Tensor:
        """Attention of one call under these rules, all of them in one launch per order."""
        grids = grids_of(call, q.shape[0], self.plan.block_tokens)
        if self.taken is None:
            self.taken = choose_backend(q, k, v, [Span(grids[0])], backend=self.backend)
        return attend_rules(q, k, v, grids, rules, scale=scale, backend=self.backend, memory=self._memory(call))

    def _memory(self, call: Call) -> StepMemory:
        """What the layer kept in earlier steps of the same pass and range; dynamic tiles stay between the schedule's refresh steps."""
        place = self._range(call)
        before, memory = self._kept.get(call.pass_name, (place, StepMemory()))
        if before != place:
            memory = StepMemory()
        self._kept[call.pass_name] = place, memory
        schedule = self.plan.schedule
        if call.step is None:
            return StepMemory()
        memory.step = call.step[0]
        if schedule is None or not schedule.refresh:
            memory.chosen = None
        elif schedule.refreshes(*call.step) or memory.chosen is None:
            memory.chosen = {}
        return memory


def grids_of(call: Call, batch_size: int, block_tokens: int) -> tuple[BlockGrid, ...]:
    """The block grid of each batch row; padding stands at the end, in every order."""
    lengths = call.key_lengths or (call.layout.num_tokens,) * batch_size
    return tuple(_grid(call.layout, length, block_tokens) for length in lengths)


@lru_cache(maxsize=64)
def _grid(layout: Layout, length: int, block_tokens: int) -> BlockGrid:
    own = layout if length == layout.num_tokens else _shortened(layout, length)
    return BlockGrid(length, length, block_tokens, causal=False, layout=own)


def _shortened(layout: Layout, length: int) -> Layout:
    """The layout without the padding of its last segment."""
    *others, last = layout.segments
    kept = length - sum(segment.tokens for segment in others)
    if kept == 0:
        return layout.model_copy(update={"segments": tuple(others)})
    return layout.model_copy(update={"segments": (*others, last.model_copy(update={"shape": (kept,)}))})
