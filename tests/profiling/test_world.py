"""Two processes that share the sequences write what one process writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
@pytest.mark.parametrize("samples", [3])
def test_two_processes_equal_one(tmp_path: Path, samples: int) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    options = ["profile", "needle-7m", "--space", str(tmp_path / "space.yaml"), "--lengths", "192,256", "--num-samples"]
    options += [str(samples), "--num-probes", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(launcher: list[str], out: str) -> str:
        command = [
            sys.executable,
            *launcher,
            "-m",
            "sparsesearch_cli.main",
            *options,
            "-o",
            str(tmp_path / out),
            "--json",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    one = run([], "one")
    two = run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "two")
    assert one == two, "only the first process reports"
    for file in ("scores-192.safetensors", "scores-256.safetensors", "profile.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
