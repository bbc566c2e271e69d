"""Sequences that need retrieval: statements of a key and a value hidden in text, and later questions about them.

Sources: the single- and multi-key needle tasks of Hsieh et al. 2024, RULER, arXiv:2404.06654, section 3.1. Differs: three wordings (heads that
serve one wording need not serve another), and questions may be spread over the text, so that one sequence holds many answers.
"""

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sparsesearch.calibration.samples import Sample
from sparsesearch.calibration.tokens import Ids, Piece, piece, start_tokens, windows
from sparsesearch.errors import SpecError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["spread", "end"]

_ADJECTIVES = (
    "red blue quiet northern broken silver hidden gentle bitter ancient "
    "frozen golden rapid hollow distant narrow crimson steady plain royal"
)
_NOUNS = (
    "harbor garden engine library mountain river castle signal bridge forest market "
    "temple window valley station mirror island tower anchor lantern"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
KEYS = tuple(f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, NOUNS))
_DEEPEST = 0.95  # drawn statements stand before this share of the text, so that a question never follows at once
_WIDE_VALUE = "90817"  # no two digits that a tokenizer is likely to merge


class Template(NamedTuple):
    """A wording; `{k}` is the key, `{v}` the value."""

    statement: str
    question: str


TEMPLATES = {
    "secret_number": Template(
        " The secret number of the {k} is {v}.", " Question: what is the secret number of the {k}? Answer: {v}."
    ),
    "set_get": Template("\nset {k} = {v}\n", "\nget {k} -> {v}\n"),
    "opens_with_code": Template(" Remember that the {k} opens with code {v}.", " The {k} opens with code {v}."),
}


@dataclass(frozen=True)
class NeedleTask:
    """How sequences are made.

    Attributes:
        template: a key of `TEMPLATES`.
        style: `spread` asks about every needle somewhere after its statement; `end` asks `num_questions` at the end, where the last
            value ends the sequence.
        num_needles: statements per sequence, with different keys.
        num_questions: questions in style `end`.
        depth: where the statement asked about last stands in the text before the questions, 0 … 1; None draws it from [0, 0.95), spread
            evenly over the sequences.
    """

    template: str
    style: Style = "end"
    num_needles: int = 8
    num_questions: int = 1
    depth: float | None = None

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise SpecError(f"unknown needle template {self.template!r}.{nearest(self.template, TEMPLATES)}")
        if not 1 <= self.num_needles <= len(KEYS):
            raise SpecError(f"1 <= num_needles <= {len(KEYS)} must hold, but got {self.num_needles}.")
        if not 1 <= self.num_questions <= self.num_needles:
            raise SpecError(f"1 <= num_questions <= num_needles must hold, but got {self.num_questions}.")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise SpecError(f"0 <= depth <= 1 must hold, but got {self.depth}.")


def needles_that_fit(tokenizer: "PreTrainedTokenizerBase", length_tokens: int, most: int) -> int:
    """How many needles, 1 … `most`, surely take less than half of a sequence, questions included."""
    texts = [
        wording.replace("{k}", key).replace("{v}", _WIDE_VALUE)
        for template, key in product(TEMPLATES.values(), KEYS)
        for wording in template
    ]
    lengths = np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])
    longest_pair = int(lengths.reshape(-1, 2).sum(1).max())
    return max(1, min(most, (length_tokens // 2 - len(start_tokens(tokenizer))) // longest_pair))


def needle_samples(
    tokenizer: "PreTrainedTokenizerBase",
    tasks: list[NeedleTask],
    haystack: Ids,
    *,
    length_tokens: int,
    rng: np.random.Generator,
    source: str,
) -> list[Sample]:
    """One sequence per task, each exactly `length_tokens` long, with `haystack` between the needles.

    Raises:
        SpecError: the needles leave less than half of the sequence to text, or the haystack is too short.
    """
    start = start_tokens(tokenizer)
    texts = windows(haystack, length_tokens, len(tasks), rng, source=source)
    # one depth from each of equal stretches: a few sequences already cover the whole text
    drawn = (rng.permutation(len(tasks)) + rng.random(len(tasks))) / len(tasks) * _DEEPEST
    return [
        _sequence(
            tokenizer, task, start, text, float(depth) if task.depth is None else task.depth, rng, f"needle in {source}"
        )
        for task, text, depth in zip(tasks, texts, drawn, strict=True)
    ]


def _sequence(
    tokenizer: "PreTrainedTokenizerBase",
    task: NeedleTask,
    start: Ids,
    text: Ids,
    asked_depth: float,
    rng: np.random.Generator,
    source: str,
) -> Sample:
    """Place statements and questions at shares of the text, then cut the text so that the whole has its length."""
    depths = rng.random(task.num_needles) * _DEEPEST
    depths[-1] = asked_depth
    placed = _place(tokenizer, task, depths, rng)
    used = len(start) + sum(len(part.ids) for _, part in placed)
    body = len(text) - used
    if body < len(text) // 2:
        raise SpecError(
            f"needles may fill at most half of a sequence, but {task.num_needles} of them take {used} of {len(text)} tokens. "
            "Ask for longer sequences or fewer needles."
        )
    ids, answers, done = [start], [np.zeros(len(start), dtype=bool)], 0
    for share, part in placed:
        upto = min(body, int(share * body))
        ids += [text[done:upto], part.ids]
        answers += [np.zeros(upto - done, dtype=bool), part.answer]
        done = upto
    single = task.style == "end" and task.num_questions == 1
    return Sample(
        torch.from_numpy(np.concatenate([*ids, text[done:body]])),
        torch.from_numpy(np.concatenate([*answers, np.zeros(body - done, dtype=bool)])),
        source,
        task.template,
        asked_depth if single else None,
    )


def _place(
    tokenizer: "PreTrainedTokenizerBase", task: NeedleTask, depths: NDArray[np.float64], rng: np.random.Generator
) -> list[tuple[float, Piece]]:
    """Statements at `depths` and their questions, as (share of the text that comes before, tokens), in order of the text."""
    statement, question = TEMPLATES[task.template]
    keys = [KEYS[index] for index in rng.choice(len(KEYS), task.num_needles, replace=False)]
    placed = []
    for number, (key, depth) in enumerate(zip(keys, depths, strict=True)):
        value = "".join(str(digit) for digit in rng.integers(0, 10, 5))
        placed.append((float(depth), piece(tokenizer, statement, key, value).without_answer()))
        last = number == task.num_needles - 1
        if task.style == "spread":
            asked_at = float(depth + (1 - depth) * rng.random())
            placed.append((asked_at, piece(tokenizer, question, key, value)))
        elif number >= task.num_needles - task.num_questions:
            wording = question.partition("{v}")[0] + "{v}" if last else question
            placed.append((1.0 + number, piece(tokenizer, wording, key, value)))
    return sorted(placed, key=lambda entry: entry[0])
