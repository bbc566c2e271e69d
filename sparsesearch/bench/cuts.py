"""`sparsesearch bench cuts`: plans that remove beside baselines at the same budget, measured on held-out data and on the clock.

Of a profile of removals alone the baselines are uniform widths and magnitude pruning, with and without the refit that the searched
plan gets, and the criteria that stand for published methods, with it. Of a joint profile they are the plans that only remove and the
plans that only thin attention out.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from sparsesearch.errors import BudgetInfeasibleError, SpecError, nearest
from sparsesearch.plan import Plan
from sparsesearch.profiling.record import Profile, device_name, provenance_versions
from sparsesearch.pruning.apply import PrunedApply
from sparsesearch.pruning.heal import held_out_loss
from sparsesearch.pruning.joint import find_joint
from sparsesearch.pruning.prices import SublayerSize, flops, params
from sparsesearch.pruning.quality import Batch, dense_rows, mean_distance
from sparsesearch.pruning.record import PruningProfile
from sparsesearch.pruning.search import PruningQuestion, find_cut, uniform_cut

Progress = Callable[[str, int, int], None]
JOINT, CUTS_ONLY, RULES_ONLY = "joint", "pruning only", "attention only"
MODES = ("vtrans", "ofb", "sparse_then_prune")
"""Criteria that stand for published methods; a profile may have learned masks besides. Their plans get the searched plan's refit."""


@dataclass(frozen=True)
class CutRow:
    """One plan, measured.

    Attributes:
        plan: how it was found.
        budget: what it was found for.
        params: share of the layers' parameters that is left.
        flops: share of the layers' FLOPs that is left at the length that is timed; attention counted dense.
        distance: from dense on held-out data: KL in nats per token, or 1 − cosine.
        loss_gap: held-out loss over dense in nats per token; None for models that do not predict tokens.
        forward_s: median seconds of a forward; None when it was not timed.
        speed_up: median over rounds of dense seconds over this plan's in the same round.
    """

    plan: str
    budget: str
    params: float
    flops: float
    distance: float
    loss_gap: float | None
    forward_s: float | None
    speed_up: float | None


@dataclass(frozen=True)
class CutBench:
    """What plans are measured on.

    Attributes:
        held_out: data for distance and loss.
        refit: data that plans with compensation are refitted on.
        timed: one batch whose forward is timed; None takes no times.
        timed_tokens: its length, at which FLOPs are counted.
        timed_on: where; a small model's quality is found faster on a GPU, and its time on one says little.
        rounds: of timing; every round runs every plan once.
    """

    held_out: Sequence[Batch]
    refit: Sequence[Batch]
    timed: Batch | None
    timed_tokens: int
    timed_on: str = "cpu"
    rounds: int = 7


def rival_plans(
    profile: PruningProfile, question: PruningQuestion, *, names: Sequence[str] | None = None
) -> dict[str, Plan]:
    """The searched plan and its baselines, every one within the question's budgets.

    Args:
        profile: of removals.
        question: budgets, criterion and refit of the searched plan; baselines share what is not their own.
        names: which of them; None: all.

    Raises:
        SpecError: an unknown name.
    """
    magnitude, bare = replace(question, criterion="magnitude"), replace(question, compensation=None)
    makers: dict[str, Callable[[], Plan]] = {
        "searched": lambda: find_cut(profile, question),
        "searched, not refitted": lambda: find_cut(profile, bare),
        "uniform width": lambda: uniform_cut(profile, question),
        "uniform width, not refitted": lambda: uniform_cut(profile, bare),
        "magnitude": lambda: find_cut(profile, magnitude),
        "magnitude, not refitted": lambda: find_cut(profile, replace(magnitude, compensation=None)),
        "uniform magnitude": lambda: uniform_cut(profile, magnitude),
        "uniform magnitude, not refitted": lambda: uniform_cut(profile, replace(magnitude, compensation=None)),
    }
    modes = [*MODES, "learned"] if profile.has("learned") else MODES
    makers |= {mode: partial(find_cut, profile, replace(question, criterion=mode)) for mode in modes}
    for name in names or ():
        if name not in makers:
            raise SpecError(f"unknown baseline {name!r}.{nearest(name, list(makers))}")
    return dict(_feasible({name: makers[name] for name in names or makers}))


def joint_plans(cuts: PruningProfile, attention: Profile, question: PruningQuestion) -> dict[str, Plan]:
    """The joint plan, and the best plans of either kind alone, within the same budgets; a kind that cannot fit is left out."""
    makers: dict[str, Callable[[], Plan]] = {
        JOINT: lambda: find_joint(cuts, attention, question),
        CUTS_ONLY: lambda: find_joint(cuts, attention, question, allow_rules=False),
        RULES_ONLY: lambda: find_joint(cuts, attention, question, allow_cuts=False),
    }
    return dict(_feasible(makers))


def _feasible(makers: Mapping[str, Callable[[], Plan]]) -> Iterator[tuple[str, Plan]]:
    for name, make in makers.items():
        try:
            yield name, make()
        except BudgetInfeasibleError:
            continue


