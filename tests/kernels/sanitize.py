"""All kernels on small shapes under NVIDIA's compute-sanitizer; prints what each tool found.

    python tests/kernels/sanitize.py --tools memcheck racecheck synccheck --json out.json

The exit status is 1 if a tool other than racecheck finds anything, or if a run does not finish. racecheck reports the eight bytes by which
Triton 3.6's warp specialisation wakes its warps (they are ordered by barriers that it does not model), so its hazards are listed by
kernel and to be read.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).with_name("small_shapes.py")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def check(tool: str, *, timeout_s: float, quick: bool) -> dict[str, Any]:
    """Run the shapes under one tool; its summary, and the messages it repeats, counted by kernel."""
    # torch's caching allocator would hide accesses beyond a tensor; compiled kernels come from the cache of a run before this one
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, sys.executable, str(SHAPES), *["--quick"] * quick]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
        log, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        log, status = (late.stdout or b"").decode(), "timed out"
    lines = [line.removeprefix("========= ") for line in log.splitlines() if line.startswith("=========")]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), "no summary")
    kernels = Counter(match.group(1) for match in re.finditer(r"(?:in|at) (\w+)\+0x", log))
    messages = Counter(
        re.sub(r"0x[0-9a-f]+|\d+", "#", line)[:160]
        for line in lines
        if re.match(r"(?:Error|Warning|Invalid|Uninit|Barrier)", line)
    )
    return {
        "tool": tool,
        "summary": summary,
        "finished": "all kernels ran" in log,
        "status": status,
        "kernels": dict(kernels.most_common(8)),
        "messages": dict(messages.most_common(8)),
        "tail": "" if "all kernels ran" in log else log[-2000:],
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS[:3]))
    parser.add_argument("--timeout-s", type=float, default=300.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--no-warm", action="store_true", help="the kernels are in Triton's cache already")
    given = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer must be on PATH; it comes with the CUDA toolkit.")
    if not given.no_warm:
        subprocess.run([sys.executable, str(SHAPES), *["--quick"] * given.quick], check=True)
    rows = []
    for tool in given.tools:
        rows.append(check(tool, timeout_s=given.timeout_s, quick=given.quick))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    clean = all(row["finished"] and (row["tool"] == "racecheck" or " 0 errors" in row["summary"]) for row in rows)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
