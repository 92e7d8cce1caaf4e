"""The HTML pages: Jinja templates beside this file, filled in without any address outside the page."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from svip.evaluation import figures


def render(name: str, **values: Any) -> str:
    """The template ``name``.html with those values and the figures' palette; a value that is missing is an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["readable"] = figures.readable
    template = resources.files("svip.evaluation").joinpath(f"{name}.html").read_text("utf-8")
    return environment.from_string(template).render(palette=figures.PALETTE, **values)
