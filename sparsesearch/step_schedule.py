"""Which assignments hold at which denoising steps, written small: 72,000 decisions (50 steps, 60 layers, 24 heads) fit in half a megabyte."""

from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from sparsesearch.errors import SpecError

Assignments = dict[str, tuple[str, ...]]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepRange(_Frozen):
    """Steps first … end - 1. `choices[module]` holds one number per query head: an index into the schedule's `rules`.

    A module that is not named is dense in these steps.
    """

    first: int = Field(ge=0)
    end: int = Field(ge=1, description="one past the last step")
    choices: dict[str, str] = Field(description="module -> indices of rules, separated by blanks, in head order")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.first >= self.end:
            raise ValueError(f"a step range must have first < end, but has {self.first} and {self.end}")
        return self


class StepSchedule(_Frozen):
    """Ranges of a trajectory of `num_steps` steps; outside them the plan's own assignments hold.

    A trajectory with another number of steps is mapped by its share: step i of n is step ⌊(i + 1/2)·num_steps/n⌋ here.
    """

    num_steps: int = Field(ge=1)
    rules: tuple[str, ...] = Field(description="names in the plan's `rules`")
    ranges: tuple[StepRange, ...] = Field(description="ascending and disjoint")
    refresh: tuple[int, ...] = Field(
        (),
        description="steps at which rules that need queries and keys choose again; in between their tiles stay. Empty: at every step",
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        ends = [0, *(item.end for item in self.ranges)]
        if any(item.first < end for item, end in zip(self.ranges, ends, strict=False)) or ends[-1] > self.num_steps:
            shown = ", ".join(f"{item.first}-{item.end}" for item in self.ranges)
            raise ValueError(f"ranges must ascend without overlap and end by step {self.num_steps}, but are {shown}")
        if list(self.refresh) != sorted({step for step in self.refresh if 0 <= step < self.num_steps}):
            raise ValueError(
                f"refresh must hold ascending steps below {self.num_steps}, but is {', '.join(map(str, self.refresh))}"
            )
        for item in self.ranges:
            for module, codes in item.choices.items():
                wrong = [c for c in codes.split() if not c.isdecimal() or int(c) >= len(self.rules)]
                if wrong:
                    raise ValueError(f"{module} must name rules 0 to {len(self.rules) - 1}, but names {wrong[0]!r}")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_refresh(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        content: dict[str, object] = handler(self)
        if not self.refresh:
            content.pop("refresh", None)
        return content

    @classmethod
    def of(
        cls, num_steps: int, ranges: Sequence[tuple[int, int, Mapping[str, Sequence[str]]]], refresh: Sequence[int] = ()
    ) -> Self:
        """Make a schedule of (first, end, assignments) triples."""
        names = sorted({name for *_, table in ranges for heads in table.values() for name in heads})
        code = {name: str(index) for index, name in enumerate(names)}
        written = tuple(
            StepRange(
                first=first, end=end, choices={m: " ".join(code[name] for name in heads) for m, heads in table.items()}
            )
            for first, end, table in ranges
        )
        return cls(num_steps=num_steps, rules=tuple(names), ranges=written, refresh=tuple(refresh))

    def step(self, index: int, num_steps: int | None = None) -> int:
        """The step here of step `index` of a trajectory of `num_steps` steps.

        Raises:
            SpecError: there is no such step.
        """
        count = self.num_steps if num_steps is None else num_steps
        if not 0 <= index < count:
            raise SpecError(f"a step must lie in 0 to {count - 1}, but is {index}.")
        return (2 * index + 1) * self.num_steps // (2 * count)

    def range_index(self, index: int, num_steps: int | None = None) -> int | None:
        """Which range holds a step; None outside all of them. Equal answers mean equal assignments."""
        step = self.step(index, num_steps)
        return next((place for place, item in enumerate(self.ranges) if item.first <= step < item.end), None)

    def assignments(self, range_index: int) -> Assignments:
        """Rule names per module of one range."""
        choices = self.ranges[range_index].choices
        return {module: tuple(self.rules[int(code)] for code in codes.split()) for module, codes in choices.items()}

    def refreshes(self, index: int, num_steps: int | None = None) -> bool:
        """Whether dynamic rules choose anew at this step: at the first step that reaches or passes a refresh step, or always."""
        step = self.step(index, num_steps)
        if not self.refresh or index == 0:
            return True
        before = self.step(index - 1, num_steps)
        return any(before < refresh <= step for refresh in self.refresh)