def measure_cuts(
    model: PreTrainedModel,
    profile: PruningProfile,
    plans: Mapping[tuple[str, str], Plan],
    bench: CutBench,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> list[CutRow]:
    """Measure plans, named by (how, budget); the model ends up where it was timed.

    Times of one round lie next to each other, so that the machine's drift hits all plans alike.
    """
    held_out, applied = list(bench.held_out), PrunedApply(bench.refit)
    dense, goal = dense_rows(model, held_out), held_out_loss(model, held_out)
    found: list[tuple[float, float | None]] = []
    for number, plan in enumerate(plans.values()):
        progress("measure plans", number, len(plans))
        with applied(model, plan):
            loss = held_out_loss(model, held_out)
            gap = None if loss is None or goal is None else loss - goal
            found.append((mean_distance(model, held_out, dense), gap))
    progress("measure plans", len(plans), len(plans))
    seconds = _seconds(model, plans, bench, applied, progress)
    rows = []
    for (key, plan), (distance, gap) in zip(plans.items(), found, strict=True):
        left, times = _left(profile, plan, bench.timed_tokens), seconds.get(key)
        median = None if times is None else statistics.median(times)
        ratio = None if times is None else statistics.median(np.divide(seconds[None], times).tolist())
        rows.append(CutRow(*key, left["params"], left["flops"], distance, gap, median, ratio))
    return rows


def _left(profile: PruningProfile, plan: Plan, length: int) -> dict[str, float]:
    """Shares of the layers' parameters and FLOPs that a plan's cut leaves."""
    total, left = {"params": 0.0, "flops": 0.0}, {"params": 0.0, "flops": 0.0}
    causal = profile.manifest.causal
    for index, shape in enumerate(profile.manifest.layers):
        own = plan.pruning.layers.get(index) if plan.pruning else None
        whole = SublayerSize(shape.num_heads, shape.num_kv_heads, shape.num_channels)
        size = (
            whole
            if own is None
            else SublayerSize(*(len(k) for k in (own.kept_heads, own.kept_groups, own.kept_channels)))
        )
        for sums, each in ((total, whole), (left, size)):
            sums["params"] += params(shape, each)
            sums["flops"] += flops(shape, each, length, causal=causal)
    return {name: left[name] / total[name] for name in total}


@torch.no_grad()
def _seconds(
    model: PreTrainedModel,
    plans: Mapping[tuple[str, str], Plan],
    bench: CutBench,
    applied: PrunedApply,
    progress: Progress,
) -> dict[tuple[str, str] | None, list[float]]:
    """Per plan (None: dense) one time per round."""
    if bench.timed is None or not bench.rounds:
        return {}
    variants: list[tuple[tuple[str, str] | None, Plan | None]] = [(None, None), *plans.items()]
    times: dict[tuple[str, str] | None, list[float]] = {key: [] for key, _ in variants}
    stack: nn.Module = model
    stack.to(bench.timed_on)
    inputs = {name: tensor.to(model.device) for name, tensor in bench.timed.items()}
    if model.can_generate():
        inputs |= {"logits_to_keep": 1}  # type: ignore[dict-item]
    for turn in range(bench.rounds):
        progress("time plans", turn, bench.rounds)
        first = turn % len(variants)
        for key, plan in (*variants[first:], *variants[:first]):
            with nullcontext() if plan is None else applied(model, plan):
                model(**inputs)  # builds schedules and warms memory
                times[key].append(_timed(model, inputs))
    progress("time plans", bench.rounds, bench.rounds)
    return times


def _timed(model: PreTrainedModel, inputs: Mapping[str, Any]) -> float:
    _wait_for(model.device)
    start = time.perf_counter()
    model(**inputs)
    _wait_for(model.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def at_equal_time(rows: Sequence[CutRow]) -> list[dict[str, Any]]:
    """Per joint plan, the distance that each kind of plan alone has at the joint plan's measured time.

    Between two plans of a kind the logarithm of the distance is taken as linear in seconds; outside the measured range there is no value,
    except that a slower plan bounds nothing: where a kind has no plan as fast as the joint one, it says so with None.
    """
    found = []
    for row in (row for row in rows if row.plan == JOINT and row.forward_s is not None):
        alone = {
            kind: _at([r for r in rows if r.plan == kind], row.forward_s or 0.0) for kind in (CUTS_ONLY, RULES_ONLY)
        }
        found.append({"budget": row.budget, "forward_s": row.forward_s, JOINT: row.distance, **alone})
    return found


def _at(rows: Sequence[CutRow], seconds: float) -> float | None:
    """Distance of a kind at a time."""
    points = sorted((row.forward_s, row.distance) for row in rows if row.forward_s is not None)
    for (early, worse), (late, better) in pairwise(points):
        if early <= seconds <= late and min(worse, better) > 0:
            share = (seconds - early) / max(late - early, 1e-12)
            return float(np.exp((1 - share) * np.log(worse) + share * np.log(better)))
    return None


def record_of(
    model: PreTrainedModel,
    profile: PruningProfile,
    rows: Sequence[CutRow],
    *,
    judged_on: str,
    timed_on: str | None,
    **more: Any,
) -> dict[str, Any]:
    """What is written to disk: rows and where they come from.

    Args:
        model: what was measured.
        profile: where the plans come from.
        rows: what was found.
        judged_on: device of refits and quality, as torch names it.
        timed_on: device of the forward that was timed; None if none was.
        more: further provenance.
    """
    return {
        "format": "sparsesearch.bench.cuts",
        "model": profile.manifest.base_model.name_or_path,
        "weights_sha256": profile.manifest.base_model.weights_sha256,
        "distance": profile.manifest.distance,
        "rows": [asdict(row) for row in rows],
        "at_equal_time": at_equal_time(rows),
        "provenance": {
            "device": device_name(judged_on),
            "timed_on": None if timed_on is None else device_name(timed_on),
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "calibration": profile.manifest.calibration,
            "versions": provenance_versions(),
            **more,
        },
    }
