"""Profiling runs: every architecture, interruption and resumption, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sparsesearch.calibration import Calibration, Sample
from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.profiling import run
from sparsesearch.profiling.proxies import OBJECTIVES, length_terms, objective_loss
from sparsesearch.profiling.published import PUBLISHED
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search_space import SearchSpace

SPACE = """
name: test
source: tests
description: every kind
block_tokens: 16
unit: query_head
candidates:
  - {kind: zero}
  - {kind: mean_value}
  - {kind: sink_window, sink: 16, window: [16, {b: 0.5}]}
  - {kind: vertical_slash, vertical: 16, slash: 32}
  - {kind: pooled_topk, keep: {b: 0.3}}
  - {kind: fixed_blocks, keep: 0.4}
"""


def calibration(length: int, count: int = 2, answers: bool = True) -> Calibration:
    generator = torch.Generator().manual_seed(length)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[-3:] = answers
    ids = [torch.randint(0, 64, (length,), generator=generator) for _ in range(count)]
    return Calibration(tuple(Sample(one, mask, "tests") for one in ids), f"tests {length}")


def request_for(model: PreTrainedModel, lengths: tuple[int, ...] = (70, 96), **changes: Any) -> Request:
    space = SearchSpace.parse(SPACE, where="tests")
    return Request(describe(model, "tiny"), space, {n: calibration(n) for n in lengths}, num_probes=2, **changes)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_architecture(any_tiny: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = any_tiny(ids).logits
    profile = profile_model(any_tiny, request_for(any_tiny), tmp_path / "profile")
    with torch.no_grad():
        assert torch.equal(any_tiny(ids).logits, before), "profiling leaves no trace"
    for objective in (
        name for name in OBJECTIVES if name not in PUBLISHED
    ):  # those ask for rules and units of their own
        for granularity in ("query_head", "kv_group"):
            loss = objective_loss(profile, objective, granularity, answer_weight=1.0)
            assert (loss >= 0).all()
            assert (loss[:, 0] == 0).all()
            assert loss[:, 1].sum() > 0, "zero loses something"
    for length in profile.manifest.lengths:
        terms = length_terms(profile, length, "query_head")
        assert terms.proxies["text"][:, 0].max() < 1e-9
        assert (terms.tiles[:, 0] >= terms.tiles.max(1)).all(), "dense computes the most tiles"


def test_interruption_then_resume_gives_the_same_bytes(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    request = request_for(model)
    profile_model(model, request, tmp_path / "whole")
    real, calls = run.score_layer, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(run, "score_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile_model(model, request, tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "shards").rglob("*.safetensors"))) == 5, "only the layer in work is lost"
    with pytest.raises(ArtifactError, match="--resume"):
        Profile.load(tmp_path / "parts")
    with pytest.raises(ArtifactError, match="--resume"):
        profile_model(model, request, tmp_path / "parts")
    calls = 100
    profile_model(model, request, tmp_path / "parts", resume=True)
    assert calls == 100 + 3, "finished layers are not scored again"
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_resume_names_the_field_that_differs(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny("llama")
    profile_model(model, request_for(model), tmp_path / "profile")
    with pytest.raises(ArtifactError, match="another seed"):
        profile_model(model, request_for(model, seed=1), tmp_path / "profile", resume=True)
    with pytest.raises(ArtifactError, match="another calibration"):
        profile_model(model, request_for(model, (70,)), tmp_path / "profile", resume=True)


def test_refuses_a_folder_with_other_files(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds other files"):
        profile_model(tiny("llama"), request_for(tiny("llama")), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_edited_scores_are_refused(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny("llama")
    profile_model(model, request_for(model), tmp_path / "profile")
    path = tmp_path / "profile" / "scores-70.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match="scores-70"):
        Profile.load(tmp_path / "profile")


def test_group_terms_add_heads_before_squaring(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """With one head per KV head both granularities agree; with two they must not be mere sums."""
    one = tiny("llama", num_key_value_heads=4)
    profile = profile_model(one, request_for(one), tmp_path / "one")
    for name, term in length_terms(profile, 70, "kv_group").proxies.items():
        assert term == pytest.approx(length_terms(profile, 70, "query_head").proxies[name]), name
    two = tiny("llama")
    profile = profile_model(two, request_for(two), tmp_path / "two")
    heads, groups = (length_terms(profile, 70, g).proxies for g in ("query_head", "kv_group"))
    assert heads["output_error"].reshape(4, 2, -1).sum(1) == pytest.approx(groups["output_error"])
    assert heads["text"].reshape(4, 2, -1).sum(1) != pytest.approx(groups["text"])


def test_text_alone_still_has_an_answer_proxy(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny("llama")
    plain = Request(describe(model, "tiny"), SearchSpace.parse(SPACE, where="t"), {64: calibration(64, answers=False)})
    profile = profile_model(model, plain, tmp_path / "profile")
    assert length_terms(profile, 64, "query_head").proxies["answer"][:, 1].min() > 0


def test_unequal_sample_counts(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny("llama")
    sets = {64: calibration(64), 80: calibration(80, 3)}
    with pytest.raises(SpecError, match="same number of samples"):
        profile_model(model, Request(describe(model, "t"), SearchSpace.parse(SPACE, where="t"), sets), tmp_path / "p")


@pytest.mark.parametrize("name", ["hylra", "rals"])
def test_objectives_of_reuse_name_their_command(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, name: str
) -> None:
    model = tiny("llama")
    profile = profile_model(model, request_for(model, (70,)), tmp_path / "profile")
    with pytest.raises(SpecError, match=f"search-reuse PROFILE --objective {name}"):
        objective_loss(profile, name, "query_head", answer_weight=1.0)
