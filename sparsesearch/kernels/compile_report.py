"""What ptxas makes of a kernel, without a GPU: compile for sm_90a and read registers, spills, shared memory and matrix instructions."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
STRIDED = ("stride", "stride_b", "stride_h", "stride_g", "stride_s", "stride_t")
"""Integer arguments so named are multiples of 16, as they are for every head_dim we serve; the launcher finds that out at run time."""

LOCAL = r"\b(?:LDL|STL)\b"

SHARED_LIMIT_BYTES = 232_448  # per block, H100 and H200


@dataclass(frozen=True)
class CompileReport:
    """Resources of one compiled kernel.

    Attributes:
        registers: per thread at launch (warp-specialised kernels reallocate them).
        spill_bytes: stores and loads to local memory.
        shared_bytes: static and dynamic shared memory of a block.
        wgmma: HGMMA instructions in the machine code.
        local_accesses: LDL and STL instructions in the machine code.
        warnings: ptxas lines that say matrix instructions were serialised, or register reallocation ignored.
        loop_local_accesses: those of `local_accesses` that lie in the loops over keys, the innermost ones with matrix instructions.
        exp2_under_product: per place that waits for all but the last group of matrix instructions, and then for that one, the exponentials in
            between. ptxas moves waits: 0 means that the exponentials come after both, and nothing runs beside the last group.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    local_accesses: int
    warnings: tuple[str, ...]
    exp2_under_product: tuple[int, ...] = ()
    loop_local_accesses: int = 0

    @property
    def problems(self) -> tuple[str, ...]:
        """Why this kernel must not ship; empty if it may."""
        found = list(self.warnings)
        if self.spill_bytes or self.local_accesses:
            found.append(f"{self.spill_bytes} B spilled, {self.local_accesses} local accesses")
        if self.shared_bytes > SHARED_LIMIT_BYTES:
            found.append(f"{self.shared_bytes} B of shared memory exceed {SHARED_LIMIT_BYTES}")
        return tuple(found)


def compile_report(
    kernel: JITFunction[Any], signature: Mapping[str, str], constants: Mapping[str, Any], *, options: Mapping[str, Any]
) -> CompileReport:
    """Compile `kernel` for sm_90a and report.

    Args:
        kernel: a `@triton.jit` or `@gluon.jit` function.
        signature: argument name -> Triton type, such as `*bf16`, `i32` or `tensordesc<...>`.
        constants: compile-time argument name -> value.
        options: `num_warps`, `num_stages`, `maxnreg`.
    """
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = [["tt.divisibility", 16]]
    attrs = {(i,): aligned for i, name in enumerate(names) if types[name].startswith("*") or name.endswith(STRIDED)}
    source = source_type(kernel, types, constexprs=values, attrs=attrs)
    compiled = triton.compile(source, target=HOPPER, options=dict(options))
    return _inspect(compiled.asm["ptx"], compiled.asm["cubin"], int(compiled.metadata.shared))


def _inspect(ptx: str, cubin: bytes, shared_bytes: int) -> CompileReport:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source, "-o", binary]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas: {done.stdout}{done.stderr}")
        log = done.stderr
        binary.write_bytes(cubin)
        sass = subprocess.run([tools / "nvdisasm", "-c", binary], check=True, capture_output=True, text=True).stdout
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    warnings = tuple(line.strip() for line in log.splitlines() if re.search(r"C75\d\d|setmaxnreg", line))
    local = len(re.findall(LOCAL, sass))
    looped = sum(len(re.findall(LOCAL, loop)) for loop in _inner_loops(sass))
    between = re.findall(r"DEPBAR\.LE gsb0, 0x1\b((?:(?!DEPBAR\.LE gsb0)[\s\S])*)DEPBAR\.LE gsb0, 0x0\b", sass)
    under = tuple(len(re.findall(r"\bMUFU\.EX2\b", code)) for code in between)
    products = len(re.findall(r"\bHGMMA\b", sass))
    return CompileReport(registers, spills, shared_bytes, products, local, warnings, under, looped)


def _inner_loops(sass: str) -> list[str]:
    """Machine code of the innermost loops with matrix instructions: those that a conditional branch closes (a wait that retries jumps back without one)."""
    starts = {label[1]: label.end() for label in re.finditer(r"^(\.L\S+):", sass, re.MULTILINE)}
    jumps = re.finditer(r"@!?U?P\d+ BRA `\((\.L\S+?)\)", sass)
    spans = [(starts[jump[1]], jump.start()) for jump in jumps if starts[jump[1]] < jump.start()]
    spans = [(start, end) for start, end in spans if "HGMMA" in sass[start:end]]
    inner = [
        one for one in spans if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in spans)
    ]
    return [sass[start:end] for start, end in inner]
