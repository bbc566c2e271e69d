"""What healing reads: the request, the sequences that are trained on, and others that its states are compared on."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from sparsesearch.errors import SpecError
from sparsesearch.pruning.data import IMAGES_PER_BATCH, SENTENCES_PER_BATCH, load_batches, stacked
from sparsesearch.pruning.quality import Batch

OPENING_TOKENS = 32
_GENERATED_TOGETHER = 128
_MOST_SENTENCES = 2**14
_VALIDATION = 8
"""Windows that states are compared on, and as many generated sequences; two batches of sentences or images."""
_OTHER_SEED = 1009


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
        save_every: steps between states; each is compared with the best so far.
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


def training_batches(teacher: PreTrainedModel, tokenizer: Any, request: HealRequest) -> tuple[list[Batch], list[Batch]]:
    """What is trained on, and the validation data that states are compared on; both are of the calibration split.

    A model of language is validated on windows of the data drawn anew, which may overlap those trained on, and on as many sequences that the
    teacher writes anew: on those alone states passed that were further from it on held-out text. Other models are validated on batches held apart.
    """
    size = _pool_size(request, teacher)

    def load(count: int, seed: int) -> list[Batch]:
        return load_batches(
            teacher, tokenizer, request.data, length_tokens=request.length_tokens, num_samples=count, seed=seed
        )

    if teacher.can_generate():
        pool = load(size, request.seed) + generated_batches(teacher, tokenizer, request)
        others = replace(request, generated=min(_VALIDATION, request.generated), seed=request.seed + _OTHER_SEED)
        return pool, load(_VALIDATION, others.seed) + generated_batches(teacher, tokenizer, others)
    if reads_sentences(teacher):
        size += 2 * SENTENCES_PER_BATCH
    found = load(max(size, 2 * IMAGES_PER_BATCH), request.seed)
    apart = max(1, min(2, len(found) // 4))
    return found[:-apart], found[-apart:]


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


def items_of(batch: Batch) -> int:
    """Sequences, sentences or images of a batch."""
    return len(next(iter(batch.values())))


def reads_sentences(model: PreTrainedModel) -> bool:
    """Whether it is a text encoder."""
    return bool(model.main_input_name == "input_ids" and not model.can_generate())


def _pool_size(request: HealRequest, teacher: PreTrainedModel) -> int:
    """Distinct sequences: each is seen about twice at most, up to what a small corpus gives."""
    if reads_sentences(teacher):
        together = max(request.batch, SENTENCES_PER_BATCH)
        return min(_MOST_SENTENCES, max(together, request.steps * together // 2))
    return min(512 if request.batch < 32 else 4096, max(request.batch, request.steps * request.batch // 2))


def drawn(step: int, size: int, per_step: int, seed: int) -> list[int]:
    """The batches of a step, a function of the step alone, so that a resumed run sees the same."""
    first = step * per_step
    orders = {epoch: torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
              for epoch in {first // size, (first + per_step - 1) // size}}  # fmt: skip
    return [orders[place // size][place % size] for place in range(first, first + per_step)]
