"""`sparsesearch`: the app, its global options, and the order in which the commands are listed."""

import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import (
    bench,
    calibrate,
    deploy,
    exchange,
    front,
    heal,
    judge,
    lint,
    listing,
    measure,
    plan,
    predict,
    quickstart,
    report,
    reuse,
    search,
    tune,
)
from .command import Command
from .errors import interrupt_again

app = typer.Typer(
    name="sparsesearch",
    help="Find, offline, how a transformer may skip attention work at a budget with the least loss; then run the plan.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"max_content_width": 110},
)
ROOMS = (
    *(quickstart, measure, calibrate, search, plan, reuse, heal, tune, lint, predict),
    *(deploy, exchange, judge, report, front, bench, listing),
)
for room in ROOMS:
    room.register(app)
for info in (*app.registered_commands, *bench.bench.registered_commands):
    info.cls = Command


@app.callback()
def options(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file of option values: command -> option -> value.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="One option value; wins over --config.", metavar="COMMAND.OPTION=VALUE"),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    log_level: Annotated[
        str, typer.Option(envvar="SPARSESEARCH_LOG_LEVEL", help="debug, info, warning or error, on stderr.")
    ] = "warning",
) -> None:
    """Set what holds for every command."""
    import logging

    if not isinstance(logging.getLevelName(log_level.upper()), int):
        raise typer.BadParameter(f"log level must be debug, info, warning or error, but got {log_level!r}.")
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is drawn by cli/render.py alone
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make small CPU regions up to 20x slower
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    context.default_map = _defaults(config, set_ or [])


def _defaults(config: Path | None, settings: list[str]) -> dict[str, dict[str, Any]]:
    """Option values by command, from the file and then from --set; a name that is no command or option is refused."""
    values: dict[str, dict[str, Any]] = {} if config is None else _read(config)
    for setting in settings:
        key, separator, value = setting.partition("=")
        command, dot, option = key.partition(".")
        if not separator or not dot:
            raise _refusal("--set", f"must look like search.budget=density=0.25, but got {setting!r}.")
        values.setdefault(command, {})[option] = value
    source = "--config or --set"
    commands = {info.name: info.callback for info in app.registered_commands if info.name and info.callback}
    defaults: dict[str, dict[str, Any]] = {}
    for command, part in values.items():
        if command not in commands:
            raise _refusal(source, f"names no command {command!r}.", command, commands)
        known = inspect.signature(commands[command]).parameters
        for option, value in part.items():
            name = str(option).replace("-", "_")
            if name not in known:
                raise _refusal(source, f"names no option {command}.{option}.", name, known)
            defaults.setdefault(command, {})[name] = _as_given(value, takes_list="list" in str(known[name].annotation))
    return defaults


def _read(config: Path) -> dict[str, dict[str, Any]]:
    import yaml

    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise _refusal("--config", f"must be a readable YAML file, but {config} is not: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(part, dict) for part in values.values()):
        raise _refusal("--config", f"must map command -> option -> value, but {config} does not.")
    return values


def _as_given(value: Any, *, takes_list: bool) -> Any:
    """A value as the command line would give it: a list for an option that may be repeated, else text with commas."""
    if takes_list:
        return value if isinstance(value, list) else [value]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _refusal(option: str, message: str, name: str = "", known: Any = ()) -> typer.BadParameter:
    from sparsesearch.errors import nearest

    return typer.BadParameter(message + (nearest(name, known) if known else ""), param_hint=option)


def main() -> None:
    """The entry point; commands that run no model start without transformers."""
    os.environ.setdefault("SPARSESEARCH_REGISTER", "later")
    sys.unraisablehook = interrupt_again
    app()


if __name__ == "__main__":
    main()
