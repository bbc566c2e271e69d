"""Healing: a short distillation of the dense model's output into a pruned checkpoint, resumable, with its gain measured."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from sparsesearch.cut import Cut
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.pruning.data import SENTENCES_PER_BATCH, load_batches, stacked
from sparsesearch.pruning.heal_state import HealOptimiser, HealState, trained_parameters
from sparsesearch.pruning.models import load_prunable
from sparsesearch.pruning.quality import Batch, dense_rows, distance, mean_distance, output_rows
from sparsesearch.pruning.verify import layout_of
from sparsesearch.runtime.export import COMPANIONS, PLAN_FILE, check_target, complete_or_nothing

_WARMUP_SHARE = 0.05
OPENING_TOKENS = 32
_GENERATED_TOGETHER = 128
_MOST_SENTENCES = 2**14
RATES = {"muon": 2e-3, "adamw": 1e-3}
"""Peak learning rates of language models; that of Muon was chosen on documents of the calibration text that were not trained on."""
ENCODER_RATES = {"muon": 3e-4, "adamw": 5e-5}
"""The same of text encoders, which a refit leaves nearer to dense: Muon at 2e-3 and AdamW at 2e-4 took
all-MiniLM-L6-v2 further away within 150 and 80 steps, Muon at 3e-4 brought it nearer."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HealRequest:
    """What to do. Two runs of equal requests on equal checkpoints take the same steps.

    Attributes:
        steps: optimiser steps.
        data: calibration spec.
        length_tokens: of a training sequence.
        batch: sequences per step; a text encoder reads at least a whole batch of sentences.
        optimiser: `muon` (matrices orthogonalised, vectors by AdamW) or `adamw`.
        learning_rate: peak of the cosine schedule, after a warm-up over 5 % of the steps; None takes the optimiser's own of `RATES`, or
            of `ENCODER_RATES`.
        generated: sequences that the dense model writes itself, after openings from the data, and that are trained on too. A model of
            language shows what it knows in them, so a small corpus lasts longer. Other models take none.
        num_sequences: held-out sequences for the gain.
        held_out: spec of the data whose held-out split they are from; None: `data`.
        save_every: steps between states.
        seed: of data and order.
    """

    steps: int
    data: str = "text"
    length_tokens: int = 512
    batch: int = 4
    optimiser: Literal["muon", "adamw"] = "muon"
    learning_rate: float | None = None
    generated: int = 256
    num_sequences: int = 16
    held_out: str | None = None
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise SpecError(f"the learning rate must be positive and finite, but got {self.learning_rate:g}.")


@dataclass(frozen=True)
class HealReport:
    """Held-out distance from dense (KL in nats per token, or 1 − cosine) and, for language models, loss in nats per token.

    Attributes:
        recovered: share of the loss gap to dense (of the distance, where there is no loss) that healing closed.
    """

    steps: int
    distance_before: float
    distance_after: float
    loss_dense: float | None
    loss_before: float | None
    loss_after: float | None
    recovered: float


