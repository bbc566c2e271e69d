"""Judging on long-context tasks: dense and every plan on the same sequences, task by task."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.calibration.tasks import TaskSample, task_samples, task_text
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.reference import ApplyPlan
from sparsesearch.evaluate.task_metrics import SuiteSpec, TaskMetrics, TaskTable
from sparsesearch.plan import Plan
from sparsesearch.runtime.live import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A model on a GPU wants more than one short sequence at a time; a CPU gains nothing from it.
_BATCH_TOKENS = {"cpu": 1}
_BATCH_TOKENS_ELSEWHERE = 1 << 15
_SLACK_TOKENS = 8  # generated beyond the length of the expected answer, for a model that says more around it


@dataclass(frozen=True)
class TaskScores:
    """One variant on n sequences of one task.

    Attributes:
        right: share of each sequence's values predicted to the last token, teacher forced.
        log_p: log-probabilities at the positions that predict answers, all sequences one after the other.
        generated: share of each sequence's values that generated text names; None where nothing was generated.
    """

    right: Float[Tensor, " n"]
    log_p: Float[Tensor, "P V"]
    generated: Float[Tensor, " n"] | None


def judge_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plans: Mapping[str, Plan | None],
    spec: SuiteSpec,
    lengths: Sequence[int],
    *,
    apply: ApplyPlan = apply,
    progress: Callable[[str, int, int], None] | None = None,
) -> TaskTable:
    """Run every task at every length under every plan.

    Args:
        model: a live causal LM in evaluation mode; unchanged afterwards.
        tokenizer: the model's.
        plans: variant -> plan; `dense` -> None must be among them.
        spec: tasks, format, number of sequences, seed.
        lengths: tokens per sequence.
        apply: how a plan is put on the model.
        progress: called with (what, done, total).

    Raises:
        SpecError: an unknown task or format, or a task that does not fit a length.
    """
    head = Head(model)
    found: TaskTable = {}
    cells = [(length, task) for length in sorted(set(lengths)) for task in spec.tasks]
    text = task_text(tokenizer, spec.split, max(lengths))
    for done, (length, task) in enumerate(cells):
        samples = task_samples(
            tokenizer,
            task,
            length_tokens=length,
            num_samples=spec.num_sequences,
            seed=spec.seed,
            split=spec.split,
            format=spec.format,
            shots=spec.shots,
            text=text,
        )
        scores = {}
        for number, (name, plan) in enumerate(plans.items()):
            if progress is not None:
                progress(f"{task}, {length} tokens, {name}", done * len(plans) + number, len(cells) * len(plans))
            with _applied(apply, model, plan):
                scores[name] = _score(head, tokenizer, samples, generate=spec.generate)
        found.setdefault(length, {})[task] = {
            name: _metrics(own, scores["dense"], samples) for name, own in scores.items()
        }
    return found


def _applied(apply: ApplyPlan, model: "PreTrainedModel", plan: Plan | None) -> AbstractContextManager[Any]:
    return nullcontext() if plan is None else apply(model, plan)


def _score(
    head: Head, tokenizer: "PreTrainedTokenizerBase", samples: Sequence[TaskSample], *, generate: bool
) -> TaskScores:
    right, log_p = [], []
    for batch in _batches(samples, _BATCH_TOKENS.get(head.model.device.type, _BATCH_TOKENS_ELSEWHERE)):
        hidden = head.hidden(torch.stack([one.sample.input_ids for one in batch]))
        before = torch.stack([one.sample.answer_mask for one in batch])[:, 1:].to(hidden.device)
        logits = head.logits(hidden[:, :-1][before])
        counts = [int(one.sample.answer_mask.sum()) for one in batch]
        predicted = logits.argmax(-1).cpu().split(counts)
        right += [values_right(one, own) for one, own in zip(batch, predicted, strict=True)]
        log_p.append(logits.log_softmax(-1))
    generated = [_generated(head.model, tokenizer, one) for one in samples] if generate else None
    return TaskScores(
        torch.tensor(right, dtype=torch.float64),
        torch.cat(log_p),
        None if generated is None else torch.tensor(generated, dtype=torch.float64),
    )


def values_right(task_sample: TaskSample, predicted: Tensor) -> float:
    """Share of a sequence's values whose tokens were all predicted; a value of a list may begin with any that is not named yet.

    Args:
        task_sample: the sequence.
        predicted: most probable token before each answer token, in order.
    """
    sample = task_sample.sample
    places = sample.answer_mask.nonzero()[:, 0]
    hit = predicted == sample.input_ids[places]
    hit |= (predicted[:, None] == task_sample.accepted[places]).any(-1)
    begins = _begins(places)
    value = begins.long().cumsum(0) - 1
    missed = torch.zeros(int(begins.sum())).index_add(0, value, (~hit).float())
    return float((missed == 0).double().mean())


def _begins(places: Tensor) -> Bool[Tensor, " P"]:
    """Which answer tokens follow no answer token."""
    return torch.cat([torch.ones(1, dtype=torch.bool), places[1:] != places[:-1] + 1])


def _generated(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", task_sample: TaskSample) -> float:
    """Share of the values that greedy text names, each question after the true answers of those before it."""
    named, asked = 0, 0
    for segment in task_sample.segments:
        prompt = task_sample.sample.input_ids[None, : segment.start].to(model.device)
        text = model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=segment.stop - segment.start + _SLACK_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        )[0, segment.start :]
        said = str(tokenizer.decode(text, skip_special_tokens=True)).lower()
        named += sum(bool(re.search(rf"\b{re.escape(answer.lower())}\b", said)) for answer in segment.answers)
        asked += len(segment.answers)
    return named / asked


def _metrics(own: TaskScores, dense: TaskScores, samples: Sequence[TaskSample]) -> TaskMetrics:
    counts = [int(one.sample.answer_mask.sum()) for one in samples]
    kl = (dense.log_p.exp() * (dense.log_p - own.log_p)).sum(-1).clamp(min=0).double().split(counts)
    return TaskMetrics.of(
        own.right.tolist(),
        dense.right.tolist(),
        [float(part.mean()) for part in kl],
        None if own.generated is None else own.generated.tolist(),
        None if dense.generated is None else dense.generated.tolist(),
    )


def _batches(samples: Sequence[TaskSample], batch_tokens: int) -> Iterator[Sequence[TaskSample]]:
    size = max(1, batch_tokens // len(samples[0].sample.input_ids))
    return (samples[first : first + size] for first in range(0, len(samples), size))
