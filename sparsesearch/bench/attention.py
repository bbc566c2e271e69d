"""Prefill attention on a device: the tile kernels against cuDNN, FlashAttention-2 and FlexAttention, in one run.

    python -m sparsesearch.bench.attention --json out.json

R = t / (density · t_dense), t_dense of the fastest dense kernel (cuDNN, forced): 1 means that a skipped block costs nothing and a computed
one costs what it costs the fastest dense kernel. Each plan takes turns with that kernel while it is timed (`dense_s` of its row), because the
card's clock depends on what ran before. Density counts tiles of 128 x 128. Every row holds the relative error of its output
against fp64 (`fp64`), cuDNN's included.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsesearch.bench.fp64 import exact_rows, relative_error
from sparsesearch.bench.predicted import shipped_costs
from sparsesearch.bench.timing import Turns, ceilings, median_s, paired, provenance
from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SparseSearchError
from sparsesearch.kernels.dispatch import Backend, run_schedule, schedule_for
from sparsesearch.kernels.schedule import Span, TileSchedule
from sparsesearch.rules.base import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow

PlanName = Literal["dense", "mixed", "sparse", "stream", "equal", "unequal"]
PLANS: tuple[PlanName, ...] = ("dense", "mixed", "sparse", "stream", "equal", "unequal")
BLOCK_TOKENS = 128
LONG = 32768


def plan_rules(name: PlanName, num_heads: int, length: int) -> tuple[Rule, ...]:
    """The rules of one layer.

    mixed: per head dense, or a window of S/32, S/16 or S/8. sparse: windows of S/16. stream: one dense head, the others windows of 512.
    equal, unequal: windows of S/8; and windows of S/16 and S/4 mixed so that about as many blocks are computed.
    """
    match name:
        case "dense":
            return (Dense(),) * num_heads
        case "mixed":
            kinds = (Dense(), _window(length // 32), _window(length // 16), _window(length // 8))
            return tuple(kinds[head % 4] for head in range(num_heads))
        case "sparse":
            return (_window(length // 16),) * num_heads
        case "stream":
            return (Dense(), *(_window(512),) * (num_heads - 1))
        case "equal":
            return (_window(length // 8),) * num_heads
        case "unequal":
            return tuple(_window(length // 4 if head % 3 == 0 else length // 16) for head in range(num_heads))


def _window(tokens: int) -> SinkWindow:
    return SinkWindow(sink=BLOCK_TOKENS, window=LengthLaw(a=max(tokens, BLOCK_TOKENS)))


def run(
    *,
    lengths: Sequence[int] = (4096, 8192, 32768, 131072),
    head_dims: Sequence[int] = (128, 64),
    plans: Sequence[PlanName] = PLANS,
    causal: Sequence[bool] = (True, False),
    num_heads: int = 32,
    num_kv_heads: int = 8,
    backends: Sequence[Backend] = ("gluon", "triton"),
    flex_lengths: Sequence[int] = (8192, 32768),
    budget_s: float = 0.1,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Time every case and return rows, ceilings and provenance.

    Args:
        lengths: sequence lengths, batch 1. Beyond LONG, only our first backend and cuDNN are timed.
        head_dims: head widths, bf16.
        plans: see `plan_rules`.
        causal: which masks; the full mask is timed up to 32k.
        num_heads: query heads.
        num_kv_heads: KV heads.
        backends: ours, timed on every plan.
        flex_lengths: where to time FlexAttention with the identical block mask, causal (it compiles once per shape).
        budget_s: device time per row.
        command: recorded as the command line.
        progress: called with the record so far whenever a row is finished.
    """
    top = ceilings()
    rows: list[dict[str, Any]] = []
    found = {
        "format": "sparsesearch.bench.attention",
        "provenance": provenance(command),
        "ceilings": top,
        "rows": rows,
    }

    def record(row: dict[str, Any]) -> None:
        if "seconds" in row:
            row["tflop_per_s"] = row.pop("flop") / row["seconds"] / 1e12
            row["ceiling_share"] = row["tflop_per_s"] * 1e12 / top["matmul_flop_per_s"]
        rows.append(row)
        progress(found)

    for head_dim in head_dims:
        for is_causal in causal:
            for length in lengths:
                if not is_causal and length > LONG:
                    continue
                case = _Case(length, head_dim, num_heads, num_kv_heads, is_causal, budget_s)
                case.dense(record)
                ours = backends if length <= LONG else backends[:1]
                for name in plans:
                    case.sparse(name, ours, is_causal and length in flex_lengths, record)
                del case
                torch.cuda.empty_cache()
    return found


