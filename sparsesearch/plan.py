"""The plan: unit -> rule, with everything needed to trust it. One file, `sparse_plan.json`."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from sparsesearch.artifacts import canonical_json, parse_json, read_text, sha256_text, write_json
from sparsesearch.cut import Cut
from sparsesearch.errors import ArtifactError, SpecError, first_problem
from sparsesearch.rules import Rule, parse_rule, rule_kinds
from sparsesearch.rules.dense import Dense
from sparsesearch.shapes import Granularity, ModelGeometry

FORMAT = "sparsesearch.plan"
SCHEMA_VERSION = "1.0"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelInfo(_Frozen):
    """Which model a plan or profile belongs to."""

    name_or_path: str
    model_type: str
    modules: tuple[str, ...] = Field(description="dotted paths of the attention modules, in module order")
    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    weights_sha256: str | None = Field(
        None, description="of names, shapes and sampled values; None when weights were not at hand"
    )

    @property
    def geometry(self) -> ModelGeometry:
        """The head counts alone."""
        return ModelGeometry(self.modules, self.num_heads, self.num_kv_heads, self.head_dim)


class BudgetRecord(_Frozen):
    """One constraint of the search and what the plan uses of it, per length."""

    metric: Literal["density", "kv_fraction", "latency", "params", "flops", "memory"]
    bound: float = Field(description="share of dense, in (0, 1]")
    predicted: dict[str, float] = Field(default_factory=dict, description="sequence length -> share of dense")
    cost_model: str | None = Field(None, description="which cost model priced it (latency only)")


class Certificate(_Frozen):
    """What the search proved about the additive problem it solved."""

    objective: str
    loss: float
    lower_bound: float
    gap: float = Field(description="(loss - lower_bound) / max(|loss|, 1e-12)")
    solver: str


def _as_rule(value: Any) -> Any:
    return value if isinstance(value, Rule) else parse_rule(value, where="rules")


class _RuleSchema:
    """In a JSON Schema, a rule is one of the kinds there are."""

    @staticmethod
    def __get_pydantic_json_schema__(_: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(rule.__pydantic_core_schema__) for rule in rule_kinds().values()]}


AnyRule = Annotated[SerializeAsAny[Rule], BeforeValidator(_as_rule), _RuleSchema]


class Plan(_Frozen):
    """Which rule each query head follows.

    `assignments[module][h]` names the rule of query head h; modules that are not named stay dense. Rules are named by their label.
    """

    base_model: BaseModelInfo
    block_tokens: int = Field(ge=1)
    unit: Granularity
    lengths_tokens: tuple[int, ...] = Field(
        description="lengths the search saw; outside their range the prediction is extrapolated"
    )
    rules: dict[str, AnyRule]
    assignments: dict[str, tuple[str, ...]]
    budgets: tuple[BudgetRecord, ...] = ()
    certificate: Certificate | None = None
    quality: dict[str, Any] = Field(
        default_factory=dict, description="measured on held-out data: metric -> variant -> value"
    )
    provenance: dict[str, Any] = Field(default_factory=dict)
    pruning: Cut | None = Field(None, description="heads and FFN channels removed for good; left out when nothing is")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        geometry = self.base_model.geometry
        heads = dict(zip(geometry.modules, geometry.num_heads, strict=True))
        for module, names in self.assignments.items():
            if module not in heads:
                raise ValueError(f"assignments name module {module!r}, which base_model.modules lacks")
            if len(names) != heads[module]:
                raise ValueError(f"{module} must have {heads[module]} rules, one per query head, but has {len(names)}")
            for name in names:
                if name not in self.rules:
                    raise ValueError(f"{module} names rule {name!r}, which `rules` lacks")
        return self

    def rule(self, module: str, head: int) -> Rule:
        """The rule of one query head; dense where the plan says nothing."""
        names = self.assignments.get(module)
        return Dense() if names is None else self.rules[names[head]]

    def module_rules(self, module: str) -> tuple[Rule, ...]:
        """The rules of a module's query heads, in head order."""
        count = dict(zip(self.base_model.modules, self.base_model.num_heads, strict=True))[module]
        return tuple(self.rule(module, head) for head in range(count))

    def heads(self) -> Iterator[tuple[str, int, Rule]]:
        """Every (module, head, rule)."""
        for module in self.base_model.modules:
            for head, rule in enumerate(self.module_rules(module)):
                yield module, head, rule

    def kind_counts(self) -> dict[str, int]:
        """Query heads per rule kind."""
        return dict(sorted(Counter(rule.kind for _, _, rule in self.heads()).items()))

    @property
    def sha256(self) -> str:
        """Digest of the content."""
        return sha256_text(canonical_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON content, as embedded in a checkpoint's config."""
        return self.model_dump(mode="json", exclude={"pruning"} if self.pruning is None else None)

    @classmethod
    def from_dict(cls, content: dict[str, Any], *, source: str) -> Self:
        """Validate plain content; `source` names it in messages.

        Raises:
            ArtifactError: a field is missing, unknown or inconsistent.
            SpecError: a rule is unknown or out of range.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            cause = error.errors()[0].get("ctx", {}).get("error")
            if isinstance(cause, SpecError):
                raise SpecError(f"{source}: {cause}") from error
            problem = first_problem(error, cls.model_fields)
            raise ArtifactError(f"{source}: {problem} Make the plan again with `sparsesearch search`.") from error

    def save(self, path: Path) -> None:
        """Write `sparse_plan.json` atomically; same plan, same bytes."""
        write_json(path, self.to_dict(), format=FORMAT, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a plan file.

        Raises:
            ArtifactError: it is missing, truncated, foreign, edited, or of a newer major version.
        """
        content = parse_json(read_text(path), source=str(path), format=FORMAT, schema_version=SCHEMA_VERSION)
        return cls.from_dict(content, source=str(path))


def uniform_plan(base_model: BaseModelInfo, rule: Rule, *, block_tokens: int, lengths_tokens: tuple[int, ...]) -> Plan:
    """The same rule for every head: the baseline that every searched plan is judged against."""
    return Plan(
        base_model=base_model,
        block_tokens=block_tokens,
        unit="query_head",
        lengths_tokens=lengths_tokens,
        rules={rule.label: rule},
        assignments={
            module: (rule.label,) * count
            for module, count in zip(base_model.modules, base_model.num_heads, strict=True)
        },
    )
