"""Families at equal measured latency on a model with random weights: profile it, then compare.

    python -m sparsesearch.bench.families --json out.json --model-shape llama3-8b --length 4096 --at 0.5

What random weights lose says nothing about language; it says whether the search spends a device's time where the outputs move least.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from transformers import PreTrainedModel

from sparsesearch.bench.random_model import random_model
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.cost import CostModel, load_cost_model
from sparsesearch.cost.shipped import shipped_for
from sparsesearch.equal_latency.compare import compare_at_latency
from sparsesearch.equal_latency.ladders import DEFAULT_FAMILIES
from sparsesearch.equal_latency.record import EqualLatency
from sparsesearch.equal_latency.settle import Progress, Setting
from sparsesearch.errors import SpecError
from sparsesearch.model_shapes import ModelShape, model_shape
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search_space import SearchSpace

ANSWER_TOKENS = 16


def random_samples(vocab_size: int, length: int, count: int, *, seed: int) -> tuple[Sample, ...]:
    """Sequences of random tokens; the last ones count as answers, so that both axes of the profile have something to measure."""
    generator = torch.Generator().manual_seed(seed)
    answer = torch.zeros(length, dtype=torch.bool)
    answer[-min(ANSWER_TOKENS, length - 1) :] = True
    return tuple(
        Sample(torch.randint(vocab_size, (length,), generator=generator), answer, "random tokens") for _ in range(count)
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, required=True, help="where to write the record")
    add("--model-shape", default="llama3-8b")
    add("--layers", type=int, help="take only so many of its layers")
    add("--length", type=int, default=4096)
    add("--batch", type=int, default=1)
    add("--at", type=float, nargs="+", default=[0.5], help="shares of dense's time")
    add("--families", nargs="+", default=list(DEFAULT_FAMILIES))
    add("--num-samples", type=int, default=2, help="of the profile")
    add("--num-probes", type=int, default=4, help="of the profile")
    add("--num-sequences", type=int, default=8, help="judged")
    add("--choose-sequences", type=int, default=4, help="on which the first family chooses; 0: it does not")
    add("--rounds", type=int, default=9, help="of the final measurement")
    add("--time-limit", type=float, default=3600, help="seconds per target after which no step begins")
    add("--refine", type=int, default=0, help="most steps that improve every family's plan")
    add("--space", default="mixture")
    add("--block-tokens", type=int, help="side of a tile; the space's own by default")
    add("--profile", type=Path, help="kept there, and continued if it is there already")
    add("--profile-only", action="store_true", help="stop when --profile is there")
    add("--resume", action="store_true", help="start from the budgets in --json of an earlier run")
    add("--cost-model", help="the device's own by default")
    add("--device", default="cuda")
    return parser.parse_args()


def _model(given: argparse.Namespace) -> tuple[PreTrainedModel, ModelShape]:
    shape = model_shape(given.model_shape)
    shape = replace(shape, num_layers=given.layers or shape.num_layers)
    dtype = torch.bfloat16 if given.device.startswith("cuda") else torch.float32
    return random_model(shape, device=given.device, dtype=dtype), shape


def _profiled(
    given: argparse.Namespace, model: PreTrainedModel, vocab_size: int, folder: Path, progress: Progress
) -> Profile:
    space = SearchSpace.load(given.space)
    samples = random_samples(vocab_size, given.length, given.num_samples, seed=0)
    request = Request(
        describe(model, given.model_shape),
        space if given.block_tokens is None else space.in_blocks_of(given.block_tokens),
        {given.length: Calibration(samples, "random tokens")},
        num_probes=given.num_probes,
    )
    return profile_model(model, request, folder, resume=given.profile is not None, progress=progress)


def _compared(
    given: argparse.Namespace,
    model: PreTrainedModel,
    vocab_size: int,
    profile: Profile,
    costs: CostModel,
    progress: Progress,
) -> EqualLatency:
    judged = random_samples(vocab_size, given.length, 2 * given.num_sequences, seed=1)
    setting = Setting(
        given.at, given.families, given.batch, "attention", rounds=max(1, given.rounds // 2), final_rounds=given.rounds,
        time_limit_s=given.time_limit, steps=given.refine,
    )  # fmt: skip
    return compare_at_latency(
        model,
        profile,
        setting,
        costs,
        judged[: given.num_sequences],
        judged[given.num_sequences :],
        choose_on=random_samples(vocab_size, given.length, given.choose_sequences, seed=2),
        command=" ".join(["python -m sparsesearch.bench.families", *sys.argv[1:]]),
        begun=EqualLatency.load(given.json) if given.resume and given.json.exists() else None,
        saved=lambda record: record.save(given.json),
        progress=progress,
    )


def _say(found: EqualLatency) -> None:
    for target, row in found.targets.items():
        for family, entry in row.items():
            sys.stderr.write(
                f"{target} {family}: time {entry.share:.3f} ± {entry.share_error:.3f}, density {entry.quality.density:.3f}, "
                f"KL {entry.quality.kl_text.mean:.3g}, minus the first's {entry.excess['kl'].mean:+.3g} ± "
                f"{entry.excess['kl'].standard_error:.2g}\n"
            )


def main() -> None:
    """Command line: progress on stderr, the record in a file."""
    given, begin = _arguments(), perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        at_s = round(perf_counter() - begin, 1)
        sys.stderr.write(json.dumps({"at_s": at_s, "stage": stage, "done": done, "of": total}) + "\n")

    costs = load_cost_model(given.cost_model) if given.cost_model else shipped_for(given.device)
    if costs is None:
        raise SpecError(
            "a cost model of this device must be known, but nobody has measured it. Pass --cost-model FILE."
        )
    model, shape = _model(given)
    with tempfile.TemporaryDirectory() as folder:
        profile = _profiled(given, model, shape.vocab_size, given.profile or Path(folder) / "profile", progress)
        if not given.profile_only:
            _say(_compared(given, model, shape.vocab_size, profile, costs, progress))


if __name__ == "__main__":
    main()
