"""The plan: unit -> rule, with everything needed to trust it. One file, `sparse_plan.json`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from sparsesearch.artifacts import canonical_json, parse_json, read_text, sha256_text, write_json
from sparsesearch.cut import Cut
from sparsesearch.errors import ArtifactError, SpecError, first_problem
from sparsesearch.layout import Layout
from sparsesearch.rules import Rule, parse_rule, rule_kinds
from sparsesearch.rules.dense import Dense
from sparsesearch.shapes import Granularity, ModelGeometry
from sparsesearch.step_schedule import StepSchedule

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

    metric: Literal["density", "kv_fraction", "latency", "ttft", "tpot", "memory", "params", "flops"]
    bound: float = Field(description="share of dense, in (0, 1]; seconds or bytes if absolute")
    predicted: dict[str, float] = Field(
        default_factory=dict, description="sequence length, or `workload` for a total -> what the bound limits"
    )
    cost_model: str | None = Field(None, description="which cost model priced it (seconds only)")
    absolute: bool = Field(False, description="bound and predictions are in seconds or bytes, not shares of dense")
    replayed: dict[str, float] = Field(
        default_factory=dict,
        description="seconds only: the same by replay of every layer's schedule or calls; `predicted` is the sum over units",
    )

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`absolute` and `replayed` are written only where they are set, so that older plans keep their bytes."""
        content: dict[str, Any] = handler(self)
        unset = {name for name in ("absolute", "replayed") if not getattr(self, name)}
        return {name: value for name, value in content.items() if name not in unset}


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
    `decode`, where it names a module, does the same for the tokens that are generated; elsewhere they follow `assignments`.
    """

    base_model: BaseModelInfo
    block_tokens: int = Field(ge=1)
    unit: Granularity
    lengths_tokens: tuple[int, ...] = Field(
        description="lengths the search saw; outside their range the prediction is extrapolated"
    )
    rules: dict[str, AnyRule]
    assignments: dict[str, tuple[str, ...]]
    decode: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="the rules of the decode phase, where they are not those of `assignments`"
    )
    budgets: tuple[BudgetRecord, ...] = ()
    certificate: Certificate | None = None
    quality: dict[str, Any] = Field(
        default_factory=dict, description="measured on held-out data: metric -> variant -> value"
    )
    provenance: dict[str, Any] = Field(default_factory=dict)
    schedule: StepSchedule | None = Field(None, description="assignments per range of denoising steps; diffusion only")
    layout: Layout | None = Field(None, description="the segments and grids that the search saw")
    pruning: Cut | None = Field(None, description="heads and FFN channels removed for good; left out when nothing is")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        geometry = self.base_model.geometry
        heads = dict(zip(geometry.modules, geometry.num_heads, strict=True))
        schedule = self.schedule
        scheduled = [] if schedule is None else [schedule.assignments(i) for i in range(len(schedule.ranges))]
        tables = (self.assignments, self.decode, *scheduled)
        for module, names in ((m, names) for table in tables for m, names in table.items()):
            if module not in heads:
                raise ValueError(f"assignments name module {module!r}, which base_model.modules lacks")
            if len(names) != heads[module]:
                raise ValueError(f"{module} must have {heads[module]} rules, one per query head, but has {len(names)}")
            for name in names:
                if name not in self.rules:
                    raise ValueError(f"{module} names rule {name!r}, which `rules` lacks")
        for target, module in enumerate(geometry.modules):
            for head in range(len(self.assignments.get(module, ()))):
                self._check_source(target, module, head)
        return self

    def at_step(self, index: int, num_steps: int | None = None, chunk: int | None = None) -> "Plan":
        """The plan of one denoising step: the same content, the step's assignments, no schedule. Itself without a schedule.

        Args:
            index: step of the trajectory, from 0.
            num_steps: steps of the trajectory; those of the schedule by default.
            chunk: the piece that is generated, from 0, where the schedule has budgets per chunk.

        Raises:
            SpecError: there is no such step, or the chunk is missing.
        """
        if self.schedule is None:
            return self
        place = self.schedule.range_index(index, num_steps, chunk)
        table = self.assignments if place is None else self.schedule.assignments(place)
        return self.model_copy(update={"assignments": table, "schedule": None})

    def _check_source(self, target: int, module: str, head: int) -> None:
        """A head that reuses must name an earlier head that leaves a selection."""
        source = self.rule(module, head).source_head(head)
        if source is None:
            return
        layer, source_head = source
        if layer >= target:
            raise ValueError(
                f"{module}:{head} must reuse an earlier layer than its own ({target}), but names layer {layer}"
            )
        path = self.base_model.modules[layer]
        if not 0 <= source_head < self.base_model.num_heads[layer]:
            raise ValueError(
                f"{module}:{head} reuses head {source_head} of {path}, which has {self.base_model.num_heads[layer]}"
            )
        left = self.rule(path, source_head)
        if not left.dynamic or left.reuses:
            raise ValueError(
                f"{module}:{head} reuses {path}:{source_head}, which leaves no selection: its rule is {left.label}"
            )
        if self.rule(module, head).decodes and (not left.decodes or {module, path} & set(self.decode)):
            raise ValueError(
                f"{module}:{head} reuses {path}:{source_head} for decoded tokens too, for which its rule, {left.label}, must choose, and "
                "neither layer may have other rules in `decode`"
            )

    def rule(self, module: str, head: int) -> Rule:
        """The rule of one query head; dense where the plan says nothing."""
        names = self.assignments.get(module)
        return Dense() if names is None else self.rules[names[head]]

    def decode_rule(self, module: str, head: int) -> Rule:
        """The rule of one query head while tokens are generated; that of the prefill where the plan says nothing else."""
        names = self.decode.get(module)
        return self.rule(module, head) if names is None else self.rules[names[head]]

    def module_rules(self, module: str) -> tuple[Rule, ...]:
        """The rules of a module's query heads, in head order."""
        count = dict(zip(self.base_model.modules, self.base_model.num_heads, strict=True))[module]
        return tuple(self.rule(module, head) for head in range(count))

    def removed_heads(self, module: str) -> tuple[int, ...]:
        """Query heads of a module that the plan takes out of the model, so that no rule of theirs runs."""
        cut = None if self.pruning is None else self.pruning.layers.get(self.base_model.modules.index(module))
        return () if cut is None else cut.removed_heads

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

    def has_sha256(self, digest: str) -> bool:
        """Whether a digest is this plan's, as it is or as it was before figures were recorded in its `quality`."""
        return digest in (self.sha256, self.model_copy(update={"quality": {}}).sha256)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON content, as embedded in a checkpoint's config."""
        unset = {name for name in ("schedule", "layout", "decode", "pruning") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude=unset)

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

    def save(self, path: str | Path) -> None:
        """Write `sparse_plan.json` atomically; same plan, same bytes."""
        write_json(Path(path), self.to_dict(), format=FORMAT, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan file, or the plan that a checkpoint directory carries.

        Raises:
            ArtifactError: it is missing, truncated, foreign, edited, or of a newer major version.
        """
        if Path(path).is_dir():
            from sparsesearch.embedded_plan import plan_of_checkpoint  # which reads plans by this module

            plan = plan_of_checkpoint(Path(path))
            assert isinstance(plan, cls)
            return plan
        content = parse_json(read_text(Path(path)), source=str(path), format=FORMAT, schema_version=SCHEMA_VERSION)
        return cls.from_dict(content, source=str(path))


def uniform_plan(base_model: BaseModelInfo, rule: Rule, *, block_tokens: int, lengths_tokens: tuple[int, ...]) -> Plan:
    """The same rule for every head: the baseline that every searched plan is judged against."""
    return cyclic_plan(base_model, (rule,), block_tokens=block_tokens, lengths_tokens=lengths_tokens)


def cyclic_plan(
    base_model: BaseModelInfo, rules: Sequence[Rule], *, block_tokens: int, lengths_tokens: tuple[int, ...]
) -> Plan:
    """Layer l follows rule l mod n in all its heads, as VMoBA's three partitions take turns."""
    return Plan(
        base_model=base_model,
        block_tokens=block_tokens,
        unit="query_head",
        lengths_tokens=lengths_tokens,
        rules={rule.label: rule for rule in rules[: len(base_model.modules)]},
        assignments={
            module: (rules[layer % len(rules)].label,) * count
            for layer, (module, count) in enumerate(zip(base_model.modules, base_model.num_heads, strict=True))
        },
    )
