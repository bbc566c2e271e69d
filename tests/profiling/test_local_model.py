"""The loss expanded around a plan against the loss itself, one change at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparsesearch.bench.families import random_samples
from sparsesearch.calibration import Calibration
from sparsesearch.evaluate.reference import DenseReference
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.profiling import local_model
from sparsesearch.profiling.local_model import loss_around
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.refinement import true_loss
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search_space import SearchSpace

LENGTH, NOW = 127, 2
RULES: tuple[Rule, ...] = tuple(
    parse_rule(rule, where="test")
    for rule in (
        {"kind": "dense"},
        {"kind": "zero"},
        *({"kind": "sink_window", "sink": 16, "window": width} for width in (48, 32, 16)),
    )
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def profile(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    space = SearchSpace("test", "", "", 16, "query_head", RULES)
    data = Calibration(random_samples(64, LENGTH, 1, seed=0), "random tokens")
    folder: Path = tmp_path_factory.mktemp("local")
    return profile_model(model, Request(describe(model, "tiny"), space, {LENGTH: data}, num_probes=1), folder / "p")


def plan_of(profile: Profile, choice: list[int]) -> Plan:
    """Eight heads, layer by layer."""
    plan = uniform_plan(profile.manifest.base_model, RULES[NOW], block_tokens=16, lengths_tokens=(LENGTH,))
    labels = [RULES[candidate].label for candidate in choice]
    modules = profile.manifest.base_model.modules
    assignments = {module: tuple(labels[4 * layer : 4 * layer + 4]) for layer, module in enumerate(modules)}
    return plan.model_copy(update={"rules": {rule.label: rule for rule in RULES}, "assignments": assignments})


def around(model: PreTrainedModel, profile: Profile, *, num_probes: int) -> np.ndarray:
    choice = [NOW] * 8
    samples = random_samples(64, LENGTH, 3, seed=1)
    return loss_around(
        model,
        plan_of(profile, choice),
        choice,
        profile,
        samples,
        "query_head",
        answer_weight=5.0,
        num_probes=num_probes,
    ).change


@pytest.fixture(scope="module")
def truth(model: PreTrainedModel, profile: Profile) -> np.ndarray:
    """What each change of one head really does."""
    reference = DenseReference(model, random_samples(64, LENGTH, 3, seed=1))

    def loss(choice: list[int]) -> float:
        return float(true_loss(reference.compare(plan_of(profile, choice)), 5.0).mean())

    now = loss([NOW] * 8)
    return np.array(
        [
            [loss([NOW] * unit + [candidate] + [NOW] * (7 - unit)) - now for candidate in range(len(RULES))]
            for unit in range(8)
        ]
    )


def test_changes_are_ranked_as_the_loss_itself_ranks_them(
    model: PreTrainedModel, profile: Profile, truth: np.ndarray
) -> None:
    """And what undoes a loss has a negative sign. The last term is of second order only, so values are compared loosely."""
    found = around(model, profile, num_probes=16)
    assert (found[:, NOW] == 0).all()
    others = np.arange(len(RULES)) != NOW
    assert spearmanr(found[:, others].ravel(), truth[:, others].ravel()).statistic > 0.95
    assert (np.sign(found[:, others]) == np.sign(truth[:, others])).mean() > 0.9
    np.testing.assert_allclose(found, truth, rtol=1.0, atol=0.1 * float(np.abs(truth).max()))


def test_steadied_curvature_of_one_probe_ranks_better(
    model: PreTrainedModel, profile: Profile, truth: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = np.arange(len(RULES)) != NOW

    def rank() -> float:
        found = around(model, profile, num_probes=1)
        return float(spearmanr(found[:, others].ravel(), truth[:, others].ravel()).statistic)

    steadied = rank()
    monkeypatch.setattr(local_model, "moderated", lambda squares, error, degrees: squares)
    assert steadied > 0.9 > rank()
