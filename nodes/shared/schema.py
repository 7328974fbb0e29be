"""Schemas that run on every ComfyUI from 0.3.75 on, the branches of our menu, and text on a node."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any, Literal

from comfy_api.v0_0_2 import io

CATEGORY = "Flash Diffusion"
# The branches have names of ComfyUI's own categories: it translates them.
Branch = Literal["", "loaders", "sampling", "image", "conditioning", "training"]

SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}
# search_aliases: since ComfyUI 0.11. has_intermediate_output: a newer one sends a cached node's card again, to a page
# that was opened later.
NEWER_SCHEMA_FIELDS = {"search_aliases", "has_intermediate_output"}
LINE_BREAK = "  \n"  # of Markdown


def node_schema(branch: Branch = "", **fields: Any) -> io.Schema:
    """Make an ``io.Schema`` in our menu, without newer fields that the running ComfyUI does not know.

    No node has an ``essentials_category``: it would hide the node among ComfyUI's own (docs/adr/0020-menu.md).

    Args:
        branch: of the menu "Flash Diffusion". Default: its root.
    """
    known = {name: value for name, value in fields.items() if name in SCHEMA_FIELDS or name not in NEWER_SCHEMA_FIELDS}
    return io.Schema(category=f"{CATEGORY}/{branch}" if branch else CATEGORY, **known)


def advanced(widget: type[io.WidgetInput], *arguments: Any, **fields: Any) -> io.Input:
    """Make a widget that the page's new renderer folds under "advanced"; the classic one shows it as any other.

    The schema knows the mark since ComfyUI 0.10. An older server passes it on all the same: its page may be newer.
    """
    if "advanced" in inspect.signature(widget).parameters:
        return widget(*arguments, advanced=True, **fields)
    made = widget(*arguments, **fields)
    made.extra_dict["advanced"] = True
    return made


def show_text(node: type[io.ComfyNode], text: str) -> None:
    """Show ``text`` on the node in the page; the node's schema must list ``io.Hidden.unique_id``.

    Without a running server, as in a script that calls the node, do nothing. The page's new renderer reads the text as
    Markdown, where lines stay apart only with two spaces at their ends (:data:`LINE_BREAK`).
    """
    identity = node.hidden.unique_id if node.hidden is not None else None
    server = sys.modules.get("server")  # ComfyUI's; an import here would load it in a script too
    running = getattr(server.PromptServer, "instance", None) if server is not None else None
    if identity is not None and running is not None:
        running.send_progress_text(LINE_BREAK.join(text.split("\n")), identity)


def count(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
