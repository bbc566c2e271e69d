"""A few PTX instructions on one quad of lanes, in numpy: enough to run the branches of the late softmax without a GPU."""

from typing import Any

import numpy as np

LANES = 4
Registers = dict[str, Any]
TWO = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.fmax, "min": np.fmin}
TESTS = {"gt": np.greater, "lt": np.less, "neu": np.not_equal}


def run(code: str, registers: Registers) -> None:
    """Execute `code`; operands and results are in `registers`, by name, one value per lane."""
    lines = [line.strip() for line in code.replace(";", "\n").splitlines()]
    lines = [line for line in lines if line and line not in "{}" and not line.startswith(".reg")]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    at = 0
    with np.errstate(all="ignore"):
        while at < len(lines):
            line = lines[at]
            at += 1
            if line.startswith("@!q bra"):
                at = at if registers["q"].any() else labels[line.split()[-1]]
            elif not line.endswith(":"):
                name, rest = line.split(None, 1)
                to, *given = (word.strip() for word in rest.split(","))
                registers[to] = _result(name, [_value(word, registers) for word in given])


def rounded_pair(word: Any, upper: bool) -> Any:
    """One bf16 of a packed pair, as fp32."""
    return (word & 0xFFFF0000 if upper else word << 16).astype(np.uint32).view(np.float32)


def _value(word: str, registers: Registers) -> Any:
    if word.startswith("0f"):
        return np.full(LANES, np.frombuffer(bytes.fromhex(word[2:]), ">f4")[0], np.float32)
    return registers[word] if word in registers else int(word, 0)


def _result(name: str, given: list[Any]) -> Any:
    match name.split("."):
        case ["setp", test, *others]:
            found = TESTS[test](given[0], given[1])
            return found | given[2] if "or" in others else found
        case ["vote", *_]:
            return np.full(LANES, given[0].any())
        case ["shfl", *_]:
            return given[0][np.arange(LANES) ^ given[1]]
        case ["selp", _]:
            return np.where(given[2], given[0], given[1])
        case ["mov", _]:
            return given[0].copy()
        case ["neg", _]:
            return -given[0]
        case ["ex2", *_]:
            power = np.exp2(given[0].astype(np.float64)).astype(np.float32)
            return np.where(power < 2.0**-126, np.float32(0), power)
        case ["cvt", "rn", "bf16x2", _]:
            return _bf16(given[0]) & 0xFFFF0000 | _bf16(given[1]) >> 16
        case ["fma", *_]:
            return (given[0] * given[1] + given[2]).astype(np.float32)
        case [operation, _]:
            return TWO[operation](*given).astype(np.float32)
    raise AssertionError(name)


def _bf16(x: Any) -> Any:
    bits = np.asarray(x, np.float32).view(np.uint32)
    return bits + 0x7FFF + (bits >> 16 & 1)
