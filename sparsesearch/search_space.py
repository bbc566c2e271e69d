"""Search spaces: a YAML file -> the menu of candidate rules. A list value is an axis of the grid, also inside a law."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsesearch.artifacts import canonical_json, read_text, sha256_text
from sparsesearch.errors import SpecError, first_problem, nearest
from sparsesearch.presets import preset_names, preset_text
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.shapes import Granularity


class PruningMenu(BaseModel):
    """What may be removed for good, beside the candidates for attention."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    channel_multiple: int = Field(64, ge=1, description="FFN widths are multiples of this; 64 or 128 suits GPUs")
    thin_groups: bool = Field(True, description="whether every KV group may lose the same number of query heads")
    bias: bool = Field(True, description="whether refitted projections may gain a bias the stock architecture lacks")
    measured_options: int = Field(4, ge=1, description="cuts per sublayer that are measured one at a time")


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    source: str
    description: str
    block_tokens: int = Field(64, ge=16, le=256, multiple_of=16)
    unit: Granularity
    include: list[str] = Field(default=[], description="shipped spaces whose candidates come first")
    candidates: list[dict[str, Any]]
    pruning: PruningMenu | None = None


@dataclass(frozen=True)
class SearchSpace:
    """What may be tried: candidate rules on tiles of one size.

    Attributes:
        candidates: distinct rules in file order; dense is always the first.
        unit: what receives one decision unless the search says otherwise.
        pruning: what may be removed; None: nothing.
    """

    name: str
    source: str
    description: str
    block_tokens: int
    unit: Granularity
    candidates: tuple[Rule, ...]
    pruning: PruningMenu | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The candidates' names."""
        return tuple(rule.label for rule in self.candidates)

    def in_blocks_of(self, block_tokens: int) -> "SearchSpace":
        """The same candidates on tiles of another side: larger ones are cheaper per key and coarser.

        Raises:
            SpecError: no multiple of 16 from 16 to 256.
        """
        if block_tokens % 16 or not 16 <= block_tokens <= 256:
            raise SpecError(f"blocks must be a multiple of 16 tokens from 16 to 256, but got {block_tokens}.")
        return replace(self, block_tokens=block_tokens)

    @property
    def sha256(self) -> str:
        """Digest of what matters for scores: tile size and candidates."""
        rules = [rule.model_dump(mode="json") for rule in self.candidates]
        return sha256_text(canonical_json({"block_tokens": self.block_tokens, "candidates": rules}))

    @classmethod
    def load(cls, name_or_path: str) -> "SearchSpace":
        """Load a shipped space by name, or a YAML file by path.

        Raises:
            SpecError: unknown name, malformed YAML, unknown key or rule.
        """
        if name_or_path.endswith((".yaml", ".yml")):
            return cls.parse(read_text(Path(name_or_path)), where=name_or_path)
        known = preset_names("search_spaces")
        if name_or_path not in known:
            raise SpecError(f"unknown search space {name_or_path!r}.{nearest(name_or_path, known)}")
        return cls.parse(preset_text("search_spaces", name_or_path), where=name_or_path)

    @classmethod
    def parse(cls, text: str, *, where: str) -> "SearchSpace":
        """Read a YAML text; `where` names it in messages."""
        try:
            document = _Document.model_validate(yaml.safe_load(text))
        except yaml.YAMLError as error:
            place = getattr(error, "problem_mark", None)
            line = "" if place is None else f" at line {place.line + 1}"
            raise SpecError(f"{where} must be YAML, but breaks off or is damaged{line}. Correct it.") from error
        except ValidationError as error:
            raise SpecError(f"{where}: {first_problem(error, _Document.model_fields)}") from error
        rules: dict[str, Rule] = {"dense": parse_rule({"kind": "dense"}, where=where)}
        if document.name in document.include:
            raise SpecError(f"{where}: include must name other spaces, but names {document.name!r} itself.")
        for name in document.include:
            rules |= {rule.label: rule for rule in cls.load(name).candidates}
        for index, entry in enumerate(document.candidates):
            for data in _grid(entry):
                rule = parse_rule(data, where=f"{where}, candidates[{index}]")
                rules.setdefault(rule.label, rule)
        return cls(
            name=document.name,
            source=document.source,
            description=document.description,
            block_tokens=document.block_tokens,
            unit=document.unit,
            candidates=tuple(rules.values()),
            pruning=document.pruning,
        )


def _grid(value: Any) -> list[Any]:
    """Every combination of the lists found anywhere in a nested mapping."""
    if isinstance(value, list):
        return [choice for item in value for choice in _grid(item)]
    if isinstance(value, dict):
        axes = [_grid(item) for item in value.values()]
        return [dict(zip(value, combination, strict=True)) for combination in product(*axes)]
    return [value]
