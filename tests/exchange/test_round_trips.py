"""Foreign plans: small files of our own in each published format, read, written, and read again."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsesearch.errors import ArtifactError, PlanMismatchError, SpecError
from sparsesearch.exchange import FORMATS, Target, read_plan, write_plan
from sparsesearch.plan import BaseModelInfo, Plan, uniform_plan
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.flex_prefill import FlexPrefill
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.reuse import Reuse
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.skip_softmax import SkipSoftmax
from sparsesearch.rules.vertical_slash import VerticalSlash
from sparsesearch.rules.zero import Zero

MODEL = BaseModelInfo(
    name_or_path="tiny",
    model_type="llama",
    modules=("model.layers.0.self_attn", "model.layers.1.self_attn"),
    num_heads=(4, 4),
    num_kv_heads=(2, 2),
    head_dim=(16, 16),
)
TARGET = Target(MODEL, lengths_tokens=(1024, 4096))
FOREIGN = [name for name in FORMATS if name != "plan"]


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def slash(vertical: int, diagonal: int) -> VerticalSlash:
    return VerticalSlash(vertical=LengthLaw(a=vertical), slash=LengthLaw(a=diagonal))


def stream(sink: int, window: int) -> SinkWindow:
    return SinkWindow(sink=sink, window=LengthLaw(a=window))


MINFERENCE = [
    {
        "0": ["vertical_and_slash", 1000, 6096, 0.33],
        "1": ["stream_llm", 100, 800, 0.9],
        "2": ["block_sparse", 1000, 6096, 0.5],
        "3": ["vertical_and_slash", 30, 800, 1.0],
    },
    {
        "0": ["flex_vertical_and_slash", [0.9, 4096], [0.9, 4096], 0.0],
        "1": ["vertical_and_slash", 3500, 100, 1],
        "3": ["vertical_and_slash", 100, 750, 0.25, "ignored"],
    },
]
MINFERENCE_RULES = [
    [slash(1000, 6096), stream(100, 800), PooledTopk(keep=LengthLaw(a=6400), sink=0), slash(30, 800)],
    [FlexPrefill(gamma=0.9, tau=0, min_budget=4096, probe=64), slash(3500, 100), slash(1000, 6096), slash(100, 750)],
]
MOA = {"alphas": [[0, -1024, 1024, 0], [0, 0, 2048, 512]], "betas": [[0.125, 1.0, 0.0, 1.0], [0.5, 0.75, 0.875, 0]]}
UCM = {
    "model_name": "tiny",
    "num_hidden_layers": 2,
    "chunk_size": 128,
    "top_k_ratio_per_layer": [1, 0.3],
    "top_k_index_reuse": [-1, -1],
    "must_select_blocks": [0, -2, -1],
    "hash_bits": 16,
}
MODELOPT = {
    "sparse_attention_config": {
        "config_groups": {
            "group_0": {
                "algorithm": "skip_softmax",
                "targets": ["LlamaAttention"],
                "ignore": ["*layers.0.*"],
                "threshold_scale_factor": {"prefill": {"a": 2.0, "b": 4.0}, "decode": {"a": 0.5, "b": 6.0}},
                "target_sparsity": {"prefill": 0.5, "decode": 0.25},
            }
        },
        "producer": {"name": "modelopt"},
    }
}


def duo_folder(folder: Path, gates: list[list[float]], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "full_attention_heads.tsv").write_text(
        "\n".join("\t".join(f"{g:.18e}" for g in row) for row in gates) + "\n"
    )
    write_json(folder / "config.json", {"sink_size": 128, "recent_size": 256, "deploy_sink_size": None, **config})
    return folder


def source(format: str, folder: Path) -> Path:
    match format:
        case "duo_attention":
            return duo_folder(folder / "duo", [[0.9, 0.1], [0.5, 0.49]], threshold=0.5)
        case "minference":
            return write_json(folder / "in.json", MINFERENCE)
        case "moa":
            return write_json(folder / "in.json", MOA)
        case "ucm":
            return write_json(folder / "in.json", UCM)
    return write_json(folder / "in.json", MODELOPT)


def rules(plan: Plan) -> list[list[Rule]]:
    return [list(plan.module_rules(module)) for module in MODEL.modules]


@pytest.mark.parametrize("format", FOREIGN)
def test_a_file_read_and_written_says_the_same(format: str, tmp_path: Path) -> None:
    plan = read_plan(source(format, tmp_path), format, TARGET)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")  # what is kept for writing survives our own file
    write_plan(again, format, tmp_path / "out")
    back = read_plan(tmp_path / "out", format, TARGET)
    assert rules(back) == rules(plan)
    assert back.unit == plan.unit
    assert plan.provenance["converted_from"] == format


@pytest.mark.parametrize("format", ["moa", "ucm", "modelopt"])
def test_json_formats_come_back_as_they_were(format: str, tmp_path: Path) -> None:
    file = source(format, tmp_path)
    write_plan(read_plan(file, format, TARGET), format, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(file.read_text())


def test_minference_heads(tmp_path: Path) -> None:
    plan = read_plan(source("minference", tmp_path), "minference", TARGET)
    assert rules(plan) == MINFERENCE_RULES, "a head left out runs MInference's default"
    write_plan(plan, "minference", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written[0] == MINFERENCE[0]
    assert written[1]["2"] == ["vertical_and_slash", 1000, 6096, 1]
    assert written[1]["3"] == MINFERENCE[1]["3"][:4]


def test_every_shape_of_minferences_released_files(tmp_path: Path) -> None:
    """As its released files differ: one budget or dozens, windows, scores of any number type, heads left out, more numbers, vLLM's table."""
    budgets = [
        (1000, 6096),
        (100, 800),
        (30, 800),
        (100, 750),
        (500, 700),
        (3500, 100),
        (512, 2048),
        (1000, 4096),
        (13388, 18384),
    ]
    model = MODEL.model_copy(update={"num_heads": (9, 9), "num_kv_heads": (3, 3)})
    target = replace(TARGET, base_model=model)
    layers: list[dict[str, list[Any]]] = [
        {str(head): ["vertical_and_slash", *budget, 1.5e-3 * head] for head, budget in enumerate(budgets)},
        {
            "0": ["stream_llm", 100, 800, 1],
            "4": ["vertical_and_slash", 1000, 6096, 0.97, 12],
            "8": ["block_sparse", 1000, 6096, 1],
        },
    ]
    plain = read_plan(write_json(tmp_path / "list.json", layers), "minference", target)
    first, second = ([*plain.module_rules(module)] for module in model.modules)
    assert first == [slash(*budget) for budget in budgets]
    assert second[0] == stream(100, 800)
    assert second[8] == PooledTopk(keep=LengthLaw(a=6400), sink=0)
    assert second[1:8] == [slash(1000, 6096)] * 7, "heads that the search left out run its default"
    table = {str(number): layer for number, layer in enumerate(layers)}
    nested = {"dual_chunk_attention_config": {"chunk_size": 8192, "sparse_attention_config": table}, "hidden_size": 4}
    for number, content in enumerate((table, {"sparse_attention_config": table}, nested)):
        again = read_plan(write_json(tmp_path / f"table{number}.json", content), "minference", target)
        assert again.assignments == plain.assignments
    with pytest.raises(ArtifactError, match="list over layers"):
        read_plan(write_json(tmp_path / "gap.json", {"0": layers[0], "2": layers[1]}), "minference", target)


