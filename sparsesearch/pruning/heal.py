"""Healing: a short distillation of the dense model's output into a pruned checkpoint, resumable, with its gain measured."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsesearch.cut import Cut
from sparsesearch.errors import ArtifactError, RegressionError, SpecError
from sparsesearch.plan import Plan
from sparsesearch.pruning.data import load_batches, stacked
from sparsesearch.pruning.heal_data import HealRequest, drawn, items_of, reads_sentences, training_batches
from sparsesearch.pruning.heal_state import Best, HealOptimiser, HealState, trained_parameters
from sparsesearch.pruning.models import load_prunable
from sparsesearch.pruning.quality import Batch, dense_rows, distance, mean_distance, output_rows
from sparsesearch.pruning.verify import layout_of
from sparsesearch.runtime.export import COMPANIONS, PLAN_FILE, check_target, complete_or_nothing

_WARMUP_SHARE = 0.05
RATES = {"muon": 2e-3, "adamw": 1e-3}
"""Peak learning rates of language models; that of Muon was chosen on documents of the calibration text that were not trained on."""
ENCODER_RATES = {"muon": 3e-4, "adamw": 5e-5}
"""The same of text encoders, which a refit leaves nearer to dense: Muon at 2e-3 and AdamW at 2e-4 took
all-MiniLM-L6-v2 further away within 150 and 80 steps, Muon at 3e-4 brought it nearer."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HealReport:
    """Held-out distance from dense (KL in nats per token, or 1 − cosine) and, for language models, loss in nats per token.

    Attributes:
        steps: optimiser steps taken.
        best_step: the one whose state was nearest to the teacher on validation data, and was written.
        validation: step -> distance there, in units of the held-out one.
        recovered: share of the loss gap to dense (of the distance, where there is no loss) that healing closed.
        improved: whether the held-out distance became smaller; validation data may have said so and be wrong.
    """

    steps: int
    best_step: int
    validation: dict[int, float]
    distance_before: float
    distance_after: float
    loss_dense: float | None
    loss_before: float | None
    loss_after: float | None
    recovered: float
    improved: bool


