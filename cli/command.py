"""How every command shows its options, and what it says to an option that it lacks."""

from typing import Any

import typer.core


class Command(typer.core.TyperCommand):
    """Options under the headings of their `rich_help_panel`, also in plain text; an unknown option names the commands that have it."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """One section per heading, in the order in which they first come."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                usual = "Options" if param.param_type_name == "option" else "Arguments"
                sections.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As ever, but with a better hint than the nearest spelling where other commands have the option."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # click's, or the copy of it that newer releases of Typer carry
                _hint(error, _having(error.option_name, ctx.find_root().command))  # type: ignore[attr-defined]
            raise


def _hint(error: Any, commands: list[str]) -> None:
    if commands:
        error.message = f"No such option: {error.option_name}. It is one of {', '.join(commands)}."
        error.possibilities = None


def _having(option: str, group: Any, prefix: str = "") -> list[str]:
    """Names of the commands that have an option of this name."""
    found = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += _having(option, command, f"{name} ")
        elif any(option in param.opts for param in command.params):
            found.append(f"`{prefix}{name}`")
    return found