def test_moa_windows(tmp_path: Path) -> None:
    plan = read_plan(source("moa", tmp_path), "moa", TARGET)
    window = SinkWindow(sink=64, window=LengthLaw(a=-1024, b=1.0))
    assert rules(plan)[0] == [SinkWindow(sink=64, window=LengthLaw(b=0.125)), window, stream(64, 1024), Dense()]


def test_duo_attention_by_threshold_and_by_share(tmp_path: Path) -> None:
    folder = duo_folder(tmp_path / "duo", [[0.9, 0.1], [0.5, 0.5]], threshold=0.5, deploy_recent_size=512)
    one = stream(64, 512)
    assert rules(read_plan(folder, "duo_attention", TARGET)) == [[Dense(), Dense(), one, one], [Dense()] * 4]
    half = Target(MODEL, streaming_share=0.5)
    assert rules(read_plan(folder, "duo_attention", half)) == [
        [Dense(), Dense(), one, one],
        [one, one, Dense(), Dense()],
    ]
    everything = Target(MODEL, streaming_share=1.0)
    assert rules(read_plan(folder, "duo_attention", everything)) == [[one] * 4] * 2
    assert read_plan(folder, "duo_attention", TARGET).unit == "kv_group"


def test_duo_attention_keeps_the_gates_it_was_read_from(tmp_path: Path) -> None:
    gates = [[0.9, 0.1], [0.5, 0.49]]
    plan = read_plan(duo_folder(tmp_path / "duo", gates, threshold=0.5), "duo_attention", TARGET)
    write_plan(plan, "duo_attention", tmp_path / "out")
    lines = (tmp_path / "out" / "full_attention_heads.tsv").read_text().splitlines()
    assert [[float(cell) for cell in line.split("\t")] for line in lines] == gates