class _Case:
    """One shape: tensors, dense times, and the plans on it."""

    def __init__(
        self, length: int, head_dim: int, num_heads: int, num_kv_heads: int, causal: bool, budget_s: float
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(length + head_dim)

        def normal(heads: int) -> Tensor:
            shape = (1, heads, length, head_dim)
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

        self.q, self.k, self.v = normal(num_heads), normal(num_kv_heads), normal(num_kv_heads)
        self.grid = BlockGrid(length, length, BLOCK_TOKENS, causal=causal)
        self.budget_s = budget_s
        self.shape: dict[str, Any] = {"head_dim": head_dim, "length": length, "causal": causal}
        self.costs = shipped_costs()

    def dense(self, record: Callable[[dict[str, Any]], None]) -> None:
        """cuDNN, forced, and FlashAttention-2, each by itself."""
        length, head_dim, num_heads = self.grid.q_len, self.q.shape[-1], self.q.shape[1]
        flop = 4 * num_heads * length * length * head_dim / (2 if self.grid.causal else 1)
        exact = self._exact(plan_rules("dense", num_heads, length))

        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash2", SDPBackend.FLASH_ATTENTION)):
            if name == "flash2" and length > LONG:
                continue
            error = relative_error(self._attend(backend), exact)
            seconds = median_s(partial(self._attend, backend), budget_s=self.budget_s)
            row = {"kernel": name, "plan": "dense", "density": 1.0, "seconds": seconds, "flop": flop}
            record(self.shape | row | {"fp64_error": error})

    def _attend(self, backend: SDPBackend = SDPBackend.CUDNN_ATTENTION) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=self.grid.causal, enable_gqa=True)

    def _exact(self, rules: tuple[Rule, ...]) -> Tensor:
        return exact_rows(self.q, self.k, self.v, rules, self.grid, scale=self.q.shape[-1] ** -0.5)

    def sparse(
        self,
        name: PlanName,
        backends: Sequence[Backend],
        flex: bool,
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        """Our backends and FlexAttention on one plan."""
        rules = plan_rules(name, self.q.shape[1], self.grid.q_len)
        spans = (Span(self.grid),)
        scale = self.q.shape[-1] ** -0.5
        exact = self._exact(rules)
        density = None
        for backend in backends:
            row: dict[str, Any] = {**self.shape, "kernel": backend, "plan": name}
            try:
                schedule = schedule_for(self.q, self.k, spans, rules, backend)
                density = schedule.density

                def attend() -> Tensor:
                    return run_schedule(self.q, self.k, self.v, schedule, scale=scale, kernel=backend)[0]  # noqa: B023

                row["fp64_error"] = relative_error(attend(), exact)
                ours, dense = paired(attend, self._attend, budget_s=self.budget_s)
                record(row | self._costs(schedule, ours, dense) | self._predicted(schedule, backend, ours.hz))
            except (
                RuntimeError,
                SparseSearchError,
            ) as error:  # a case that fails is a row that says so, never a missing one
                record(row | {"error": f"{type(error).__name__}: {error}"[:400]})
        if flex and density is not None:
            row = {**self.shape, "kernel": "flex", "plan": name}
            try:
                record(row | self._flex(rules, density, exact))
            except RuntimeError as error:  # inductor's own kinds included
                record(row | {"error": f"{type(error).__name__}: {error}"[:400]})

    def _costs(self, schedule: TileSchedule, ours: Turns, dense: Turns) -> dict[str, Any]:
        shape, seconds, dense_s = schedule.shape, ours.seconds, dense.seconds
        return {
            "density": schedule.density,
            "seconds": seconds,
            "flop": 4 * schedule.num_blocks * shape.rows * shape.keys * self.q.shape[-1],
            "dense_s": dense_s,
            "R": seconds / (schedule.density * dense_s),
            "makespan": schedule.makespan,
            "blocks": schedule.num_blocks,
            "hz": ours.hz,
            "dense_hz": dense.hz,
        }

    def _predicted(self, schedule: TileSchedule, backend: Backend, hz: float | None) -> dict[str, Any]:
        """What the shipped cost model says, if it is of this device and kernel: of the kernel alone for long, and at the clock met here."""
        if self.costs is None or self.costs.kernel != backend:
            return {}
        heads = {"num_kv_heads": self.k.shape[1], "head_dim": self.k.shape[3]}
        found = {"predicted_s": self.costs.attention_s(schedule, **heads)}
        if hz is None or self.costs.table.boost_hz is None:
            return found
        return found | {"predicted_at_clock_s": self.costs.attention_s(schedule, **heads, hz=hz)}

    def _flex(self, rules: tuple[Rule, ...], density: float, exact: Tensor) -> dict[str, Any]:
        from torch.nn.attention.flex_attention import flex_attention

        mask = block_mask(rules, self.grid)
        compiled: Any = torch.compile(flex_attention, dynamic=False)

        def attend() -> Tensor:
            out: Tensor = compiled(self.q, self.k, self.v, block_mask=mask, enable_gqa=True)
            return out

        error = relative_error(attend(), exact)
        own, dense = paired(attend, self._attend, budget_s=self.budget_s)
        seconds, dense_s = own.seconds, dense.seconds
        blocks = density * self.q.shape[1] * int(self.grid.reachable().sum())
        flop = 4 * blocks * BLOCK_TOKENS**2 * self.q.shape[-1]
        costs = {"density": density, "seconds": seconds, "flop": flop, "dense_s": dense_s}
        return costs | {"R": seconds / (density * dense_s)} | {"fp64_error": error}


def _causal_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    return q_index >= k_index


def block_mask(rules: tuple[Rule, ...], grid: BlockGrid) -> Any:
    """FlexAttention's BlockMask with the same tiles, full and partial ones told apart in the same way."""
    from torch.nn.attention.flex_attention import BlockMask

    distinct = tuple(dict.fromkeys(rules))
    chosen = torch.stack([rule.select(grid) for rule in distinct])[[distinct.index(rule) for rule in rules]][
        None
    ].cuda()
    partial = chosen & grid.diagonal("cuda") if grid.causal else torch.zeros_like(chosen)
    full = chosen & ~partial

    def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(mask.int(), dim=-1, descending=True, stable=True)
        return mask.sum(-1, dtype=torch.int32), order.int()

    side = (grid.block_tokens, grid.block_tokens)
    return BlockMask.from_kv_blocks(
        *lists(partial), *lists(full), BLOCK_SIZE=side, mask_mod=_causal_mod if grid.causal else None
    )


def main() -> None:
    """Command line: all cases, a line of JSON per row on stderr, the record in a file, written again with every row: a run may be cut short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768, 131072])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out (it compiles for minutes)")
    parser.add_argument("--no-full", action="store_true", help="causal only")
    parser.add_argument("--backends", nargs="+", choices=("gluon", "triton"), default=["gluon", "triton"])
    parser.add_argument("--budget-s", type=float, default=0.1, help="device time per row")
    given = parser.parse_args()

    def keep(record: dict[str, Any]) -> None:
        sys.stderr.write(json.dumps(record["rows"][-1]) + "\n")
        given.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    run(
        lengths=given.lengths,
        head_dims=given.head_dims,
        flex_lengths=() if given.no_flex else (8192, 32768),
        causal=(True,) if given.no_full else (True, False),
        backends=given.backends,
        budget_s=given.budget_s,
        progress=keep,
    )


if __name__ == "__main__":
    main()
