"""A plan with removals on a live model: refit once, then really narrower layers and the plan's attention rules on what is left."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel

from sparsesearch.cut import Cut
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.pruning.compensate import compensate
from sparsesearch.pruning.live import narrowed
from sparsesearch.pruning.quality import Batch
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.fingerprint import attention_sites, describe, require_weights, weights_sha256
from sparsesearch.runtime.live import apply, check_geometry
from sparsesearch.runtime.shrink import Fitted


class PrunedApply:
    """Puts plans on a model as `evaluate` wants it; the refit of a plan is computed once and kept.

    Args:
        batches: what plans with compensation are refitted on.
        allow_other_weights: accept weights whose fingerprint differs.
    """

    def __init__(self, batches: Sequence[Batch], *, allow_other_weights: bool = False) -> None:
        self._batches, self._allow = batches, allow_other_weights
        self._fitted: dict[str, dict[str, Fitted]] = {}
        self._model: weakref.ref[PreTrainedModel] | None = None

    @contextmanager
    def __call__(self, model: PreTrainedModel, plan: Plan) -> Iterator[None]:
        """Run the plan until the block ends.

        Raises:
            PlanMismatchError: the plan is for another model.
        """
        if plan.pruning is None:
            with apply(model, plan, allow_other_weights=self._allow):
                yield
            return
        if not _all_dense(plan):  # what a cut needs is checked where it is made, for encoders too
            check_geometry(plan.base_model, attention_sites(model))
        if not self._allow:
            require_weights(plan.base_model, weights_sha256(model))
        fitted = self._refit(model, plan.sha256, plan.pruning)
        with ExitStack() as stack:
            stack.enter_context(narrowed(model, plan.pruning, fitted))
            remaining = attention_after_cut(plan, lambda: describe(model, plan.base_model.name_or_path))
            if remaining is not None:
                stack.enter_context(apply(model, remaining, allow_other_weights=True))
            yield

    def _refit(self, model: PreTrainedModel, key: str, cut: Cut) -> dict[str, Fitted]:
        if cut.compensation is None:
            return {}
        if self._model is None or self._model() is not model:
            self._fitted, self._model = {}, weakref.ref(model)
        if key not in self._fitted:
            self._fitted[key] = compensate(model, cut, self._batches, bias=cut.compensation.bias)
        return self._fitted[key]


def attention_after_cut(plan: Plan, described: Callable[[], BaseModelInfo]) -> Plan | None:
    """The attention part of a plan for the heads that are left; None when all of it is dense.

    Args:
        plan: with removals.
        described: tells the narrower model's modules and head counts.
    """
    if _all_dense(plan):
        return None
    info, cut = described(), plan.pruning
    rules: dict[str, Rule] = {}
    assignments: dict[str, tuple[str, ...]] = {}
    for index, module in enumerate(plan.base_model.modules):
        own = None if cut is None else cut.layers.get(index)
        kept = range(plan.base_model.num_heads[index]) if own is None else own.kept_heads
        if module not in info.modules:
            continue
        labels = []
        for head in kept:
            rule = plan.rule(module, head)
            rules[rule.label] = rule
            labels.append(rule.label)
        assignments[module] = tuple(labels)
    rules.setdefault(Dense().label, Dense())
    used = {name for names in assignments.values() for name in names}
    return plan.model_copy(
        update={
            "base_model": info,
            "rules": {name: rule for name, rule in rules.items() if name in used},
            "assignments": assignments,
            "pruning": None,
        }
    )


def _all_dense(plan: Plan) -> bool:
    return all(rule.kind == "dense" for _, _, rule in plan.heads())
