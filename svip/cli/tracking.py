"""Commands on what is tracked: sync."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svip.cli.shared import app, example


@app.command(epilog=example("svip sync"))
def sync(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER]", help="The outbox: else $SVIP_OUTBOX, else .svip-outbox here.", show_default=False
        ),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", metavar="URI", help="The server, where it has another address from here.")
    ] = "",
) -> None:
    """Send what was tracked while the MLflow server was away; each record takes effect once."""
    from svip import tracking

    place = folder or tracking.outbox_folder()
    results = 0
    failed = False
    for result in tracking.sync(place, to):
        results += 1
        failed |= bool(result.problem or result.refused)
        if result.busy:
            print(f"run {result.run_id}: left to its process, which is still running")
        elif result.problem:
            print(f"run {result.run_id}: {result.sent} sent, {result.left} kept: {result.problem}")
        else:
            refused = f", {result.refused} refused" if result.refused else ""
            print(f"run {result.run_id}: {result.sent} sent{refused} to {result.uri}")
    if not results:
        print(f"nothing to send in {place}")
    if failed:
        raise typer.Exit(1)
