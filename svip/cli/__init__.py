"""The command line: ``svip STEP --help``. One command a step; it reads arguments and calls ``svip.steps``."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console
from rich.markup import escape

# in this order their commands stand in the help
from svip.cli import data, doctor, model, registry, runs, tracking, tuning  # noqa: F401
from svip.cli.shared import app


def main() -> None:
    """Run the command line; an error is one line, with exit code 2 for a wrong usage and 1 for all else."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("timm", "alembic", "mlflow", "httpx", "gensim", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for extension in entry_points(group="svip.commands"):
        app.add_typer(extension.load(), name=extension.name)
    try:
        sys.exit(app(prog_name="svip", standalone_mode=False))
    except typer.TyperException as error:  # not in its frame of several lines
        if message := error.format_message():  # of `svip` alone, whose help has been shown, there is none
            command = getattr(getattr(error, "ctx", None), "command_path", "svip")
            message = message.replace(": Value error, ", ": ").removesuffix(".")  # of pydantic
            show_error(f"{message} ({command} --help)")
        sys.exit(error.exit_code)
    except (ValueError, OSError, RuntimeError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from svip.training.launch import left_to_others

            if left_to_others(error):
                sys.exit(1)
        show_error(str(error) or type(error).__name__)
        sys.exit(1)


def show_error(message: str) -> None:
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
