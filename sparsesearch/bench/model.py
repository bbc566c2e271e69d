"""A whole model, end to end: prefill and decoding under a plan beside the strong dense baseline, in one run.

The bounds it is measured against:
    prefill   Amdahl: T = T_dense - A + density · A, A the measured seconds of cuDNN's attention in that same dense prefill
    decoding  bytes: weights read per step, and keys and values kept, over the copy bandwidth measured in the same run
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from sparsesearch.bench.dense_baseline import dense, repeated
from sparsesearch.bench.meter import Stamps, elapsed_s, emptied, free_bytes, peak_bytes, synchronize, timed
from sparsesearch.bench.model_inside import look_inside
from sparsesearch.bench.timing import ceilings, provenance
from sparsesearch.cost import CostModel
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.decode_step import DecodeStep
from sparsesearch.runtime.joined_linears import join_linears
from sparsesearch.runtime.live import apply
from sparsesearch.runtime.prepare import sparse_cache

FORMAT = "sparsesearch.bench.model"
_MARGIN_BYTES = 4 << 30  # logits, workspaces, the captured graph's own pool
_ENOUGH_S, _MOST_REPEATS = 1.0, 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        lengths: prompt lengths of the prefill, batch 1.
        decode_tokens: tokens per sequence in the cache when decoding is measured; 0 leaves decoding out.
        batches: decoding batches; 0 stands for the largest that fits, of either variant.
        steps: decoding steps timed.
        compiled: compile decoder layers in decoding, of either variant.
        repeats: fewest timed prefills of either variant per length, of which the fastest counts; a cold one comes first.
    """

    lengths: Sequence[int] = (4096, 32768, 131072)
    decode_tokens: int = 32768
    batches: Sequence[int] = (1, 8, 0)
    steps: int = 32
    compiled: bool = True
    repeats: int = 1

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.lengths) or self.decode_tokens < 0 or min(self.batches, default=0) < 0:
            raise SpecError(f"lengths >= 1, decode_tokens >= 0 and batches >= 0 must hold, but got {self}.")
        if self.steps < 1 or self.repeats < 1:
            raise SpecError(f"steps >= 1 and repeats >= 1 must hold, but got {self}.")


