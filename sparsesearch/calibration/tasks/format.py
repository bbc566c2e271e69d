"""How a task is put to a model: what stands around texts, questions and answers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparsesearch.calibration.tasks.draft import Question
from sparsesearch.calibration.tokens import Ids, encode, start_tokens
from sparsesearch.errors import SpecError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["completion", "sentence", "chat"]
FORMATS: dict[str, str] = {
    "completion": "question, `Answer:`, value; no instruction (what needle-7m was trained on)",
    "sentence": "instruction, text, question, and an answer that begins as a sentence",
    "chat": "the tokenizer's chat template, with the answer begun as a sentence in the assistant's turn",
}
_USER, _ASSISTANT, _AGAIN = "\u2402first\u2403", "\u2402second\u2403", "\u2402third\u2403"


@dataclass(frozen=True)
class Glue:
    """Tokens between the parts of a sequence.

    Attributes:
        start: before everything.
        to_answer: between a question and its answer.
        to_question: between an answer and the next question.
        instructs: whether instructions are given.
        sentences: whether an answer begins with the question's `lead`.
    """

    start: Ids
    to_answer: Ids
    to_question: Ids
    instructs: bool
    sentences: bool

    def before_value(self, question: Question) -> str:
        """The text between what `to_answer` ends and the first value."""
        return question.lead if self.sentences else question.cue


def glue(tokenizer: "PreTrainedTokenizerBase", name: str) -> Glue:
    """What a format puts between parts, in a model's own tokens.

    Raises:
        SpecError: unknown format, or the tokenizer has no chat template that takes turns.
    """
    nothing = np.empty(0, np.int64)
    match name:
        case "completion":
            return Glue(start_tokens(tokenizer), nothing, encode(tokenizer, "."), instructs=False, sentences=False)
        case "sentence":
            answer = encode(tokenizer, " Answer:")
            return Glue(start_tokens(tokenizer), answer, encode(tokenizer, ".\n\n"), instructs=True, sentences=True)
        case "chat":
            return _chat(tokenizer)
    raise SpecError(f"unknown format {name!r}.{nearest(name, FORMATS)}")


def _chat(tokenizer: "PreTrainedTokenizerBase") -> Glue:
    """Cut the chat template at placeholders for what people say."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise SpecError(
            "format chat needs a tokenizer with a chat template, but this one has none. Pass --format sentence or completion."
        )
    turns = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ASSISTANT},
        {"role": "user", "content": _AGAIN},
    ]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    before, _, rest = text.partition(_USER)
    to_answer, _, rest = rest.partition(_ASSISTANT)
    to_question, found, _ = rest.partition(_AGAIN)
    if not found:
        raise SpecError(
            "format chat needs a template that shows user, assistant and user turns in order, but this one drops some. "
            "Pass --format sentence."
        )
    return Glue(
        encode(tokenizer, before),
        encode(tokenizer, to_answer),
        encode(tokenizer, to_question),
        instructs=True,
        sentences=True,
    )
