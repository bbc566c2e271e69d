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

from sparsesearch.bench.random_model import random_model
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.shipped import shipped_for
from sparsesearch.equal_latency.compare import compare_at_latency
from sparsesearch.equal_latency.ladders import DEFAULT_FAMILIES
from sparsesearch.equal_latency.record import EqualLatency
from sparsesearch.equal_latency.settle import Setting
from sparsesearch.errors import SpecError
from sparsesearch.model_shapes import model_shape
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


def main() -> None:
    """Command line: progress on stderr, the record in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--model-shape", default="llama3-8b")
    parser.add_argument("--layers", type=int, help="take only so many of its layers")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--at", type=float, nargs="+", default=[0.5], help="shares of dense's time")
    parser.add_argument("--families", nargs="+", default=list(DEFAULT_FAMILIES))
    parser.add_argument("--num-samples", type=int, default=2, help="of the profile")
    parser.add_argument("--num-probes", type=int, default=4, help="of the profile")
    parser.add_argument("--num-sequences", type=int, default=8, help="judged")
    parser.add_argument(
        "--choose-sequences",
        type=int,
        default=4,
        help="on which the first family chooses among its parts; 0: it does not",
    )
    parser.add_argument("--rounds", type=int, default=9, help="of the final measurement")
    parser.add_argument(
        "--time-limit", type=float, default=3600, help="seconds per target after which budgets move no more"
    )
    parser.add_argument("--refine", type=int, default=0, help="most steps that improve every family's plan")
    parser.add_argument("--space", default="mixture")
    parser.add_argument("--block-tokens", type=int, help="side of a tile; the space's own by default")
    parser.add_argument("--profile", type=Path, help="kept there, and continued if it is there already")
    parser.add_argument("--profile-only", action="store_true", help="stop when --profile is there")
    parser.add_argument("--resume", action="store_true", help="start from the budgets in --json of an earlier run")
    parser.add_argument("--cost-model", help="the device's own by default")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    begin = perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        sys.stderr.write(
            json.dumps({"at_s": round(perf_counter() - begin, 1), "stage": stage, "done": done, "of": total}) + "\n"
        )

    costs = load_cost_model(given.cost_model) if given.cost_model else shipped_for(given.device)
    if costs is None:
        raise SpecError(
            "a cost model of this device must be known, but nobody has measured it. Pass --cost-model FILE."
        )
    shape = model_shape(given.model_shape)
    shape = replace(shape, num_layers=given.layers or shape.num_layers)
    dtype = torch.bfloat16 if given.device.startswith("cuda") else torch.float32
    model = random_model(shape, device=given.device, dtype=dtype)
    samples = random_samples(shape.vocab_size, given.length, given.num_samples, seed=0)
    judged = random_samples(shape.vocab_size, given.length, 2 * given.num_sequences, seed=1)
    choose_on = random_samples(shape.vocab_size, given.length, given.choose_sequences, seed=2)
    space = SearchSpace.load(given.space)
    request = Request(
        describe(model, given.model_shape),
        space if given.block_tokens is None else space.in_blocks_of(given.block_tokens),
        {given.length: Calibration(samples, "random tokens")},
        num_probes=given.num_probes,
    )
    begun = EqualLatency.load(given.json) if given.resume and given.json.exists() else None
    with tempfile.TemporaryDirectory() as folder:
        kept = given.profile is not None
        profile = profile_model(
            model, request, given.profile or Path(folder) / "profile", resume=kept, progress=progress
        )
        if given.profile_only:
            return
        setting = Setting(
            given.at,
            given.families,
            given.batch,
            "attention",
            rounds=max(1, given.rounds // 2),
            final_rounds=given.rounds,
            time_limit_s=given.time_limit,
            steps=given.refine,
        )
        needles, text = judged[: given.num_sequences], judged[given.num_sequences :]
        found = compare_at_latency(
            model, profile, setting, costs, needles, text, choose_on=choose_on, command=" ".join(["python -m sparsesearch.bench.families", *sys.argv[1:]]), begun=begun,
            saved=lambda record: record.save(given.json), progress=progress,
        )  # fmt: skip
    for target, row in found.targets.items():
        for family, entry in row.items():
            sys.stderr.write(
                f"{target} {family}: time {entry.share:.3f} ± {entry.share_error:.3f}, density {entry.quality.density:.3f}, "
                f"KL {entry.quality.kl_text.mean:.3g}, minus the first's {entry.excess['kl'].mean:+.3g} ± "
                f"{entry.excess['kl'].standard_error:.2g}\n"
            )


if __name__ == "__main__":
    main()
