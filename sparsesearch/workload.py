"""What a plan will serve: prompts, generated tokens, batch, and how much each mix counts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

from sparsesearch.errors import SpecError, nearest

_FIELDS = {"prompt": "prompt_tokens", "generate": "generate_tokens", "batch": "batch", "weight": "weight"}


@dataclass(frozen=True)
class Workload:
    """One kind of request.

    Attributes:
        prompt_tokens: length of the prompt.
        generate_tokens: tokens decoded after it.
        batch: sequences served at once.
        weight: share of this kind among several; only ratios count.
    """

    prompt_tokens: int
    generate_tokens: int = 0
    batch: int = 1
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.batch < 1 or self.generate_tokens < 0 or not 0 < self.weight < float("inf"):
            raise SpecError(
                f"prompt >= 1, batch >= 1, generate >= 0 and a finite weight > 0 must hold in a workload, but got {self}."
            )

    @property
    def last_context_tokens(self) -> int:
        """Tokens in the cache after the last decoded one."""
        return self.prompt_tokens + self.generate_tokens

    def __str__(self) -> str:
        own = (f"{name}={getattr(self, field):g}" for name, field in _FIELDS.items())
        return ",".join(own)


def parse_workload(text: str) -> Workload:
    """Read one workload: `prompt=32768,generate=512,batch=8,weight=0.5`; prompt alone is required.

    Raises:
        SpecError: the text has another form, names an unknown field, or a number is out of range.
    """
    values: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([\d.]+)\s*(k?)\s*", part)
        if match is None:
            raise SpecError(f"a workload must look like prompt=32768,generate=512,batch=8, but got {text!r}.")
        name, number, kilo = match.groups()
        if name not in _FIELDS:
            raise SpecError(f"the workload {text!r} names unknown field {name!r}.{nearest(name, tuple(_FIELDS))}")
        if _FIELDS[name] in values:
            raise SpecError(f"the workload {text!r} must name {name!r} once. Write --workload again for another one.")
        values[_FIELDS[name]] = _number(number, text) * (1024 if kilo else 1)
    if "prompt_tokens" not in values:
        raise SpecError(f"a workload must say its prompt length, such as prompt=32768, but got {text!r}.")
    whole = {field.name for field in fields(Workload) if field.name != "weight"}
    if any(value != int(value) for name, value in values.items() if name in whole):
        raise SpecError(f"prompt, generate and batch must be whole numbers, but got {text!r}.")
    return Workload(**{name: int(value) if name in whole else value for name, value in values.items()})  # type: ignore[arg-type]


def parse_workloads(texts: Iterable[str]) -> tuple[Workload, ...]:
    """Read several workloads, one text each.

    Raises:
        SpecError: there is none, or one of them cannot be read.
    """
    workloads = tuple(parse_workload(text) for text in texts)
    if not workloads:
        raise SpecError("at least one workload must be given, such as prompt=32768.")
    return workloads


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SpecError(f"{text!r} must be a number in the workload {whole!r}.") from error
