"""Two processes that share the sequences write what one process writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparsesearch_cli.main import app
from typer.testing import CliRunner

from sparsesearch.profiling.world import World, own_device

SPACE = """
name: test
source: tests
description: a template and rules that choose by themselves
block_tokens: 64
unit: query_head
candidates:
  - {kind: sink_window, sink: 64, window: 64}
  - {kind: vertical_slash, vertical: 64, slash: 64}
  - {kind: fixed_blocks, keep: 0.4}
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    options = ["profile", "needle-7m", "--space", str(tmp_path / "space.yaml"), "--lengths", "192,256", "--num-samples"]
    options += ["3", "--num-probes", "1", "--json", "-o"]
    one = CliRunner().invoke(app, [*options, str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*launcher, "-m", "sparsesearch_cli.main", *options, str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert two.returncode == 0, two.stderr
    assert one.stdout == two.stdout, "only the first process reports"
    for file in ("scores-192.safetensors", "scores-256.safetensors", "profile.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("needle-7m", ["--stream"]),
        ("needle-7m", ["--device-map", "auto"]),
        ("needle-7m", ["--space", "pruning"]),
    ],
)
def test_what_processes_cannot_share_is_refused(
    model: str, options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["profile", model, *options, "-o", str(tmp_path / "profile")])
    assert result.exit_code == 2
    assert "torchrun started 2" in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "profile").exists()


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda", World(1, 2)) == "cuda:1"
    assert current == [1]
    assert [own_device("cuda", World()), own_device("cpu", World(1, 2)), own_device("cuda:0", World(1, 2))] == [
        "cuda",
        "cpu",
        "cuda:0",
    ]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda", World(3, 4)) == "cuda:3"  # which is refused where it is looked for
    assert current == [1]
