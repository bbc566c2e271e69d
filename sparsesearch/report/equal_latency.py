"""The figure of a comparison at equal measured latency."""

from sparsesearch.equal_latency.record import EqualLatency
from sparsesearch.report.plot import Curve, Panel, plot


def equal_latency_plot(found: EqualLatency) -> str:
    """Two panels as SVG: KL to dense and needle accuracy of every family against its measured time."""
    kl, needle = [], []
    for family in found.families:
        own = sorted((row[family] for row in found.targets.values()), key=lambda entry: entry.share)
        kl.append(
            Curve(
                family, [(entry.share, entry.quality.kl_text.mean) for entry in own if entry.quality.kl_text.mean > 0]
            )
        )
        needle.append(Curve(family, [(entry.share, entry.quality.needle.mean) for entry in own]))
    what = "attention" if found.part == "attention" else "prefill"
    axis = f"measured {what} time / dense"
    return plot(
        [
            Panel("KL to dense", axis, "nats per token", kl, log_y=True),
            Panel("needle accuracy", axis, "share of questions answered", needle, zero_y=True),
        ],
        title=f"{found.model}, {found.batch} x {found.length_tokens} tokens, {found.provenance.get('device', '')}",
    )
