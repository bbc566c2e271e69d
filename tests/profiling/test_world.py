"""Two processes that share the sequences write what one process writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sparsesearch_cli.main import app
from typer.testing import CliRunner

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
