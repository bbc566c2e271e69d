"""What to profile of a diffusion transformer."""

from dataclasses import dataclass
from typing import Any

from sparsesearch.errors import SpecError
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.profiling.record import provenance_versions
from sparsesearch.search_space import SearchSpace


@dataclass(frozen=True)
class StepsRequest:
    """What to profile.

    Attributes:
        base_model: the transformer.
        space: candidates.
        num_steps: denoising steps that the sampler takes.
        ends: where ranges of steps end, as shares of the run; the last is 1.
        captured_per_range: steps to look at in each range, evenly spaced.
        calibration: a name of the calibration inputs, for the record and for resuming.
        passes: how often the sampler comes to each step: prompts one after another and guidance in calls of its own count each. With more
            than one, what was measured at a step is held in memory until all have come.
        query_blocks: score so many query blocks, evenly spaced, instead of all; for sequences of 100,000 tokens.
    """

    base_model: BaseModelInfo
    space: SearchSpace
    num_steps: int
    ends: tuple[float, ...] = (0.2, 0.5, 1.0)
    captured_per_range: int = 2
    calibration: str = "unnamed"
    passes: int = 1
    query_blocks: int | None = None

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First and end step of each range."""
        ends = [round(share * self.num_steps) for share in self.ends]
        if sorted(set(ends)) != ends or ends[0] < 1 or ends[-1] != self.num_steps:
            raise SpecError(
                f"ends must ascend to 1 with a step in every range, but are {self.ends} of {self.num_steps}."
            )
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def captured(self) -> tuple[tuple[int, ...], ...]:
        """Steps to look at, per range."""
        count = self.captured_per_range
        return tuple(
            tuple(sorted({first + (2 * i + 1) * (end - first) // (2 * count) for i in range(count)}))
            for first, end in self.ranges
        )

    def fingerprint(self, plan: Plan | None) -> dict[str, Any]:
        """The fields a resumed run must repeat."""
        return {
            "model": self.base_model.model_dump(mode="json", exclude={"name_or_path"}),
            "space": self.space.sha256,
            "captured": [list(steps) for steps in self.captured],
            "num_steps": self.num_steps,
            "calibration": self.calibration,
            "passes": self.passes,
            "query_blocks": self.query_blocks,
            "plan": None if plan is None else plan.sha256,
            "versions": provenance_versions(),
        }
