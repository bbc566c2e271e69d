"""Tasks whose answer is spread over the whole text: the words of a list that occur most.

Source: Hsieh et al. 2024, RULER, arXiv:2404.06654, section 3.3. Differs: lists without numbers; a common word occurs ten times as often as another; four
common words, not ten, for small models.
"""

from collections import Counter

import numpy as np

from sparsesearch.calibration.tasks.draft import Draft, Question, Task
from sparsesearch.calibration.tasks.vocabulary import coined_words, words

_COMMON, _TIMES_AS_OFTEN = 4, 10
_MOST_FREQUENT, _COINED, _ZIPF = 3, 40, 2.0


def _common_words(rng: np.random.Generator, items: int) -> Draft:
    """Four words take two thirds of the list; the rest occur a tenth as often each."""
    each = max(2, items // 6)
    drawn = words(rng, _COMMON + max(1, min(100, (items - _COMMON * each) // max(1, each // _TIMES_AS_OFTEN))))
    common, others = drawn[:_COMMON], drawn[_COMMON:]
    listed = common * each + [others[index % len(others)] for index in range(max(0, items - _COMMON * each))]
    question = Question(
        f" Question: which {_COMMON} words occur most often in the list?",
        f" The {_COMMON} words that occur most often in the list are",
        tuple(common),
        any_order=True,
    )
    return _list_of(rng, "Below is a list of words. Remember which occur most often.", listed, question)


def _frequent_words(rng: np.random.Generator, items: int) -> Draft:
    """Coined words with Zipf's frequencies; the three most frequent of this very list are asked for."""
    share = np.arange(1, _COINED + 1) ** -_ZIPF
    counts = np.maximum(np.floor(share / share.sum() * items), 0).astype(int)
    counts[0] += items - counts.sum()
    listed = [word for word, count in zip(coined_words(rng, _COINED), counts, strict=True) for _ in range(count)]
    most = tuple(word for word, _ in Counter(listed).most_common(_MOST_FREQUENT))
    question = Question(
        f" Question: which {len(most)} words occur most often in the list?",
        f" The {len(most)} words that occur most often in the list are",
        most,
        any_order=True,
    )
    return _list_of(rng, "Below is a list of coded words. Remember which occur most often.", listed, question)


def _list_of(rng: np.random.Generator, instruction: str, listed: list[str], question: Question) -> Draft:
    shuffled = [listed[index] for index in rng.permutation(len(listed))]
    return Draft(instruction, tuple((1.0, f" {word},") for word in shuffled), (question,))


TASKS = (
    Task("common_words", "the four words of a list that occur ten times as often as others", _common_words, None, 40),
    Task(
        "frequent_words", "the three most frequent of coined words with Zipf's frequencies", _frequent_words, None, 40
    ),
)