def run(
    model: PreTrainedModel,
    plan: Plan,
    request: Request,
    *,
    cost_model: CostModel | None = None,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure, and return rows, ceilings and provenance.

    Args:
        model: on the GPU that is measured; its linears are joined (`join_linears`), which both variants enjoy.
        plan: the plan beside dense.
        request: what to measure.
        cost_model: predicts attention and decoding beside the measurement.
        command: recorded as the command line.
        progress: called with the record so far whenever a row is finished.

    Raises:
        SpecError: the model is not on a GPU.
    """
    if model.device.type != "cuda":
        raise SpecError(f"the model must be on a GPU to be measured, but is on {model.device}. Pass --device cuda.")
    record = {
        "format": FORMAT,
        "model": plan.base_model.name_or_path,
        "plan_sha256": plan.sha256,
        "rules": plan.kind_counts(),
        "provenance": provenance(command),
        "ceilings": ceilings(),
        "rows": [],
    }
    join_linears(model)
    bench = _Bench(model, plan, request, record, cost_model, progress)
    with torch.inference_mode():
        if request.decode_tokens:
            bench.decode()
        for length in request.lengths:
            bench.prefill(length)
    return record


@dataclass(frozen=True)
class _Prefills:
    warm_s: float
    peak_bytes: int
    cache_bytes: int


class _Bench:
    """One model and one plan."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        request: Request,
        record: dict[str, Any],
        cost_model: CostModel | None,
        progress: Callable[[dict[str, Any]], None],
        backend: str = "auto",
    ) -> None:
        self.model, self.plan, self.request, self.record, self.progress = model, plan, request, record, progress
        self.cost_model, self.device, self.backend = cost_model, model.device, backend
        self.rows: list[Row] = record["rows"]
        self._one: Any = None  # a cache that holds one prompt already

    def _record(self, **row: Any) -> Row:
        self.rows.append(row)
        self.progress(self.record)
        return row

    def _prompt(self, length: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(length)
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (1, length), generator=generator, device=self.device)

    def _prefill_s(self, ids: Tensor, cache: Any) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE_KEYWORD: cache})
        synchronize(self.device)
        return time.perf_counter() - start

    def _prefills(self, ids: Tensor, make: Callable[[], Any], repeats: int, before: Callable[[], None]) -> "_Prefills":
        """Prefills into new caches while memory and kernels are at hand: `repeats`, and more while a second lasts."""
        times: list[float] = []
        while len(times) < repeats or (sum(times) < _ENOUGH_S and len(times) < _MOST_REPEATS):
            before()
            cache = make()
            times.append(self._prefill_s(ids, cache))
            size = _cache_bytes(cache)
            del cache
        return _Prefills(min(times), peak_bytes(self.device), size)

    def prefill(self, length: int) -> None:
        """Time to first token, peak memory, and what bounds them."""
        ids, config, repeats = self._prompt(length), self.model.config.get_text_config(), self.request.repeats
        with dense(self.model) as attention:
            attention.tokens = length
            emptied(self.device)
            self._prefill_s(ids[:, : min(length, 4096)], None)  # kernels are chosen and loaded
            plain = self._prefills(
                ids, lambda: StaticCache(config, max_cache_len=length), repeats, attention.stamps.clear
            )
            attention_s = elapsed_s(attention.stamps)  # of the last one
        with apply(self.model, self.plan, backend=self.backend, allow_other_weights=True):
            emptied(self.device)
            cold_s = self._prefill_s(ids, sparse_cache(self.model, max_tokens=length))  # makes what the shape needs
            ours = self._prefills(ids, lambda: sparse_cache(self.model, max_tokens=length), repeats, lambda: None)
            inner = look_inside(self.model, ids)
        density = inner["density"]
        bound_s = plain.warm_s - attention_s * (1 - density)
        predicted = (
            {} if self.cost_model is None else {"predicted_attention_s": self._predicted_prefill(length, density)}
        )
        self._record(
            phase="prefill", length=length, dense_s=plain.warm_s, dense_attention_s=attention_s, dense_peak_bytes=plain.peak_bytes,
            plan_s=ours.warm_s, plan_cold_s=cold_s, plan_peak_bytes=ours.peak_bytes, speedup=plain.warm_s / ours.warm_s,
            bound_s=bound_s, bound_share=bound_s / ours.warm_s, kv_bytes=ours.cache_bytes,
            kv_fraction=ours.cache_bytes / self._dense_kv_bytes(length), **inner, **predicted,
        )  # fmt: skip

    def _dense_kv_bytes(self, tokens: int) -> int:
        info = self.plan.base_model
        heads = sum(count * size for count, size in zip(info.num_kv_heads, info.head_dim, strict=True))
        return 2 * heads * tokens * self.model.dtype.itemsize

    def _predicted_prefill(self, length: int, density: float) -> float:
        """Attention seconds at the measured density, every query head alike."""
        from sparsesearch.cost import UnitWork

        assert self.cost_model is not None
        info, block = self.plan.base_model, self.plan.block_tokens
        blocks = -(-length // block)
        works = [
            UnitWork("tiles", length, length, size, tiles=density * blocks * (blocks + 1) / 2, query_blocks=blocks, block_tokens=block)
            for count, size in zip(info.num_heads, info.head_dim, strict=True)
            for _ in range(count)
        ]  # fmt: skip
        return float(self.cost_model.latency_s(works).sum())

    def decode(self) -> None:
        """Seconds per step of either variant at the same batches, and at the largest that each can hold."""
        tokens, fits = self.request.decode_tokens, {}
        for variant in ("dense", "plan"):
            with ExitStack() as stack:
                attention = self._enter(stack, variant)
                room = tokens + self.request.steps + 8
                emptied(self.device)
                self._one = self._filled(variant, attention, room)
                bytes_each = _cache_bytes(self._one)
                fits[variant] = 1 + max(0, int((free_bytes(self.device) - _MARGIN_BYTES) // bytes_each))
                sizes = [batch or fits[variant] for batch in self.request.batches]
                for size in dict.fromkeys(size for size in sizes if size <= fits[variant]):
                    self._fitting(variant, attention, size, room, bytes_each)
        self._record(phase="fit", tokens=tokens, largest_batch=fits)

    def _enter(self, stack: ExitStack, variant: str) -> Any:
        if variant == "dense":
            return stack.enter_context(dense(self.model))
        stack.enter_context(apply(self.model, self.plan, backend=self.backend, allow_other_weights=True))
        return None

    def _filled(self, variant: str, attention: Any, room: int) -> Any:
        """A cache that holds one prompt."""
        tokens = self.request.decode_tokens
        if attention is not None:
            attention.tokens = tokens
        config = self.model.config.get_text_config()
        cache = (
            sparse_cache(self.model, max_tokens=room) if variant == "plan" else StaticCache(config, max_cache_len=room)
        )
        self._prefill_s(self._prompt(tokens), cache)
        return cache

    def _fitting(self, variant: str, attention: Any, batch: int, room: int, bytes_each: int) -> None:
        """The steps at this batch, or at the next smaller one that fits beside what a step needs for itself."""
        while True:
            try:
                return self._steps(variant, attention, batch, room, bytes_each)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            emptied(self.device)
            batch = max(1, batch * 15 // 16)

    def _steps(self, variant: str, attention: Any, batch: int, room: int, bytes_each: int) -> None:
        """Time decoding steps; all sequences of a batch are copies of one, which costs what different ones cost."""
        cache, self._one = self._one, None
        emptied(self.device)
        tokens = self.request.decode_tokens
        cache = self._filled(variant, attention, room) if cache is None else cache
        if batch > 1:  # layer by layer, so that only one layer is there twice
            repeated(cache, batch) if variant == "dense" else cache.batch_repeat_interleave(batch)
        if attention is not None:
            attention.tokens = self._dense_tokens
        torch._dynamo.reset()  # sizes of another batch would make this one's dynamic, which is slower
        step = DecodeStep(self.model, cache, first_position=tokens, compiled=self.request.compiled)
        newest = torch.zeros(batch, dtype=torch.long, device=self.device)
        start = time.perf_counter()
        step(newest)
        synchronize(self.device)
        capture_s = time.perf_counter() - start
        stamps: Stamps = []
        with timed(stamps, self.device):
            for _ in range(self.request.steps):
                newest = step(newest).argmax(-1)
        step_s = elapsed_s(stamps) / self.request.steps
        read = self._read_bytes(cache, batch)
        bound_s = (self._weight_bytes() + read) / self.record["ceilings"]["copy_bytes_per_s"]
        self._record(
            phase="decode", variant=variant, batch=batch, tokens=tokens, step_s=step_s, tokens_per_s=batch / step_s,
            kv_read_bytes=read, weight_bytes=self._weight_bytes(), bound_s=bound_s, bound_share=bound_s / step_s,
            cache_bytes_per_sequence=bytes_each, peak_bytes=peak_bytes(self.device), capture_s=capture_s,
            compiled=self.request.compiled, **self._predicted_decode(cache, batch),
        )  # fmt: skip

    @property
    def _dense_tokens(self) -> int:
        """Keys that the dense variant reads in every step: those of the middle one, because a graph's shapes are fixed."""
        return self.request.decode_tokens + 1 + self.request.steps // 2

    def _weight_bytes(self) -> int:
        """Weights that a step reads: all but an input embedding of its own."""
        total = sum(parameter.nbytes for parameter in self.model.parameters())
        inputs: Any = self.model.get_input_embeddings().weight
        outputs: Any = self.model.get_output_embeddings().weight
        return total - (0 if inputs is outputs else int(inputs.nbytes))

    def _read_bytes(self, cache: Any, batch: int) -> int:
        info, read = self.plan.base_model, 0
        for layer, heads, size in zip(cache.layers, info.num_kv_heads, info.head_dim, strict=True):
            lens = getattr(layer, "reads", None)
            keys = int(lens.lens.sum()) if lens is not None else batch * heads * self._dense_tokens
            read += 2 * keys * size * self.model.dtype.itemsize
        return read

    def _predicted_decode(self, cache: Any, batch: int) -> Row:
        if self.cost_model is None:
            return {}
        from sparsesearch.cost import DecodeWork

        info, works = self.plan.base_model, []
        for layer, heads, kv_heads, size in zip(
            cache.layers, info.num_heads, info.num_kv_heads, info.head_dim, strict=True
        ):
            lens = getattr(layer, "reads", None)
            dense_lens = [self._dense_tokens] * kv_heads
            own = lens.lens.view(batch, -1).float().mean(0).tolist() if lens is not None else dense_lens
            works += [DecodeWork(count, size, heads // kv_heads, batch, self.model.dtype.itemsize) for count in own]
        seconds = (
            float(self.cost_model.decode_latency_s(works).sum()) + len(cache.layers) * self.cost_model.decode_call_s
        )
        return {"predicted_attention_s": seconds}


def _cache_bytes(cache: Any) -> int:
    return sum(getattr(layer, "nbytes", None) or layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
