"""What dense attention says on a set of sequences, kept so that any number of plans can be scored against it quickly."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sparsesearch.calibration import Sample
from sparsesearch.errors import SpecError
from sparsesearch.evaluate.head import Head
from sparsesearch.plan import Plan
from sparsesearch.runtime.live import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ApplyPlan = Callable[["PreTrainedModel", Plan], AbstractContextManager[Any]]

# Logits at a time. CPU: of 2^18 … 2^24 on needle-7m (one core), 2^22 was the fastest, 0.49 s against 0.71 s at 2^24: chunks that stay in cache.
# Elsewhere a chunk's launches must not show.
_CHUNK_LOGITS = {"cpu": 1 << 22}
_CHUNK_LOGITS_ELSEWHERE = 1 << 27
_LEAST_ROWS = 256
_BATCH_TOKENS = {"cpu": 1 << 12}
_BATCH_TOKENS_ELSEWHERE = 1 << 15


@dataclass(frozen=True)
class Comparison:
    """One variant beside dense, one number per sequence (n sequences); fp64. Positions: all, or those that were decoded if some were.

    Attributes:
        loss: mean of -log p(token) over all positions, nats per token.
        kl_text: mean over all positions of KL(dense ‖ variant), nats.
        kl_answer: the same over positions that predict answer tokens; NaN where there are none.
        top1_agreement: share of positions whose most probable token is dense's.
        needle: share of answers (runs of answer tokens) predicted right to the last token, teacher forced; NaN where there are none.
    """

    loss: Float[Tensor, " n"]
    kl_text: Float[Tensor, " n"]
    kl_answer: Float[Tensor, " n"]
    top1_agreement: Float[Tensor, " n"]
    needle: Float[Tensor, " n"]

    @classmethod
    def concatenate(cls, parts: Sequence["Comparison"]) -> "Comparison":
        """The sequences of all parts, in order."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})


@dataclass
class _Batch:
    """B sequences of S tokens and what dense predicts at their R = B·(S - 1) positions."""

    input_ids: Int64[Tensor, "B S"]
    answer: Bool[Tensor, "B P"]
    target: Int64[Tensor, " R"]
    hidden: Float[Tensor, "R D"]
    self_entropy: Float[Tensor, " R"]
    top1: Int64[Tensor, " R"]
    probabilities: Float[Tensor, "R V"] | None


