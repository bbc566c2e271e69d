"""A mean over independent sequences, with its standard error."""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field


class Estimate(BaseModel):
    """A mean over independent sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    mean: float
    standard_error: float = Field(ge=0, description="of the mean, over sequences")
    num_sequences: int = Field(ge=1)

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate | None":
        """Mean and s/√n of one value per sequence; NaN values (nothing to count there) are left out; None when nothing is left."""
        counted = [value for value in values if not math.isnan(value)]
        if not counted:
            return None
        mean = math.fsum(counted) / len(counted)
        spread = math.fsum((value - mean) ** 2 for value in counted) / max(1, len(counted) - 1)
        return cls(mean=mean, standard_error=math.sqrt(spread / len(counted)), num_sequences=len(counted))

    @classmethod
    def of_share(cls, hits: Sequence[float]) -> "Estimate | None":
        """Like `of` for values 0 or 1. The error is Agresti and Coull's (1998, The American Statistician 52:119), which is not 0 at 0 or 1."""
        plain = cls.of(hits)
        if plain is None:
            return None
        trials = plain.num_sequences + 4
        share = (plain.mean * plain.num_sequences + 2) / trials
        return plain.model_copy(update={"standard_error": math.sqrt(share * (1 - share) / trials)})
