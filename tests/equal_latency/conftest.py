"""A tiny model and its profile, made once."""

from collections.abc import Callable

import pytest
from tiny_comparison import LENGTH
from transformers import PreTrainedModel

from sparsesearch.bench.families import random_samples
from sparsesearch.calibration import Calibration
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search_space import SearchSpace


@pytest.fixture(scope="module")
def model(tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def profile(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    samples = random_samples(64, LENGTH, 1, seed=0)
    request = Request(describe(model, "tiny"), SearchSpace.load("mixture"), {LENGTH: Calibration(samples, "random")}, 1)
    return profile_model(model, request, tmp_path_factory.mktemp("profile") / "profile")
