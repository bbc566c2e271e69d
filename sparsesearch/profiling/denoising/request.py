"""What to profile of a diffusion transformer."""

from dataclasses import dataclass
from typing import Any, Literal

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
        span: first and end step that this transformer is called at, where it is one of several; `ends` are shares of it. All by default.
        bitmaps: whether calibrated bitmaps are those of their range, or of all captured steps together, so that ranges can be merged later.
    """

    base_model: BaseModelInfo
    space: SearchSpace
    num_steps: int
    ends: tuple[float, ...] = (0.2, 0.5, 1.0)
    captured_per_range: int = 2
    calibration: str = "unnamed"
    passes: int = 1
    query_blocks: int | None = None
    span: tuple[int, int] | None = None
    bitmaps: Literal["range", "run"] = "range"

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First and end step of each range."""
        first, last = self.span or (0, self.num_steps)
        ends = [first + round(share * (last - first)) for share in self.ends]
        if sorted(set(ends)) != ends or ends[0] <= first or ends[-1] != last:
            raise SpecError(
                f"ends must ascend to 1 with a step in every range, but are {self.ends} of the {last - first} steps {first} to {last - 1}."
            )
        return tuple(zip([first, *ends[:-1]], ends, strict=True))

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
            "bitmaps": self.bitmaps,
            "plan": None if plan is None else plan.sha256,
            "versions": provenance_versions(),
        }
