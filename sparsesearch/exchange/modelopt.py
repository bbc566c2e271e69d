"""NVIDIA Model Optimizer: `sparse_attention_config`, as its checkpoint export writes it into config.json.

Expressible: no sparse group at all (dense), and skip-softmax groups with a calibrated threshold, scale = a·exp(b·target sparsity) per phase,
threshold = scale / N, for the modules that `targets` and `ignore` leave. Not expressible: N:M sparse softmax (`sparse_softmax`), which thins
single scores inside a tile, and VSA, whose gates are trained weights of the checkpoint.
"""

import fnmatch
import json
import math
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import write_bytes
from sparsesearch.errors import SpecError
from sparsesearch.exchange.target import Target, inexpressible, malformed, read_json
from sparsesearch.plan import Plan
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.skip_softmax import SkipSoftmax

_FORMAT = "modelopt"
_KEY = "sparse_attention_config"
_SKIP = ("skip_softmax", "softmax_skip")  # the newer and the older spelling
_DEFAULT_TARGET = 0.5
_PHASES = ("prefill", "decode")


def read(path: Path, target: Target) -> Plan:
    """One rule for the modules of each skip-softmax group; every other module is dense.

    Raises:
        SpecError: a group is of another algorithm, or is not calibrated.
    """
    content = read_json(path, format=_FORMAT)
    config = content.get(_KEY, content) if isinstance(content, dict) else None
    groups = config.get("config_groups") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(groups, dict):
        malformed(path, _FORMAT, f"it must hold `{_KEY}` with `config_groups`")
    chosen = _module_rules(config, target.base_model.modules, target.target_sparsity, str(path))
    rules = [[rule] * heads for rule, heads in zip(chosen, target.base_model.num_heads, strict=True)]
    return target.plan(
        rules, "kv_group", format=_FORMAT, source=path, content=config, target_sparsity=target.target_sparsity
    )


def write(plan: Plan, path: Path, length_tokens: int | None) -> None:
    """One skip-softmax group, modules that stay dense in `ignore`; a fixed scale is written as a = scale, b = 0."""
    chosen: list[Rule] = []
    for module in plan.base_model.modules:
        rules = set(plan.module_rules(module))
        for rule in rules - {Dense()}:
            if not isinstance(rule, SkipSoftmax):
                inexpressible(module, rule, _FORMAT, "dense modules, and one skip_softmax threshold law for all others")
        if len(rules) > 1:
            raise SpecError(
                f"{module}: {_FORMAT} decides per module, but the heads of this one follow {len(rules)} rules."
            )
        chosen += rules
    laws = set(chosen) - {Dense()}
    if len(laws) > 1:
        raise SpecError(
            f"{_FORMAT} has one threshold law for all modules, but the plan has {len(laws)} skip_softmax rules."
        )
    came = plan.provenance if plan.provenance.get("converted_from") == _FORMAT else {}
    config = came.get("content")
    if (
        config is None
        or _module_rules(config, plan.base_model.modules, came.get("target_sparsity"), str(path)) != chosen
    ):
        dense = [
            module for module, rule in zip(plan.base_model.modules, chosen, strict=True) if isinstance(rule, Dense)
        ]
        config = _config(next(iter(laws), None), dense)
    write_bytes(path, (json.dumps({_KEY: config}, indent=2) + "\n").encode())


def _module_rules(
    config: dict[str, Any], modules: tuple[str, ...], target_sparsity: float | None, where: str
) -> list[Rule]:
    """The rule of each module: its group's, dense without one."""
    chosen: dict[str, Rule] = {module: Dense() for module in modules}
    for name, group in config["config_groups"].items():
        rule = _rule(group, config, target_sparsity, f"{where}, {name}")
        for module in modules:
            if not any(fnmatch.fnmatch(module, str(pattern)) for pattern in group.get("ignore") or []):
                chosen[module] = rule
    return list(chosen.values())


def _config(rule: Rule | None, dense: list[str]) -> dict[str, Any]:
    if not isinstance(rule, SkipSoftmax):
        return {"config_groups": {}}
    scales = zip(_PHASES, (rule.prefill_scale, rule.decode_scale), strict=True)
    factor: dict[str, Any] = {phase: {"a": scale, "b": 0.0} for phase, scale in scales if scale is not None}
    group = {"algorithm": _SKIP[0], "targets": ["*"], "ignore": dense, "threshold_scale_factor": factor}
    return {"config_groups": {"group_0": group}}


def _rule(group: Any, config: dict[str, Any], target_sparsity: float | None, where: str) -> Rule:
    algorithm = group.get("algorithm", group.get("sparse_algo")) if isinstance(group, dict) else None
    match algorithm:
        case str() if algorithm in _SKIP:
            pass
        case "sparse_softmax":
            raise SpecError(
                f"{where}: sparse_softmax keeps N of every M single scores inside a tile; a plan's rules choose whole tiles."
            )
        case "vsa":
            raise SpecError(
                f"{where}: vsa chooses by gates that were trained into the checkpoint; a plan has no such weights."
            )
        case _:
            raise SpecError(
                f"{where}: algorithm {algorithm!r} is not known; skip_softmax with calibrated thresholds can be converted."
            )
    factor = group.get("threshold_scale_factor", config.get("threshold_scale_factor"))
    wanted: Any = target_sparsity
    if wanted is None:
        wanted = group.get("target_sparsity", config.get("target_sparse_ratio", _DEFAULT_TARGET))
    scales = {phase: _scale(factor, wanted, phase) for phase in _PHASES}
    if not any(scales.values()):
        raise SpecError(
            f"{where}: the threshold must be calibrated: `threshold_scale_factor` with a and b per phase is missing."
        )
    return SkipSoftmax(prefill_scale=scales["prefill"], decode_scale=scales["decode"])


def _scale(factor: Any, wanted: Any, phase: str) -> float | None:
    """a·exp(b·target) of one phase; None if that phase has no fit."""
    fit = factor.get(phase) if isinstance(factor, dict) else None
    if not isinstance(fit, dict) or "a" not in fit or "b" not in fit:
        return None
    share = wanted.get(phase, _DEFAULT_TARGET) if isinstance(wanted, dict) else wanted
    return float(fit["a"]) * math.exp(float(fit["b"]) * float(share))
