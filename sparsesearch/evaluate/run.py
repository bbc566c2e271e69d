"""The evaluation itself: which sequences, in which order, and how single numbers become means with errors."""

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from sparsesearch import calibration
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.cost.base import CostModel
from sparsesearch.errors import SpecError
from sparsesearch.evaluate.density import TileCount, achieved_density, counting
from sparsesearch.evaluate.estimate import Estimate
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.metrics import Metrics, VariantMetrics
from sparsesearch.evaluate.predicted import predicted_seconds
from sparsesearch.evaluate.reference import ApplyPlan, Comparison, DenseReference
from sparsesearch.evaluate.suite import judge_tasks
from sparsesearch.evaluate.task_metrics import SuiteSpec
from sparsesearch.evaluate.timing import prefill_seconds
from sparsesearch.plan import Plan
from sparsesearch.profiling.record import device_name, provenance_versions
from sparsesearch.runtime.live import apply, require_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]

_GROUP_TOKENS = 1 << 15  # dense hidden states kept at a time; each plan is applied once per group
_DEPTH_BINS = 5


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plans: Mapping[str, Plan],
    *,
    lengths: Sequence[int],
    num_sequences: int = 96,
    num_text_sequences: int | None = None,
    num_needles: int | None = None,
    depths: Sequence[float] | None = None,
    data: str = "text",
    seed: int = 0,
    timing_rounds: int = 5,
    cost_model: CostModel | None = None,
    suite: SuiteSpec | None = None,
    decode_tokens: int = 0,
    apply: ApplyPlan = apply,
    progress: Progress | None = None,
    command: str | None = None,
    model_name: str | None = None,
) -> Metrics:
    """Judge plans beside dense on held-out sequences, in one job.

    Needle sequences (three wordings in equal parts, one question at the end) give KL, agreement and accuracy; plain text gives the held-out
    loss. The vocabulary is worked through in chunks of positions.

    Args:
        model: a live causal LM in evaluation mode; unchanged afterwards.
        tokenizer: the model's.
        plans: variant -> plan. Dense is always judged, under the name `dense`.
        lengths: tokens per sequence; each is judged by itself.
        num_sequences: needle sequences per length.
        num_text_sequences: plain sequences per length; a sixth of `num_sequences`, at least four, by default.
        num_needles: statements per needle sequence; 8, or as many as take half of a short one, by default.
        depths: where the statement asked about stands, in turn; None draws it uniformly.
        data: where the text comes from: `text`, a file, or a hub dataset; its held-out split is used.
        seed: of everything that is drawn.
        timing_rounds: prefill measurements per variant and length; 0 measures no time.
        cost_model: of this device; its predictions stand beside what is timed.
        suite: long-context tasks to judge besides, each by itself.
        decode_tokens: how many of a sequence's last tokens plans decode one by one; agreement, KL and loss are then of these. 0: none.
        apply: how a plan is put on the model.
        progress: called with (what, done, total).
        command: how this was started, for the record.
        model_name: what the model is called in the record; by default where it was loaded from.

    Raises:
        SpecError: a variant is called `dense`, the model runs a plan already, no length is given or one exceeds the model's context, or the data do not suffice.
    """
    _require_judgeable(model, plans, lengths, num_sequences)
    variants: dict[str, Plan | None] = {"dense": None, **plans}
    results: dict[int, dict[str, VariantMetrics]] = {}
    used: dict[str, str] = {}
    for length in sorted(set(lengths)):
        parts = held_out_parts(
            tokenizer,
            length,
            num_sequences,
            num_text_sequences=num_text_sequences,
            num_needles=num_needles,
            depths=depths,
            data=data,
            seed=seed,
        )
        used |= {part.description: part.id for part in parts}
        samples = [sample for part in parts[:-1] for sample in part.samples]
        found, density = compare_all(
            model,
            variants,
            [*samples, *parts[-1].samples],
            apply,
            progress,
            f"{length} tokens",
            decode_tokens=decode_tokens,
        )
        timed = _timed(model, samples[0], variants, timing_rounds, apply, cost_model)
        results[length] = {
            name: summary(samples, found[name], found["dense"], density[name], timed.get(name)) for name in variants
        }
    tasks = {}
    if suite is not None:
        tasks = judge_tasks(model, tokenizer, variants, suite, lengths, apply=apply, progress=progress)
    return Metrics(
        model=model_name or str(model.config.name_or_path or type(model).__name__),
        results=results,
        plans={name: plan.sha256 for name, plan in plans.items()},
        data=used,
        suite=suite,
        tasks=tasks,
        decode_tokens=decode_tokens,
        provenance=provenance(model, seed, command),
    )


def _require_judgeable(
    model: "PreTrainedModel", plans: Mapping[str, Plan], lengths: Sequence[int], num_sequences: int
) -> None:
    if "dense" in plans:
        raise SpecError("no plan may be called 'dense': dense is always judged beside the plans. Choose another name.")
    if not lengths or num_sequences < 1:
        raise SpecError(
            f"at least one length and one sequence must be judged, but got {list(lengths)}, {num_sequences}."
        )
    calibration.check_context(model.config, lengths)
    require_dense(model)


