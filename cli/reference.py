"""The command line reference in the README, made of every `--help`; `python -m sparsesearch_cli.reference README.md` rewrites it."""

import sys
from importlib.metadata import version
from pathlib import Path

from typer.testing import CliRunner

from .main import app
from .render import lines

BEGIN, END = "<!-- cli:begin -->", "<!-- cli:end -->"
COLUMNS = "110"


def layout() -> str:
    """What lays the help texts out, and therefore must be the same to compare them: Typer's minor version."""
    return "typer " + ".".join(version("typer").split(".")[:2])


def reference() -> str:
    """The block between the markers: the list of commands, then each command's help, folded."""
    commands: list[tuple[str, ...]] = [(info.name,) for info in app.registered_commands if info.name]
    for group in app.registered_groups:
        own = group.typer_instance.registered_commands if group.typer_instance else []
        commands += [(str(group.name), str(info.name)) for info in own]
    parts = [f"<!-- {layout()} -->", _code(_help())]
    for name in commands:
        summary = f"<details><summary><code>sparsesearch {' '.join(name)}</code></summary>"
        parts.append(f"{summary}\n\n{_code(_help(*name))}\n\n</details>")
    return "\n\n".join(parts)


def block(text: str) -> str:
    """What stands between the markers of a README now.

    Raises:
        ValueError: the text lacks a marker.
    """
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def rewritten(text: str) -> str:
    """A README with the block made anew."""
    return text[: text.index(BEGIN)] + f"{BEGIN}\n{reference()}\n" + text[text.index(END) :]


def _help(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": COLUMNS, "TERMINAL_WIDTH": COLUMNS})
    return "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())


def _code(text: str) -> str:
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(rewritten(readme.read_text(encoding="utf-8")), encoding="utf-8")
    lines(f"written: {readme}")
