"""Words that tasks draw from: keys, values, variables, lists."""

from itertools import product

import numpy as np

from sparsesearch.calibration.needle import ADJECTIVES, NOUNS

_WORDS = (
    "acorn apple arrow basket beach berry blanket boat bottle branch bread brick broom brush bucket button cabin cable "
    "camel candle canyon carpet carrot chain chair cherry circle cloud coast coin copper corner cotton cradle crown curtain "
    "desert diamond dragon drum eagle engine falcon farmer feather fence ferry field finger flame flower forest fountain "
    "glass glove grape grass hammer handle hat helmet hill honey horse hotel island jacket jewel kettle kitchen knife ladder "
    "lake lamp leaf lemon letter lion locket magnet maple marble meadow melon metal mirror monkey moon mountain needle nest "
    "ocean onion orange oven paddle palace paper parrot path peach pearl pencil pepper piano pillow planet plate pocket pond "
    "potato pumpkin rabbit rail raven ribbon ring river road rocket roof rope saddle sail salt sand school shadow shell ship "
    "shoe silk snow soup spider spoon spring stairs star stone storm sugar swan table temple thread ticket tiger tower trail "
    "train tree tunnel turtle valley violin wagon wall water wheat wheel whistle window winter wolf wood yard zebra"
)
WORDS = tuple(_WORDS.split())
KEYS = tuple(f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, dict.fromkeys((*NOUNS, *WORDS))))
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def keys(rng: np.random.Generator, count: int) -> list[str]:
    """Different keys, two words each; past their number they take a number besides."""
    drawn = [KEYS[index] for index in rng.permutation(len(KEYS))[: min(count, len(KEYS))]]
    return drawn + [f"{drawn[index % len(drawn)]} {index // len(drawn) + 1}" for index in range(len(drawn), count)]


def words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of `WORDS`."""
    return [WORDS[index] for index in rng.choice(len(WORDS), count, replace=False)]


def number(rng: np.random.Generator) -> str:
    """Five digits."""
    return "".join(str(digit) for digit in rng.integers(0, 10, 5))


def coined_words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of three syllables that no language has."""
    found: dict[str, None] = {}
    while len(found) < count:
        letters = zip(rng.choice(list(_CONSONANTS), 3), rng.choice(list(_VOWELS), 3), strict=True)
        found["".join(a + b for a, b in letters)] = None
    return list(found)
