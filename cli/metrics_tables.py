"""What `eval` prints: a table per length, predictions beside measured times, and tasks one by one."""

from typing import TYPE_CHECKING

from .render import lines, table

if TYPE_CHECKING:
    from sparsesearch.evaluate import Estimate, Metrics


def _show_predictions(metrics: "Metrics", length: int) -> None:
    """Predicted beside measured, where a cost model was at hand."""
    from sparsesearch.cost import caveat

    rows = []
    for name in metrics.variants:
        cell = metrics.at(length, name)
        for part, measured in (("prefill", cell.prefill_s), ("attention", cell.attention_s)):
            predicted = cell.predicted.get(f"{part}_s")
            if measured is not None and predicted is not None:
                rows.append([name, part, measured * 1e3, predicted * 1e3, f"{100 * (predicted / measured - 1):+.1f} %"])
    if rows:
        source = metrics.at(length, "dense").cost_model or ""
        table(
            f"{length} tokens, predicted by {source}",
            ["variant", "part", "measured (ms)", "predicted (ms)", "predicted is off by"],
            rows,
        )
        if caveat(source):
            lines(f"{source}: {caveat(source)} Measured on {metrics.provenance.get('device', 'this device')}.")


def show_metrics(metrics: "Metrics") -> None:
    """One table per length."""
    decoded = f", the last {metrics.decode_tokens} tokens decoded" if metrics.decode_tokens else ""
    for length in metrics.lengths_tokens:
        rows = []
        for name in metrics.variants:
            cell = metrics.at(length, name)
            rows.append(
                [
                    name,
                    cell.density,
                    cell.needle.mean,
                    cell.kl_text.mean,
                    cell.kl_answer.mean,
                    cell.heldout_loss.mean,
                    None if cell.prefill_s is None else cell.prefill_s * 1e3,
                ]
            )
        table(
            f"{metrics.model}, {length} tokens, {metrics.at(length, 'dense').needle.num_sequences} sequences{decoded}",
            ["variant", "density", "needle", "KL text", "KL answer", "text loss", "prefill (ms)"],
            rows,
        )
        _show_predictions(metrics, length)
        show_tasks(metrics, length)


def show_tasks(metrics: "Metrics", length: int) -> None:
    """Every task by itself: accuracy of each variant, and of each plan its difference to dense and the share it retains."""
    if length not in metrics.tasks:
        return
    assert metrics.suite is not None
    generated = metrics.suite.generate
    header = [
        "task",
        "variant",
        "accuracy",
        "- dense",
        "retained",
        "KL answer",
        *(["generated"] if generated else []),
        "",
    ]
    rows: list[list[object]] = []
    for task, cells in metrics.tasks[length].items():
        remark = "dense answers too little to say much" if metrics.says_little(length, task) else ""
        for name, cell in cells.items():
            rows.append(
                [
                    task if name == "dense" else "",
                    name,
                    _with_error(cell.accuracy),
                    "" if name == "dense" else _with_error(cell.accuracy_minus_dense),
                    ""
                    if name == "dense" or cell.retention is None
                    else f"{cell.retention:.3f} ± {cell.retention_error:.3f}",
                    "" if name == "dense" else cell.kl_answer.mean,
                    *([_with_error(cell.generated)] if generated else []),
                    remark if name == "dense" else "",
                ]
            )
    table(
        f"tasks, {length} tokens, {metrics.suite.num_sequences} sequences each, format {metrics.suite.format}",
        header,
        rows,
    )


def _with_error(estimate: "Estimate | None") -> str:
    return "" if estimate is None else f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"
