"""Fused decoding steps of heads that choose what they read (Quest), through the runtime, beside their prediction.

    python -m sparsesearch.bench.choosing_steps --json out.json [--cost-model h200] [--rows earlier.json] [--runs runs.json]

Some layers of a model with random weights decode behind prompts of 16k to 128k tokens. In a plan `all` every query head reads the keys that it
chooses; in `half` every second KV head streams instead; in `whole` every key is read. With --rows nothing is measured: another cost model
predicts an earlier record. With --runs the calibration's micro-runs of such steps are written too.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsesearch.artifacts import canonical_json, write_bytes
from sparsesearch.bench.model_predicted import heads_of
from sparsesearch.bench.random_model import random_model
from sparsesearch.bench.timing import provenance
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.device.compile_ahead import run_all, steps
from sparsesearch.cost.device.micro_bench import Bench, CompilingBench, Row
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.run_plan import FULL
from sparsesearch.cost.device.step_runs import step_runs
from sparsesearch.cost.device.timing import event_times, timed_of
from sparsesearch.cost.predict import predict
from sparsesearch.errors import SpecError
from sparsesearch.model_shapes import ModelShape, model_shape
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.rules import Rule
from sparsesearch.rules.base import LengthLaw
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.decode_step import DecodeStep
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.live import apply
from sparsesearch.runtime.prepare import sparse_cache
from sparsesearch.workload import Workload

FORMAT = "sparsesearch.bench.choosing_steps"
STEPS = 32
"""Timed; half as many run before."""
SINK = 64
REST_S, LONG_TOKENS = 1.0, 65536
"""After a long prompt: small kernels take a tenth longer for so long after a device has been at its power limit."""


@dataclass(frozen=True)
class Case:
    """One plan behind one prompt, at some batches."""

    plan: str
    prompt_tokens: int
    keep_tokens: int = 2048
    block_tokens: int = 64
    batches: tuple[int, ...] = (1, 8)

    def build(self, info: BaseModelInfo) -> Plan:
        """The plan of a model."""
        chosen = BoundsTopk(keep=LengthLaw(a=self.keep_tokens), sink=SINK)
        stream = SinkWindow(sink=SINK, window=LengthLaw(a=self.keep_tokens))
        whole = SinkWindow(sink=SINK, window=LengthLaw(b=1.0))
        turns: dict[str, tuple[Rule, ...]] = {"all": (chosen,), "half": (chosen, stream), "whole": (whole,)}
        rules, assignments = turns[self.plan], {}
        for path, heads, kv_heads in zip(info.modules, info.num_heads, info.num_kv_heads, strict=True):
            groups = [rules[number % len(rules)].label for number in range(kv_heads)]
            assignments[path] = tuple(label for label in groups for _ in range(heads // kv_heads))
        return Plan(
            base_model=info,
            block_tokens=self.block_tokens,
            unit="kv_group",
            lengths_tokens=(self.prompt_tokens,),
            rules={rule.label: rule for rule in rules},
            assignments=assignments,
        )


CASES = (
    Case("all", 16384),
    Case("all", 65536),
    Case("all", 131072),
    Case("half", 65536),
    Case("whole", 65536),
    Case("all", 65536, block_tokens=128),
    Case("all", 32768, keep_tokens=4096),
    Case("whole", 131072),
)


def step_rows(bench: Bench, shape: ModelShape, cases: Sequence[Case]) -> Iterator[Row]:
    """Seconds of a step of every case at each of its batches, which rise; all sequences of a batch hold the same prompt."""
    model = random_model(shape, device=bench.device, dtype=bench.dtype, max_tokens=max(c.prompt_tokens for c in cases))
    info = describe(model, shape.name)
    for case in cases:
        with torch.no_grad(), apply(model, case.build(info), backend=bench.kernel, allow_other_weights=True):
            room = case.prompt_tokens + (STEPS + STEPS // 2) * len(case.batches)
            cache: Any = sparse_cache(model, max_tokens=room)
            ids = torch.randint(shape.vocab_size, (1, case.prompt_tokens), device=bench.device)
            model(ids, use_cache=True, logits_to_keep=1, **{CACHE_KEYWORD: cache})
            if case.prompt_tokens >= LONG_TOKENS:
                bench.rest(REST_S)
            position, before = case.prompt_tokens, 1
            for batch in case.batches:
                cache.batch_repeat_interleave(batch // before)
                step = DecodeStep(model, cache, first_position=position, fused=True)
                newest = torch.arange(batch, device=bench.device)
                for _ in range(STEPS // 2):
                    step(newest)
                samples = event_times(partial(step, newest), STEPS)
                row = {name: value for name, value in vars(case).items() if name != "batches"}
                model_is = {"model": shape.name, "layers": shape.num_layers, "batch": batch}
                yield bench.row("choosing_step", timed_of(samples), **model_is, **row, context_tokens=position + STEPS)
                position, before = position + STEPS + STEPS // 2, batch


def judged(rows: Sequence[Row], model: DeviceCostModel) -> list[dict[str, Any]]:
    """The rows with what the cost model predicts."""
    found = []
    for row in rows:
        shape = replace(model_shape(row["model"]), num_layers=row["layers"])
        case = Case(row["plan"], row["prompt_tokens"], row["keep_tokens"], row["block_tokens"])
        plan = case.build(heads_of(shape))
        beyond = row["context_tokens"] - row["prompt_tokens"]
        workload = Workload(row["prompt_tokens"], 2 * beyond, row["batch"])  # halfway through is where it was timed
        priced = predict(plan, shape, workload, model)
        assert priced.tpot_s is not None
        found.append(
            row
            | {"predicted_s": priced.tpot_s, "error": priced.tpot_s / row["seconds"] - 1}
            | {"predicted_attention_s": priced.decode_attention_s}
        )
    return found


def micro_runs(bench: Bench) -> Iterator[Row]:
    """What a calibration measures of such steps, compiled first."""
    if torch.device(bench.device).type == "cuda":
        run_all(bench.device, steps(CompilingBench(bench), FULL))
    yield from step_runs(bench, FULL)


def main() -> None:
    """Command line: a line per row on stderr, the record in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--cost-model", help="shipped name or file whose prediction stands beside")
    parser.add_argument(
        "--rows", type=Path, help="an earlier record whose rows are predicted again; needs --cost-model"
    )
    parser.add_argument("--runs", type=Path, help="where to write the micro-runs of such steps")
    parser.add_argument("--model-shape", default="llama3-8b")
    parser.add_argument("--layers", type=int, default=8, help="layers of that model")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    model = None if given.cost_model is None else load_cost_model(given.cost_model)
    if model is not None and not isinstance(model, DeviceCostModel):
        raise SpecError(f"--cost-model must be that of an accelerator, but {given.cost_model} is not.")
    if given.rows is not None:
        if model is None:
            raise SpecError("--rows measures nothing, so the cost model must be known. Pass --cost-model.")
        earlier = json.loads(given.rows.read_text(encoding="utf-8"))
        _write(given.json, earlier | {"cost_model": model.name, "rows": judged(_measured(earlier["rows"]), model)})
        return
    bench, rows = Bench(given.device, "gluon", torch.bfloat16, seed=1), []
    if given.runs is not None:
        runs = list(micro_runs(bench))
        write_bytes(given.runs, canonical_json({"runs": runs}).encode())
    shape = replace(model_shape(given.model_shape), num_layers=given.layers)
    beside = {
        "format": FORMAT,
        "provenance": provenance([" ".join(["python -m sparsesearch.bench.choosing_steps", *sys.argv[1:]])]),
    }
    for row in step_rows(bench, shape, CASES):
        rows.append(row)
        sys.stderr.write(json.dumps(row) + "\n")
        named = {} if model is None else {"cost_model": model.name}
        _write(given.json, beside | named | {"rows": rows if model is None else judged(rows, model)})


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if "predicted" not in name and name != "error"} for row in rows]


def _write(path: Path, content: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
