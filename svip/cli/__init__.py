"""The command line: ``svip STEP --help``. One command a step; it reads arguments and calls ``svip.steps``."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import entry_points

from rich.console import Console
from rich.markup import escape

# in this order their commands stand in the help
from svip.cli import data, doctor, model, registry, runs, tracking, tuning  # noqa: F401
from svip.cli.shared import app


def main() -> None:
    """Run the command line; expected errors end with one line and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("timm", "alembic", "mlflow", "httpx", "gensim", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for extension in entry_points(group="svip.commands"):
        app.add_typer(extension.load(), name=extension.name)
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from svip.training.launch import left_to_others

            if left_to_others(error):
                sys.exit(1)
        message = escape(str(error) or type(error).__name__)
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {message}", soft_wrap=True)
        sys.exit(1)