def test_ucm_layers(tmp_path: Path) -> None:
    assert (
        rules(read_plan(source("ucm", tmp_path), "ucm", TARGET))[1] == [BoundsTopk(keep=LengthLaw(b=0.3), sink=128)] * 4
    )
    hashed = UCM | {"vllm_hash_attention_topk": 2048, "vllm_hash_attention_rollback_layers": [1]}
    hashed |= {"top_k_ratio_per_layer": [0.3, 0.3], "vllm_hash_attention_skip_layers": [False, True]}
    plan = read_plan(write_json(tmp_path / "hashed.json", hashed), "ucm", TARGET)
    assert rules(plan) == [[BoundsTopk(keep=LengthLaw(a=2048), sink=128)] * 4, [Dense()] * 4]


def test_ucm_layers_that_skip_reuse_the_last_choice(tmp_path: Path) -> None:
    """As RALS writes them: dense layers at the ends and in between, runs of layers without a choice of their own."""
    model = replace_layers(MODEL, 7)
    content = UCM | {
        "num_hidden_layers": 7,
        "top_k_ratio_per_layer": [0.3] * 7,
        "top_k_index_reuse": [-1] * 7,
        "vllm_hash_attention_topk": 2048,
        "vllm_hash_attention_rollback_layers": [0, 3, 6],
        "vllm_hash_attention_skip_layers": [False, False, True, True, True, False, False],
    }
    target = replace(TARGET, base_model=model)
    plan = read_plan(write_json(tmp_path / "rals.json", content), "ucm", target)
    chosen, reused = BoundsTopk(keep=LengthLaw(a=2048), sink=128), Reuse(layer=1, decode=True)
    expected = [Dense(), chosen, reused, Dense(), reused, chosen, Dense()]
    assert [set(plan.module_rules(module)) for module in model.modules] == [{rule} for rule in expected]
    assert plan.save(tmp_path / "plan.json") is None
    fresh = Plan.load(tmp_path / "plan.json").model_copy(update={"provenance": {}})
    write_plan(fresh, "ucm", tmp_path / "again.json")
    again = read_plan(tmp_path / "again.json", "ucm", target)
    assert again.assignments == plan.assignments
    named = content | {"top_k_index_reuse": [-1, -1, -1, -1, 1, -1, -1]}
    assert read_plan(write_json(tmp_path / "named.json", named), "ucm", target).assignments == plan.assignments
    early = content | {"vllm_hash_attention_skip_layers": [False, True, True, True, True, False, False]}
    with pytest.raises(SpecError, match="layer 1 reuses the choice of no layer, which makes none"):
        read_plan(write_json(tmp_path / "early.json", early), "ucm", target)
    other = fresh.model_copy(
        update={
            "rules": plan.rules | {"other": Reuse(layer=1)},
            "assignments": plan.assignments | {model.modules[4]: ("other",) * 4},
        }
    )
    with pytest.raises(SpecError, match="reuse of the last such layer by decoded tokens"):
        write_plan(other, "ucm", tmp_path / "other.json")


def replace_layers(model: BaseModelInfo, count: int) -> BaseModelInfo:
    sizes = {name: (getattr(model, name)[0],) * count for name in ("num_heads", "num_kv_heads", "head_dim")}
    modules = tuple(f"model.layers.{layer}.self_attn" for layer in range(count))
    return model.model_copy(update={"modules": modules, **sizes})


