"""What this extension's own script, ``web/flash_diffusion.js``, shows on a node in ComfyUI's page.

A *card* is rows of label and value, and stays on the node after a run; the *chart* draws losses while they fall. Both
travel as plain JSON. A page without the script ignores both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from comfy_api.v0_0_2 import io

CARD = "flash_card"  # in a node's ui output: [[label, value], ...]
LOSSES = "flash_losses"  # in a node's ui output: losses in order, at most POINTS
LOSSES_EVENT = "flash_diffusion.losses"  # sent while a node runs: {"node", "losses", "done", "total"}
POINTS = 120  # of a chart: as many as its pixels show


def card(rows: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the ui output that shows a card.

    Args:
        rows: label and value; a row without label takes the whole width.
    """
    return {CARD: [list(row) for row in rows]}


def text_card(text: str) -> dict[str, Any]:
    """Return the ui output that shows a text's lines.

    ComfyUI shows :func:`~.schema.show_text` only while the node runs, so it is missing in a page that was opened later.
    """
    return card(("", line) for line in text.splitlines() if line)


def chart(losses: Sequence[float]) -> dict[str, Any]:
    """Return the ui output that keeps the chart on the node after a run."""
    return {LOSSES: thinned(losses)}


def send_losses(node: type[io.ComfyNode], losses: Sequence[float], total: int = 0) -> None:
    """Show the losses so far on a running node; its schema must list ``io.Hidden.unique_id``.

    Args:
        losses: so far, earlier sessions' too, so that a reloaded page has the whole curve.
        total: losses of the whole run, one for each update; 0 where a loss stands for several updates.
    """
    identity = node.hidden.unique_id if node.hidden is not None else None
    server = sys.modules.get("server")  # ComfyUI's; an import here would load it in a script too
    running = getattr(server.PromptServer, "instance", None) if server is not None else None
    if identity is not None and running is not None:
        data = {"node": identity, "losses": thinned(losses), "done": len(losses), "total": total}
        running.send_sync(LOSSES_EVENT, data, running.client_id)


def thinned(values: Sequence[float], points: int = POINTS) -> list[float]:
    """Return at most ``points`` values: the means of neighbours, in order."""
    size = max(1, -(-len(values) // points))
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(group) / len(group) for group in groups]
