"""Time to first token, peak memory, and what bounds them: a plan beside the dense baseline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import StaticCache

from sparsesearch.bench.dense_baseline import dense
from sparsesearch.bench.meter import Stamps, elapsed_s, emptied, peak_bytes, timed
from sparsesearch.bench.model_inside import look_inside
from sparsesearch.bench.model_session import Row, Session, cache_bytes
from sparsesearch.runtime.live import apply
from sparsesearch.runtime.prepare import sparse_cache
from sparsesearch.runtime.prompt_graph import PromptGraph

_ENOUGH_S, _MOST_REPEATS = 1.0, 5
_REPLAYS = 5


@dataclass(frozen=True)
class _Prefills:
    warm_s: float
    peak_bytes: int
    cache_bytes: int


def measure_prefill(session: Session, length: int) -> None:
    """One row: either variant at this length, batch 1."""
    ids, model, repeats = session.prompt(length), session.model, session.request.repeats
    with dense(model) as attention:
        attention.tokens = length
        emptied(session.device)
        session.prefill_s(ids[:, : min(length, 4096)], None)  # kernels are chosen and loaded

        def dense_cache() -> Any:
            return StaticCache(session.config, max_cache_len=length)

        plain = _prefills(session, ids, dense_cache, repeats, attention.stamps.clear)
        attention_s = elapsed_s(attention.stamps)  # of the last one
        captured = _captured(session, "dense", ids, dense_cache)
    with apply(model, session.plan, backend=session.backend, allow_other_weights=True):
        emptied(session.device)

        def own_cache() -> Any:
            return sparse_cache(model, max_tokens=length)

        cold_s = session.prefill_s(ids, own_cache())  # makes what the shape needs
        ours = _prefills(session, ids, own_cache, repeats, lambda: None)
        inner = look_inside(model, ids)
        captured |= _captured(session, "plan", ids, own_cache)
    density = inner["density"]
    bound_s = plain.warm_s - attention_s * (1 - density)
    session.add(
        phase="prefill", length=length, dense_s=plain.warm_s, dense_attention_s=attention_s, dense_peak_bytes=plain.peak_bytes,
        plan_s=ours.warm_s, plan_cold_s=cold_s, plan_peak_bytes=ours.peak_bytes, speedup=plain.warm_s / ours.warm_s,
        bound_s=bound_s, bound_share=bound_s / ours.warm_s, kv_bytes=ours.cache_bytes,
        kv_fraction=ours.cache_bytes / _dense_kv_bytes(session, length), **inner, **captured,
    )  # fmt: skip


def _prefills(
    session: Session, ids: Tensor, make: Callable[[], Any], repeats: int, before: Callable[[], None]
) -> _Prefills:
    """Prefills into new caches while memory and kernels are at hand: `repeats`, and more while a second lasts."""
    times: list[float] = []
    while len(times) < repeats or (sum(times) < _ENOUGH_S and len(times) < _MOST_REPEATS):
        before()
        cache = make()
        times.append(session.prefill_s(ids, cache))
        size = cache_bytes(cache)
        del cache
    return _Prefills(min(times), peak_bytes(session.device), size)


def _captured(session: Session, variant: str, ids: Tensor, make: Callable[[], Any]) -> Row:
    """Seconds of the same prompt replayed from a CUDA graph, where nothing waits for the host to launch."""
    if session.device.type != "cuda" or ids.shape[1] > session.request.graph_tokens:
        return {}
    graph, times = PromptGraph(session.model, make(), ids.shape[1]), []
    graph(ids)
    for _ in range(_REPLAYS):
        stamps: Stamps = []
        with timed(stamps, session.device):
            graph(ids)
        times.append(elapsed_s(stamps))
    return {f"{variant}_graph_s": min(times)}


def _dense_kv_bytes(session: Session, tokens: int) -> int:
    info = session.plan.base_model
    heads = sum(count * size for count, size in zip(info.num_kv_heads, info.head_dim, strict=True))
    return 2 * heads * tokens * session.model.dtype.itemsize
