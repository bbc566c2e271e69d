"""profile, search, apply, eval, report on pipeline directories, from the command line to `DiffusionPipeline.from_pretrained`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_directories import load, make_pipeline
from typer.testing import CliRunner

import sparsesearch
from sparsesearch.denoising.judgement import Judgement
from sparsesearch.denoising.pipeline import PipelineIndex, load_plans
from sparsesearch.denoising.sampling_run import SamplingRun
from sparsesearch.errors import PlanMismatchError, SpecError
from sparsesearch.plan import Plan

SPACE = """
name: tiny
source: test
description: test
unit: query_head
block_tokens: 16
candidates:
  - {kind: diagonal_band, order: [identity, axes(hwf)], reach: [{b: 0.1}, {b: 0.3}]}
  - {kind: calibrated_tiles, keep: [0.25, 0.5]}
"""
RUN = """
inputs: embeds.safetensors
steps: 8
seed: 5
height: 64
width: 96
num_frames: 9
guidance_scale: 3.0
step_ranges: [0.5, 1.0]
captured_per_range: 1
bitmaps: run
"""


def call(*arguments: object, code: int = 0) -> Any:
    from sparsesearch_cli.main import app

    result = CliRunner().invoke(app, [str(part) for part in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, f"{arguments}: {result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with two transformers, a calibration run and a held-out one, and the profile."""
    folder = tmp_path_factory.mktemp("commands")
    make_pipeline().save_pretrained(folder / "wan")
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    generator = torch.Generator().manual_seed(3)
    for name, samples in (("embeds", 2), ("other", 1)):
        prompts = torch.randn(samples, 7, 8, generator=generator)
        tensors = {"prompt_embeds": prompts, "negative_prompt_embeds": prompts * 0.5}
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    held_out = RUN.replace("embeds.safetensors", "other.safetensors").replace("seed: 5", "seed: 77")
    (folder / "held_out.yaml").write_text(held_out, encoding="utf-8")
    call(
        "profile", folder / "wan", "--run", folder / "run.yaml", "--space", folder / "space.yaml", "--sensitivity", "layer",
        "-o", folder / "profile",
    )  # fmt: skip
    return folder