def heal_checkpoint(
    checkpoint: Path,
    teacher: str | Path,
    out: Path,
    request: HealRequest,
    *,
    device: str = "cpu",
    resume: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> HealReport:
    """Distil and write a healed checkpoint.

    Args:
        checkpoint: pruned; left as it is.
        teacher: the dense model.
        out: directory to make; until it is whole its training state lies beside it in `<out>.heal`.
        request: see there.
        device: where to train.
        resume: continue from that state.
        progress: called with (stage, done, total).

    Raises:
        ArtifactError: `out` is taken; a state is there and `resume` is off, or it belongs to another request.
        SpecError: nothing was removed from the checkpoint, or it answers as the teacher does.
    """
    check_target(out, checkpoint, overwrite=False)
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
    train(student, dense, tokenizer or reader, request, state, progress)
    after = mean_distance(student, held_out, reference), held_out_loss(student, held_out)
    with complete_or_nothing(out, overwrite=False) as staging:
        _write(student, checkpoint, staging)
    shutil.rmtree(state.folder, ignore_errors=True)
    goal = held_out_loss(dense, held_out)
    if goal is None or before[1] is None or after[1] is None:
        share = (before[0] - after[0]) / before[0]
    else:
        share = (before[1] - after[1]) / max(before[1] - goal, 1e-12)
    return HealReport(request.steps, before[0], after[0], goal, before[1], after[1], share)


def _cut_of(checkpoint: Path) -> Cut:
    """What was removed from a checkpoint."""
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
) -> None:
    """Minimise the distance to the teacher over everything but the embeddings."""
    pool = load_batches(
        teacher, tokenizer, request.data, length_tokens=request.length_tokens,
        num_samples=_pool_size(request, teacher), seed=request.seed,
    )  # fmt: skip
    if teacher.can_generate():
        pool += generated_batches(teacher, tokenizer, request)
    per_step = max(1, request.batch // _items(pool[0]))
    usual = ENCODER_RATES if _reads_sentences(teacher) else RATES
    rate = usual[request.optimiser] if request.learning_rate is None else request.learning_rate
    optimiser = HealOptimiser(trained_parameters(student), request.optimiser, rate)
    first = state.restore(optimiser)
    for step in range(first, request.steps):
        progress("heal", step, request.steps)
        chosen = [pool[index] for index in _drawn(step, len(pool), per_step, request.seed)]
        if student.can_generate() and student.device.type != "cpu":
            chosen = stacked(chosen, len(chosen))
        items = sum(_items(batch) for batch in chosen)
        for batch in chosen:
            with torch.no_grad():
                rows, logits = output_rows(teacher, batch)
            share = _items(batch) / items
            with torch.enable_grad():
                (share * distance(rows, output_rows(student, batch)[0], logits=logits).mean()).backward()
        optimiser.step(_schedule(step, request.steps))
        if (step + 1) % request.save_every == 0 and step + 1 < request.steps:
            state.save(optimiser, step + 1)
    progress("heal", request.steps, request.steps)


@torch.no_grad()
def generated_batches(teacher: PreTrainedModel, tokenizer: Any, request: HealRequest) -> list[Batch]:
    """What the teacher writes after openings of calibration text, sampled from its own distribution, one sequence per batch.

    Source: generated calibration data as in Liu et al. 2023, LLM-QAT, arXiv:2305.17888, section 2.1; ours opens with text of the corpus.
    """
    length, seed = request.length_tokens, request.seed
    opening = min(OPENING_TOKENS, length // 2)
    if not request.generated or not opening:
        return []
    openings = load_batches(
        teacher, tokenizer, request.data, length_tokens=opening, num_samples=request.generated, seed=seed + 7
    )
    written: list[Batch] = []
    model: Any = teacher
    devices = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for batch in stacked(openings, _GENERATED_TOGETHER):
            ids = batch["input_ids"].to(teacher.device)
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
                min_new_tokens=length - opening, max_new_tokens=length - opening,
            )  # fmt: skip
            written += [{"input_ids": row[None].cpu()} for row in found]
    return written


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


def _items(batch: Batch) -> int:
    """Sequences, sentences or images of a batch."""
    return len(next(iter(batch.values())))


def _reads_sentences(model: PreTrainedModel) -> bool:
    return bool(model.main_input_name == "input_ids" and not model.can_generate())


def _pool_size(request: HealRequest, teacher: PreTrainedModel) -> int:
    """Distinct sequences: each is seen about twice at most, up to what a small corpus gives."""
    if _reads_sentences(teacher):
        together = max(request.batch, SENTENCES_PER_BATCH)
        return min(_MOST_SENTENCES, max(together, request.steps * together // 2))
    return min(512 if request.batch < 32 else 4096, max(request.batch, request.steps * request.batch // 2))


def _drawn(step: int, size: int, per_step: int, seed: int) -> list[int]:
    """The batches of a step, a function of the step alone, so that a resumed run sees the same."""
    first = step * per_step
    orders = {epoch: torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
              for epoch in {first // size, (first + per_step - 1) // size}}  # fmt: skip
    return [orders[place // size][place % size] for place in range(first, first + per_step)]


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
