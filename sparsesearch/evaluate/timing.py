"""Prefill time of several variants, measured so that drift of the machine hits all of them alike."""

import time
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from jaxtyping import Int64
from torch import Tensor

from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.reference import ApplyPlan
from sparsesearch.plan import Plan


def prefill_seconds(
    head: Head, input_ids: Int64[Tensor, "B S"], plans: Mapping[str, Plan | None], *, rounds: int, apply: ApplyPlan
) -> dict[str, tuple[float, ...]]:
    """Wall time of a prefill (KV cache filled, logits of the last position) per variant and round.

    Every round runs every variant once, in an order that turns from round to round. Each measurement follows an unmeasured run under the same
    plan, so that compiled schedules and memory are warm, as they are from the second prompt on in service.

    Returns:
        variant -> one time in seconds per round.
    """
    times: dict[str, list[float]] = {name: [] for name in plans}
    names = list(plans)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            plan = plans[name]
            with nullcontext() if plan is None else apply(head.model, plan):
                head.hidden(input_ids, use_cache=True)
                times[name].append(_timed(head, input_ids))
    return {name: tuple(runs) for name, runs in times.items()}


def _timed(head: Head, input_ids: Int64[Tensor, "B S"]) -> float:
    _synchronize(head.model.device)
    start = time.perf_counter()
    head.hidden(input_ids, use_cache=True)
    _synchronize(head.model.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
