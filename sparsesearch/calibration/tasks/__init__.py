"""Long-context tasks, made offline in a model's own tokens: retrieval, tracking, aggregation. One registry of tasks, one of suites.

Source: the tasks of Hsieh et al. 2024, RULER, arXiv:2404.06654; each file says how it differs.
"""

from typing import TYPE_CHECKING, cast

import numpy as np

from sparsesearch.calibration.samples import Split
from sparsesearch.calibration.sources import documents
from sparsesearch.calibration.tasks import aggregation, retrieval, tracking
from sparsesearch.calibration.tasks.compose import Segment, TaskSample, compose
from sparsesearch.calibration.tasks.draft import Draft, Question, Task
from sparsesearch.calibration.tasks.format import FORMATS, Format, glue
from sparsesearch.calibration.tokens import Ids, stream, windows
from sparsesearch.errors import SpecError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FORMATS",
    "SUITES",
    "TASKS",
    "Draft",
    "Format",
    "Question",
    "Segment",
    "Task",
    "TaskSample",
    "parsed_spec",
    "task_names",
    "task_samples",
    "task_text",
]

TASKS = {task.name: task for task in (*retrieval.TASKS, *tracking.TASKS, *aggregation.TASKS)}
SUITES = {
    "ruler": tuple(TASKS),
    "retrieval": tuple(task.name for task in retrieval.TASKS),
    "aggregation": tuple(task.name for task in (*tracking.TASKS, *aggregation.TASKS)),
}
_STREAM_WINDOWS = 64


def task_names(text: str) -> tuple[str, ...]:
    """A suite, a task, or several of both with commas, as the names of tasks in the registry's order.

    Raises:
        SpecError: an unknown name.
    """
    wanted: set[str] = set()
    for name in (part.strip() for part in text.split(",") if part.strip()):
        if name not in SUITES and name not in TASKS:
            raise SpecError(
                f"unknown task or suite {name!r} ({', '.join(SUITES)} are suites).{nearest(name, [*SUITES, *TASKS])}"
            )
        wanted |= set(SUITES.get(name, (name,)))
    if not wanted:
        raise SpecError(f"at least one task must be named; suites: {', '.join(SUITES)}; tasks: {', '.join(TASKS)}.")
    return tuple(name for name in TASKS if name in wanted)


def parsed_spec(spec: str) -> tuple[tuple[str, ...], Format]:
    """`tasks:NAMES` or `tasks:NAMES:FORMAT` as names of tasks and a format, `completion` by default.

    Raises:
        SpecError: an unknown name or format.
    """
    _, names, *form = spec.split(":", 2)
    chosen = form[0] if form else "completion"
    if chosen not in FORMATS:
        raise SpecError(f"unknown format {chosen!r}.{nearest(chosen, FORMATS)}")
    return task_names(names), cast(Format, chosen)


def task_text(tokenizer: "PreTrainedTokenizerBase", split: Split, length_tokens: int) -> Ids:
    """Tokens of the shipped documentation, enough for different windows of `length_tokens`; repeated where it is shorter than two of them."""
    text = stream(tokenizer, documents("text", split), enough_tokens=length_tokens * _STREAM_WINDOWS)
    return np.tile(text, max(1, -(-2 * length_tokens // len(text))))


def task_samples(
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    *,
    length_tokens: int,
    num_samples: int,
    seed: int,
    split: Split = "heldout",
    format: Format = "completion",
    shots: int = 0,
    text: Ids | None = None,
) -> tuple[TaskSample, ...]:
    """Sequences of one task, each exactly `length_tokens` long; the last token ends the last answer. Same arguments, same tokens.

    Args:
        tokenizer: the model's.
        name: a key of `TASKS`.
        length_tokens: of every sequence.
        num_samples: how many.
        seed: of keys, values, places and text.
        split: which part of the text, and another stream of random numbers.
        format: a key of `FORMATS`.
        shots: worked examples before the task.
        text: what `task_text` gave for this split; so that several tasks read it once.

    Raises:
        SpecError: unknown task or format, too little text, or the task does not fit the length.
    """
    task, around = TASKS[task_names(name)[0]], glue(tokenizer, format)
    seeds = [seed, split == "heldout", length_tokens, list(TASKS).index(task.name)]
    text = task_text(tokenizer, split, length_tokens) if text is None else text
    texts = windows(text, length_tokens, num_samples, np.random.default_rng([*seeds, 0]), source="the shipped text")
    return tuple(
        compose(tokenizer, task, around, one, length_tokens=length_tokens, shots=shots, seeds=[*seeds, 1 + index])
        for index, one in enumerate(texts)
    )
