"""What a task wants in one sequence, before it is worded for a model and cut into tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Question:
    """One question and what answers it.

    Attributes:
        ask: the question.
        lead: how an answer in a whole sentence begins; the values follow it.
        answers: values, in the order in which the text has them.
        cue: what stands between question and value where no sentence is wanted.
        any_order: the values may be named in any order; each counts once.
    """

    ask: str
    lead: str
    answers: tuple[str, ...]
    cue: str = " Answer:"
    any_order: bool = False


@dataclass(frozen=True)
class Draft:
    """One sequence of a task.

    Attributes:
        instruction: what a reader is told before the text.
        statements: (share of the surrounding text that comes before, statement); equal shares stay in order.
        questions: asked one after the other, after the text.
    """

    instruction: str
    statements: tuple[tuple[float, str], ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Task:
    """How sequences of one kind are made.

    Attributes:
        name: as the command line knows it.
        description: one line for listings.
        make: (random numbers, number of items) -> a draft.
        items: statements per sequence, with documentation text around them; None: as many as fill the sequence.
        example_items: statements of a worked example.
    """

    name: str
    description: str
    make: Callable[[np.random.Generator, int], Draft]
    items: int | None
    example_items: int
