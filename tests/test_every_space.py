"""Every search space that language models have, from profile to tokens: profiled, searched, applied, and equal to the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsesearch
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.errors import SpecError
from sparsesearch.planning import Question
from sparsesearch.presets import preset_names
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.replayed_search import search_plan
from sparsesearch.rules import rule_kinds
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.oracle import oracle_logits
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import SearchSpace

LENGTH = 600
FOR_LONG = {
    "flex_prefill": 0.97,
    "minference_released": None,
    "token_sparse": 0.9,
    "power_attention": 0.9,
    "tri_shape": 0.9,
}
"""Spaces whose published budgets keep much, or all, of a prompt this short, and the density that they can reach."""
SPACES = [
    name
    for name in preset_names("search_spaces")
    if len((menu := SearchSpace.load(name)).candidates) > 1
    and not any(rule_kinds()[rule.kind].needs_layout for rule in menu.candidates)
]


def sample() -> Sample:
    answers = torch.arange(LENGTH) >= LENGTH - 4
    return Sample(torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(3)), answers, "tests")


@pytest.mark.parametrize("name", SPACES)
def test_a_plan_of_it_computes_what_it_says(name: str, tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", max_position_embeddings=1024, head_dim=16)
    calibration = {LENGTH: Calibration((sample(),), "tests")}
    request = Request(describe(model, "tiny"), SearchSpace.load(name), calibration, num_probes=1)
    profile = profile_model(model, request, tmp_path / "profile")
    density = FOR_LONG.get(name, 0.8)
    if density is None:
        with pytest.raises(SpecError, match="every one computes all tiles there"):
            search_plan(profile, Question(budgets=(Budget("density", 0.9),)))
        return
    plan = search_plan(profile, Question(budgets=(Budget("density", density),), granularity="kv_group"))
    assert plan.budgets[0].predicted[str(LENGTH)] <= density + 1e-9
    ids = sample().input_ids[:203]
    with torch.no_grad(), sparsesearch.apply(model, plan):
        exact = oracle_logits(model, ids, 200)
        output = model(ids[None, :200], use_cache=True)
        found = [output.logits[0]]
        for token in ids[200:].split(1):
            output = model(token[None], **{CACHE_KEYWORD: output[CACHE_KEYWORD]})
            found.append(output.logits[0])
    assert (torch.cat(found) - exact).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * exact.abs().max()