def test_modelopt_evaluates_its_law_per_phase(tmp_path: Path) -> None:
    plan = read_plan(source("modelopt", tmp_path), "modelopt", TARGET)
    assert rules(plan)[0] == [Dense()] * 4, "ignored"
    (rule,) = set(rules(plan)[1])
    assert isinstance(rule, SkipSoftmax)
    assert rule.prefill_scale == pytest.approx(2 * math.exp(4 * 0.5))
    assert rule.decode_scale == pytest.approx(0.5 * math.exp(6 * 0.25))
    (other,) = set(rules(read_plan(tmp_path / "in.json", "modelopt", Target(MODEL, target_sparsity=0.9)))[1])
    assert isinstance(other, SkipSoftmax)
    assert other.prefill_scale == pytest.approx(2 * math.exp(4 * 0.9))


def test_modelopt_older_spelling_and_no_groups(tmp_path: Path) -> None:
    older = {
        "config_groups": {"group_0": {"sparse_algo": "softmax_skip", "targets": ["A"]}},
        "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 3.0, "b": 0.0}},
    }
    plan = read_plan(write_json(tmp_path / "older.json", older), "modelopt", TARGET)
    assert set(rules(plan)[0]) == {SkipSoftmax(prefill_scale=3.0)}
    nothing = read_plan(write_json(tmp_path / "none.json", {"config_groups": {}}), "modelopt", TARGET)
    assert nothing.kind_counts() == {"dense": 8}


# --- plans of ours ---------------------------------------------------------------------------------------------------------------------


def ours(*layers: list[Rule]) -> Plan:
    return TARGET.plan(layers, "query_head", format="plan", source=Path("test"))


def test_laws_become_numbers_at_a_length(tmp_path: Path) -> None:
    plan = ours([slash(64, 64)] * 4, [SinkWindow(sink=64, window=LengthLaw(a=64, b=0.25))] * 4)
    with pytest.raises(
        SpecError, match=r"model.layers.1.self_attn:0: minference wants a number of tokens.*Pass --length"
    ):
        write_plan(plan, "minference", tmp_path / "out.json")
    write_plan(plan, "minference", tmp_path / "out.json", length_tokens=4096)
    assert json.loads((tmp_path / "out.json").read_text())[1]["0"] == ["stream_llm", 64, 1088, 1.0]


