"""What decoding loses at a share of dense's predicted time per token, by windows, by Quest's choices and by both: predicted beside measured.

    python -m sparsesearch.bench.decode_quality PROFILE --json out.json [--at 0.2 0.3 0.5] [--device cuda]

The profile must hold the rules of space `mixture_served`. Plans leave the prompt dense: only decode rules are searched, at budgets in time per
token. Each is judged on held-out needle sequences whose last tokens it decodes one by one.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsesearch.artifacts import write_bytes
from sparsesearch.cost import load_cost_model
from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.evaluate.estimate import Estimate
from sparsesearch.evaluate.reference import Comparison
from sparsesearch.evaluate.run import compare_all, held_out_parts, provenance
from sparsesearch.plan import Plan
from sparsesearch.planning import Question, find_choice, write_plan
from sparsesearch.profiling.proxies import chooses_in_steps, length_terms
from sparsesearch.profiling.record import Profile, summary
from sparsesearch.runtime.loading import load_model
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Decoding
from sparsesearch.workload import parse_workload

FORMAT = "sparsesearch.bench.decode_quality"
FAMILIES = ("windows and choices", "windows", "choices")


def family_space(profile: Profile, family: str) -> SearchSpace:
    """The candidates of a family: those that choose for every decoded token, those that do not, or all."""
    whole = SearchSpace.load(profile.manifest.space)
    chooses = dict(zip(profile.labels, chooses_in_steps(profile).tolist(), strict=True))
    wanted = {"windows": (False,), "choices": (True,)}.get(family, (False, True))
    kept = (rule for rule in whole.candidates if rule.kind == "dense" or chooses[rule.label] in wanted)
    return replace(whole, candidates=tuple(kept))


def searched(profile: Profile, question: Question) -> tuple[Plan, dict[str, Any]]:
    """The plan of least loss, and what is predicted of it."""
    table, solution = find_choice(profile, question)
    plan = write_plan(profile, question, table, solution.choice, solution)
    rows = [row for row, unit in enumerate(table.units) if isinstance(unit, Decoding)]
    columns = profile.indices(() if question.space is None else question.space.candidates)
    chosen = np.array([columns[candidate] for candidate in solution.choice[rows]])
    units = np.arange(len(rows))
    predicted = [length_terms(profile, n, "kv_group").proxies["decode_text"] for n in profile.manifest.lengths]
    return plan, {
        "loss": solution.loss,
        "gap": solution.gap,
        "tpot_share": max(solution.used["tpot"].values()),
        "kv_heads_that_choose": int(chooses_in_steps(profile)[chosen].sum()),
        "kv_heads": len(rows),
        "predicted_kl": float(np.mean([terms[units, chosen].sum() for terms in predicted])),
    }


def plans_of(
    profile: Profile, question: Question, shares: Sequence[float]
) -> Iterator[tuple[str, Plan, dict[str, Any]]]:
    """(name, plan, predictions) of every family at every share."""
    for share in shares:
        for family in FAMILIES:
            asked = replace(question, budgets=(Budget("tpot", share),), space=family_space(profile, family))
            try:
                plan, predicted = searched(profile, asked)
            except BudgetInfeasibleError as error:
                sys.stderr.write(f"{family} at {share:g}: {error}\n")
                continue
            yield f"{family}, {share:g}", plan, {"family": family, "share": share, **predicted}


def judged(found: Comparison) -> dict[str, Any]:
    """Means of what was measured."""
    means = {name: Estimate.of(getattr(found, name).tolist()) for name in ("kl_text", "kl_answer")}
    means["needle"] = Estimate.of_share(found.needle.tolist())
    return {name: None if mean is None else mean.model_dump() for name, mean in means.items()}


def main() -> None:
    """Command line: a line per plan on stderr, the record in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--at", type=float, nargs="+", default=[0.2, 0.3, 0.5], help="shares of dense's time per token")
    parser.add_argument("--workload", default="prompt=2048,generate=256,batch=8")
    parser.add_argument("--cost-model", default="roofline:h200")
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--num-sequences", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    profile = Profile.load(given.profile)
    base, length = profile.manifest.base_model.name_or_path, max(profile.manifest.lengths)
    model, tokenizer = load_model(base, device=given.device, dtype="auto", with_plan=False)
    question = Question(
        (), granularity="kv_group", decode="separate", cost_model=load_cost_model(given.cost_model), dtype_bytes=2,
        workloads=(parse_workload(given.workload),),
    )  # fmt: skip
    rows = {name: (plan, predicted) for name, plan, predicted in plans_of(profile, question, given.at)}
    parts = held_out_parts(tokenizer, length, given.num_sequences, seed=1)
    samples = [sample for part in parts[:-1] for sample in part.samples]
    variants: dict[str, Plan | None] = {"dense": None, **{name: plan for name, (plan, _) in rows.items()}}
    found, _ = compare_all(model, variants, samples, decode_tokens=given.decode_tokens)
    record = {
        "format": FORMAT, "workload": given.workload, "cost_model": given.cost_model, "length": length,
        "decode_tokens": given.decode_tokens, "profile": summary(profile), "dense_needle": judged(found["dense"])["needle"],
        "rows": [predicted | judged(found[name]) for name, (_, predicted) in rows.items()],
        "provenance": provenance(model, 1, " ".join(["python -m sparsesearch.bench.decode_quality", *sys.argv[1:]])),
    }  # fmt: skip
    for row in record["rows"]:
        sys.stderr.write(json.dumps(row) + "\n")
    write_bytes(given.json, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
