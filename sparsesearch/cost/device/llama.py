"""A Llama with random weights on a device: prefill under tile schedules, and decoding from full caches, timed end to end.

The model is transformers' own; only its attention is replaced: in prefill by the tile kernel over one schedule per layer, in decoding by
the ragged kernel over caches that lie ready. Prefill runs as `generate` runs it (logits of the last token); a decoding step is captured in
a CUDA graph, as serving engines do it, so the host's launches do not count.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from sparsesearch.cost.device.tile_cases import on_device
from sparsesearch.cost.device.timing import Timed
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.dispatch import run_schedule
from sparsesearch.kernels.schedule import TileSchedule
from sparsesearch.model_shapes import ModelShape

if TYPE_CHECKING:
    from sparsesearch.cost.device.micro_bench import Bench

NAME = "sparsesearch_bench"


class RandomLlama:
    """The model, and what its attention does in the run at hand."""

    def __init__(self, shape: ModelShape, bench: "Bench") -> None:
        AttentionInterface.register(NAME, self._attend)
        settings = shape.config_settings() | {"max_position_embeddings": 1 << 18}
        config = AutoConfig.for_model(shape.model_type, **settings)
        before = torch.get_default_dtype()
        torch.set_default_dtype(bench.dtype)
        try:
            with torch.device(bench.device):
                self.model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
        finally:
            torch.set_default_dtype(before)
        self.shape, self.bench = shape, bench
        self._schedules: Sequence[TileSchedule] = ()
        self._caches: list[tuple[Tensor, Tensor]] = []
        self._starts = self._lens = torch.empty(0)

    def prefill(self, length: int, schedules: Sequence[TileSchedule]) -> Timed:
        """Time to the first token's logits, batch 1; layer i runs schedule i modulo their number."""
        self._schedules = [on_device(schedule, self.bench.device) for schedule in schedules]
        ids = torch.randint(self.shape.vocab_size, (1, length), device=self.bench.device)

        def run(copy: int) -> object:
            return self.model(ids, use_cache=False, logits_to_keep=1).logits

        with torch.inference_mode():
            timed = self.bench.time(run, warm_s=0.3, graph=False)
        self._schedules = ()
        return timed

    def decode(self, batch: int, kv_tokens: int) -> Timed:
        """Time of one step of `batch` sequences, each with `kv_tokens` cached keys in every KV head."""
        shape, bench = self.shape, self.bench
        pairs = batch * shape.num_kv_heads
        kv_shape = (pairs * kv_tokens, shape.head_dim)
        self._caches = [(bench.normal(*kv_shape), bench.normal(*kv_shape)) for _ in range(shape.num_layers)]
        self._starts = torch.arange(pairs, device=bench.device) * kv_tokens
        self._lens = torch.full((pairs,), kv_tokens, device=bench.device, dtype=torch.int32)
        ids = torch.randint(shape.vocab_size, (batch, 1), device=bench.device)
        positions = torch.full((batch, 1), kv_tokens - 1, device=bench.device)

        def run(copy: int) -> object:
            return self.model(ids, position_ids=positions, use_cache=False).logits

        with torch.inference_mode():
            timed = bench.time(run, warm_s=0.1)
        self._caches = []
        return timed

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        scale = self.shape.head_dim**-0.5
        if query.shape[2] > 1:
            schedule = self._schedules[layer % len(self._schedules)]
            out, _ = run_schedule(query, key, value, schedule, scale=scale, kernel=self.bench.kernel)
            return out.transpose(1, 2).contiguous(), None
        keys, values = self._caches[layer]
        last = self._starts + self._lens - 1
        keys[last] = key.reshape(-1, self.shape.head_dim)
        values[last] = value.reshape(-1, self.shape.head_dim)
        out, _ = ragged_decode(query[:, :, 0].contiguous(), keys, values, self._starts, self._lens, scale=scale)
        return out[:, None], None
