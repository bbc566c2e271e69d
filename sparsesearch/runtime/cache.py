"""The ragged KV cache: KV heads keep what their rule can still reach, and no more.

A KV head whose query heads all follow one evicting rule keeps sink and window (`sink_window`), a running sum (`mean_value`) or nothing
(`zero`); every other KV head keeps everything. `update` cannot evict, because it does not know the padding, so it hands the layer itself to our
attention function in the place of keys and values; the layer attends and then writes. Keys are rotated before they come here, so their order
in a ring does not matter.

The layers are put into the empty DynamicCache that `generate` makes, so no argument is needed; a StaticCache gets the layers of
`static_layer`. Laws stay at the length of the first prefill: a second turn on the same cache keeps the first prompt's windows. A prompt that
comes in several chunks must be announced, see `sparse_cache`. Quantised and offloaded caches, and static ones whose memory is there already,
are left alone: there evicting rules are masked, and no memory is saved.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from sparsesearch.errors import SparseSearchError, SpecError, UnsupportedModelError
from sparsesearch.rules.base import Rule
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.attention import attend_heads
from sparsesearch.runtime.binding import LayerBinding, binding_of, kv_partition
from sparsesearch.runtime.handles import KeyValues
from sparsesearch.runtime.mask_code import MaskCode
from sparsesearch.runtime.rule_attention import pick_heads
from sparsesearch.runtime.static_layer import StaticPlanLayer
from sparsesearch.runtime.stores import SLACK_TOKENS, Call, EmptyStore, FullStore, MeanStore, RingStore, Store


class PlanCacheLayer(CacheLayerMixin):
    """One layer's cache, split into groups of KV heads. See the module's docstring."""

    is_sliding = False
    is_compileable = False
    is_croppable = True  # by up to SLACK_TOKENS, which assisted decoding needs
    supports_early_init = False

    def __init__(self, binding: LayerBinding) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.binding = binding
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.stores: list[tuple[Store, tuple[int, ...]]] = []
        self.num_tokens = self.highest = 0
        self.law_tokens: Tensor | None = None
        self.cropped = self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores, once the number of KV heads is known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stores = [(make(), kv_heads) for make, kv_heads in _store_plan(self.binding, key_states.shape[1])]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Hand the layer to the attention function, in the place of keys and of values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.num_tokens += key_states.shape[2]
        self.highest = max(self.highest, self.num_tokens)
        handle = KeyValues(self, key_states, value_states)
        return handle, handle

    def attend(
        self,
        query: Float[Tensor, "B H S D"],
        key: Float[Tensor, "B G S D"],
        value: Float[Tensor, "B G S D"],
        code: MaskCode | None,
        scale: float,
    ) -> Float[Tensor, "B H S D"]:
        """Output of all heads; called once per `update`."""
        binding = self.binding
        before, positions = self._positions(query, code)
        assert self.law_tokens is not None, "prepare_call sets the prompt's length before any layer runs"
        is_first = self.num_tokens == query.shape[2]
        call = Call(binding, code, self.law_tokens, scale, before, positions, is_first)
        if is_first:  # nothing is kept yet, so all heads go together
            for store, kv_heads in self.stores:
                store.take_in(call, pick_heads(key, kv_heads), pick_heads(value, kv_heads))
            return attend_heads(_groups(binding, query), binding, query, key, value, code, self.law_tokens, scale, None)
        size, order, outputs = query.shape[1] // key.shape[1], [], []
        for store, kv_heads in self.stores:
            heads = [head * size + member for head in kv_heads for member in range(size)]
            inputs = pick_heads(query, heads), pick_heads(key, kv_heads), pick_heads(value, kv_heads)
            outputs.append(store.attend(call, *inputs))
            order += heads
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return joined if order == sorted(order) else joined[:, torch.tensor(order).argsort().to(joined.device)]

    def _positions(self, query: Tensor, code: MaskCode | None) -> tuple[Int[Tensor, " B"], Int[Tensor, "B S"]]:
        """Real tokens of each row before this call, and the position of each new token."""
        start, end = self.num_tokens - query.shape[2], self.num_tokens
        if code is None:
            line = torch.arange(start, end, device=query.device).expand(query.shape[0], -1)
            return torch.full((query.shape[0],), start, device=query.device), line
        line = code[:, 0, 0]
        return (line[:, :start] > 0).sum(1), line[:, start:end].long() - 1

    def get_seq_length(self) -> int:
        """Slots seen, padding included."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers all slots seen; what is kept of them is the layer's own business."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; `tokens_to_remove` is negative, as in transformers.

        Raises:
            SparseSearchError: more than the slack of evicting heads would have to be taken back.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise SpecError(f"crop must be given minus the number of tokens to remove, but got {-count}.")
        self.cropped = True
        if self.highest - (self.num_tokens - count) > SLACK_TOKENS:
            raise SparseSearchError(
                f"at most {SLACK_TOKENS} tokens can be taken back from a cache that drops keys, but {count} were asked for. Use "
                "sparsesearch.apply(..., cache=False), or fewer assistant tokens."
            )
        self.num_tokens -= count
        for store, _ in self.stores:
            if isinstance(store, FullStore):
                store.keep_slots(self.num_tokens)

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for store, _ in self.stores:
            store.map_rows(change)
        if self.law_tokens is not None:
            self.law_tokens = change(self.law_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows for the next step of beam search."""
        self._map_rows(lambda kept: kept.index_select(0, beam_idx.to(kept.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._map_rows(lambda kept: kept.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        self._map_rows(lambda kept: kept[indices.to(kept.device)])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(store.nbytes for store, _ in self.stores)


def _groups(binding: LayerBinding, query: Tensor) -> Sequence[tuple[Rule, tuple[int, ...]]]:
    return binding.groups if query.shape[2] > 1 else binding.decode_groups


def _store_plan(binding: LayerBinding, num_kv_heads: int) -> list[tuple[Callable[[], Store], tuple[int, ...]]]:
    """How to make each group's store, and its KV heads."""
    size = len(binding.rules) // num_kv_heads
    plans: list[tuple[Callable[[], Store], tuple[int, ...]]] = []
    for rule, kv_heads in kv_partition(binding.kept_by, num_kv_heads).items():
        heads = tuple(kv_head * size + member for kv_head in kv_heads for member in range(size))
        plans.append((functools.partial(FullStore, binding, heads) if rule is None else _maker(rule), kv_heads))
    return plans


def _maker(rule: Rule) -> Callable[[], Store]:
    match rule:
        case SinkWindow():
            return lambda: RingStore(rule)
        case MeanValue():
            return MeanStore
        case _:
            return EmptyStore


def install_layers(decoder: nn.Module, cache: DynamicCache | StaticCache) -> None:
    """Replace the layers of an empty cache, in place: whoever holds the cache keeps it.

    In a dynamic cache where some KV head's rule evicts; in a static one wherever a plan is bound.

    Raises:
        UnsupportedModelError: two attention modules share one layer index, so nobody can tell whose cache is whose.
    """
    taken: set[int] = set()
    mates: dict[str, StaticPlanLayer] = {}
    if cache.layer_class_to_replicate is not None:
        cache.layers[:] = DynamicCache(config=decoder.config).layers  # type: ignore[arg-type]
        cache.layer_class_to_replicate = None
    for module in decoder.modules():
        binding, index = binding_of(module), getattr(module, "layer_idx", None)
        if binding is None or index is None:
            continue
        layer = cache.layers[index]
        if type(layer) not in (DynamicLayer, PlanCacheLayer, StaticLayer, StaticPlanLayer):
            continue
        if index in taken:
            raise UnsupportedModelError(
                f"{binding.path}: every attention module must have its own layer_idx to drop keys, but {index} is used twice. Pass "
                "cache=False to sparsesearch.apply."
            )
        taken.add(index)
        if isinstance(layer, StaticLayer):
            cache.layers[index] = StaticPlanLayer(binding, layer.max_cache_len, mates)
        elif isinstance(layer, StaticPlanLayer):
            layer.rebind(binding)
        elif any(isinstance(rule, SinkWindow | Zero | MeanValue) for rule in binding.kept_by):
            cache.layers[index] = PlanCacheLayer(binding)