def test_from_a_pipeline_to_a_patched_one(folder: Path, tmp_path: Path) -> None:
    index = PipelineIndex.load(folder / "profile")
    assert index.components == ("transformer", "transformer_2")
    profiles = index.profiles(folder / "profile")
    spans = [(p.manifest.ranges[0][0], p.manifest.ranges[-1][1]) for p in profiles.values()]
    assert spans[0][0] == 0
    assert spans[0][1] == spans[1][0], "the second transformer takes over where the first one ends"
    assert spans[1][1] == 8
    assert all(bool((p.sensitivity != 1).all()) for p in profiles.values())

    call("search", folder / "profile", "--budget", "density=0.6", "-o", tmp_path / "plans")
    plans = load_plans(tmp_path / "plans")
    assert set(plans) == {"transformer", "transformer_2"}
    shown = json.loads(
        call(
            "eval", tmp_path / "plans", "--run", folder / "held_out.yaml", "-o", tmp_path / "metrics.json", "--json"
        ).stdout
    )
    assert Judgement.load(tmp_path / "metrics.json").model_dump(mode="json") == shown
    assert 0 < shown["variants"]["plan"]["density"] <= 0.6 + 1e-9
    assert 5 < shown["variants"]["plan"]["values"]["psnr_db"][0] < 119

    call("apply", tmp_path / "plans", folder / "wan", "-o", tmp_path / "sparse")
    run = SamplingRun.load(folder / "held_out.yaml")
    plain = load(folder / "wan")
    dense = next(run.sample(plain, "latent"))
    with sparsesearch.apply_diffusers(plain, plans):
        live = next(run.sample(plain, "latent"))
    assert torch.equal(next(run.sample(load(tmp_path / "sparse"), "latent")), live)
    assert not torch.equal(live, dense)

    call("report", tmp_path / "plans", tmp_path / "metrics.json", "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert "<h3>transformer_2</h3>" in page
    assert page.count("<svg") >= 4
    call("search", folder / "profile", "--budget", "density=0.8", "-o", tmp_path / "others")
    told = call("report", tmp_path / "others", tmp_path / "metrics.json", "-o", tmp_path / "no.html", code=5).stderr
    assert plans["transformer"].sha256[:12] in told
    call("report", tmp_path / "plans", tmp_path / "metrics.json", "--profile", folder / "profile", code=2)
    (tmp_path / "metrics.frames.safetensors").unlink()
    told = call("report", tmp_path / "plans", tmp_path / "metrics.json", "-o", tmp_path / "no.html", code=1).stderr
    assert "metrics.frames.safetensors" in told


def test_searches_that_differ_from_the_plain_one(folder: Path, tmp_path: Path) -> None:
    losses = {}
    for name, options in {
        "plain": [],
        "one": ["--max-ranges", 1],
        "vdit": ["--objective", "sparse_vdit"],
        "refined": ["--refine", 1],
    }.items():
        found = call("search", folder / "profile", "--budget", "density=0.6", "-o", tmp_path / name, "--json", *options)
        losses[name] = json.loads(found.stdout)["components"]["transformer"]
    assert all(each["density"] <= 0.6 + 1e-9 for each in losses.values())
    assert len(losses["plain"]["step_ranges"]) == 2
    assert len(losses["one"]["step_ranges"]) == 1
    assert losses["one"]["loss"] >= losses["plain"]["loss"] * (1 - 1e-3)
    assert losses["vdit"]["objective"] == "sparse_vdit"
    assert "replayed_log10_error" in Plan.load(tmp_path / "refined" / "transformer.json").provenance


def test_a_profile_goes_on_and_can_be_made_under_plans(folder: Path, tmp_path: Path) -> None:
    given = ("--run", folder / "run.yaml", "--space", folder / "space.yaml")
    call("search", folder / "profile", "--budget", "density=0.6", "-o", tmp_path / "plans")
    call("profile", folder / "wan", *given, "--sensitivity", "layer", "-o", folder / "profile", "--resume")
    call("profile", folder / "wan", *given, "--under", tmp_path / "plans", "-o", tmp_path / "under")
    before, after = (PipelineIndex.load(f).profiles(f)["transformer"] for f in (folder / "profile", tmp_path / "under"))
    assert after.manifest.base_plan_sha256 == load_plans(tmp_path / "plans")["transformer"].sha256
    assert not torch.equal(after.error, before.error)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    refused = call("profile", folder / "wan", "-o", tmp_path / "p", code=2)
    assert "--run" in refused.stderr
    refused = call("search", folder / "profile", "--budget", "latency=0.5x", "-o", tmp_path / "x", code=2)
    assert "density=0.35" in refused.stderr
    refused = call(
        "search", folder / "profile", "--budget", "density=0.6", "--objective", "moa", "-o", tmp_path / "x", code=2
    )
    assert "sparse_vdit" in refused.stderr
    refused = call("search", folder / "profile", "--budget", "density=0.01", "-o", tmp_path / "x", code=3)
    assert "smallest feasible" in refused.stderr
    refused = call(
        "profile", folder / "wan" / "transformer", "--run", folder / "run.yaml", "-o", tmp_path / "p", code=5
    )
    assert "whole pipeline" in refused.stderr
    (tmp_path / "plans").mkdir()
    with pytest.raises(PlanMismatchError, match="several components"):
        load_plans(tmp_path / "plans", "transformer")


def test_options_of_one_kind_of_model_are_refused_for_the_other(folder: Path, tmp_path: Path) -> None:
    for options in (
        ["--pareto", tmp_path / "front.csv"],
        ["--workload", "prompt=8,generate=8"],
        ["--unit", "kv_group"],
    ):
        refused = call("search", folder / "profile", "--budget", "density=0.6", "-o", tmp_path / "x", *options, code=2)
        assert "not for diffusers pipelines" in refused.stderr
    for options in (["--run", folder / "run.yaml"], ["--sensitivity", "layer"], ["--under", tmp_path]):
        refused = call("profile", "needle-7m", "-o", tmp_path / "p", *options, code=2)
        assert "is for diffusers pipelines" in refused.stderr
    call("search", folder / "profile", "--budget", "density=0.6", "-o", tmp_path / "plans")
    for plans in (tmp_path / "plans", tmp_path / "plans" / "transformer.json"):
        assert "--run" in call("eval", plans, code=2).stderr


def test_a_dry_run_counts_what_would_be_sampled(folder: Path, tmp_path: Path) -> None:
    given = ("--run", folder / "run.yaml", "--space", folder / "space.yaml", "--sensitivity", "layer")
    found = json.loads(call("profile", folder / "wan", *given, "-o", tmp_path / "p", "--dry-run", "--json").stdout)
    assert found["transformers"] == "transformer, transformer_2"
    assert (found["layers"], found["heads"], found["samples_of_the_run"]) == (4, 8, 2)
    assert found["of_them_replays_for_sensitivities"] == 4 * 2
    assert found["runs"] == 1 + 2 * 2 + 8
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 4", "one number of samples"),
        ("prompts: [a, b]\nimages: [c.png]", "one number of samples"),
        ("prompts: [a]\nprompts_file: b.txt", "not both"),
        ("prompts: [a]\nstpes: 4", "there is no 'stpes'"),
        ("prompts: {", "must be YAML"),
    ],
)
def test_runs_that_say_nothing_to_sample(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=message):
        SamplingRun.load(tmp_path / "run.yaml")