@pytest.mark.parametrize(
    ("format", "layer", "sentence"),
    [
        ("minference", [Dense()] * 4, r"self_attn:0 follows dense, which minference cannot express: it has stream_llm"),
        ("minference", [PooledTopk(keep=LengthLaw(a=64))] * 4, r"cannot express.*100 blocks of 64"),
        ("moa", [Dense(), Dense(), Zero(), Dense()], r"self_attn:2 follows zero, which moa cannot express"),
        ("moa", [stream(128, 256)] * 4, r"sink of 64 tokens"),
        ("duo_attention", [Dense(), stream(64, 256), Dense(), Dense()], r"decides per KV head.*--unit kv_group"),
        (
            "duo_attention",
            [stream(64, 256), stream(64, 256), stream(64, 512), stream(64, 512)],
            r"one sink and one window",
        ),
        ("duo_attention", [Zero()] * 4, r"dense and streaming"),
        ("ucm", [Dense(), Zero(), Dense(), Dense()], r"cannot express|decides per layer"),
        ("ucm", [BoundsTopk(keep=LengthLaw(a=64), prefill=True)] * 4, r"with a dense prompt"),
        ("modelopt", [stream(64, 256)] * 4, r"one skip_softmax threshold law"),
    ],
)
def test_what_a_format_cannot_say_is_named(format: str, layer: list[Rule], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=sentence):
        write_plan(ours(layer, layer), format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_new_ucm_and_modelopt_files(tmp_path: Path) -> None:
    plan = ours([Dense()] * 4, [BoundsTopk(keep=LengthLaw(a=512), sink=128)] * 4)
    write_plan(plan, "ucm", tmp_path / "ucm.json")
    assert rules(read_plan(tmp_path / "ucm.json", "ucm", TARGET)) == rules(plan)
    plan = ours([Dense()] * 4, [SkipSoftmax(prefill_scale=12.5)] * 4)
    write_plan(plan, "modelopt", tmp_path / "modelopt.json")
    assert rules(read_plan(tmp_path / "modelopt.json", "modelopt", TARGET)) == rules(plan)
    write_plan(uniform_plan(MODEL, Dense(), block_tokens=64, lengths_tokens=(64,)), "modelopt", tmp_path / "dense.json")
    assert json.loads((tmp_path / "dense.json").read_text()) == {"sparse_attention_config": {"config_groups": {}}}


def test_an_edited_plan_is_written_as_it_is_now(tmp_path: Path) -> None:
    """What a file said is given back only while the plan still says it."""
    for format in ("ucm", "modelopt", "duo_attention"):
        plan = read_plan(source(format, tmp_path), format, TARGET)
        dense = dict.fromkeys(MODEL.modules, ("dense",) * 4)
        edited = plan.model_copy(update={"assignments": dense, "rules": {"dense": Dense()}})
        write_plan(edited, format, tmp_path / f"{format}-edited")
        assert read_plan(tmp_path / f"{format}-edited", format, TARGET).kind_counts() == {"dense": 8}


# --- files that are wrong --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "content", "error", "sentence"),
    [
        ("minference", {}, ArtifactError, "no minference file: it must be a list over layers"),
        ("minference", [{"zero": []}], ArtifactError, "no minference file"),
        ("minference", [{"0": ["triangle", 1, 2, 3]}, {}], ArtifactError, "known type, but is .'triangle'"),
        ("minference", [{}], PlanMismatchError, "must have 2 layers x 4 query heads for tiny, but has 1 layers x 4"),
        ("minference", [{"4": ["stream_llm", 1, 2, 3]}, {}], PlanMismatchError, "2 layers of 5, 4"),
        ("moa", {"alphas": [[1]]}, ArtifactError, "`alphas` and `betas`"),
        ("moa", {"alphas": [[1], [1]], "betas": [[0], [0]]}, PlanMismatchError, "has 2 layers x 1"),
        (
            "moa",
            {"alphas": [[1] * 4] * 2, "betas": [[2] * 4] * 2},
            ArtifactError,
            r"betas must lie in \[0, 1\], but one is 2",
        ),
        ("ucm", {"num_hidden_layers": 2}, ArtifactError, "`top_k_ratio_per_layer`"),
        (
            "ucm",
            UCM | {"top_k_index_reuse": [-1, 0]},
            SpecError,
            "layer 1 reuses the choice of layer 0, which makes none",
        ),
        ("ucm", UCM | {"top_k_ratio_per_layer": [1]}, PlanMismatchError, "has 1 layers"),
        ("modelopt", {"sparse_attention_config": {}}, ArtifactError, "`config_groups`"),
        (
            "modelopt",
            {"config_groups": {"g": {"algorithm": "sparse_softmax"}}},
            SpecError,
            "N of every M single scores",
        ),
        ("modelopt", {"config_groups": {"g": {"algorithm": "vsa"}}}, SpecError, "gates that were trained"),
        ("modelopt", {"config_groups": {"g": {"algorithm": "skip_softmax"}}}, SpecError, "must be calibrated"),
        ("modelopt", {"config_groups": {"g": {}}}, SpecError, "algorithm None is not known"),
    ],
)
def test_wrong_files(format: str, content: Any, error: type[Exception], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=sentence):
        read_plan(write_json(tmp_path / "in.json", content), format, TARGET)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('[{"0":')
    with pytest.raises(ArtifactError, match="breaks off or is damaged at line 1"):
        read_plan(tmp_path / "cut.json", "minference", TARGET)
    with pytest.raises(ArtifactError, match="must exist"):
        read_plan(tmp_path / "none.json", "moa", TARGET)
    (tmp_path / "full_attention_heads.tsv").write_text("a\tb\n")
    with pytest.raises(ArtifactError, match="numbers separated by tabs"):
        read_plan(tmp_path, "duo_attention", TARGET)


def test_a_format_and_a_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Did you mean 'moa'"):
        read_plan(tmp_path, "moe", TARGET)
    with pytest.raises(SpecError, match="does not describe its model; name it with --model"):
        read_plan(source("moa", tmp_path), "moa")
