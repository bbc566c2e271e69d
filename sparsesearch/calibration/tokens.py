"""Text to tokens: a stream of documents, windows of it, and the pieces of a sentence with one value in it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsesearch.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int64]


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> Ids:
    """Token ids without special tokens."""
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def start_tokens(tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """What the tokenizer puts before every text (the BOS token of most models), or nothing."""
    with_special, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    at = next(i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
    return np.asarray(with_special[:at], dtype=np.int64)


def stream(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str], *, enough_tokens: int) -> Ids:
    """Documents one after the other, a blank line between, until `enough_tokens` are there or no document is left."""
    parts: list[Ids] = []
    gap, total = encode(tokenizer, "\n\n"), 0
    for text in texts:
        parts += [encode(tokenizer, text), gap]
        total += len(parts[-2]) + len(gap)
        if total >= enough_tokens:
            break
    return np.concatenate([np.empty(0, np.int64), *parts[:-1]])


def windows(tokens: Ids, length: int, count: int, rng: np.random.Generator, *, source: str) -> list[Ids]:
    """`count` windows of `length` tokens: one from each of `count` equal stretches, at a random place, in random order.

    Raises:
        SpecError: the text is shorter than one window.
    """
    room = len(tokens) - length
    if room < 0:
        raise SpecError(
            f"{source} must hold at least {length} tokens for sequences this long, but this split of it holds {len(tokens)}. "
            "Give more text or a smaller length."
        )
    starts = ((np.arange(count) + rng.random(count)) / count * (room + 1)).astype(np.int64)
    return [tokens[start : start + length] for start in rng.permutation(starts)]


@dataclass(frozen=True)
class Piece:
    """A sentence in tokens; `answer` marks those that the value's characters touch."""

    ids: Ids
    answer: NDArray[np.bool_]

    def without_answer(self) -> "Piece":
        """The same tokens with nothing to answer: a statement."""
        return Piece(self.ids, np.zeros_like(self.answer))


def piece(tokenizer: "PreTrainedTokenizerBase", wording: str, key: str, value: str) -> Piece:
    """Tokenize a wording with its `{k}` and `{v}` filled in, in one go as the tokenizer itself would, and mark the value by its characters.

    Raises:
        SpecError: the tokenizer cannot tell which characters a token stands for, or glues the value to other text than a space.
    """
    if not tokenizer.is_fast:
        raise SpecError(
            f"built-in needles need a tokenizer that reports character offsets, but {type(tokenizer).__name__} does not; "
            "give `text` or a file as calibration."
        )
    before, _, after = wording.replace("{k}", key).partition("{v}")
    text = before + value + after
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
    answer = [start < len(before) + len(value) and end > len(before) for start, end in spans]
    cut = [text[start:end] for (start, end), mark in zip(spans, answer, strict=True) if mark]
    if "".join(cut).strip() != value:
        raise SpecError(f"the tokenizer must keep the value {value!r} apart from the text around it, but cut {cut}.")
    return Piece(np.asarray(encoded["input_ids"], dtype=np.int64), np.asarray(answer))
