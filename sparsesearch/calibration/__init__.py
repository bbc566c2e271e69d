"""Calibration and evaluation data: token sequences of one length, made from a spec, a seed, and the model's own tokenizer."""

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparsesearch.calibration.context import check_context
from sparsesearch.calibration.needle import TEMPLATES, NeedleTask, Style, needle_samples, needles_that_fit
from sparsesearch.calibration.samples import Calibration, Sample, Split
from sparsesearch.calibration.sources import BUILT_IN, documents
from sparsesearch.calibration.tasks import parsed_spec, task_samples
from sparsesearch.calibration.tokens import Ids, start_tokens, stream, windows
from sparsesearch.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BUILT_IN",
    "NUM_NEEDLES",
    "TEMPLATES",
    "Calibration",
    "NeedleTask",
    "Sample",
    "Split",
    "check_context",
    "load",
    "needle_questions",
    "needles_that_fit",
]

NUM_NEEDLES = 8
"""Statements in a needle sequence that is long enough for them."""
_CALIBRATION_QUESTIONS = 4
_STREAM_WINDOWS = 64  # read no more of a hub dataset than gives every sequence its own stretch


def load(
    spec: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length_tokens: int,
    num_samples: int,
    seed: int,
    split: Split = "calibration",
    text_column: str = "text",
) -> Calibration:
    """Make `num_samples` sequences of exactly `length_tokens` tokens.

    Specs: `needle` (three wordings in turn; three sequences with the questions spread over the text, three with questions at the end, and so
    on; 8 needles, fewer where they would not fit), `needle:FILE` (the same in the text of a file), `text` (shipped documentation), a local
    `.jsonl`, `.txt` or `.parquet` file, a hub dataset `name:config:split`, or `tasks:NAMES:FORMAT`, long-context tasks in turn
    (`calibration.tasks`). Several of these separated by `;` take turns. Same arguments, same tokens.

    Raises:
        SpecError: unknown spec, too little text for the length, or an extra is not installed.
        ArtifactError: a file is missing, empty, not UTF-8 or damaged.
    """
    if ";" in spec:
        each = -(-num_samples // len(spec.split(";")))
        loaded = [
            load(part.strip(), tokenizer, length_tokens=length_tokens, num_samples=each, seed=seed, split=split, text_column=text_column).samples
            for part in spec.split(";")
        ]  # fmt: skip
        turns = tuple(sample for turn in zip(*loaded, strict=True) for sample in turn)[:num_samples]
        return Calibration(turns, _described(spec, split, num_samples, length_tokens, seed))
    rng = _generator(length_tokens, num_samples, seed, split)
    if spec.startswith("tasks:"):
        in_turn = _tasks(tokenizer, spec, length_tokens, num_samples, seed, split)
        return Calibration(in_turn, _described(spec, split, num_samples, length_tokens, seed))
    needles = spec == "needle" or spec.startswith("needle:")
    source = (spec.removeprefix("needle").removeprefix(":") or "text") if needles else spec
    text = _text(tokenizer, source, split, text_column, num_tokens=length_tokens * max(num_samples, _STREAM_WINDOWS))
    if needles:
        count = needles_that_fit(tokenizer, length_tokens, NUM_NEEDLES)
        styles: tuple[Style, ...] = ("spread", "end")
        menu = [
            NeedleTask(template, style, count, min(count, _CALIBRATION_QUESTIONS))
            for style, template in product(styles, TEMPLATES)
        ]
        tasks = [menu[index % len(menu)] for index in range(num_samples)]
        samples = needle_samples(tokenizer, tasks, text, length_tokens=length_tokens, rng=rng, source=source)
    else:
        samples = _plain(tokenizer, text, length_tokens, num_samples, rng, source)
    return Calibration(tuple(samples), _described(spec, split, num_samples, length_tokens, seed))


def _described(spec: str, split: Split, num_samples: int, length_tokens: int, seed: int) -> str:
    return f"{spec}, {split}, {num_samples} x {length_tokens} tokens, seed {seed}"


def needle_questions(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length_tokens: int,
    num_samples: int,
    template: str,
    depth: float | None = None,
    num_needles: int = 8,
    seed: int,
    split: Split = "heldout",
    source: str = "text",
) -> Calibration:
    """Sequences for judging: one question at the end about one of `num_needles` statements; the last tokens are its five-digit value.

    Args:
        tokenizer: the model's.
        length_tokens: of every sequence, answer included.
        num_samples: how many sequences.
        template: a key of `TEMPLATES`.
        depth: where the statement asked about stands, 0 (start) … 1 (just before the question); None draws it anew for each sequence.
        num_needles: statements, with different keys.
        seed: of text, keys, values and places.
        split: which part of the text.
        source: where the text comes from, as in `load`.

    Raises:
        SpecError: unknown template, or the needles do not fit.
    """
    rng = _generator(
        length_tokens, num_samples, seed, split, list(TEMPLATES).index(template) if template in TEMPLATES else 0
    )
    task = NeedleTask(template, "end", num_needles, depth=depth)
    text = _text(tokenizer, source, split, "text", num_tokens=length_tokens * max(num_samples, _STREAM_WINDOWS))
    samples = needle_samples(tokenizer, [task] * num_samples, text, length_tokens=length_tokens, rng=rng, source=source)
    where = "" if depth is None else f" at depth {depth:g}"
    return Calibration(
        tuple(samples), f"{template}{where} in {source}, {split}, {num_samples} x {length_tokens} tokens, seed {seed}"
    )


def _tasks(
    tokenizer: "PreTrainedTokenizerBase", spec: str, length: int, count: int, seed: int, split: Split
) -> tuple[Sample, ...]:
    names, form = parsed_spec(spec)
    each = -(-count // len(names))
    drawn = [
        task_samples(tokenizer, name, length_tokens=length, num_samples=each, seed=seed, split=split, format=form)
        for name in names
    ]
    return tuple(one.sample for several in zip(*drawn, strict=True) for one in several)[:count]


def _plain(
    tokenizer: "PreTrainedTokenizerBase", text: Ids, length: int, count: int, rng: np.random.Generator, source: str
) -> list[Sample]:
    start = start_tokens(tokenizer)
    return [
        Sample(torch.from_numpy(np.concatenate([start, window])), torch.zeros(length, dtype=torch.bool), source)
        for window in windows(text, length - len(start), count, rng, source=source)
    ]


def _text(tokenizer: "PreTrainedTokenizerBase", source: str, split: Split, column: str, *, num_tokens: int) -> Ids:
    return stream(tokenizer, documents(source, split, text_column=column), enough_tokens=num_tokens)


def _generator(length_tokens: int, num_samples: int, seed: int, split: Split, *more: int) -> np.random.Generator:
    """A stream of random numbers per (seed, split, length, …): splits and lengths do not share needles."""
    if length_tokens < 2 or num_samples < 1:
        raise SpecError(
            f"length_tokens >= 2 and num_samples >= 1 must hold, but got {length_tokens} and {num_samples}."
        )
    return np.random.default_rng([seed, split == "heldout", length_tokens, *more])
