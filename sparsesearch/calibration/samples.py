"""What every stage that needs data receives: token sequences of one length, with the answers marked."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool, Int64
from torch import Tensor

from sparsesearch.artifacts import sha256_text
from sparsesearch.errors import SpecError

Split = Literal["calibration", "heldout"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence.

    Attributes:
        input_ids: its S tokens.
        answer_mask: the tokens that are an answer: a model that retrieves predicts token i from position i - 1. All False in plain text.
        source: where it comes from, for people.
        template: how its questions are worded; None in plain text.
        depth: where the statement that the last question asks about stands, 0 (start) to 1 (end); None unless the sequence ends with its
            only question.
    """

    input_ids: Int64[Tensor, " S"]
    answer_mask: Bool[Tensor, " S"] = field(repr=False)
    source: str
    template: str | None = None
    depth: float | None = None

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.answer_mask.shape or self.input_ids.ndim != 1:
            raise SpecError(
                "input_ids and answer_mask must be vectors of equal length, but have shapes "
                f"{tuple(self.input_ids.shape)} and {tuple(self.answer_mask.shape)}."
            )
        if self.answer_mask[:1].any():
            raise SpecError("token 0 cannot be an answer: no position predicts it.")

    @property
    def sha256(self) -> str:
        """Digest of tokens, answers, wording and depth."""
        digest = hashlib.sha256(f"{self.template}|{self.depth}|".encode())
        digest.update(self.input_ids.numpy().tobytes())
        digest.update(self.answer_mask.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Calibration:
    """A set of sequences of one length.

    Attributes:
        samples: at least one.
        description: the spec, split, length and seed it was made from.
    """

    samples: tuple[Sample, ...]
    description: str

    def __post_init__(self) -> None:
        if not self.samples:
            raise SpecError("a calibration must hold at least one sequence; ask for num_samples >= 1.")
        if len({len(sample.input_ids) for sample in self.samples}) != 1:
            raise SpecError("all sequences of one calibration must have the same length; load one per length.")

    @property
    def id(self) -> str:
        """SHA-256 of the content: equal data, equal id."""
        return sha256_text("\n".join(sample.sha256 for sample in self.samples))

    @property
    def length_tokens(self) -> int:
        """S: the length of every sequence."""
        return len(self.samples[0].input_ids)

    @property
    def num_answers(self) -> int:
        """Answer tokens of all sequences together."""
        return int(sum(int(sample.answer_mask.sum()) for sample in self.samples))
