"""What a suite of long-context tasks found: every task by itself, because a mean hides the one that collapsed."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sparsesearch.evaluate.estimate import Estimate

SAYS_LITTLE_BELOW = 0.5
"""A task that dense attention itself answers less often than this says little about a plan."""


class SuiteSpec(BaseModel):
    """Which tasks are judged, and how; the same spec, the same sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tasks: tuple[str, ...] = Field(min_length=1, description="names of calibration.tasks.TASKS")
    format: Literal["completion", "sentence", "chat"] = "completion"
    shots: int = Field(0, ge=0, description="worked examples before each task")
    num_sequences: int = Field(24, ge=1, description="per task and length")
    seed: int = Field(0, ge=0)
    split: Literal["calibration", "heldout"] = "heldout"
    generate: bool = Field(False, description="also let the model generate its answers, through the runtime's caches")


class TaskMetrics(BaseModel):
    """One variant on one task at one length; `*_minus_dense` are paired over the same sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    accuracy: Estimate = Field(description="share of the values answered exactly, teacher forced")
    accuracy_minus_dense: Estimate
    retention: float | None = Field(description="accuracy / dense's; None where dense answers nothing")
    retention_error: float | None = Field(description="standard error of retention, paired")
    kl_answer: Estimate = Field(description="KL(dense ‖ variant) at the positions that predict answers, nats")
    generated: Estimate | None = Field(None, description="share of the values that generated text names")
    generated_minus_dense: Estimate | None = None

    @classmethod
    def of(
        cls,
        right: Sequence[float],
        dense: Sequence[float],
        kl: Sequence[float],
        generated: Sequence[float] | None = None,
        dense_generated: Sequence[float] | None = None,
    ) -> "TaskMetrics":
        """Means and errors of one number per sequence."""
        share, error = retention(right, dense)
        return cls.model_validate(
            {
                "accuracy": Estimate.of_share(right),
                "accuracy_minus_dense": Estimate.of(_differences(right, dense)),
                "retention": share,
                "retention_error": error,
                "kl_answer": Estimate.of(kl),
                "generated": None if generated is None else Estimate.of_share(generated),
                "generated_minus_dense": None
                if generated is None or dense_generated is None
                else Estimate.of(_differences(generated, dense_generated)),
            }
        )


TaskTable = dict[int, dict[str, dict[str, TaskMetrics]]]
"""Length in tokens -> task -> variant -> what was found."""


def retention(right: Sequence[float], dense: Sequence[float]) -> tuple[float | None, float | None]:
    """Ratio of the means of paired values, and its standard error by the delta method: √(Σ (a - r·b)² / (n (n - 1))) / mean b."""
    count, whole = len(dense), math.fsum(dense)
    if whole == 0:
        return None, None
    share = math.fsum(right) / whole
    spread = math.fsum((a - share * b) ** 2 for a, b in zip(right, dense, strict=True))
    return share, math.sqrt(spread / (count * max(1, count - 1))) / (whole / count)


def _differences(values: Sequence[float], dense: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, dense, strict=True)]
