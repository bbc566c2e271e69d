"""Variable tracking: which variables hold a value that was handed on from one to the next.

Source: Hsieh et al. 2024, RULER, arXiv:2404.06654, section 3.2. Differs: variables are words, and every chain has as many assignments.
"""

import numpy as np

from sparsesearch.calibration.tasks.draft import Draft, Question, Task
from sparsesearch.calibration.tasks.vocabulary import number, words

_CHAINS = 2


def _chains(rng: np.random.Generator, items: int) -> Draft:
    """`items` assignments, in two chains; the first is asked about."""
    length = max(1, items // _CHAINS)
    names, values = words(rng, _CHAINS * length), [number(rng) for _ in range(_CHAINS)]
    chains = [names[chain * length : (chain + 1) * length] for chain in range(_CHAINS)]
    placed = []
    for chain, value in zip(chains, values, strict=True):
        places = np.sort(rng.random(length)) * 0.95
        held = [f"VALUE {value}", *(f"VAR {name}" for name in chain[:-1])]
        placed += [
            (float(place), f"\nVAR {name} = {source}\n")
            for place, name, source in zip(places, chain, held, strict=True)
        ]
    question = Question(
        f" Question: which variables hold the value {values[0]}?",
        f" The variables that hold the value {values[0]} are",
        tuple(chains[0]),
        any_order=True,
    )
    return Draft(
        "Some assignments to variables are hidden in the following text. Follow them.", tuple(placed), (question,)
    )


TASKS = (Task("tracking", "the variables that a value was handed to, in five steps", _chains, 10, 4),)
