"""Bad input: one sentence that says what to do next, a documented exit code, no traceback, and nothing lost."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sparsesearch import artifacts
from sparsesearch.artifacts import read_json, write_json
from sparsesearch.presets import preset_path

PROFILES = Path(__file__).parents[2] / "profiles"
PLAN = {"format": "sparsesearch.plan", "schema_version": "1.0"}


@pytest.fixture(scope="session")
def bad(corridor: Path, run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    space = (corridor / "space.yaml").read_text()
    plan_text = (corridor / "plan.json").read_text()
    plan = json.loads(plan_text)
    texts = {
        "rule.yaml": space.replace("kind: sink_window", "kind: sink_windw"),
        "key.yaml": space.replace("sink: 32", "sinks: 32"),
        "value.yaml": space.replace("sink: 32", "sink: -32"),
        "field.yaml": space.replace("source:", "sauce:"),
        "broken.yaml": space + "\n  - {kind: zero",
        "list.yaml": "- 1\n- 2\n",
        "narrow.yaml": re.sub(r"candidates:.*", "candidates:\n  - {kind: sink_window, sink: 32, window: 32}", space, flags=re.DOTALL),
        "unknown.yaml": re.sub(r"candidates:.*", "candidates:\n  - {kind: sink_window, sink: 0, window: 96}", space, flags=re.DOTALL),
        "nan.json": plan_text.replace("0.35", "NaN", 1),
        "deep.json": "[" * 100_000,
        "truncated.json": plan_text[: len(plan_text) // 2],
        "newer.json": json.dumps({**plan, "schema_version": "2.0"}),
        "edited.json": json.dumps({**plan, "block_tokens": 64}),
        "checksum.json": json.dumps({**plan, "sha256": "0" * 64}),
        "list.json": "[1, 2]",
        "empty.json": "",
        "empty.txt": "",
        "blank.jsonl": "\n\n",
        "short.txt": "A few words are not enough for a whole sequence. " * 3,
        "damaged.jsonl": '{"text": "good"}\n{"text": \n',
        "column.jsonl": '{"body": "good"}\n' * 8,
        "listed.yaml": "- profile\n",
        "command.yaml": "serch: {budget: density=0.5}\n",
        "option.yaml": "search: {bugdet: density=0.5}\n",
        "notes.md": "no model",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("latin.txt", "latin.json", "latin.yaml"):
        (folder / name).write_bytes("caf\xe9 ".encode("latin-1") * 50)
    (folder / "folder.json").mkdir()
    inconsistent = read_json(corridor / "plan.json", format=PLAN["format"], schema_version=PLAN["schema_version"])
    inconsistent["assignments"]["model.layers.0.self_attn"][0] = "no_such_rule"
    write_json(folder / "inconsistent.json", inconsistent, **PLAN)
    _other_model(folder / "other")
    for name in ("unfinished", "damaged"):
        shutil.copytree(corridor / "profile", folder / name)
    (folder / "unfinished" / "profile.json").unlink()
    capped = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    }
    transformers.AutoConfig.for_model("gemma2", head_dim=16, intermediate_size=32, **capped).save_pretrained(
        folder / "capped"
    )
    (folder / "removals").mkdir()
    (folder / "removals" / "pruning.json").write_text("{}")
    scores = folder / "damaged" / "scores-256.safetensors"
    scores.write_bytes(scores.read_bytes()[:-1])
    _changed_profile(
        corridor / "profile", folder / "foreign", lambda content: content["base_model"].update(weights_sha256="0" * 64)
    )
    _changed_profile(
        corridor / "profile",
        folder / "elsewhere",
        lambda content: content.update(space="tiny", candidates=[{"kind": "dense"}], calibrated={}),
    )
    _changed_profile(
        corridor / "profile", folder / "otherwise", lambda content: content["calibration"].update({"256": "other text"})
    )
    shutil.copytree(folder / "other", folder / "config")
    (folder / "config" / "config.json").write_text('{"model_type": ')
    shutil.copytree(folder / "other", folder / "unweighted")
    (folder / "unweighted" / "model.safetensors").unlink()
    shutil.copytree(folder / "other", folder / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(folder / "other", folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(folder / "other", folder / "lacking")
    shutil.copytree(folder / "other", folder / "reshaped")
    _rewrite(folder / "lacking" / "model.safetensors", lambda tensor: None)
    _rewrite(folder / "reshaped" / "model.safetensors", lambda tensor: tensor[:-1].contiguous())
    run("apply", corridor / "plan.json", "needle-7m", "-o", folder / "patched")
    shutil.copytree(folder / "patched", folder / "torn")
    (folder / "torn" / "model.safetensors").unlink()
    (folder / "torn" / "model.safetensors").write_bytes(b"\0" * 7)
    return folder


def _changed_profile(good: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same profile, with something else in its `profile.json`."""
    shutil.copytree(good, folder)
    stamp = {
        "format": "sparsesearch.profile",
        "schema_version": json.loads((good / "profile.json").read_text())["schema_version"],
    }
    content = read_json(good / "profile.json", **stamp)
    change(content)
    write_json(folder / "profile.json", content, **stamp)


