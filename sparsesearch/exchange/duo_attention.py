"""DuoAttention: a folder with full_attention_heads.tsv (layers x KV heads of gates in [0, 1]) and config.json (sink and recent sizes).

The gates become dense or streaming KV groups either by the threshold of config.json or by the share that is to stream; equal gates are settled
by position, where DuoAttention draws noise.
"""

import json
import math
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import read_text, write_bytes
from sparsesearch.errors import SpecError
from sparsesearch.exchange.target import Target, inexpressible, malformed, read_json, tokens_of
from sparsesearch.plan import Plan
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow

_FORMAT = "duo_attention"
_GATES, _CONFIG = "full_attention_heads.tsv", "config.json"
_DEPLOYED = {"sink": 64, "recent": 256}  # the paper's deployment, where config.json names none


def read(path: Path, target: Target) -> Plan:
    """Dense where the gate is high, streaming elsewhere; one decision per KV group."""
    folder = path if path.is_dir() else path.parent
    gates = _gates(folder / _GATES)
    target.check([len(row) for row in gates], source=folder / _GATES, what="KV heads", per_kv_head=True)
    config = read_json(folder / _CONFIG, format=_FORMAT)
    if not isinstance(config, dict):
        malformed(folder / _CONFIG, _FORMAT, "it must be a mapping")
    sizes = {name: config.get(f"deploy_{name}_size") or tokens for name, tokens in _DEPLOYED.items()}
    streaming = SinkWindow(sink=sizes["sink"], window=LengthLaw(a=sizes["recent"]))
    threshold = config.get("threshold") if target.streaming_share is None else None
    flat = [gate for row in gates for gate in row]
    streams = _streaming(flat, threshold, target.streaming_share)
    rules, group = [], iter(streams)
    for heads, kv_heads in zip(target.base_model.num_heads, target.base_model.num_kv_heads, strict=True):
        chosen: list[Rule] = [streaming if next(group) else Dense() for _ in range(kv_heads)]
        rules.append([chosen[head * kv_heads // heads] for head in range(heads)])
    return target.plan(
        rules,
        "kv_group",
        format=_FORMAT,
        source=folder / _GATES,
        gates=gates,
        threshold=threshold,
        share=target.streaming_share,
    )


def write(plan: Plan, path: Path, length_tokens: int | None) -> None:
    """Gates 1 and 0, and the sizes; gates that came from such a folder are written as they were where they still agree."""
    model, rows, streaming = plan.base_model, [], None
    for module, heads, kv_heads in zip(model.modules, model.num_heads, model.num_kv_heads, strict=True):
        rules, row = plan.module_rules(module), []
        for group in range(kv_heads):
            mates = rules[group * heads // kv_heads : (group + 1) * heads // kv_heads]
            where = f"{module}:{group * heads // kv_heads}"
            if len(set(mates)) > 1:
                raise SpecError(
                    f"{where}: {_FORMAT} decides per KV head, but the query heads of this one follow {len(set(mates))} rules. "
                    "Search with --unit kv_group."
                )
            if isinstance(mates[0], SinkWindow):
                sizes = (mates[0].sink, tokens_of(mates[0].window, length_tokens, where, _FORMAT))
                if streaming not in (None, sizes):
                    inexpressible(where, mates[0], _FORMAT, f"one sink and one window for all, here {streaming} tokens")
                streaming = sizes
            elif not isinstance(mates[0], Dense):
                inexpressible(where, mates[0], _FORMAT, "dense and streaming (sink and window) KV heads")
            row.append(float(isinstance(mates[0], Dense)))
        rows.append(row)
    known = plan.provenance.get("gates") if plan.provenance.get("converted_from") == _FORMAT else None
    sink, recent = streaming or (_DEPLOYED["sink"], _DEPLOYED["recent"])
    config: dict[str, Any] = {"deploy_sink_size": sink, "deploy_recent_size": recent, "threshold": 0.5}
    if known is not None and _agrees(known, rows, plan.provenance):
        rows, config["threshold"] = known, plan.provenance.get("threshold") or 0.5
    text = "\n".join("\t".join(repr(float(gate)) for gate in row) for row in rows) + "\n"
    write_bytes(path / _GATES, text.encode())
    write_bytes(path / _CONFIG, (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())


def _gates(path: Path) -> list[list[float]]:
    try:
        gates = [[float(cell) for cell in line.split("\t")] for line in read_text(path).splitlines() if line.strip()]
    except ValueError:
        gates = []
    if not gates or not all(math.isfinite(gate) for row in gates for gate in row):
        malformed(path, _FORMAT, "it must be a table of numbers separated by tabs, one row per layer")
    return gates


def _streaming(gates: list[float], threshold: float | None, share: float | None) -> list[bool]:
    """Which KV heads stream: gates below the threshold, or the smallest ones, earlier first among equals."""
    if share is None:
        return [gate < (0.5 if threshold is None else threshold) for gate in gates]
    order = sorted(range(len(gates)), key=lambda index: (gates[index], index))
    chosen = set(order[: round(share * len(gates))])
    return [index in chosen for index in range(len(gates))]


def _agrees(gates: list[list[float]], rows: list[list[float]], provenance: dict[str, Any]) -> bool:
    flat = [gate for row in gates for gate in row]
    streams = _streaming(flat, provenance.get("threshold"), provenance.get("share"))
    return [not gate for row in rows for gate in row] == streams
