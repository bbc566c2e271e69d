"""The whole corridor on the embedded model: profile, search, apply, evaluate, check, report."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsesearch import calibration
from sparsesearch.artifacts import require_unfinished, write_bytes
from sparsesearch.block_mask import BlockGrid, density
from sparsesearch.check import judge
from sparsesearch.check_result import CheckResult, Thresholds
from sparsesearch.evaluate import Metrics
from sparsesearch.evaluate.run import evaluate
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.planning import Question
from sparsesearch.presets import preset_path
from sparsesearch.profiling.record import Profile, summary
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.refinement import refine
from sparsesearch.report import render
from sparsesearch.report.front import front_curves
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.runtime.export import export
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.loading import load_model
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import SearchSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = "needle-7m"
LENGTH_TOKENS = 2048
TIMED_LENGTH_TOKENS = 4096
REFERENCE_SAMPLES = 12
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quickstart:
    """What the run found.

    Attributes:
        plan: the plan.
        metrics: dense, `uniform_window` and `plan` on held-out sequences.
        check: the gate's verdict.
        profile_source: `measured here`, or that the shipped reference profile was used.
    """

    plan: Plan
    metrics: Metrics
    check: CheckResult
    profile_source: str

    def summary(self) -> dict[str, Any]:
        """The figures that `--json` prints."""
        row = {name: self.metrics.at(LENGTH_TOKENS, name) for name in self.metrics.variants}
        timed = {name: self.metrics.at(TIMED_LENGTH_TOKENS, name) for name in self.metrics.variants}
        certificate = self.plan.certificate
        return {
            "density": row["plan"].density,
            "density_uniform_window": row["uniform_window"].density,
            "needle_accuracy": {name: cell.needle.mean for name, cell in row.items()},
            "heldout_loss": {name: cell.heldout_loss.mean for name, cell in row.items()},
            "kl_to_dense": {name: cell.kl_text.mean for name, cell in row.items()},
            "prefill_s": {name: cell.prefill_s for name, cell in timed.items()},
            "prefill_length_tokens": TIMED_LENGTH_TOKENS,
            "quality_length_tokens": LENGTH_TOKENS,
            "num_sequences": row["plan"].needle.num_sequences,
            "gap": None if certificate is None else certificate.gap,
            "check_passed": self.check.passed,
            "profile": self.profile_source,
        }


def quickstart(
    out: Path,
    *,
    density_budget: float = 0.25,
    from_scratch: bool = False,
    evaluations: int = 3,
    num_sequences: int = 18,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Quickstart:
    """Run the corridor into `out`, which must be new, empty, or left behind by an interrupted run, which goes on.

    Leaves `profile/`, `sparse_plan.json`, `patched/`, `metrics.json` and `report.html`.

    Args:
        out: the folder.
        density_budget: share of dense attention's tiles that the plan may compute.
        from_scratch: profile here instead of taking the profile that is shipped with the package.
        evaluations: plans that the refinement may replay.
        num_sequences: held-out sequences to judge on.
        seed: of everything that is drawn.
        progress: called with (stage, done, total).

    Raises:
        ArtifactError: `out` holds a finished run, or other files.
        BudgetInfeasibleError: no plan fits the density.
    """
    require_unfinished(out, {"profile", "sparse_plan.json", "patched", "metrics.json"})
    model, tokenizer = load_model(MODEL)
    profile, source = _profile(model, tokenizer, out / "profile", from_scratch, seed, progress)
    question = Question((Budget("density", density_budget),))
    samples = calibration.load("needle", tokenizer, length_tokens=LENGTH_TOKENS, num_samples=6, seed=seed + 1).samples
    plan, _ = refine(model, profile, question, samples, evaluations=evaluations, progress=progress)
    variants = {"uniform_window": uniform_window(profile, density_budget), "plan": plan}
    metrics = _judge(model, tokenizer, variants, num_sequences, seed, progress)
    plan = plan.model_copy(update={"quality": _recorded(metrics)})
    plan.save(out / "sparse_plan.json")
    export(plan, MODEL, out / "patched", overwrite=True)
    metrics.save(out / "metrics.json")
    check = judge(metrics, "plan", Thresholds(recovery=0.9))
    page = render(
        plan,
        metrics,
        pareto=front_curves(profile, "query_head"),
        profile_summary={"source": source, **summary(profile)},
    )
    write_bytes(out / "report.html", page.encode())
    return Quickstart(plan, metrics, check, source)


def uniform_window(profile: Profile, density_budget: float) -> Plan:
    """The baseline: sink 64 and one window for all heads, the narrowest that computes at least the plan's share."""
    manifest = profile.manifest
    grid = BlockGrid(LENGTH_TOKENS, LENGTH_TOKENS, manifest.block_tokens)
    for blocks in range(1, grid.num_k_blocks + 1):
        rule = SinkWindow(sink=64, window=LengthLaw(a=blocks * manifest.block_tokens))
        if density(rule.select(grid), grid) >= density_budget:
            break
    return uniform_plan(manifest.base_model, rule, block_tokens=manifest.block_tokens, lengths_tokens=manifest.lengths)


def reference_request(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", seed: int = 0) -> Request:
    """What the shipped reference profile was made with."""
    samples = calibration.load(
        "needle", tokenizer, length_tokens=LENGTH_TOKENS, num_samples=REFERENCE_SAMPLES, seed=seed
    )
    return Request(describe(model, MODEL), SearchSpace.load("mixture"), {LENGTH_TOKENS: samples}, seed=seed)


def _profile(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    from_scratch: bool,
    seed: int,
    progress: Progress,
) -> tuple[Profile, str]:
    if from_scratch:
        request = reference_request(model, tokenizer, seed)
        return profile_model(model, request, folder, resume=True, progress=progress), "measured here"
    shutil.copytree(preset_path("profiles", MODEL), folder, dirs_exist_ok=True)
    return Profile.load(folder), "shipped reference profile (make it again with --from-scratch)"


def _judge(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plans: dict[str, Plan],
    num_sequences: int,
    seed: int,
    progress: Progress,
) -> Metrics:
    """Quality at the profiled length, time at twice of it, with a few sequences of quality there too."""
    parts = [
        evaluate(
            model,
            tokenizer,
            plans,
            lengths=[length],
            num_sequences=count,
            num_text_sequences=texts,
            timing_rounds=rounds,
            model_name=MODEL,
            seed=seed,
            progress=progress,
        )
        for length, count, texts, rounds in ((LENGTH_TOKENS, num_sequences, 4, 0), (TIMED_LENGTH_TOKENS, 3, 1, 3))
    ]
    first, second = parts
    return first.model_copy(update={"results": first.results | second.results, "data": first.data | second.data})


def _recorded(metrics: Metrics) -> dict[str, Any]:
    """The figures a plan carries about itself."""
    cells = {name: metrics.at(LENGTH_TOKENS, name) for name in metrics.variants}
    return {
        "length_tokens": LENGTH_TOKENS,
        "needle_accuracy": {name: cell.needle.mean for name, cell in cells.items()},
        "kl_to_dense": {name: cell.kl_text.mean for name, cell in cells.items()},
        "heldout_loss": {name: cell.heldout_loss.mean for name, cell in cells.items()},
    }
