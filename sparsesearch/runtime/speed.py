"""How long a prompt takes with and without a plan, in the same run."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.runtime.live import apply


def prefill_times(
    model: PreTrainedModel,
    plan: Plan,
    lengths: Sequence[int],
    repeats: int = 5,
    *,
    backend: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Median prefill time of the model as it is and under the plan, measured in turn so that a slow moment hits both.

    A prefill is one forward of a random prompt, with only the last token's logits, as `generate` does it; no cache is kept.

    Args:
        model: any model the plan fits; as it is means with the attention it was loaded with (SDPA by default).
        plan: the plan.
        lengths: prompt lengths in tokens.
        repeats: timed pairs per length; one more is run first and not counted.
        backend: as in `apply`.
        progress: called with one line per length.

    Returns:
        `{"lengths_tokens": […], "dense_s": […], "plan_s": […], "speedup": […], "repeats", "threads", "device"}`.

    Raises:
        SpecError: no length, or fewer than one repeat.
    """
    if not lengths or min(lengths) < 1 or repeats < 1:
        raise SpecError(f"lengths >= 1 and repeats >= 1 must hold, but got {list(lengths)} and {repeats}.")
    dense_s, plan_s = [], []
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(model.config.get_text_config().vocab_size, (1, length), generator=generator).to(
            model.device
        )
        dense, sparse = [], []
        for _ in range(repeats + 1):
            dense.append(_forward_s(model, ids))
            with apply(model, plan, backend=backend, allow_other_weights=True):
                sparse.append(_forward_s(model, ids))
        dense_s.append(median(dense[1:]))
        plan_s.append(median(sparse[1:]))
        if progress is not None:
            progress(f"{length} tokens: dense {dense_s[-1]:.3f} s, plan {plan_s[-1]:.3f} s")
    return {
        "lengths_tokens": list(lengths),
        "dense_s": dense_s,
        "plan_s": plan_s,
        "speedup": [dense / sparse for dense, sparse in zip(dense_s, plan_s, strict=True)],
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
    }


def _forward_s(model: PreTrainedModel, ids: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
