"""Write a page of blocks as one HTML file that fetches nothing.

Pictures are embedded, charts are inline SVG, and colours follow the reader's light or dark setting. ``report.html`` is
the template.
"""

from __future__ import annotations

from pathlib import Path

from .blocks import Page


def render(page: Page) -> str:
    """Return a page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )
    return environment.get_template("report.html").render(page=page)