def heal_checkpoint(
    checkpoint: Path,
    teacher: str | Path,
    out: Path,
    request: HealRequest,
    *,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> HealReport:
    """Distil and write a healed checkpoint: the state that is nearest to the teacher on validation data of the calibration split.

    Args:
        checkpoint: pruned; left as it is.
        teacher: the dense model.
        out: directory to make; until it is whole its training state lies beside it in `<out>.heal`.
        request: see there.
        device: where to train.
        resume: continue from that state.
        overwrite: replace what is at `out`, once the new checkpoint is whole.
        progress: called with (stage, done, total).

    Raises:
        ArtifactError: `out` is taken; a state is there and `resume` is off, or it belongs to another request.
        SpecError: nothing was removed from the checkpoint, or it answers as the teacher does.
        RegressionError: no state is nearer than the checkpoint itself; nothing is written.
    """
    check_target(out, checkpoint, overwrite)
    cut = _cut_of(checkpoint)
    state = HealState.open(out.with_name(f"{out.name}.heal"), request, resume=resume)
    student, tokenizer = load_prunable(checkpoint, device=device, dtype="float32")
    if layout_of(student, cut) == "logical":
        raise SpecError(
            f"{checkpoint} must really be smaller to be healed, but holds zeros, which training would fill. Apply its plan without --logical."
        )
    dense, reader = load_prunable(teacher, device=device, dtype="float32")
    held_out = load_batches(
        dense, reader or tokenizer, request.held_out or request.data, length_tokens=request.length_tokens,
        num_samples=request.num_sequences, seed=request.seed, split="heldout",
    )  # fmt: skip
    reference = dense_rows(dense, held_out)
    before = mean_distance(student, held_out, reference), held_out_loss(student, held_out)
    if before[0] == 0:
        raise SpecError(
            f"{checkpoint} must differ from its teacher, but answers exactly as {teacher} does. Give the dense model."
        )
    best = train(student, dense, tokenizer or reader, request, state, progress)
    if best.step == 0:
        shutil.rmtree(state.folder, ignore_errors=True)
        raise RegressionError(_worse(checkpoint, best))
    after = mean_distance(student, held_out, reference), held_out_loss(student, held_out)
    found = _report(best, before, after, held_out_loss(dense, held_out))
    with complete_or_nothing(out, overwrite) as staging:
        _write(student, checkpoint, staging)
        _note(staging / "README.md", teacher, request, found)
    shutil.rmtree(state.folder, ignore_errors=True)
    return found


def _report(
    best: Best, before: tuple[float, float | None], after: tuple[float, float | None], goal: float | None
) -> HealReport:
    """What (distance, loss) were and became; `goal` is dense's loss."""
    if goal is None or before[1] is None or after[1] is None:
        share = (before[0] - after[0]) / before[0]
    else:
        share = (before[1] - after[1]) / max(before[1] - goal, 1e-12)
    return HealReport(
        max(best.distances), best.step, best.distances, before[0], after[0], goal, before[1], after[1], share, after[0] < before[0]
    )  # fmt: skip


def _note(card: Path, teacher: str | Path, request: HealRequest, found: HealReport) -> None:
    """Say in the model card that the weights are no longer those of the refit."""
    loss = (
        "" if found.loss_after is None else f", loss {found.loss_before:.4g} to {found.loss_after:.4g} nats per token"
    )
    text = (
        f"## Healed\n\nDistilled from `{teacher}` on `{request.data}` (seed {request.seed}): the state after {found.best_step} of {found.steps} "
        f"steps, the nearest on validation data. On {request.num_sequences} held-out sequences of `{request.held_out or request.data}`, distance "
        f"from it {found.distance_before:.4g} to {found.distance_after:.4g}{loss}.\n"
    )
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    card.write_text(f"{before}\n{text}".lstrip(), encoding="utf-8")


def _worse(checkpoint: Path, best: Best) -> str:
    trained = {step: distance for step, distance in best.distances.items() if step}
    step = min(trained, key=lambda step: trained[step] if math.isfinite(trained[step]) else math.inf)
    return (
        f"healing must bring {checkpoint} nearer to its teacher, but took it from {best.distances[0]:.4g} to {trained[step]:.4g} at best (step "
        f"{step}) on validation data. Nothing was written. Lower --learning-rate, or give more --data."
    )


def _cut_of(checkpoint: Path) -> Cut:
    """What was removed from a checkpoint."""
    if not checkpoint.is_dir():
        raise ArtifactError(
            f"{checkpoint} must be the directory of a pruned checkpoint, but there is none. Check the path."
        )
    cut = Plan.load(checkpoint / PLAN_FILE).pruning if (checkpoint / PLAN_FILE).is_file() else None
    if cut is None:
        raise SpecError(
            f"{checkpoint} must be a pruned checkpoint, but nothing was removed from it. Make one with `sparsesearch apply`."
        )
    return cut


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    request: HealRequest,
    state: HealState,
    progress: Progress,
) -> Best:
    """Minimise the distance to the teacher over everything but the embeddings; the student ends in the best state seen."""
    pool, validation = training_batches(teacher, tokenizer, request)
    wanted = dense_rows(teacher, validation)
    per_step = max(1, request.batch // items_of(pool[0]))
    usual = ENCODER_RATES if reads_sentences(teacher) else RATES
    rate = usual[request.optimiser] if request.learning_rate is None else request.learning_rate
    optimiser = HealOptimiser(trained_parameters(student), request.optimiser, rate)
    first, best = state.restore(optimiser)
    for step in range(first, request.steps + 1):
        progress("heal", step, request.steps)
        if step not in best.distances and (step % request.save_every == 0 or step == request.steps):
            best.see(step, mean_distance(student, validation, wanted), optimiser.trained)
            if not math.isfinite(best.distances[step]):
                break  # it diverged, and stays so
            if 0 < step < request.steps:
                state.save(optimiser, best, step)
        if step < request.steps:
            chosen = [pool[index] for index in drawn(step, len(pool), per_step, request.seed)]
            _accumulate(student, teacher, chosen)
            optimiser.step(_schedule(step, request.steps))
    best.take(optimiser.trained)
    return best


def _accumulate(student: PreTrainedModel, teacher: PreTrainedModel, chosen: list[Batch]) -> None:
    """Gradients of the mean distance over the items of several batches."""
    if student.can_generate() and student.device.type != "cpu":
        chosen = stacked(chosen, len(chosen))
    items = sum(items_of(batch) for batch in chosen)
    for batch in chosen:
        with torch.no_grad():
            rows, logits = output_rows(teacher, batch)
        with torch.enable_grad():
            share = items_of(batch) / items
            (share * distance(rows, output_rows(student, batch)[0], logits=logits).mean()).backward()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: list[Batch]) -> float | None:
    """Mean next-token cross-entropy, nats per token; None for models that do not predict tokens."""
    if not model.can_generate():
        return None
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        log_p = output_rows(model, batch)[0].unflatten(0, ids.shape)[:, :-1].log_softmax(-1)
        total -= float(log_p.gather(-1, ids[:, 1:, None]).double().sum())
        count += ids[:, 1:].numel()
    return total / count


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, int(_WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _write(student: PreTrainedModel, checkpoint: Path, staging: Path) -> None:
    content = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    name = content.get("dtype") or content.get("torch_dtype") or "float32"
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise SpecError(f"{checkpoint}/config.json must name a torch dtype, but names {name!r}.")
    student.to(getattr(torch, name)).save_pretrained(staging)
    for pattern in (*COMPANIONS, PLAN_FILE, "README.md"):
        for file in sorted(checkpoint.glob(pattern)):
            if file.is_file() and file.name != "generation_config.json":
                shutil.copy(file, staging / file.name)
    shutil.copy(checkpoint / "config.json", staging / "config.json")