def _rewrite(path: Path, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Write a weight file again with one tensor changed or, for None, left out."""
    weights = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    changed = change(weights.pop(name))
    if changed is not None:
        weights[name] = changed
    save_file(weights, path, metadata={"format": "pt"})


def _other_model(folder: Path) -> None:
    """Two layers instead of eight, with the embedded model's tokenizer."""
    embedded = preset_path("models", "needle-7m")
    config = transformers.AutoConfig.from_pretrained(
        embedded, num_hidden_layers=2, hidden_size=64, intermediate_size=64
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)


SEARCH = "search {good}/profile -o {out}/plan.json --budget "
TRIAL = "profile needle-7m -o {out}/profile --num-samples 2 --num-probes 1 "
CASES: dict[str, tuple[str, int, str]] = {
    # search spaces
    "unknown rule": (TRIAL + "--space {bad}/rule.yaml", 1, r"unknown rule kind 'sink_windw'. Did you mean 'sink_window'"),
    "unknown rule parameter": (TRIAL + "--space {bad}/key.yaml", 1, r"candidates\[2\], sink_window: there is no 'sinks'. Did you mean 'sink'"),
    "rule parameter out of range": (TRIAL + "--space {bad}/value.yaml", 1, r"sink must be greater than or equal to 0, but got -32"),
    "unknown field of a space": (TRIAL + "--space {bad}/field.yaml", 1, r"field.yaml: 'source' must be given"),
    "space is no YAML": (TRIAL + "--space {bad}/broken.yaml", 1, r"broken.yaml must be YAML"),
    "space is no mapping": (TRIAL + "--space {bad}/list.yaml", 1, r"list.yaml: the whole must be a mapping, but is a list"),
    "space is not UTF-8": (TRIAL + "--space {bad}/latin.yaml", 1, r"must be UTF-8 text, but byte 3 is not"),
    "space is missing": (TRIAL + "--space {bad}/none.yaml", 1, r"none.yaml must exist"),
    "odd blocks": (TRIAL + "--block-tokens 100", 1, r"blocks must be a multiple of 16 tokens from 16 to 256, but got 100"),
    "unknown space": (TRIAL + "--space mixtur", 1, r"unknown search space 'mixtur'. Did you mean 'mixture'"),
    "space was not profiled": (SEARCH + "density=0.5 --space {bad}/unknown.yaml", 1, r"must have scored sink_window\(sink=0.*Profile again"),
    # plans
    "plan is missing": ("explain {bad}/none.json", 1, r"none.json must exist"),
    "plan is a folder": ("explain {bad}/folder.json", 1, r"must be a plan file or a checkpoint with a plan, but has no config.json"),
    "plan below a file": ("explain {bad}/empty.json/plan.json", 1, r"must be readable, but Not a directory"),
    "plan is empty": ("explain {bad}/empty.json", 1, r"must be complete JSON"),
    "plan is truncated": ("explain {bad}/truncated.json", 1, r"must be complete JSON, but it breaks off"),
    "plan is not UTF-8": ("explain {bad}/latin.json", 1, r"must be UTF-8 text"),
    "plan is a list": ("explain {bad}/list.json", 1, r"must have format 'sparsesearch.plan'"),
    "plan is a profile": ("explain {good}/profile/profile.json", 1, r"must have format 'sparsesearch.plan', but has 'sparsesearch.profile'"),
    "plan holds no number": ("explain {bad}/nan.json", 1, r"must be JSON with finite numbers, but holds NaN"),
    "plan is nested without end": ("explain {bad}/deep.json", 1, r"nested too deeply"),
    "plan is newer": ("explain {bad}/newer.json", 1, r"schema_version 2.0.*Upgrade sparsesearch"),
    "plan was edited": ("explain {bad}/edited.json", 1, r"does not match its own checksum"),
    "checksum was edited": ("explain {bad}/checksum.json", 1, r"does not match its own checksum"),
    "plan contradicts itself": ("explain {bad}/inconsistent.json", 1, r"names rule 'no_such_rule', which `rules` lacks"),
    "plan for another model, apply": ("apply {good}/plan.json {bad}/other -o {out}/patched", 5, r"made for 'needle-7m' with 8 attention modules, but this model has 2"),
    "plan for another model, eval": ("eval {good}/plan.json --model {bad}/other --lengths 256 --num-sequences 3 --num-needles 2", 5, r"made for 'needle-7m' with 8 attention modules, but this model has 2"),
    "plan for another model, check": ("check {good}/plan.json --model {bad}/other --lengths 256 --num-sequences 3 --num-needles 2", 5, r"made for 'needle-7m' with 8 attention modules, but this model has 2"),
    "no such head": ("explain {good}/plan.json 3:9", 1, r"must name a query head of .*: 0 to 7"),
    "no such module": ("explain {good}/plan.json model.layers.30.self_attn:1", 1, r"Did you mean 'model.layers.3.self_attn'"),
    # calibration
    "calibration is missing": (TRIAL + "--data {bad}/none.txt", 1, r"none.txt must exist"),
    "calibration is empty": (TRIAL + "--data {bad}/empty.txt", 1, r"must hold text, but is empty"),
    "calibration is blank": (TRIAL + "--data {bad}/blank.jsonl", 1, r"must hold text, but is empty"),
    "calibration is too short": (TRIAL + "--data {bad}/short.txt --lengths 512", 1, r"must hold at least 512 tokens.*Give more text or a smaller length"),
    "calibration is not UTF-8": (TRIAL + "--data {bad}/latin.txt", 1, r"must be UTF-8 text"),
    "calibration is damaged": (TRIAL + "--data {bad}/damaged.jsonl", 1, r"line 2 must be a JSON object"),
    "calibration lacks the column": (TRIAL + "--data {bad}/column.jsonl", 1, r"--text-column. Known: body"),
    "unknown calibration": (TRIAL + "--data neddle", 1, r"Did you mean 'needle'"),
    "longer than the context": (TRIAL + "--lengths 20000", 1, r"at most 16384 tokens"),
    "device of a cost model, dry": (TRIAL + "--device h200 --dry-run", 2, r"--device: must be cpu, cuda or cuda:N, but got 'h200'"),
    "longer than the context, dry": (TRIAL + "--lengths 20000 --dry-run", 1, r"at most 16384 tokens"),
    "longer than the context, eval": ("eval {good}/plan.json --lengths 20000", 1, r"at most 16384 tokens"),
    "too short for the needles": ("eval {good}/plan.json --lengths 64", 1, r"longer sequences or fewer needles"),
    # options
    "lengths are no numbers": (TRIAL + "--lengths 1k", 2, r"positive token counts"),
    "length zero": (TRIAL + "--lengths 0,256", 2, r"positive token counts"),
    "no samples": (TRIAL + "--num-samples 0", 2, r"num-samples"),
    "unknown option": (TRIAL + "--spase mixture", 2, r"No such option"),
    "option of another command": (SEARCH + "density=0.5 --join study", 2, r"No such option: --join. It is one of `tune`"),
    "option of a bench": ("search {good}/profile --kv-fraction 0.5", 2, r"--kv-fraction. It is one of `bench model`"),
    "objective of another command": (SEARCH + "density=0.5 --objective hylra", 1, r"Run `sparsesearch search-reuse PROFILE --objective hylra`"),
    "unknown command": ("profil needle-7m", 2, r"No such command 'profil'"),
    "missing argument": ("explain", 2, r"Missing argument"),
    "missing budget": ("search {good}/profile", 2, r"Missing option '--budget'"),
    "unknown unit": (SEARCH + "density=0.5 --unit head", 2, r"query_head"),
    "unknown objective": (SEARCH + "density=0.5 --objective loss", 2, r"combined"),
    "unknown dtype": (TRIAL + "--dtype float8", 2, r"bfloat16"),
    "unknown device": (TRIAL + "--device tpu", 2, r"must be cpu, cuda or cuda:N, but got 'tpu'"),
    "unknown cost model": (SEARCH + "latency=0.5 --device roofline:h10", 1, r"Did you mean 'h100'"),
    "unknown artefact": ("schema pln", 2, r"Did you mean 'plan'"),
    "recovery out of range": ("check {good}/plan.json --recovery 1.5", 2, r"recovery must be less than or equal to 1, but got 1.5"),
    "negative bound": ("check {good}/plan.json --max-kl -1", 2, r"max_kl must be greater than 0, but got -1.0"),
    "config is missing": ("--config {bad}/none.yaml rules", 2, r"--config.*readable YAML"),
    "config is no mapping": ("--config {bad}/listed.yaml rules", 2, r"command -> option -> value"),
    "config names no command": ("--config {bad}/command.yaml rules", 2, r"'serch'. Did you mean 'search'"),
    "config names no option": ("--config {bad}/option.yaml rules", 2, r"search.bugdet. Did you mean 'budget'"),
    "set without a value": ("--set search.budget rules", 2, r"must look like"),
    "set names no option": ("--set search.bugdet=density=0.5 rules", 2, r"Did you mean 'budget'"),
    "unknown log level": ("--log-level loud rules", 2, r"debug, info, warning or error"),
    "option not for removals": ("search {bad}/removals --budget params=0.9x -o {out}/plan.json --answer-weight 2", 2, r"--answer-weight: is not for removals"),
    "option for removals": (SEARCH + "density=0.5 --uniform", 2, r"--uniform: is for removals, and .*profile covers none"),
    "option for removals, at its default": (SEARCH + "density=0.5 --criterion measured", 2, r"--criterion: is for removals"),
    "option for removals, from --set": ("--set search.uniform=true " + SEARCH + "density=0.5", 2, r"--uniform: is for removals"),
    "option for pipelines": (SEARCH + "density=0.5 --max-ranges 2", 2, r"--max-ranges: is for diffusers pipelines"),
    "objective for pipelines": (SEARCH + "density=0.5 --objective sparse_vdit", 2, r"--objective: is for diffusers pipelines"),
    "apply with an option for removals": ("apply {good}/plan.json needle-7m -o {out}/patched --logical", 2, r"--logical: is for removals"),
    "apply with an option for pipelines": ("apply {good}/plan.json needle-7m -o {out}/patched --component x", 2, r"--component: is for diffusers"),
    "masks for a space without removals": (TRIAL + "--learn-masks 3", 2, r"--learn-masks: is for spaces that remove"),
    "revision for removals": ("profile needle-7m --space pruning --revision main -o {out}/profile", 2, r"--revision: is not for spaces that remove"),
    "run of a language model": (TRIAL + "--run {bad}/run.yaml", 2, r"--run: is for diffusers pipelines"),
    "eval with a run of a language model": ("eval {good}/plan.json --run {bad}/run.yaml", 2, r"--run: is for plans of diffusers pipelines, and .*plan.json is none"),
    "record of nothing": ("bench video --measured {bad}/list.json -o {out}/v.json", 1, r"must have format 'sparsesearch.bench.video', but has 'list'"),
    "record is a plan": ("bench video --measured {good}/plan.json -o {out}/v.json", 1, r"but has 'sparsesearch.plan'. Give what `sparsesearch bench video` wrote"),
    "record is cut off": ("bench video --measured {bad}/truncated.json -o {out}/v.json", 1, r"must be complete JSON, but is damaged at line"),
    "space of a video model": ("profile needle-7m --space video_geometric --lengths 160 --num-samples 1 -o {out}/profile", 1, r"needs to know frames and text"),
    "plans of one name": ("eval {good}/plan.json {good}/plan.json --lengths 256", 2, r"PLAN: must have file names of their own"),
    "cost model without times": ("eval {good}/plan.json --timing-rounds 0 --cost-model cpu", 2, r"--cost-model: stands beside measured times"),
    "option of another objective": ("search-reuse {good}/profile --objective hylra --budget density=0.3 -o {out}/p.json", 2, r"--budget: is for --objective reuse, and not for hylra"),
    "metrics on the plan": ("eval {good}/plan.json -o {good}/plan.json", 2, r"--out: must be a place of its own, but .*plan.json is named twice"),
    "junit on the plan": ("check {good}/plan.json --junit {good}/plan.json", 2, r"--junit: must be a place of its own"),
    "front on the plan": (SEARCH + "density=0.5 --pareto {out}/plan.json", 2, r"--pareto: must be a place of its own"),
    "answers in another objective": (SEARCH + "density=0.5 --objective text --answer-weight 2", 2, r"--answer-weight: weighs the parts of --objective combined, and text is not"),
    "endless weight": (SEARCH + "density=0.5 --answer-weight inf", 1, r"the weight of answers must be a number from 0 on, but got inf"),
    "front beyond the context": ("front {good}/profile --lengths 20000 -o {out}/f.json", 1, r"at most 16384 tokens"),
    "metrics on a folder": ("eval {good}/plan.json -o {good}/profile", 1, r"profile must be a file, but is a folder. Name a file in it"),
    "front on a folder": (SEARCH + "density=0.5 --pareto {good}/profile", 1, r"profile must be a file, but is a folder"),
    "micro-runs of a CPU": ("calibrate --quick --runs {out}/r.json -o {out}/c.json", 2, r"--runs: is for a GPU"),
    "unknown device map": (TRIAL + "--device-map nowhere", 2, r"--device-map: must be one of auto, balanced"),
    "bench of a whole model on a CPU": ("bench model llama3-8b --device cpu -o {out}/b.json", 2, r"--device: must be a CUDA device"),
    "lengths of our own plan": ("convert {good}/plan.json --to moa --lengths 128 -o {out}/c", 2, r"--lengths: is for plans of other systems"),
    "share of another format": ("convert {good}/plan.json --from moa --streaming-share 0.5 -o {out}/c", 2, r"--streaming-share: is for --from duo_attention"),
    "length of laws": ("convert {good}/plan.json --length 128 -o {out}/c", 2, r"--length: is for formats without laws"),
    "video without --video": ("quickstart --mode i2v -o {out}/q", 2, r"--mode: is for --video"),
    "sequences of a video": ("quickstart --video --num-sequences 4 -o {out}/q", 2, r"--num-sequences: is for the embedded language model"),
    "times of a front over densities": ("front {good}/profile --batch 4 -o {out}/f.json", 2, r"--batch: is for --at, which was not given"),
    "plans of a front over densities": ("front {good}/profile --folder {out}/plans -o {out}/f.json", 2, r"--folder: is for --at, which was not given"),
    "densities of a front at times": ("front {good}/profile --at latency=0.5x --densities 0.3 -o {out}/f.json", 2, r"--densities: is not for --at"),
    "format without tasks": ("eval {good}/plan.json --format chat", 2, r"--format: is for --suite, which was not given"),
    "answers without tasks": ("eval {good}/plan.json --generate", 2, r"--generate: is for --suite"),
    "shots without tasks, check": ("check {good}/plan.json --shots 2", 2, r"--shots: is for --suite"),
    "needles in needles": ("eval {good}/plan.json --lengths 256 --data needle", 1, r"plain text must be named here, such as text.*but needle makes"),
    "reuse without a budget": ("search-reuse {good}/profile -o {out}/p.json", 2, r"--budget: must be given, such as density=0.25"),
    "name like an emoji": (TRIAL + "--data a:b:c:d", 1, r"got 'a:b:c:d'"),
    "workload names a field twice": (SEARCH + "density=0.5 --workload prompt=512,prompt=3", 2, r"must name 'prompt' once"),
    "workload beyond memory": (SEARCH + "density=0.5 --workload prompt=99999999 --unit kv_group", 1, r"must fit into memory.*shorter lengths"),
    "study that is joined": ("tune --join x --unit kv_group -o {out}/study", 2, r"--unit: is for a new study"),
    # budgets
    "budget zero": (SEARCH + "density=0", 2, r"0 < density <= 1 must hold"),
    "budget above one": (SEARCH + "density=1.5", 2, r"0 < density <= 1 must hold"),
    "budget without a value": (SEARCH + "density", 2, r"must look like density=0.25"),
    "budget is no number": (SEARCH + "density=half", 2, r"must be a number such as 0.25"),
    "budget of an unknown metric": (SEARCH + "densty=0.5", 2, r"Did you mean 'density'"),
    "budget at no length": (SEARCH + "density=0.5@0", 2, r"must be positive token counts"),
    "memory without a unit": (SEARCH + "memory=24", 2, r"An amount has a unit: GB"),
    "removals of a profile without": (SEARCH + "params=0.8x", 2, r"params is for removals, and .*profile covers none: profile again with --space pruning"),
    "cache budget per query head": (SEARCH + "kv_fraction=0.5", 1, r"--unit kv_group"),
    "latency without a cost model": (SEARCH + "latency=0.5x", 1, r"--device with cpu, h200"),
    "cost model by where torch runs": (SEARCH + "latency=0.5x --device cuda:0", 1, r"must be called by what was measured, such as h200.*\(cuda:0\)"),
    "infeasible": (SEARCH + "density=0.05 --space {bad}/narrow.yaml", 3, r"smallest feasible value is density=0.6.*Raise the budget"),
    "refined on data, not refined": (SEARCH + "density=0.5 --refine-on text", 2, r"--refine-on: is for --refine, which is 0"),
    "infeasible, refined": (SEARCH + "density=0.05 --space {bad}/narrow.yaml --refine 2", 3, r"smallest feasible value is density=0.6.*Raise the budget"),
    # profiles and metrics
    "profile is missing": ("search {bad}/none --budget density=0.5 -o {out}/plan.json", 1, r"Run `sparsesearch profile`"),
    "profile is unfinished": ("search {bad}/unfinished --budget density=0.5 -o {out}/plan.json", 1, r"unfinished profile.*--resume"),
    "profile is damaged": ("search {bad}/damaged --budget density=0.5 -o {out}/plan.json", 1, r"scores-256.*Profile again"),
    "profile is a folder of other things": ("search {bad}/other --budget density=0.5 -o {out}/plan.json", 1, r"other must be a profile directory, but has no profile.json"),
    "profile of another model, explain": ("explain {good}/plan.json 3:7 --profile {bad}/foreign", 5, r"foreign must be a profile of the plan's model, 'needle-7m'"),
    "profile of another space, explain": ("explain {good}/plan.json --profile {bad}/elsewhere", 5, r"elsewhere must be the profile that the plan was searched in \(space 'small'\), but its space 'tiny' never scored"),
    "profile of another search, report": ("report {shipped}/needle-7m-plan.json {shipped}/needle-7m-metrics.json --profile {good}/profile -o {out}/r.html", 5, r"profile must be the profile that the plan was searched in \(space 'mixture'\), but its calibration is"),
    "profile of other data, explain": ("explain {good}/plan.json --profile {bad}/otherwise", 5, r"but its calibration is .*other text.*Give that profile, or search again"),
    "cuts of a profile without": ("bench cuts {good}/profile --budget params=0.8x -o {out}/c.json", 1, r"profile must cover removals.*--space pruning"),
    "heals nothing": ("heal {bad}/none --teacher needle-7m -o {out}/h", 1, r"none must be the directory of a pruned checkpoint, but there is none"),
    "metrics are missing": ("report {good}/plan.json {bad}/none.json -o {out}/r.html", 1, r"none.json must exist"),
    "baseline is a plan": ("check {good}/plan.json --baseline {good}/plan.json", 1, r"must have format 'sparsesearch.metrics'"),
    # models
    "model soft-caps, before its weights are read": ("profile {bad}/capped --dry-run", 5, r"Gemma2ForCausalLM cannot run a sparse plan: soft-capped scores"),
    "model is missing": ("profile ./no/such/model -o {out}/profile", 1, r"no such file or directory"),
    "model is a text file": ("profile {bad}/notes.md -o {out}/profile", 1, r"model directory or a .gguf file"),
    "model folder has no config": ("profile {good} -o {out}/profile", 1, r"has no config.json"),
    "model of a video": ("profile wan-tiny-11m -o {out}/profile", 5, r"must be a causal language model here, but is a diffusers model"),
    "model has no tokenizer": ("profile {bad}/mute -o {out}/profile", 1, r"mute: there must be a tokenizer beside the weights.*tokenizer_config.json"),
    "model config is damaged": ("profile {bad}/config -o {out}/profile", 1, r"could not be loaded"),
    "model has no weights": ("profile {bad}/unweighted -o {out}/profile", 1, r"could not be loaded: .*model.safetensors"),
    "hub model cannot be reached": ("--offline profile no-one/no-such-model -o {out}/profile", 1, r"no-one/no-such-model.*Check the name"),
    "model weights are cut off": ("profile {bad}/cut -o {out}/profile", 1, r"cut: a weight file is damaged.*Fetch or make"),
    "model lacks a weight": ("profile {bad}/lacking -o {out}/profile", 1, r"lacks 1, model.layers.1.mlp.down_proj.weight first"),
    "model weights have other shapes": ("profile {bad}/reshaped -o {out}/profile", 1, r"must have the shapes that config.json says"),
    "patched weights are torn": ("verify {bad}/torn", 1, r"torn: a weight file is damaged"),
    "patched checkpoint without weights": ("verify {bad}/unweighted", 1, r"must carry a plan under 'sparsesearch'"),
    "no patched checkpoint": ("verify {bad}/other", 1, r"sparsesearch apply"),
    "no checkpoint at all": ("verify {bad}/none", 1, r"none must exist"),
    # places that are taken
    "plan exists": ("search {good}/profile --budget density=0.5 -o {good}/plan.json", 1, r"must not exist yet.*--overwrite"),
    "profile exists": ("profile needle-7m -o {good}/profile --lengths 160", 1, r"must not hold a profile yet.*--resume"),
    "folder holds other files": ("profile needle-7m -o {good} --lengths 160", 1, r"holds other files"),
    "resumed otherwise": ("profile needle-7m --space {good}/space.yaml --lengths 160,256 --num-samples 2 --num-probes 1 --seed 1 -o {good}/profile --resume", 1, r"begun with another (calibration|seed)"),
    "checkpoint exists": ("apply {good}/plan.json needle-7m -o {good}", 1, r"--overwrite"),
    "quickstart folder is taken": ("quickstart -o {good}", 1, r"must be empty or hold an interrupted quickstart, but holds"),
    "checkpoint on a file": ("apply {good}/plan.json needle-7m -o {good}/space.yaml", 1, r"is a file"),
    "profile on a file": ("profile needle-7m -o {good}/plan.json --lengths 160", 1, r"plan.json must be a folder, but is a file"),
    "quickstart on a file": ("quickstart -o {good}/plan.json", 1, r"must be a folder, but is a file. Choose another -o"),
    "quickstart below a file": ("quickstart -o {good}/plan.json/q", 1, r"plan.json is a file. Choose another folder with -o"),
    "study below a file": ("tune {good}/profile -o {good}/plan.json/study", 1, r"plan.json is a file. Choose another folder with -o"),
    "metrics below a file": ("eval {good}/plan.json -o {good}/plan.json/m.json", 1, r"plan.json is a file. Choose another folder with -o"),
    "front below a file": ("front {good}/profile -o {good}/plan.json/f.json", 1, r"plan.json is a file. Choose another folder with -o"),
    "junit below a file": ("check {good}/plan.json --junit {good}/plan.json/j.xml", 1, r"plan.json is a file. Choose another folder with -o"),
    "pareto below a file": (SEARCH + "density=0.5 --pareto {good}/plan.json/p.csv", 1, r"plan.json is a file. Choose another folder with -o"),
    "output below a file": (SEARCH.replace("{out}", "{good}/plan.json") + "density=0.5", 1, r"must be writable, but"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, corridor: Path, bad: Path, run: Any, content: Any, tmp_path: Path) -> None:
    line, code, sentence = CASES[case]
    before = content(corridor)
    arguments = [part.format(good=corridor, bad=bad, out=tmp_path, shipped=PROFILES) for part in line.split()]
    result = run(*arguments, code=code)
    assert re.search(sentence, result.stderr, re.DOTALL), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if code != 2:
        (message,) = result.stderr.splitlines()
        assert message.startswith("error: ")
        assert message.endswith((".", ")"))
    assert content(corridor) == before, "nothing is lost"
    assert not content(tmp_path), "nothing half-made stays"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(corridor: Path, run: Any, tmp_path: Path) -> None:
    for command in (
        ("profile", "needle-7m", "-o", tmp_path / "profile"),
        ("eval", corridor / "plan.json"),
        ("check", corridor / "plan.json"),
        ("validate-proxy", corridor / "profile"),
    ):
        result = run(*command, "--device", "cuda", code=1)
        assert re.search(r"--device cuda must be a GPU.*this machine has none.*pass cpu", result.stderr)


def _full(after: int) -> Callable[[int], None]:
    """An fsync that finds the disk full from the n-th call on."""
    calls = 0

    def fsync(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fsync


@pytest.mark.parametrize(
    "line",
    [
        "search {good}/profile --budget density=0.5 -o {out}/kept.json --overwrite",
        "apply {good}/plan.json needle-7m -o {out}/patched",
        "eval {good}/plan.json --lengths 256 --num-sequences 3 --num-needles 2 --timing-rounds 0 -o {out}/kept.json",
    ],
)
def test_disk_full_keeps_what_was_there(
    line: str, corridor: Path, run: Any, content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept.json").write_text("what was there before")
    monkeypatch.setattr(artifacts.os, "fsync", _full(after=0))
    result = run(*line.format(good=corridor, out=tmp_path).split(), code=1)
    assert re.search(r"must be writable, but No space left on device.*Free space", result.stderr)
    assert content(tmp_path) == {"kept.json": b"what was there before"}


def test_disk_full_in_profile_then_resume(
    corridor: Path, run: Any, content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("profile", "needle-7m", "--space", corridor / "space.yaml", "--lengths", "160,256", "--num-samples", "2")
    command = (*command, "--num-probes", "1", "-o", tmp_path / "profile")
    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "fsync", _full(after=12))
        result = run(*command, code=1)
    assert re.search(r"must be writable, but No space left on device.*Free space", result.stderr)
    run(*command, "--resume")
    assert content(tmp_path / "profile") == content(corridor / "profile")
