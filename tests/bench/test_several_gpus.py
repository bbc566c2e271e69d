"""The comparison of profiles that several GPUs made: it sees what differs, and a failure is told."""

import sys
from pathlib import Path
from time import perf_counter

import pytest
import torch
from safetensors.torch import save_file

from sparsesearch.bench import several_gpus


def test_what_differs_is_told_by_kind(tmp_path: Path) -> None:
    truth = {"000.fisher": torch.tensor([3.0, 4.0]), "001.fisher": torch.zeros(2), "000.mass": torch.ones(2)}
    other = truth | {"001.fisher": torch.tensor([0.0, 0.5])}
    for name, scores in (("one", truth), ("two", other)):
        (tmp_path / name).mkdir()
        save_file(scores, tmp_path / name / "scores-64.safetensors")
    assert several_gpus.differences(tmp_path / "two", tmp_path / "one") == {"fisher": pytest.approx(0.1), "mass": 0.0}


def test_every_way_is_the_product_s_command() -> None:
    ways = several_gpus.commands(["MODEL", "--device", "cuda"], 2)
    assert all("sparsesearch_cli.main profile MODEL --device cuda" in " ".join(way) for way in ways.values())
    assert ways[several_gpus.ONE] == ways[several_gpus.AGAIN]
    assert "--nproc-per-node 2" in " ".join(ways[several_gpus.SHARED])
    assert ways[several_gpus.SPREAD][-2:] == ["--device-map", "auto"]


def profile_by(seconds: float, code: int) -> list[str]:
    """A stand-in for a profile: its two files, so many seconds apart."""
    program = (
        f"import os, pathlib, sys; out = pathlib.Path(sys.argv[2]); out.mkdir(); (out / 'state.json').touch()\n"
        f"(out / 'profile.json').touch(); os.utime(out / 'profile.json', ns=((out / 'state.json').stat().st_mtime_ns + {int(seconds * 1e9)},) * 2)\n"
        f"sys.exit({code} and 'no such GPU')"
    )
    return [sys.executable, "-S", "-c", program]


def test_figures_of_every_way_and_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = (several_gpus.ONE, several_gpus.AGAIN, several_gpus.SHARED, several_gpus.SPREAD)
    ways = dict(zip(names, (profile_by(seconds, 0) for seconds in (8.0, 9.0, 4.0, 8.5)), strict=True))
    monkeypatch.setattr(several_gpus, "commands", lambda options, processes: ways)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = dict(several_gpus.compared([], tmp_path, 2))
    assert [round(figures["profile_s"], 3) for figures in found.values()] == [8.0, 9.0, 4.0, 8.5]
    assert [name for name, figures in found.items() if "differences" in figures] == list(names[1:])
    process = several_gpus.started(profile_by(1.0, 1), tmp_path / "failed")
    with pytest.raises(RuntimeError, match="no such GPU"):
        several_gpus.finished(process, perf_counter())