class DenseReference:
    """Dense predictions on fixed sequences; `score` judges a plan against them with one forward pass.

    KL(p ‖ q) = H(p, q) - H(p, p), with H(p, q) = logsumexp(z_q) - p·z_q. Kept per position: p's hidden state and H(p, p); the probabilities p too
    where all of them fit `cache_bytes`, otherwise they are made again from the hidden state. Both ways give the same numbers.

    Args:
        model: runs dense outside `apply`; put into evaluation mode by the caller.
        samples: one length or several.
        batch_tokens: tokens that go through the model at once, 4096 on a CPU and 32768 elsewhere by default; a longer sequence goes alone.
        cache_bytes: most memory for dense probabilities.
        decode_tokens: how many of each sequence's last tokens a plan decodes one by one, as it would serve them; means are then over these.
        apply: how a plan is put on the model; a context manager.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        samples: Sequence[Sample],
        *,
        batch_tokens: int | None = None,
        cache_bytes: int = 1 << 30,
        decode_tokens: int = 0,
        apply: ApplyPlan = apply,
    ) -> None:
        if not samples:
            raise SpecError("at least one sequence must be given to score plans on.")
        shortest = min(len(sample.input_ids) for sample in samples)
        if not 0 <= decode_tokens < shortest - 1:
            raise SpecError(
                f"decode_tokens must leave a prompt and something to predict of {shortest} tokens, but is {decode_tokens}."
            )
        if model.training:
            raise SpecError("the model must be in evaluation mode, but is in training mode: call model.eval().")
        self._head, self._apply, self._decode_tokens = Head(model), apply, decode_tokens
        positions = sum(len(sample.input_ids) - 1 for sample in samples)
        keep = positions * self._head.vocab_size * 4 <= cache_bytes
        size = batch_tokens or _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS_ELSEWHERE)
        self._batches = [self._dense(batch, keep=keep) for batch in _batched(samples, size)]

    def score(self, plan: Plan | None) -> dict[str, float]:
        """Means over the sequences: `kl_text`, `kl_answer` (nats per position) and `needle` (share of answers right); None is dense.

        Sequences without answers do not count for `kl_answer` and `needle`; without any such sequence both are absent.
        """
        found = self.compare(plan)
        means = {name: getattr(found, name).nanmean().item() for name in ("kl_text", "kl_answer", "needle")}
        return {name: value for name, value in means.items() if not math.isnan(value)}

    def compare(self, plan: Plan | None) -> Comparison:
        """Run the plan on every sequence; None is dense itself, which has run already."""
        if plan is None:
            hidden = [batch.hidden for batch in self._batches]
        else:
            with self._apply(self._head.model, plan):
                hidden = [self._hidden(batch) for batch in self._batches]
        return Comparison.concatenate(
            [self._compare(batch, rows) for batch, rows in zip(self._batches, hidden, strict=True)]
        )

    def _hidden(self, batch: _Batch) -> Float[Tensor, "R D"]:
        hidden = self._head.hidden(batch.input_ids, decode_tokens=self._decode_tokens)
        return hidden[:, :-1].flatten(0, 1)

    def _dense(self, samples: Sequence[Sample], *, keep: bool) -> _Batch:
        device = self._head.model.device
        input_ids = torch.stack([sample.input_ids for sample in samples]).to(device)
        hidden = self._head.hidden(input_ids)[:, :-1].flatten(0, 1)
        entropies, tops, kept = [], [], []
        for rows in self._chunks(len(hidden)):
            logits = self._head.logits(hidden[rows])
            probabilities = logits.softmax(-1)
            entropies.append(_cross_entropy(probabilities, logits))
            tops.append(logits.argmax(-1))
            kept += [probabilities] if keep else []
        return _Batch(
            input_ids,
            torch.stack([sample.answer_mask for sample in samples])[:, 1:].to(device),
            input_ids[:, 1:].flatten(),
            hidden,
            torch.cat(entropies),
            torch.cat(tops),
            torch.cat(kept) if keep else None,
        )

    def _compare(self, dense: _Batch, hidden: Float[Tensor, "R D"]) -> Comparison:
        kl, loss, top1 = [], [], []
        for rows in self._chunks(len(hidden)):
            logits = self._head.logits(hidden[rows])
            if dense.probabilities is None:
                probabilities = self._head.logits(dense.hidden[rows]).softmax(-1)
            else:
                probabilities = dense.probabilities[rows]
            kl.append((_cross_entropy(probabilities, logits) - dense.self_entropy[rows]).clamp(min=0))
            loss.append(logits.logsumexp(-1) - logits.gather(-1, dense.target[rows, None])[:, 0])
            top1.append(logits.argmax(-1))
        shape = dense.answer.shape
        kl_of, loss_of = torch.cat(kl).double().view(shape), torch.cat(loss).double().view(shape)
        predicted = torch.cat(top1)
        answers = dense.answer.sum(-1)  # 0 / 0 below is the NaN that Comparison promises
        judged = slice(1 - self._decode_tokens, None) if self._decode_tokens else slice(None)
        return Comparison(
            loss=loss_of[:, judged].mean(-1).cpu(),
            kl_text=kl_of[:, judged].mean(-1).cpu(),
            kl_answer=((kl_of * dense.answer).sum(-1) / answers).cpu(),
            top1_agreement=(predicted == dense.top1).view(shape)[:, judged].double().mean(-1).cpu(),
            needle=answers_right((predicted == dense.target).view(shape), dense.answer).cpu(),
        )

    def _chunks(self, num_rows: int) -> Iterator[slice]:
        logits = _CHUNK_LOGITS.get(self._head.model.device.type, _CHUNK_LOGITS_ELSEWHERE)
        step = max(_LEAST_ROWS, logits // self._head.vocab_size)
        return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))


def answers_right(right: Bool[Tensor, "B P"], answer: Bool[Tensor, "B P"]) -> Float[Tensor, " B"]:
    """Share of each row's runs of `answer` in which every position is `right`; NaN where a row has none."""
    starts = answer & ~torch.nn.functional.pad(answer[:, :-1], (1, 0), value=False)
    run = starts.cumsum(-1) * answer  # 0: no answer; r: the r-th run of its row
    missed = torch.zeros(len(answer), int(run.max()) + 1, dtype=torch.long, device=answer.device)
    missed.scatter_add_(1, run, (answer & ~right).long())
    num_runs = starts.sum(-1)
    whole = ((missed == 0)[:, 1:] & (torch.arange(1, missed.shape[1], device=answer.device) <= num_runs[:, None])).sum(
        -1
    )
    return whole.double() / num_runs


def _cross_entropy(probabilities: Float[Tensor, "R V"], logits: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
    """H(p, softmax(z)) = logsumexp(z) - p·z."""
    expected: Tensor = torch.linalg.vecdot(probabilities, logits)
    return logits.logsumexp(-1) - expected


def _batched(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    """Neighbours of equal length, as many as `batch_tokens` allows; order is kept."""
    for length, group in groupby(samples, key=lambda sample: len(sample.input_ids)):
        equal = list(group)
        size = max(1, batch_tokens // length)
        yield from (equal[first : first + size] for first in range(0, len(equal), size))
