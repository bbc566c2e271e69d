"""A tiny model and its profile, made once."""

import pytest
import torch
import transformers
from tiny_comparison import LENGTH
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsesearch.bench.families import random_samples
from sparsesearch.calibration import Calibration
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search_space import SearchSpace


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=64, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def profile(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    samples = random_samples(64, LENGTH, 1, seed=0)
    request = Request(describe(model, "tiny"), SearchSpace.load("mixture"), {LENGTH: Calibration(samples, "random")}, 1)
    return profile_model(model, request, tmp_path_factory.mktemp("profile") / "profile")
