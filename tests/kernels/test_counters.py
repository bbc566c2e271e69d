"""Hardware counters: what `ncu` prints is read in our units; without `ncu` the command says so."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsesearch.bench import device_state
from sparsesearch.bench.counters import CASES, COUNTERS, parse, run
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
    (row,) = parse(text)
    assert row["seconds"] == pytest.approx(145.984e-6)
    names = list(COUNTERS)
    assert row["tensor"] == pytest.approx(10.0 * (names.index("tensor") + 1))
    assert row["stalls"]["wait"] == 1000.0 * len(names)


def test_without_ncu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UnsupportedKernelError, match="Nsight Compute"):
        run()


class Driver:
    """Answers as NVIDIA's library does: status 0, values through pointers."""

    nvmlInit_v2 = staticmethod(lambda: 0)
    refused = 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        assert uuid == b"GPU-12-34"
        handle._obj.value = 7
        return self.refused

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int, mhz: Any) -> int:
        assert (handle.value, kind) == (7, 1)
        mhz._obj.value = 1755
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: Any, milliwatts: Any) -> int:
        assert handle.value == 7
        milliwatts._obj.value = 684_000
        return 0


def test_clock_and_power_are_in_our_units(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(device_state, "_library", lambda _: driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    assert device_state.clock_and_power() == (1755e6, 684.0)
    driver.refused = 4
    with pytest.raises(UnsupportedKernelError, match="returned 4"):
        device_state.clock_and_power()


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(UnsupportedKernelError, match="no-such-library"):
        device_state._library("no-such-library")


def test_the_record_covers_the_cases() -> None:
    record = json.loads(RECORD.read_text())
    assert record["provenance"]["device"] == "NVIDIA H200"
    rows = record["rows"]
    assert set(CASES) <= {(r["head_dim"], r["length"], r["plan"]) for r in rows if r["kernel"] == "gluon"}
    for row in rows:
        assert 0 < row["tensor"] < 1
        assert row["busy_cycles_min"] <= row["busy_cycles_mean"] <= row["busy_cycles_max"] <= row["elapsed_cycles"]
        assert row["loaded_hz"] < 2.1e9