def test_prompts_from_a_file_and_arguments_nobody_takes(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n", encoding="utf-8")
    (tmp_path / "run.yaml").write_text("prompts_file: prompts.txt\narguments: {strenght: 1}", encoding="utf-8")
    run = SamplingRun.load(tmp_path / "run.yaml")
    assert run.prompts == ("a cat", "a dog")
    assert run.num_samples == 2
    assert run.name != run.model_copy(update={"seed": 1}).name
    with pytest.raises(SpecError, match="no argument 'strenght'"):
        next(run.sample(make_pipeline(), "latent"))


def make_cogvideox() -> Any:
    """Text and video in one sequence, guidance in one batch, steps told by the scheduler alone."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
    from tiny_models import cogvideox

    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    return CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=cogvideox().model, scheduler=CogVideoXDDIMScheduler()
    )


def test_a_pipeline_that_tells_steps_through_its_scheduler(folder: Path, tmp_path: Path) -> None:
    make_cogvideox().save_pretrained(tmp_path / "cog")
    prompts = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(4))
    save_file({"prompt_embeds": prompts, "negative_prompt_embeds": -prompts}, tmp_path / "embeds.safetensors")
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    given = ("--run", tmp_path / "run.yaml", "--space", folder / "space.yaml")
    call("profile", tmp_path / "cog", *given, "-o", tmp_path / "profile")
    profile = PipelineIndex.load(tmp_path / "profile").profiles(tmp_path / "profile")["transformer"]
    layout = profile.manifest.layout
    assert [segment.kind for segment in layout.segments] == ["text", "video"]
    assert profile.manifest.ranges == ((0, 4), (4, 8))
    call("search", tmp_path / "profile", "--budget", "density=0.7", "-o", tmp_path / "plan.json")
    found = call("eval", tmp_path / "plan.json", "--run", tmp_path / "run.yaml", "-o", tmp_path / "m.json", "--json")
    variant = json.loads(found.stdout)["variants"]["plan"]
    assert 0 < variant["density"] <= 0.7 + 1e-9
    assert 5 < variant["values"]["psnr_db"][0] < 119
    call("apply", tmp_path / "plan.json", tmp_path / "cog", "-o", tmp_path / "sparse")
    carrying = load(tmp_path / "sparse")
    run = SamplingRun.load(tmp_path / "run.yaml")
    plain = load(tmp_path / "cog")
    with sparsesearch.apply_diffusers(plain, Plan.load(tmp_path / "plan.json")):
        live = next(run.sample(plain, "latent"))
    assert torch.equal(next(run.sample(carrying, "latent")), live)
