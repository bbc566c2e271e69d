"""The gate: is a plan still as good as it must be, relative to dense in the same job and to what was recorded for it?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsesearch.check_result import CheckResult, CheckRow, Thresholds
from sparsesearch.errors import PlanMismatchError, SpecError
from sparsesearch.evaluate import Estimate, Metrics, SuiteSpec, VariantMetrics
from sparsesearch.evaluate.run import evaluate
from sparsesearch.evaluate.task_metrics import SAYS_LITTLE_BELOW
from sparsesearch.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VARIANT = "plan"
MOST_SEQUENCES = 48


def check(
    plan: Plan,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    baseline: Metrics | None = None,
    thresholds: Thresholds | None = None,
    lengths: Sequence[int] | None = None,
    **evaluation: Any,
) -> CheckResult:
    """Judge dense and the plan in one job and hold the plan against its bounds.

    Args:
        plan: the plan.
        model: the model it is for, in evaluation mode.
        tokenizer: the model's.
        baseline: what was recorded for this plan, as `eval` writes it; its variant of the plan's hash, `plan`, or its only one counts.
        thresholds: the bounds; the defaults ask for 0.98 of dense.
        lengths: in tokens; those of the baseline, or else of the plan.
        evaluation: further arguments of `evaluate`, such as `num_sequences`, `seed` and `suite`; the baseline's suite and decoded tokens are repeated.

    Raises:
        SpecError: the baseline has several plans and none is this one, shares no length with this check, or judged other tasks; or the
            model runs a plan already.
    """
    chosen = lengths or (baseline.lengths_tokens if baseline is not None else plan.lengths_tokens)
    recorded = None if baseline is None else baseline_variant(baseline, plan)
    if baseline is not None:
        _require_shared_length(baseline, chosen)
        evaluation["suite"] = _repeated_suite(evaluation.get("suite"), baseline.suite)
        evaluation.setdefault("decode_tokens", baseline.decode_tokens)
    metrics = evaluate(model, tokenizer, {VARIANT: plan}, lengths=chosen, **evaluation)
    return judge(metrics, VARIANT, thresholds or Thresholds(), baseline=baseline, baseline_name=recorded)


def repeated_sequences(baseline: Metrics | None, plan: Plan) -> int:
    """How many needle sequences to judge: those of the baseline again, at most 48, since what has a heavy tail differs between few and many."""
    if baseline is None or not baseline.results:
        return MOST_SEQUENCES
    name = baseline_variant(baseline, plan)
    return min(MOST_SEQUENCES, max(baseline.at(length, name).needle.num_sequences for length in baseline.results))


def _repeated_suite(asked: SuiteSpec | None, recorded: SuiteSpec | None) -> SuiteSpec | None:
    """The baseline's suite, or the one asked for where its figures can be compared with it.

    Raises:
        SpecError: it lacks recorded tasks, whose regression would pass unseen, or puts them otherwise.
    """
    if asked is None or recorded is None:
        return asked or recorded
    left_out = sorted(set(recorded.tasks) - set(asked.tasks))
    if left_out:
        raise SpecError(
            f"--suite must repeat the baseline's tasks, but leaves out {', '.join(left_out)}. Leave --suite out."
        )
    for name in ("format", "shots"):
        mine, theirs = getattr(asked, name), getattr(recorded, name)
        if mine != theirs:
            raise SpecError(
                f"--{name} must be the baseline's, {theirs}, to be compared with it, but is {mine}. Leave --suite out."
            )
    return asked


def judge(
    metrics: Metrics,
    variant: str,
    thresholds: Thresholds,
    *,
    baseline: Metrics | None = None,
    baseline_name: str | None = None,
) -> CheckResult:
    """Hold measured figures against their bounds; nothing is run.

    A figure may be worse than its baseline by `num_errors` standard errors of the difference, √(se² + se_baseline²): on the same sequences that
    allows too much rather than too little, so a failure is a regression and not noise.

    Raises:
        SpecError: the baseline shares no length with the metrics, time is bounded but was not measured, or nothing is bounded at all.
        PlanMismatchError: the baseline was judged on other tokens.
    """
    rows: list[CheckRow] = []
    for length in metrics.lengths_tokens:
        dense, own = metrics.at(length, "dense"), metrics.at(length, variant)
        rows += _against_dense(length, dense, own, metrics.slowdown(length, variant), thresholds)
        if baseline is not None and baseline_name is not None and length in baseline.results:
            rows += _against_baseline(length, own, baseline.at(length, baseline_name), thresholds.num_errors)
        rows += _tasks(metrics, variant, length, thresholds, baseline, baseline_name)
    if baseline is not None:
        _require_shared_length(baseline, metrics.lengths_tokens)
        _require_same_data(baseline, metrics)
    if not rows:
        raise SpecError(
            "a gate must have a bound, but none was asked for: it would pass anything. Set recovery or max_kl."
        )
    return CheckResult(tuple(rows), metrics)


def _require_shared_length(baseline: Metrics, lengths: Sequence[int]) -> None:
    if not set(baseline.results) & set(lengths):
        raise SpecError(
            f"the baseline must share a length with this check, but has {list(baseline.lengths_tokens)} and the check {list(lengths)}. Give "
            "--lengths."
        )


def _require_same_data(baseline: Metrics, metrics: Metrics) -> None:
    """Data of one description have one id, unless the tokenizer or the text behind it is another one."""
    for description, own in metrics.data.items():
        if baseline.data.get(description, own) != own:
            raise PlanMismatchError(
                f"the baseline must be of this check's data, but its {description!r} holds other tokens (it was recorded with {baseline.model!r}; "
                "the tokenizer, the text or --num-needles differ). Record it again with `sparsesearch eval PLAN -o BASELINE`."
            )


def baseline_variant(baseline: Metrics, plan: Plan) -> str:
    """Which variant of a baseline the plan is to be compared with: the same plan, the one called `plan`, or the only one.

    Raises:
        SpecError: it cannot be told.
    """
    same = [name for name, sha256 in baseline.plans.items() if plan.has_sha256(sha256)]
    named = [name for name in baseline.plans if name == VARIANT]
    for candidates in (same, named, list(baseline.plans)):
        if len(candidates) == 1:
            return candidates[0]
    raise SpecError(
        f"the baseline must record this plan, one variant called {VARIANT!r}, or a single plan, but has {sorted(baseline.plans)}. "
        "Record it with `sparsesearch eval`."
    )


def _against_dense(
    length: int, dense: VariantMetrics, own: VariantMetrics, slowdown: float | None, thresholds: Thresholds
) -> list[CheckRow]:
    rows = []
    if thresholds.recovery is not None:
        share = thresholds.recovery
        answered = dense.needle.mean
        reason = f"{share:g} of dense" + (f", whose {answered:.2g} says little" if answered < SAYS_LITTLE_BELOW else "")
        rows.append(CheckRow("needle accuracy", length, own.needle.mean, share * answered, True, reason))
        bound = dense.heldout_loss.mean / share
        rows.append(CheckRow("held-out loss", length, own.heldout_loss.mean, bound, False, f"dense over {share:g}"))
    if thresholds.max_kl is not None:
        rows.append(CheckRow("KL to dense", length, own.kl_text.mean, thresholds.max_kl, False, "--max-kl"))
    if thresholds.max_slowdown is not None:
        if slowdown is None:
            raise SpecError("time must be measured when --max-slowdown is given: evaluate with timing_rounds >= 1.")
        rows.append(
            CheckRow("prefill time / dense", length, slowdown, thresholds.max_slowdown, False, "--max-slowdown")
        )
    return rows


def _against_baseline(length: int, own: VariantMetrics, recorded: VariantMetrics, num_errors: float) -> list[CheckRow]:
    figures = (
        ("needle accuracy", own.needle, recorded.needle, True),
        ("held-out loss above dense", own.heldout_loss_minus_dense, recorded.heldout_loss_minus_dense, False),
        ("KL to dense", own.kl_text, recorded.kl_text, False),
        ("KL to dense at answers", own.kl_answer, recorded.kl_answer, False),
    )
    return [_no_worse(name, length, now, before, num_errors, at_least=more) for name, now, before, more in figures]


def _no_worse(
    figure: str, length: int, measured: Estimate, before: Estimate, num_errors: float, *, at_least: bool = True
) -> CheckRow:
    slack = num_errors * (measured.standard_error**2 + before.standard_error**2) ** 0.5
    bound = before.mean - slack if at_least else before.mean + slack
    return CheckRow(figure, length, measured.mean, bound, at_least, f"baseline {before.mean:.4g}")


def _tasks(
    metrics: Metrics,
    variant: str,
    length: int,
    thresholds: Thresholds,
    baseline: Metrics | None,
    baseline_name: str | None,
) -> list[CheckRow]:
    """Every task by itself, because a mean hides the one that collapsed; those that dense hardly answers are held to the baseline only."""
    rows = []
    for task, cells in metrics.tasks.get(length, {}).items():
        own, dense = cells[variant], cells["dense"]
        if thresholds.recovery is not None and not metrics.says_little(length, task):
            slack = thresholds.num_errors * own.accuracy_minus_dense.standard_error
            bound = thresholds.recovery * dense.accuracy.mean - slack
            reason = f"{thresholds.recovery:g} of dense {dense.accuracy.mean:.4g}"
            rows.append(CheckRow(f"task {task}", length, own.accuracy.mean, bound, True, reason))
        before = None if baseline is None else baseline.tasks.get(length, {}).get(task, {}).get(baseline_name or "")
        if before is not None:
            rows.append(_no_worse(f"task {task}", length, own.accuracy, before.accuracy, thresholds.num_errors))
    return rows
