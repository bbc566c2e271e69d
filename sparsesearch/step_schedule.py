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
    """Steps first … end - 1, of all chunks or of some. `choices[module]` holds one number per query head: an index into the schedule's `rules`.

    A module that is not named is dense in these steps. Chunks are the pieces that a model generates one after another, each in a denoising loop of
    its own: a few frames of an autoregressive video model, a block of a language model.
    """

    first: int = Field(ge=0)
    end: int = Field(ge=1, description="one past the last step")
    choices: dict[str, str] = Field(description="module -> indices of rules, separated by blanks, in head order")
    chunks: tuple[int, int | None] | None = Field(
        None, description="first chunk and one past the last (null: no last); left out for all chunks"
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.first >= self.end:
            raise ValueError(f"a step range must have first < end, but has {self.first} and {self.end}")
        if self.chunks is not None and not 0 <= self.chunks[0] < self.chunk_span[1]:
            raise ValueError(
                f"a range of chunks must have 0 <= first < end, but has {self.chunks[0]} and {self.chunks[1]}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_chunks(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        content: dict[str, object] = handler(self)
        if self.chunks is None:
            content.pop("chunks", None)
        return content

    @property
    def chunk_span(self) -> tuple[int, float]:
        """First chunk and one past the last."""
        first, end = (0, None) if self.chunks is None else self.chunks
        return first, float("inf") if end is None else end

    def overlaps(self, other: Self) -> bool:
        """Whether some step of some chunk is in both."""
        steps = self.first < other.end and other.first < self.end
        chunks = self.chunk_span[0] < other.chunk_span[1] and other.chunk_span[0] < self.chunk_span[1]
        return steps and chunks


class StepSchedule(_Frozen):
    """Ranges of a trajectory of `num_steps` steps; outside them the plan's own assignments hold.

    A trajectory with another number of steps is mapped by its share: step i of n is step ⌊(i + 1/2)·num_steps/n⌋ here.
    """

    num_steps: int = Field(ge=1)
    rules: tuple[str, ...] = Field(description="names in the plan's `rules`")
    ranges: tuple[StepRange, ...] = Field(description="ascending by first step, and disjoint")
    refresh: tuple[int, ...] = Field(
        (),
        description="steps at which rules that need queries and keys choose again; in between their tiles stay. Empty: at every step",
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        firsts = [item.first for item in self.ranges]
        clash = any(item.overlaps(other) for place, item in enumerate(self.ranges) for other in self.ranges[:place])
        if firsts != sorted(firsts) or clash or any(item.end > self.num_steps for item in self.ranges):
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
        cls,
        num_steps: int,
        ranges: Sequence[tuple[int, int, Mapping[str, Sequence[str]]]],
        refresh: Sequence[int] = (),
        chunks: Sequence[tuple[int, int | None]] | None = None,
    ) -> Self:
        """Make a schedule of (first, end, assignments) triples, each for a range of chunks if `chunks` are given."""
        names = sorted({name for *_, table in ranges for heads in table.values() for name in heads})
        code = {name: str(index) for index, name in enumerate(names)}
        written = tuple(
            StepRange(
                first=first,
                end=end,
                choices={m: " ".join(code[name] for name in heads) for m, heads in table.items()},
                chunks=None if chunks is None else chunks[place],
            )
            for place, (first, end, table) in enumerate(ranges)
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

    @property
    def by_chunk(self) -> bool:
        """Whether the chunk decides too."""
        return any(item.chunks is not None for item in self.ranges)

    def range_index(self, index: int, num_steps: int | None = None, chunk: int | None = None) -> int | None:
        """Which range holds a step of a chunk; None outside all of them. Equal answers mean equal assignments.

        Raises:
            SpecError: there is no such step, or the chunk decides and is not known.
        """
        if self.by_chunk and chunk is None:
            raise SpecError(
                "a schedule with budgets per chunk must know the chunk that is generated, but it was not told. Call `at_chunk(index)` before it."
            )
        step, at = self.step(index, num_steps), chunk or 0
        held = (item.first <= step < item.end and item.chunk_span[0] <= at < item.chunk_span[1] for item in self.ranges)
        return next((place for place, holds in enumerate(held) if holds), None)

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


def chunk_densities(num_chunks: int, density: float, *, least: float, decay: float = 1.0) -> list[float]:
    """Densities of chunks that are generated one after another, each over all earlier ones: the first is dense, later ones are sparser and sparser.

    Chunk c = 0, 1, … attends to c + 1 chunks. d_0 = 1 and d_c = min(1, least + β·c^-decay), with β such that Σ (c + 1)·d_c = density·Σ (c + 1).

    Args:
        num_chunks: chunks.
        density: of all chunks together, by work.
        least: what the densities fall towards.
        decay: how fast.

    Source: Lv et al. 2026, Light Forcing, arXiv:2602.04789 (sparsity s_i = s_base - α_i·β, β from the FLOP budget, first chunk dense). Differs: α is
    our power law; the published weights are tuned for it.

    Raises:
        SpecError: the density cannot be reached between `least` and 1.
    """
    work = [c + 1.0 for c in range(num_chunks)]

    def densities(beta: float) -> list[float]:
        return [1.0, *(min(1.0, least + beta * c**-decay) for c in range(1, num_chunks))]

    def total(beta: float) -> float:
        return sum(w * d for w, d in zip(work, densities(beta), strict=True)) / sum(work)

    if not 0 <= least <= 1 or not total(0.0) - 1e-12 <= density <= 1:
        raise SpecError(
            f"the density of {num_chunks} chunks must lie between {total(0.0):.3f} (the first dense, {least:g} for the others) and 1, but is {density}."
        )
    low, high = 0.0, float(num_chunks) ** decay
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) < density else (low, middle)
    return densities(low)
