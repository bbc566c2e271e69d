"""Profiles of a tiny random transformer: errors that a run of the candidate confirms, resuming, refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import STEPS, Run, make_run, profile, request_of

from sparsesearch.denoising.planning import write_step_plan
from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.run import profile_transformer
from sparsesearch.runtime.diffusion.attention import LayerCall, SparseLayer
from sparsesearch.runtime.diffusion.live import apply_to_transformer, output_weights


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


@pytest.fixture(scope="module")
def made(run: Run, tmp_path_factory: pytest.TempPathFactory) -> DenoisingProfile:
    return profile(run, tmp_path_factory.mktemp("profile") / "p")


def test_errors_are_those_of_running_the_candidate(run: Run, tmp_path: Path) -> None:
    """The first layer at the one captured step of the first range: every candidate through the runtime, on a dense trajectory."""
    made = profile(run, tmp_path / "p", captured_per_range=1)
    captured = made.manifest.captured[0][0]
    weight = output_weights(run.model)["blocks.0.attn1"].view(-1, 2, 16)
    for column in range(1, len(made.manifest.candidates)):
        found: list[torch.Tensor] = []
        choice = torch.zeros(made.error.shape[:3], dtype=torch.long)
        choice[0, 0] = column
        with apply_to_transformer(run.model, write_step_plan(made, choice.flatten().numpy(), density=1.0)) as applied:
            layer = applied.layers["blocks.0.attn1"]

            def probe(
                seen: LayerCall, layer: SparseLayer = layer, found: list[torch.Tensor] = found
            ) -> torch.Tensor | None:
                if seen.path != "blocks.0.attn1":
                    return None
                dense = (seen.q @ seen.k.mT * seen.scale).softmax(-1) @ seen.v
                if seen.call.step == (captured, STEPS):
                    sparse = layer.attend(seen.q, seen.k, seen.v, seen.rules, seen.call, seen.scale)
                    delta = torch.einsum("bhtd,ohd->bhto", sparse - dense, weight).square().sum((2, 3))
                    whole = torch.einsum("bhtd,ohd->bto", dense, weight).square().sum((1, 2))
                    found.append((delta / whole[:, None]).mean(0))
                return dense

            applied.probe(probe)
            run()
        torch.testing.assert_close(made.error[0, 0, :, column], found[0], rtol=1e-3, atol=1e-7)


def test_dense_has_no_error_and_all_tiles(made: DenoisingProfile) -> None:
    assert float(made.error[..., 0].abs().max()) < 1e-9
    assert (made.tiles[..., 0] == made.tiles[..., 0].max()).all()
    zero = [rule.kind for rule in made.manifest.candidates].index("zero")
    assert (made.tiles[..., zero] == 0).all()
    assert (made.error[..., zero] > made.error[..., 1:5].min(-1).values).all()


def test_wider_candidates_lose_less(made: DenoisingProfile) -> None:
    labels = [rule.label for rule in made.manifest.candidates]
    narrow, wide = (labels.index(f"calibrated_tiles(keep={keep},scope=row,order=identity)") for keep in ("0.25", "0.5"))
    assert (made.error[..., wide] <= made.error[..., narrow]).all()
    assert (made.tiles[..., wide] > made.tiles[..., narrow]).all()


def test_an_interrupted_profile_goes_on(run: Run, made: DenoisingProfile, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "errors" and done == 2:
            raise Stop

    with pytest.raises(Stop):
        profile_transformer(run.model, run, request_of(run), tmp_path / "p", progress=progress)
    assert "_diffusers_hook" not in run.model.__dict__
    with pytest.raises(ArtifactError, match="--resume"):
        profile_transformer(run.model, run, request_of(run), tmp_path / "p")
    with pytest.raises(ArtifactError, match="another captured"):
        profile_transformer(run.model, run, request_of(run, captured_per_range=1), tmp_path / "p", resume=True)
    before = run.calls
    found = profile_transformer(run.model, run, request_of(run), tmp_path / "p", resume=True)
    assert torch.equal(found.error, made.error)
    assert found.manifest == made.manifest
    assert run.calls == before + 1  # the masses were there; only errors were missing
    again = profile_transformer(run.model, run, request_of(run), tmp_path / "p", resume=True)
    assert torch.equal(again.error, made.error)
    assert run.calls == before + 1


def test_a_damaged_profile_is_refused(run: Run, tmp_path: Path) -> None:
    profile(run, tmp_path / "p", captured_per_range=1)
    scores = tmp_path / "p" / "scores.safetensors"
    scores.write_bytes(scores.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="missing or damaged"):
        DenoisingProfile.load(tmp_path / "p")
    with pytest.raises(ArtifactError, match="finished profile"):
        DenoisingProfile.load(tmp_path)


def test_the_request_must_fit_the_sampler(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="must take the 8 steps"):
        profile_transformer(run.model, run, replace(request_of(run), num_steps=8), tmp_path / "p")
    with pytest.raises(SpecError, match="ascend to 1"):
        _ = request_of(run, ends=(0.5, 0.4, 1.0)).ranges


def test_several_passes_are_averaged(run: Run, made: DenoisingProfile, tmp_path: Path) -> None:
    def twice() -> torch.Tensor:
        return torch.cat([run(), run()])

    found = profile_transformer(run.model, twice, request_of(run, passes=2), tmp_path / "two")
    torch.testing.assert_close(found.error, made.error)
    with pytest.raises(SpecError, match="set `passes`"):
        profile_transformer(run.model, twice, request_of(run), tmp_path / "one")
    with pytest.raises(SpecError, match="3 times"):
        profile_transformer(run.model, twice, request_of(run, passes=3), tmp_path / "three")


def test_maps_that_cannot_be_held_are_refused_before_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsesearch.profiling.denoising.run.MOST_MASS_BYTES", 1000.0)
    before = run.calls
    with pytest.raises(SpecError, match="video_geometric"):
        profile(run, tmp_path / "p")
    assert run.calls == before + 1
    assert "_diffusers_hook" not in run.model.__dict__
