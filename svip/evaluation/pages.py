"""The HTML pages: Jinja templates beside this file, each self-contained once it is filled in."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from svip.evaluation import figures


def render(name: str, **values: Any) -> str:
    """The template ``name``.html with those values and the figures' palette; a value that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("svip", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = figures.readable
    return environment.get_template(f"{name}.html").render(palette=figures.PALETTE, **values)
