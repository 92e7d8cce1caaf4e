"""The command that looks at the machine: doctor."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from svip.cli.shared import app, console, example

MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[bold red]✗[/]"}


@app.command(rich_help_panel="This machine", epilog=example("svip doctor --bucket s3://team/bundles --root data"))
def doctor(
    bucket: Annotated[str, typer.Option(help="Try this s3:// address too.", show_default=False)] = "",
    root: Annotated[
        Path | None, typer.Option(help="Look for data sets in this folder too.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check versions, devices, folders and services, and suggest fixes; exit code 1 where there is a problem."""
    from svip.doctor import examine

    findings = examine(bucket, root)
    count = Counter(finding.state for finding in findings)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        group = ""
        for finding in findings:
            if group and finding.group != group:
                table.add_section()
            found = escape(finding.found) + (f"\n[dim]-> {escape(finding.fix)}[/]" if finding.fix else "")
            title = "" if finding.group == group else finding.group
            table.add_row(title, MARKS[finding.state], escape(finding.name), found)
            group = finding.group
        console.print(table)
        told = [
            f"{count[state]} {state}{'s' * (count[state] != 1)}" for state in ("problem", "warning") if count[state]
        ]
        print(", ".join(told) or "all is well")
    if count["problem"]:
        raise typer.Exit(1)
