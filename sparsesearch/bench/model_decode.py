"""Seconds per decoding step of a plan, of the dense baseline, and of the dense model with the plan's fused products.

The third tells apart what the plan gains and what its step gains: it reads all keys by cuDNN, as the baseline does.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StaticCache

from sparsesearch.bench.dense_baseline import dense, repeated
from sparsesearch.bench.meter import Stamps, elapsed_s, emptied, free_bytes, peak_bytes, synchronize, timed
from sparsesearch.bench.model_session import Session, cache_bytes
from sparsesearch.kernels.decode import MOST_PAIRS
from sparsesearch.kernels.step_ops import MOST_ROWS
from sparsesearch.runtime.decode_step import DecodeStep
from sparsesearch.runtime.live import apply
from sparsesearch.runtime.prepare import sparse_cache

_MARGIN_BYTES = 4 << 30  # logits, workspaces, the captured graph's own pool
_WARM_UPS = 2
"""Steps with the choice of the next token before those that are timed: what loads a kernel at its first use took 7 ms once, of 30."""
_SPARE_TOKENS = 8
DENSE, DENSE_FUSED, PLAN = "dense", "dense_fused", "plan"


def measure_decode(session: Session) -> None:
    """Rows for either variant at the same batches, and at the largest that each can hold; the plan's first, lest a run cut short lack them."""
    fits = {}
    for name in (PLAN, DENSE):
        with _running(session, name) as variant:
            emptied(session.device)
            variant.one = variant.filled()
            fits[name] = 1 + max(0, int((free_bytes(session.device) - _MARGIN_BYTES) // cache_bytes(variant.one)))
            if name == PLAN:
                fits[name] = min(fits[name], MOST_PAIRS // max(session.plan.base_model.num_kv_heads))
            sizes = dict.fromkeys(batch or fits[name] for batch in session.request.batches)
            for size in (size for size in sizes if size <= fits[name]):
                variant.fitting(size, fused=name == PLAN)
                if name == DENSE and size <= MOST_ROWS and session.device.type == "cuda":
                    variant.fitting(size, fused=True)
    session.add(phase="fit", tokens=session.request.decode_tokens, largest_batch=fits)


@contextmanager
def _running(session: Session, name: str) -> Iterator["_Variant"]:
    if name == DENSE:
        with dense(session.model) as attention:
            yield _Variant(session, name, attention)
    else:
        with apply(session.model, session.plan, backend=session.backend, allow_other_weights=True):
            yield _Variant(session, name)


@dataclass
class _Variant:
    """The model as it runs now.

    Attributes:
        session: what is measured.
        name: dense or plan.
        attention: of the dense one.
        one: a cache that holds one prompt already.
    """

    session: Session
    name: str
    attention: Any = None
    one: Any = None

    def filled(self) -> Any:
        """A cache that holds one prompt."""
        session, tokens = self.session, self.session.request.decode_tokens
        room = tokens + session.request.steps + _SPARE_TOKENS
        if self.attention is not None:
            self.attention.tokens = tokens
            cache: Any = StaticCache(session.config, max_cache_len=room)
        else:
            cache = sparse_cache(session.model, max_tokens=room)
        session.prefill_s(session.prompt(tokens), cache)
        return cache

    def fitting(self, batch: int, *, fused: bool) -> None:
        """The steps at this batch, or at the next smaller one that fits beside what a step needs for itself."""
        while True:
            try:
                return self._measure(batch, fused)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            emptied(self.session.device)
            batch = max(1, batch * 15 // 16)

    def _measure(self, batch: int, fused: bool) -> None:
        """Time decoding steps; all sequences of a batch are copies of one, which costs what different ones cost."""
        session, request = self.session, self.session.request
        cache, self.one = self.one, None
        emptied(session.device)
        cache = self.filled() if cache is None else cache
        bytes_each = cache_bytes(cache)
        if batch > 1:  # layer by layer, so that only one layer is there twice
            repeated(cache, batch) if self.name == DENSE else cache.batch_repeat_interleave(batch)
        if self.attention is not None:
            self.attention.tokens = _dense_tokens(session)
        torch._dynamo.reset()  # sizes of another batch would make this one's dynamic, which is slower
        step = DecodeStep(
            session.model, cache, first_position=request.decode_tokens, compiled=request.compiled, fused=None if fused else False
        )  # fmt: skip
        step_s, host_s, capture_s = _timed_steps(session, step, batch)
        read, weights = _read_bytes(session, cache, batch), _weight_bytes(session)
        bound_s = (weights + read) / session.record["ceilings"]["copy_bytes_per_s"]
        session.add(
            phase="decode", variant=DENSE_FUSED if fused and self.name == DENSE else self.name, batch=batch,
            tokens=request.decode_tokens, step_s=step_s, tokens_per_s=batch / step_s, kv_read_bytes=read, weight_bytes=weights,
            bound_s=bound_s, bound_share=bound_s / step_s, cache_bytes_per_sequence=bytes_each, peak_bytes=peak_bytes(session.device),
            host_s=host_s, capture_s=capture_s, compiled=request.compiled and not step.is_fused, fused=step.is_fused,
            **({} if step.fallback_reason is None else {"fallback_reason": step.fallback_reason}),
        )  # fmt: skip


def _timed_steps(session: Session, step: DecodeStep, batch: int) -> tuple[float, float, float]:
    """Seconds of one step, of launching one, which the host does while the device computes the ones before, and of making it ready."""
    newest = torch.zeros(batch, dtype=torch.long, device=session.device)
    start = time.perf_counter()
    step(newest)
    synchronize(session.device)
    capture_s = time.perf_counter() - start
    for _ in range(_WARM_UPS):
        newest = step(newest).argmax(-1)
    stamps: Stamps = []
    start = time.perf_counter()
    with timed(stamps, session.device):
        for _ in range(session.request.steps):
            newest = step(newest).argmax(-1)
    host_s = time.perf_counter() - start
    return elapsed_s(stamps) / session.request.steps, host_s / session.request.steps, capture_s


def _dense_tokens(session: Session) -> int:
    """Keys that the dense variant reads in every step: those of the middle one, because a graph's shapes are fixed."""
    return session.request.decode_tokens + 1 + session.request.steps // 2


def _weight_bytes(session: Session) -> int:
    """Weights that a step reads: all but an input embedding of its own."""
    model = session.model
    total = sum(parameter.nbytes for parameter in model.parameters())
    inputs: Any = model.get_input_embeddings().weight
    outputs: Any = model.get_output_embeddings().weight
    return total - (0 if inputs is outputs else int(inputs.nbytes))


def _read_bytes(session: Session, cache: Any, batch: int) -> int:
    info, read = session.plan.base_model, 0
    for layer, heads, size in zip(cache.layers, info.num_kv_heads, info.head_dim, strict=True):
        lens = getattr(layer, "reads", None)
        keys = int(lens.lens.sum()) if lens is not None else batch * heads * _dense_tokens(session)
        read += 2 * keys * size * session.model.dtype.itemsize
    return read