def held_out_parts(
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    num_sequences: int,
    *,
    num_text_sequences: int | None = None,
    num_needles: int | None = None,
    depths: Sequence[float] | None = None,
    data: str = "text",
    seed: int = 0,
) -> list[Calibration]:
    """Held-out sequences of one length: needles, a set per wording, and plain text last; arguments as in `evaluate`."""
    text = calibration.load(
        data,
        tokenizer,
        length_tokens=length,
        num_samples=num_text_sequences or max(4, num_sequences // 6),
        seed=seed,
        split="heldout",
    )
    count = (
        calibration.needles_that_fit(tokenizer, length, calibration.NUM_NEEDLES) if num_needles is None else num_needles
    )
    return [*_needles(tokenizer, length, num_sequences, count, depths, data, seed), text]


def _needles(
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    num_sequences: int,
    num_needles: int,
    depths: Sequence[float] | None,
    data: str,
    seed: int,
) -> list[Calibration]:
    """Needle sequences: the wordings share `num_sequences`, and the depths share each wording's part."""
    places: Sequence[float | None] = depths or [None]
    wordings = list(calibration.TEMPLATES)
    counts = [
        len(range(index, num_sequences, len(wordings) * len(places))) for index in range(len(wordings) * len(places))
    ]
    cells = [(wording, place) for place in places for wording in wordings]
    return [
        calibration.needle_questions(
            tokenizer,
            length_tokens=length,
            num_samples=count,
            template=wording,
            depth=place,
            num_needles=num_needles,
            seed=seed,
            source=data,
        )
        for (wording, place), count in zip(cells, counts, strict=True)
        if count
    ]


def compare_all(
    model: "PreTrainedModel",
    variants: Mapping[str, Plan | None],
    samples: Sequence[Sample],
    apply: ApplyPlan = apply,
    progress: Progress | None = None,
    what: str = "evaluate",
    *,
    decode_tokens: int = 0,
) -> tuple[dict[str, Comparison], dict[str, float]]:
    """Every variant on every sequence, group by group, so that only one group's dense states are in memory."""
    parts: dict[str, list[Comparison]] = {name: [] for name in variants}
    tiles = {name: TileCount() for name in variants}
    size = max(1, _GROUP_TOKENS // len(samples[0].input_ids))
    for first in range(0, len(samples), size):
        group = samples[first : first + size]
        alone = model.device.type == "cpu" and not decode_tokens  # a CPU gains nothing from several prompts at a time
        size_tokens = 1 if alone else _GROUP_TOKENS
        reference = DenseReference(model, group, batch_tokens=size_tokens, decode_tokens=decode_tokens, apply=apply)
        for number, (name, plan) in enumerate(variants.items(), start=1):
            with counting(plan, tiles[name]):
                parts[name].append(reference.compare(plan))
            if progress is not None:
                done = first * len(variants) + len(group) * number
                progress(what, done, len(samples) * len(variants))
    length = len(samples[0].input_ids)
    return (
        {name: Comparison.concatenate(found) for name, found in parts.items()},
        {name: 1.0 if plan is None else achieved_density(plan, length, tiles[name]) for name, plan in variants.items()},
    )


def summary(
    needles: Sequence[Sample],
    found: Comparison,
    dense: Comparison,
    density: float,
    timed: Mapping[str, Any] | None = None,
) -> VariantMetrics:
    """Means and errors of one variant; the first sequences are the needles, the rest is plain text."""
    count = len(needles)
    right, dense_right = found.needle[:count].tolist(), dense.needle[:count].tolist()
    loss, dense_loss = found.loss[count:].tolist(), dense.loss[count:].tolist()
    return VariantMetrics.model_validate(
        {
            "density": density,
            "heldout_loss": Estimate.of(loss),
            "heldout_loss_minus_dense": Estimate.of([a - b for a, b in zip(loss, dense_loss, strict=True)]),
            "kl_text": Estimate.of(found.kl_text[:count].tolist()),
            "kl_answer": Estimate.of(found.kl_answer[:count].tolist()),
            "top1_agreement": Estimate.of(found.top1_agreement[:count].tolist()),
            "needle": Estimate.of_share(right),
            "needle_minus_dense": Estimate.of([a - b for a, b in zip(right, dense_right, strict=True)]),
            "needle_by_template": _shares([str(sample.template) for sample in needles], right),
            "needle_by_depth": _shares([_depth_bin(sample.depth) for sample in needles], right),
            **(timed or {}),
        }
    )


def _shares(labels: Sequence[str], right: Sequence[float]) -> dict[str, Estimate | None]:
    return {
        label: Estimate.of_share([hit for own, hit in zip(labels, right, strict=True) if own == label])
        for label in sorted(set(labels))
    }


def _depth_bin(depth: float | None) -> str:
    fifth = min(int((depth or 0.0) * _DEPTH_BINS), _DEPTH_BINS - 1)
    return f"{fifth / _DEPTH_BINS:g}-{(fifth + 1) / _DEPTH_BINS:g}"


def _timed(
    model: "PreTrainedModel",
    sample: Sample,
    variants: Mapping[str, Plan | None],
    rounds: int,
    apply: ApplyPlan,
    costs: CostModel | None,
) -> dict[str, dict[str, Any]]:
    """The fields of `VariantMetrics` that are about time: measured and, with a cost model, predicted."""
    if rounds == 0:
        return {}
    head, prompt = Head(model), sample.input_ids[None]
    runs = prefill_seconds(head, prompt, variants, rounds=rounds, apply=apply)
    found: dict[str, dict[str, Any]] = {
        name: {"prefill_s": median(own), "prefill_runs_s": own} for name, own in runs.items()
    }
    if costs is None:
        return found
    attention = prefill_seconds(head, prompt, variants, rounds=rounds, apply=apply, part="attention")
    for name, seconds in predicted_seconds(model, variants, len(sample.input_ids), costs).items():
        found[name] |= {
            "attention_s": median(attention[name]),
            "predicted": seconds,
            "cost_model": costs.name,
        }
    return found


def provenance(model: "PreTrainedModel", seed: int, command: str | None) -> dict[str, Any]:
    """What another person needs to get the same numbers."""
    return {
        "versions": {**provenance_versions(), "python": platform.python_version()},
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        "seed": seed,
        "command": command if command is not None else " ".join(sys.argv),
    }
