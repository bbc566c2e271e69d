"""Hardware counters: what `ncu` prints is read in our units; without `ncu` the command says so."""

import json
import shutil
from itertools import count, cycle
from pathlib import Path

import pytest
import torch

from sparsesearch.bench import counters
from sparsesearch.bench.counters import CASES, COUNTERS, parse, run
from sparsesearch.bench.decode_counters import CASES as DECODE_CASES
from sparsesearch.bench.decode_counters import KERNEL_NAMES
from sparsesearch.errors import UnsupportedKernelError

RECORD = Path(__file__).parents[1] / "golden" / "counters_h200.json"


def test_shares_are_fractions_and_times_are_seconds() -> None:
    metrics = [metric for metric, _ in COUNTERS.values()]
    values = [str(1000 * (i + 1)) for i in range(len(metrics))]
    values[0] = "145,984"
    text = "\n".join(
        [
            "==PROF== Connected",
            ",".join(f'"{name}"' for name in ("ID", "Kernel Name", *metrics)),
            ",".join('""' for _ in range(len(metrics) + 2)),
            ",".join(f'"{value}"' for value in ("0", "hopper_attention", *values)),
        ]
    )
    (row,) = parse(text, COUNTERS)
    assert row["seconds"] == pytest.approx(145.984e-6)
    names = list(COUNTERS)
    assert row["tensor"] == pytest.approx(10.0 * (names.index("tensor") + 1))
    assert row["stalls"]["wait"] == 1000.0 * len(names)


def test_without_ncu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "find_spec", lambda _: object())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UnsupportedKernelError, match="Nsight Compute"):
        run()


def test_without_nvidia_ml_py_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedKernelError, match=r"sparsesearch\[counters\]"):
        run()


def test_clock_and_power_are_in_our_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """MHz and mW, as torch gives them, of the second half of the calls."""
    clocks, powers = cycle([1, 1755]), cycle([1, 684_000])
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: next(clocks))
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: next(powers))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = count()
    monkeypatch.setattr(counters.time, "perf_counter", lambda: float(next(times)))
    found = counters._loaded(lambda: None, budget_s=2.5)
    assert (found["loaded_hz"], found["loaded_w"]) == (1755e6, 684.0)


def test_the_record_covers_the_cases() -> None:
    record = json.loads(RECORD.read_text())
    assert record["provenance"]["device"] == "NVIDIA H200"
    rows = record["rows"]
    assert set(CASES) <= {(r["head_dim"], r["length"], r["plan"]) for r in rows if r["kernel"] == "gluon"}
    for row in rows:
        assert 0 < row["tensor"] < 1
        assert row["busy_cycles_min"] <= row["busy_cycles_mean"] <= row["busy_cycles_max"] <= row["elapsed_cycles"]
        assert row["loaded_hz"] < 2.1e9


def test_what_limits_decoding() -> None:
    """Keys and values are read once, by three workers per multiprocessor. A gigabyte keeps the memory busy; 134 MB do not: see `triton_decode`."""
    record = json.loads((RECORD.parent / "counters_decode_h200.json").read_text())
    rows = {(*(row[name] for name in ("batch", "length", "kept")), row["kernel"]): row for row in record["rows"]}
    assert set(rows) == {(*case, kernel) for case in DECODE_CASES for kernel in KERNEL_NAMES}
    for case in DECODE_CASES:
        parts, merge = (rows[(*case, kernel)] for kernel in KERNEL_NAMES)
        assert parts["read_bytes"] == pytest.approx(parts["bytes"], rel=0.02)
        assert parts["occupancy"] == pytest.approx(3 * 4 / 64, rel=0.05)
        assert parts["dram"] > 0.9 if parts["bytes"] > 1e9 else 0.7 < parts["dram"] < 0.8
        assert merge["read_bytes"] < 0.01 * parts["bytes"]
        assert merge["seconds"] < 4e-6
