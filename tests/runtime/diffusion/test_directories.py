"""Pipeline directories that carry plans, loaded by plain `from_pretrained`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import RULES, plan_of
from tiny_models import wan
from torch import Tensor
from typer.testing import CliRunner

import sparsesearch
from sparsesearch.errors import ArtifactError, PlanMismatchError
from sparsesearch.plan import Plan
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.diffusion.call import hook_of
from sparsesearch.runtime.diffusion.export import export_diffusers
from sparsesearch.runtime.diffusion.guard import CONFIG_KEY, guarded, unguarded
from sparsesearch.step_schedule import StepSchedule

PROMPT = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(3))


def make_pipeline() -> Any:
    """Wan 2.2 in small: two transformers, the second for the late steps."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan().model, transformer_2=wan().model, boundary_ratio=0.6,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, steps: int = 4) -> Tensor:
    output: Tensor = pipeline(
        prompt_embeds=PROMPT, negative_prompt_embeds=PROMPT * 0.5, height=64, width=96, num_frames=9, num_inference_steps=steps,
        guidance_scale=3.0, output_type="latent", generator=torch.Generator().manual_seed(1),
    ).frames  # fmt: skip
    return output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "wan"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plans(source: Path) -> dict[str, Plan]:
    from diffusers import WanTransformer3DModel

    found = {}
    for component in ("transformer", "transformer_2"):
        tiny = wan()
        model = WanTransformer3DModel.from_pretrained(source / component)
        found[component] = plan_of(type(tiny)(model, tiny.inputs, tiny.layout), *RULES)
    late = StepSchedule.of(10, [(8, 10, found["transformer_2"].assignments)])
    rules = {**found["transformer_2"].rules, Dense().label: Dense()}
    found["transformer_2"] = found["transformer_2"].model_copy(
        update={"schedule": late, "assignments": {}, "rules": rules}
    )
    return found


def load(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_pipeline_directory_runs_its_plans(source: Path, plans: dict[str, Plan], tmp_path: Path) -> None:
    plain = load(source)
    dense = run(plain)
    with sparsesearch.apply_diffusers(plain, plans) as applied:
        live = run(plain)
        assert applied.heads_patched == 8
    assert torch.equal(run(plain), dense)
    assert not torch.equal(live, dense)
    export_diffusers(plans, source, tmp_path / "sparse")
    carrying = load(tmp_path / "sparse")
    assert torch.equal(run(carrying), live)
    carrying.save_pretrained(tmp_path / "again")
    assert torch.equal(run(load(tmp_path / "again")), live)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "sparse" / weights).samefile(source / weights)
    assert Plan.load(tmp_path / "sparse" / "transformer_2" / "sparse_plan.json") == plans["transformer_2"]


def test_components_assembled_by_hand_read_the_scheduler_too(
    source: Path, plans: dict[str, Plan], tmp_path: Path
) -> None:
    from diffusers import WanPipeline, WanTransformer3DModel

    export_diffusers(plans, source, tmp_path / "sparse")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "sparse" / "transformer")
    parts = {**load(source).components, "transformer": model}
    pipeline = WanPipeline(**parts)
    hook = hook_of(model)
    assert hook is not None
    assert hook.scheduler is pipeline.scheduler


def test_what_does_not_fit_leaves_nothing_behind(source: Path, plans: dict[str, Plan], tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    with pytest.raises(PlanMismatchError, match="transformer_3"):
        export_diffusers({"transformer_3": plans["transformer"]}, source, out)
    with pytest.raises(PlanMismatchError, match="weights"):
        export_diffusers({"transformer_2": plans["transformer"]}, source, out)
    assert not out.exists()
    out.mkdir()
    (out / "something").touch()
    with pytest.raises(ArtifactError):
        export_diffusers({"transformer": plans["transformer"]}, source, out)
    config = json.loads((source / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert CONFIG_KEY not in config


def test_apply_writes_a_component(source: Path, plans: dict[str, Plan], tmp_path: Path) -> None:
    from sparsesearch_cli.main import app

    plans["transformer"].save(tmp_path / "plan.json")
    plans["transformer_2"].save(tmp_path / "plan_2.json")
    steps = (
        ("plan.json", source, "one", ()),
        ("plan_2.json", tmp_path / "one", "both", ("--component", "transformer_2")),
    )
    for plan, model, out, component in steps:
        result = CliRunner().invoke(
            app, ["apply", str(tmp_path / plan), str(model), "-o", str(tmp_path / out), *component]
        )
        assert result.exit_code == 0, result.output
    assert "DiffusionPipeline.from_pretrained" in result.output
    plain = load(source)
    with sparsesearch.apply_diffusers(plain, plans):
        live = run(plain)
    assert torch.equal(run(load(tmp_path / "both")), live)


def test_without_our_import_nothing_loads(source: Path, plans: dict[str, Plan], tmp_path: Path) -> None:
    """A pipeline, a model by its class, a model by its config: refused by name, also after it was saved anew."""
    export_diffusers({"transformer": plans["transformer"]}, source, tmp_path / "sparse")
    load(tmp_path / "sparse").save_pretrained(tmp_path / "again")
    code = """
import sys
from itertools import product
from diffusers import AutoModel, DiffusionPipeline, WanTransformer3DModel
ways = (
    lambda folder: DiffusionPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None).transformer,
    lambda folder: WanTransformer3DModel.from_pretrained(folder + "/transformer"),
    lambda folder: AutoModel.from_pretrained(folder + "/transformer"),
)
refused = 0
for load, folder in product(ways, sys.argv[1:]):
    try:
        load(folder)
    except ValueError as error:
        assert "import sparsesearch" in str(error), error
        refused += 1
assert refused == 6
import sparsesearch
from sparsesearch.runtime.diffusion.call import hook_of
for load, folder in product(ways, sys.argv[1:]):
    model = load(folder)
    assert hook_of(model) is not None
    assert "quantization_config" not in model.config
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sparse"), str(tmp_path / "again")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_the_mark_keeps_a_quantization_of_its_own() -> None:
    plain = {"quantization_config": {"quant_method": "torchao"}, "num_layers": 2}
    carrying = {**plain, CONFIG_KEY: {}}
    assert guarded(plain) == plain
    assert guarded(carrying)["quantization_config"] != carrying["quantization_config"]
    assert unguarded(guarded(carrying)) == carrying
    assert guarded(guarded(carrying)) == guarded(carrying)
    assert unguarded(plain) == plain
