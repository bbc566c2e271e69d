"""`sparsesearch`: the app, its global options, and the order in which the commands are listed."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from sparsesearch_cli import deploy, judge, listing, measure, plan

app = typer.Typer(
    name="sparsesearch",
    help="Find, offline, how a transformer may skip attention work at a budget with the least loss; then run the plan.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
for room in (measure, plan, deploy, judge, listing):
    room.register(app)


@app.callback()
def options(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file of option values: command -> option -> value.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One option value, as command.option=value; wins over --config.")
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


def _defaults(config: Path | None, settings: list[str]) -> dict[str, Any]:
    """Option values by command, from the file and then from --set."""
    import yaml

    values: dict[str, Any] = {}
    if config is not None:
        try:
            values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise typer.BadParameter(f"--config must be a readable YAML file, but: {error}") from error
        if not isinstance(values, dict) or not all(isinstance(part, dict) for part in values.values()):
            raise typer.BadParameter(f"--config must map command -> option -> value, but {config} does not.")
    known = set(_command_names())
    for setting in settings:
        key, separator, value = setting.partition("=")
        command, dot, option = key.partition(".")
        if not separator or not dot:
            raise typer.BadParameter(f"--set must look like search.budget=density=0.25, but got {setting!r}.")
        values.setdefault(command, {})[option] = yaml.safe_load(value)
    for command in values:
        if command not in known:
            raise typer.BadParameter(f"no command {command!r}; commands: {', '.join(sorted(known))}.")
    return {
        command: {name.replace("-", "_"): value for name, value in part.items()} for command, part in values.items()
    }


def _command_names() -> list[str]:
    return [info.name for info in app.registered_commands if info.name]


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
