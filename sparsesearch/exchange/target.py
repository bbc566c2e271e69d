"""What every reader and writer of foreign plans shares: the model they are for, and sentences about what does not fit."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sparsesearch.artifacts import read_text
from sparsesearch.errors import ArtifactError, PlanMismatchError, SpecError
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.rules import Rule
from sparsesearch.rules.base import LengthLaw
from sparsesearch.shapes import Granularity


@dataclass(frozen=True)
class Target:
    """The model a foreign plan is for, and what its file leaves open.

    Attributes:
        base_model: the model; its layers and heads must be the file's.
        lengths_tokens: prompt lengths the plan is meant for; reports state densities there.
        block_tokens: side of a tile.
        streaming_share: share of KV heads that stream (duo_attention's `sparsity`); None takes the threshold of its config.json.
        target_sparsity: at which modelopt's threshold law is evaluated; None takes the file's own, else 0.5.
    """

    base_model: BaseModelInfo
    lengths_tokens: tuple[int, ...] = (8192,)
    block_tokens: int = 64
    streaming_share: float | None = None
    target_sparsity: float | None = None

    def check(
        self, counts: Sequence[int], *, source: Path, what: str = "query heads", per_kv_head: bool = False
    ) -> None:
        """Refuse a file whose layers or heads are not the model's.

        Raises:
            PlanMismatchError: they are not.
        """
        model = self.base_model
        own = model.num_kv_heads if per_kv_head else model.num_heads
        if tuple(counts) != own:
            raise PlanMismatchError(
                f"{source} must have {_layers(own)} {what} for {model.name_or_path}, but has {_layers(tuple(counts))}. "
                "Name the model it was made for with --model."
            )

    def plan(
        self, rules: Sequence[Sequence[Rule]], unit: Granularity, *, format: str, source: Path, **provenance: Any
    ) -> Plan:
        """A plan of one list of rules per layer, one rule per query head."""
        model = self.base_model
        return Plan(
            base_model=model,
            block_tokens=self.block_tokens,
            unit=unit,
            lengths_tokens=self.lengths_tokens,
            rules={rule.label: rule for layer in rules for rule in layer},
            assignments={
                module: tuple(rule.label for rule in layer) for module, layer in zip(model.modules, rules, strict=True)
            },
            provenance={"converted_from": format, "file": source.name, **provenance},
        )


def _layers(counts: tuple[int, ...]) -> str:
    if len(set(counts)) == 1:
        return f"{len(counts)} layers x {counts[0]}"
    return f"{len(counts)} layers of {', '.join(map(str, counts))}"


def read_json(path: Path, *, format: str) -> Any:
    """The content of a JSON file.

    Raises:
        ArtifactError: it is missing or no JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"{path} must be a {format} JSON file, but breaks off or is damaged at line {error.lineno}. Fetch it again."
        ) from error


def differences(documentation: str | None) -> str:
    """What a module's docstring says after its first sentence, on one line: how the format differs from a plan."""
    return " ".join((documentation or "").split("\n\n", 1)[-1].split())


def malformed(path: Path, format: str, must: str) -> NoReturn:
    """Refuse a file that is not of its format."""
    raise ArtifactError(f"{path} is no {format} file: {must}. Check --from.")


def tokens_of(law: LengthLaw, length_tokens: int | None, where: str, format: str) -> int:
    """A law as the plain number a format wants.

    Raises:
        SpecError: it depends on the length, and no length was given.
    """
    if law.b and length_tokens is None:
        raise SpecError(
            f"{where}: {format} wants a number of tokens, but the rule's law {law} depends on the prompt. Pass --length, the prompt length "
            "at which to fix it."
        )
    return law.tokens(length_tokens or 0)


def inexpressible(where: str, rule: Rule, format: str, can: str) -> NoReturn:
    """Refuse a rule that a format cannot say."""
    raise SpecError(f"{where} follows {rule.label}, which {format} cannot express: it has {can}.")
