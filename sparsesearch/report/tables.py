"""The report's tables and lists, as HTML."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sparsesearch.cost import caveat
from sparsesearch.evaluate import Estimate, Metrics, VariantMetrics
from sparsesearch.plan import BudgetRecord, Plan


def headline(plan: Plan, metrics: Metrics, variant: str) -> str:
    """The four figures a reader wants first: quality where most sequences were judged, time at the longest length."""
    length, longest = metrics.best_judged_length, metrics.lengths_tokens[-1]
    own, dense = metrics.at(length, variant), metrics.at(length, "dense")
    slowdown = metrics.slowdown(longest, variant)
    timed, timed_dense = metrics.at(longest, variant), metrics.at(longest, "dense")
    removed = () if plan.pruning is None else tuple(plan.pruning.layers.values())
    heads, channels = sum(len(cut.removed_heads) for cut in removed), sum(len(cut.removed_channels) for cut in removed)
    entries = (
        [("Removed", f"{heads} + {channels}", f"query heads and FFN channels, from {len(removed)} layers")]
        if removed
        else []
    )
    entries += [
        ("Density", _percent(own.density), f"of dense attention's tiles at {length} tokens"),
        (
            "Needle accuracy",
            f"{own.needle.mean:.3f}",
            f"dense {dense.needle.mean:.3f}, {own.needle.num_sequences} sequences",
        ),
        ("KL to dense", f"{own.kl_text.mean:.4f}", f"nats per token, ± {own.kl_text.standard_error:.4f}"),
    ]
    if slowdown and timed.prefill_s is not None and timed_dense.prefill_s is not None:
        note = f"{_seconds(timed.prefill_s)} against {_seconds(timed_dense.prefill_s)} dense at {longest} tokens"
        entries.append(("Prefill speed", f"{1 / slowdown:.2f} ×", note))
    return cards(entries)


def cards(entries: Sequence[tuple[str, str, str]]) -> str:
    """(name, value, note) in large print."""
    shown = "".join(
        f'<div class="kpi"><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><small>{escape(note)}</small></dd></div>'
        for name, value, note in entries
    )
    return f'<dl class="kpis">{shown}</dl>'


def quality_table(metrics: Metrics, variant: str) -> str:
    """Every variant at every length."""
    columns = (
        "density", "needle accuracy", "KL to dense<br>all positions", "KL to dense<br>answers", "same top token", "held-out loss<br>and above dense", "prefill"
    )  # fmt: skip
    head = "<tr><th scope='col'>variant</th>" + "".join(f"<th scope='col'>{name}</th>" for name in columns) + "</tr>"
    parts = []
    decoded = f", the last {metrics.decode_tokens} of them decoded" if metrics.decode_tokens else ""
    for length in metrics.lengths_tokens:
        rows = "".join(
            f'<tr{" class=own" if name == variant else ""}><th scope="row">{escape(name)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in _cells(metrics.at(length, name), metrics.slowdown(length, name)))
            + "</tr>"
            for name in metrics.variants
        )
        parts.append(
            f'<div class="scroll"><table><caption>{length} tokens{decoded}</caption><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
        )
    return "".join(parts)


def _cells(found: VariantMetrics, slowdown: float | None) -> list[str]:
    if found.prefill_s is None or slowdown is None:
        prefill = "not measured"
    else:
        prefill = f"{_seconds(found.prefill_s)} <small>{1 / slowdown:.2f} ×</small>"
    return [
        _percent(found.density),
        _estimate(found.needle, 3),
        _estimate(found.kl_text, 4),
        _estimate(found.kl_answer, 4),
        _percent(found.top1_agreement.mean),
        f"{found.heldout_loss.mean:.3f} <small>{_difference(found.heldout_loss_minus_dense)}</small>",
        prefill,
    ]


def removals_table(plan: Plan) -> str:
    """Query heads, KV heads and FFN channels that every cut layer keeps; empty where nothing goes."""
    if plan.pruning is None:
        return ""
    rows = ""
    for layer, cut in sorted(plan.pruning.layers.items()):
        kept = (
            (len(cut.kept_heads), cut.num_heads),
            (len(cut.kept_groups), cut.num_kv_heads),
            (len(cut.kept_channels), cut.num_channels),
        )
        rows += (
            f'<tr><th scope="row">layer {layer}</th>' + "".join(f"<td>{_kept(*pair)}</td>" for pair in kept) + "</tr>"
        )
    names = ("kept", "query heads", "KV heads", "FFN channels")
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    fit = plan.pruning.compensation
    note = "unchanged" if fit is None else f"refitted by least squares on {fit.num_samples} sequences of {fit.data}"
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="soft">Layers that are not named stay whole. What is left is {escape(note)}.</p>'
    )


def _kept(left: int, whole: int) -> str:
    share = 100 * left / max(whole, 1)
    return f'<span class="meter" aria-hidden="true"><i style="width:{share:.0f}%"></i></span>{left} of {whole}'


def predictions_table(plan: Plan, metrics: Metrics, variant: str) -> str:
    """What the search promised beside what was found; empty when the plan records no budget."""
    rows = []
    for budget in plan.budgets:
        for where, predicted in sorted(budget.predicted.items(), key=lambda entry: (len(entry[0]), entry[0])):
            place = f"at {where} tokens" if where.isdecimal() else f"of the {where}"
            known = where.isdecimal() and not budget.absolute
            measured = _measured_share(metrics, int(where), variant, budget.metric) if known else None
            unmeasured = ", unmeasured device" if caveat(budget.cost_model) else ""
            priced = f" ({budget.cost_model}{unmeasured})" if budget.cost_model else ""
            predicted = budget.replayed.get(where, predicted)
            off = "" if measured is None else f"{100 * (measured - predicted) / predicted:+.1f} %"
            rows.append(
                f'<tr><th scope="row">{escape(f"{budget.metric}{priced} {place}")}</th><td>{_bound(budget.bound, budget)}</td><td>{_bound(predicted, budget, 4)}</td>'
                f"<td>{'not measured' if measured is None else f'{measured:.4f}'}</td><td>{off}</td></tr>"
            )
    if not rows:
        return ""
    proof = plan.certificate
    note = (
        f'<p class="soft">Objective {escape(proof.objective)}: loss {proof.loss:.4g}, proven lower bound {proof.lower_bound:.4g}, '
        f"gap {100 * proof.gap:.2g} % ({escape(proof.solver)}).</p>"
        if proof is not None
        else ""
    )
    head = "".join(
        f"<th scope='col'>{name}</th>" for name in ("share of dense", "budget", "predicted", "measured", "difference")
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'
    )


def seconds_table(metrics: Metrics) -> str:
    """Predicted beside measured time of every variant and length; empty where no cost model was at hand."""
    rows, sources = [], set()
    for length in metrics.lengths_tokens:
        for name in metrics.variants:
            cell = metrics.at(length, name)
            for part, measured in (("prefill", cell.prefill_s), ("attention", cell.attention_s)):
                predicted = cell.predicted.get(f"{part}_s")
                if measured is None or predicted is None:
                    continue
                sources.add(str(cell.cost_model))
                rows.append(
                    f'<tr><th scope="row">{escape(name)}, {part}, {length} tokens</th><td>{_seconds(predicted)}</td>'
                    f"<td>{_seconds(measured)}</td><td>{100 * (predicted / measured - 1):+.1f} %</td></tr>"
                )
    if not rows:
        return ""
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("time", "predicted", "measured", "prediction is off by"))
    note = "; ".join(
        f"Cost model: {source}" + (f", {caveat(source)}" if caveat(source) else ".") for source in sorted(sources)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="soft">{escape(note)}</p>'
    )


def _bound(value: float, budget: BudgetRecord, digits: int = 3) -> str:
    return f"{value:.4g}" if budget.absolute else f"{value:.{digits}f}"


def _measured_share(metrics: Metrics, length: int, variant: str, metric: str) -> float | None:
    if length not in metrics.results:
        return None
    match metric:
        case "density":
            return metrics.at(length, variant).density
        case "latency":
            return metrics.slowdown(length, variant)
        case _:
            return None  # kept bytes are counted by the runtime's cache, not in a prefill


def needle_table(metrics: Metrics, variant: str) -> str:
    """Accuracy by wording and by depth, dense beside the plan, at the length with the most sequences."""
    length = metrics.best_judged_length
    own, dense = metrics.at(length, variant), metrics.at(length, "dense")
    rows = []
    for group, ours, theirs in (
        ("wording", own.needle_by_template, dense.needle_by_template),
        ("depth", own.needle_by_depth, dense.needle_by_depth),
    ):
        rows += [
            f'<tr><th scope="row">{group} {escape(name.replace("_", " "))}</th><td>{_meter(theirs[name])}</td><td>{_meter(found)}</td>'
            f"<td>{found.num_sequences}</td></tr>"
            for name, found in ours.items()
        ]
    head = "".join(f"<th scope='col'>{name}</th>" for name in (f"{length} tokens", "dense", variant, "sequences"))
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="soft">Depth is where the statement stands: 0 at the start of the text, 1 just before the question.</p>'
    )


def task_table(metrics: Metrics, variant: str) -> str:
    """Every long-context task by itself, dense beside the plan; nothing where none was judged."""
    parts = []
    for length, tasks in sorted(metrics.tasks.items()):
        rows = ""
        for task, cells in tasks.items():
            own, dense = cells[variant], cells["dense"]
            kept = "" if own.retention is None else f"{own.retention:.3f} <small>± {own.retention_error:.3f}</small>"
            remark = " <small>dense answers little</small>" if metrics.says_little(length, task) else ""
            rows += (
                f'<tr><th scope="row">{escape(task.replace("_", " "))}{remark}</th><td>{_meter(dense.accuracy)}</td>'
                f"<td>{_meter(own.accuracy)}</td><td>{_difference(own.accuracy_minus_dense)}</td><td>{kept}</td></tr>"
            )
        names = (f"{length} tokens", "dense", variant, "difference", "retained")
        head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names)
        parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>')
    return "".join(parts)


def provenance(plan: Plan, metrics: Metrics, profile_summary: Mapping[str, Any]) -> str:
    """Everything needed to make the same figures again."""
    info = plan.base_model
    facts: dict[str, Any] = {
        "model": f"{info.name_or_path} ({info.model_type}, {len(info.modules)} layers, {sum(info.num_heads)} query heads)",
        "weights": info.weights_sha256 or "not fingerprinted",
        "plan": plan.sha256,
        "tiles": f"{plan.block_tokens} x {plan.block_tokens} tokens; one decision per {plan.unit.replace('_', ' ')}",
        **{f"plan: {name}": value for name, value in sorted(plan.provenance.items())},
        **{f"profile: {name}": value for name, value in profile_summary.items()},
        **{f"evaluation: {name}": value for name, value in sorted(metrics.provenance.items())},
        **{f"data: {name}": identity for name, identity in metrics.data.items()},
    }
    return named(facts)


def named(facts: Mapping[str, Any]) -> str:
    """Names and values, a line for every entry of a list of mappings; digests are cut."""
    items = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{_fact(value)}</dd>" for name, value in facts.items()
    )
    return f'<dl class="facts">{items}</dl>'


def _fact(value: Any) -> str:
    if isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
        return "<br>".join(_fact(part) for part in value)
    shown = _plain(value)
    code = len(shown) == 64 and " " not in shown
    return f"<code>{escape(shown[:16])}…</code>" if code else escape(shown)


def _plain(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case Mapping():
            return ", ".join(f"{name} {_plain(part)}" for name, part in value.items()) or "none"
        case list() | tuple():
            return ", ".join(
                _plain(part) if not isinstance(part, list | tuple) else f"({_plain(part)})" for part in value
            )
        case _:
            return str(value)


def _estimate(found: Estimate, digits: int) -> str:
    return f"{found.mean:.{digits}f} <small>± {found.standard_error:.{digits}f}</small>"


def _difference(found: Estimate) -> str:
    return f"{found.mean:+.3f} ± {found.standard_error:.3f}"


def _meter(found: Estimate) -> str:
    return (
        f'<span class="meter" aria-hidden="true"><i style="width:{100 * found.mean:.0f}%"></i></span>{found.mean:.2f}'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
