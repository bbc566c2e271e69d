"""Tasks that find what was said: one key among text, among other keys, several values, several questions, a long list of pairs.

Source: Hsieh et al. 2024, RULER, arXiv:2404.06654, section 3.1; pairs: Liu et al. 2024, arXiv:2307.03172, section 3.1. Differs: own wording, keys of two
words, numbers of five digits; the text around is documentation.
"""

import numpy as np

from sparsesearch.calibration.tasks.draft import Draft, Question, Task
from sparsesearch.calibration.tasks.vocabulary import keys, number, words

_NUMBERS = "Some secret numbers are hidden in the following text. Remember them."
_DEEPEST = 0.95


def _places(rng: np.random.Generator, count: int) -> list[float]:
    return [float(place) for place in rng.random(count) * _DEEPEST]


def _stated(key: str, value: str) -> str:
    return f" The secret number of the {key} is {value}."


def _asked(key: str, value: str) -> Question:
    return Question(
        f" Question: what is the secret number of the {key}?", f" The secret number of the {key} is", (value,)
    )


def _one_of(rng: np.random.Generator, items: int) -> Draft:
    names, values = keys(rng, items), [number(rng) for _ in range(items)]
    statements = [_stated(key, value) for key, value in zip(names, values, strict=True)]
    asked = int(rng.integers(items))
    return Draft(
        _NUMBERS,
        tuple(zip(_places(rng, items), statements, strict=True)),
        (_asked(names[asked], values[asked]),),
    )


def _word_of_one(rng: np.random.Generator, items: int) -> Draft:
    names, values = keys(rng, items), words(rng, items)
    statements = [f" The secret word of the {key} is {value}." for key, value in zip(names, values, strict=True)]
    asked = int(rng.integers(items))
    question = Question(
        f" Question: what is the secret word of the {names[asked]}?",
        f" The secret word of the {names[asked]} is",
        (values[asked],),
    )
    placed = tuple(zip(_places(rng, items), statements, strict=True))
    return Draft("Some secret words are hidden in the following text. Remember them.", placed, (question,))


def _several_values(rng: np.random.Generator, items: int) -> Draft:
    *others, key = keys(rng, max(2, items // 2))
    values = [number(rng) for _ in range(items)]
    owners = [key] * (items - len(others)) + others
    placed = sorted(zip(_places(rng, items), owners, values, strict=True))
    answers = tuple(value for _, owner, value in placed if owner == key)
    question = Question(
        f" Question: what are all the secret numbers of the {key}?",
        f" The secret numbers of the {key} are",
        answers,
        any_order=True,
    )
    return Draft(_NUMBERS, tuple((place, _stated(owner, value)) for place, owner, value in placed), (question,))


def _several_questions(rng: np.random.Generator, items: int) -> Draft:
    names, values = keys(rng, items), [number(rng) for _ in range(items)]
    statements = [_stated(key, value) for key, value in zip(names, values, strict=True)]
    asked = rng.permutation(items)[: max(1, items // 2)]
    return Draft(
        _NUMBERS,
        tuple(zip(_places(rng, items), statements, strict=True)),
        tuple(_asked(names[index], values[index]) for index in asked),
    )


def _all_lines(rng: np.random.Generator, items: int) -> Draft:
    names, values = keys(rng, items), [number(rng) for _ in range(items)]
    asked = int(rng.integers(items))
    statements = tuple((1.0, _stated(key, value)) for key, value in zip(names, values, strict=True))
    return Draft(_NUMBERS, statements, (_asked(names[asked], values[asked]),))


def _pairs(rng: np.random.Generator, items: int) -> Draft:
    names, values = keys(rng, items), [number(rng) for _ in range(items)]
    asked = int(rng.integers(items))
    statements = tuple((1.0, f"\nset {key} = {value}\n") for key, value in zip(names, values, strict=True))
    question = Question(f"\nget {names[asked]}", f"\nset {names[asked]} =", (values[asked],), cue=" ->")
    return Draft("Each of the following lines sets a key to a value. Remember them.", statements, (question,))


TASKS = (
    Task("needle", "one secret number in text", _one_of, 1, 1),
    Task("needle_word", "one secret word in text", _word_of_one, 1, 1),
    Task("multikey", "one of eight secret numbers in text", _one_of, 8, 2),
    Task("multikey_word", "one of eight secret words in text", _word_of_one, 8, 2),
    Task("multikey_lines", "one secret number among as many as fit", _all_lines, None, 4),
    Task("multivalue", "all the secret numbers of one key", _several_values, 8, 4),
    Task("multiquery", "four questions about eight secret numbers in text", _several_questions, 8, 4),
    Task("kv_recall", "the value of one key of a list that fills the sequence", _pairs, None, 4),
)
