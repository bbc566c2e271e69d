"""A draft as tokens: exactly so long, with the answers marked, and with what counts as right for each of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from sparsesearch.calibration.samples import Sample
from sparsesearch.calibration.tasks.draft import Draft, Question, Task
from sparsesearch.calibration.tasks.format import Glue
from sparsesearch.calibration.tokens import Ids, encode, piece
from sparsesearch.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """Where one question is answered: a model that generates from token `start` should name all of `answers`."""

    start: int
    stop: int
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TaskSample:
    """A sequence of a task.

    Attributes:
        sample: tokens, with every answer token marked.
        accepted: per token, what else may stand there: first tokens of answers not named yet, where they come in any order; -1 pads.
        segments: one per question.
    """

    sample: Sample
    accepted: Int64[Tensor, "S A"] = field(repr=False)
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class _Answered:
    """Tokens of one question and its answer."""

    ids: Ids
    answer: NDArray[np.bool_]
    accepted: dict[int, list[int]]
    segment: Segment


def compose(
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    around: Glue,
    text: Ids,
    *,
    length_tokens: int,
    shots: int,
    seeds: list[int],
) -> TaskSample:
    """One sequence of `length_tokens`: worked examples, instruction, statements among `text`, questions and answers.

    Args:
        tokenizer: the model's.
        task: what to draft.
        around: the format.
        text: at least `length_tokens` of it; what statements leave is filled with it.
        length_tokens: of the whole, the last answer included.
        shots: worked examples.
        seeds: of this sequence; equal seeds, equal sequence.

    Raises:
        SpecError: the statements of the task do not fit.
    """
    examples = [
        _example(tokenizer, task.make(np.random.default_rng([*seeds, 1 + shot]), task.example_items), around)
        for shot in range(shots)
    ]
    parts = [around.start, *(ids for example in examples for ids in (example, around.to_question))]
    room = length_tokens - sum(map(len, parts))
    draft = _fitting(tokenizer, task, around, seeds, room)
    opening = _opening(tokenizer, draft, around)
    tail = list(_answered(tokenizer, draft, around))
    closing = sum(len(part.ids) for part in tail) + len(around.to_question) * (len(tail) - 1)
    placed = sorted(draft.statements, key=lambda entry: entry[0])
    body = _body(tokenizer, placed, text, room - len(opening) - closing, task.name)
    return _joined([*parts, opening, body], tail, around, length_tokens, task.name)


def _fitting(tokenizer: "PreTrainedTokenizerBase", task: Task, around: Glue, seeds: list[int], room: int) -> Draft:
    """The draft with the task's items, or with as many as fill `room` tokens."""

    def drafted(items: int) -> tuple[Draft, int]:
        draft = task.make(np.random.default_rng([*seeds, 0]), items)
        statements = sum(map(len, _encoded(tokenizer, [statement for _, statement in draft.statements])))
        around_them = len(_opening(tokenizer, draft, around)) + len(around.to_question) * (len(draft.questions) - 1)
        return draft, statements + around_them + sum(len(part.ids) for part in _answered(tokenizer, draft, around))

    if task.items is not None:
        return drafted(task.items)[0]
    few, many = task.example_items, 4 * task.example_items
    each = (drafted(many)[1] - drafted(few)[1]) / (many - few)
    items = max(few, many + int((room - drafted(many)[1]) / each))
    while True:
        draft, used = drafted(items)
        if used <= room or items <= few:
            return draft
        items = max(few, items - 1 - int((used - room) / each))


def _body(
    tokenizer: "PreTrainedTokenizerBase", placed: list[tuple[float, str]], text: Ids, room: int, name: str
) -> Ids:
    """Statements at their shares of as much text as is left."""
    statements = _encoded(tokenizer, [statement for _, statement in placed])
    filler = room - sum(map(len, statements))
    if filler < 0:
        raise SpecError(
            f"task {name} must fit, but its statements, questions and examples are {-filler} tokens too long. "
            "Ask for longer sequences or fewer examples."
        )
    ids, done = [], 0
    for (share, _), statement in zip(placed, statements, strict=True):
        upto = int(share * filler)
        ids += [text[done:upto], statement]
        done = upto
    return np.concatenate([*ids, text[done:filler]])


def _joined(head: list[Ids], tail: list[_Answered], around: Glue, length: int, name: str) -> TaskSample:
    ids, segments = list(head), []
    accepted: dict[int, list[int]] = {}
    answer = [np.zeros(len(part), dtype=bool) for part in head]
    for number, part in enumerate(tail):
        if number:
            ids.append(around.to_question)
            answer.append(np.zeros(len(around.to_question), dtype=bool))
        at = sum(map(len, ids))
        accepted |= {at + place: tokens for place, tokens in part.accepted.items()}
        segments.append(Segment(at + part.segment.start, at + part.segment.stop, part.segment.answers))
        ids.append(part.ids)
        answer.append(part.answer)
    table = torch.full((length, max(map(len, accepted.values()), default=1)), -1, dtype=torch.long)
    for place, tokens in accepted.items():
        table[place, : len(tokens)] = torch.tensor(tokens)
    sample = Sample(torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(answer)), name, name)
    return TaskSample(sample, table, tuple(segments))


def _example(tokenizer: "PreTrainedTokenizerBase", draft: Draft, around: Glue) -> Ids:
    """A worked example: the same kind of sequence without text around its statements."""
    ids = [_opening(tokenizer, draft, around)]
    ids += _encoded(tokenizer, [statement for _, statement in sorted(draft.statements, key=lambda entry: entry[0])])
    for number, part in enumerate(_answered(tokenizer, draft, around)):
        ids += [around.to_question, part.ids] if number else [part.ids]
    return np.concatenate(ids)


def _opening(tokenizer: "PreTrainedTokenizerBase", draft: Draft, around: Glue) -> Ids:
    return encode(tokenizer, draft.instruction + "\n") if around.instructs else np.empty(0, np.int64)


def _answered(tokenizer: "PreTrainedTokenizerBase", draft: Draft, around: Glue) -> Iterator[_Answered]:
    for question in draft.questions:
        if len(around.to_answer):
            asked = np.concatenate([encode(tokenizer, question.ask), around.to_answer])
            yield _values(tokenizer, question, asked, around.before_value(question))
        else:  # one piece of text: cut as the tokenizer would cut it
            yield _values(tokenizer, question, np.empty(0, np.int64), question.ask + around.before_value(question))


def _values(tokenizer: "PreTrainedTokenizerBase", question: Question, asked: Ids, before: str) -> _Answered:
    """The values one after the other, with commas; which first tokens may stand where another value is named."""
    pieces = [
        piece(tokenizer, (before if number == 0 else ",") + " {v}", "", value)
        for number, value in enumerate(question.answers)
    ]
    at, accepted, firsts = len(asked), {}, []
    for part in pieces:
        first = int(part.answer.argmax())
        firsts.append((at + first, int(part.ids[first])))
        at += len(part.ids)
    if question.any_order:
        accepted = {place: [token for _, token in firsts[number:]] for number, (place, _) in enumerate(firsts)}
    nothing = np.zeros(len(asked), dtype=bool)
    return _Answered(
        np.concatenate([asked, *(part.ids for part in pieces)]),
        np.concatenate([nothing, *(part.answer for part in pieces)]),
        accepted,
        Segment(firsts[0][0], at, question.answers),
    )


def _encoded(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[Ids]:
    """Token ids of many texts without special tokens."""
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int64) for ids in found]
