"""What nodes share: schemas without the fields that the oldest ComfyUI we run on (0.3.75) lacks, and text on a node."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

from comfy_api.v0_0_2 import io

CATEGORY = "Flash Diffusion"

SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}
NEWER_SCHEMA_FIELDS = {"search_aliases"}  # since ComfyUI 0.11


def node_schema(**fields: Any) -> io.Schema:
    """An ``io.Schema`` in our menu category, without the newer fields that the running ComfyUI does not know."""
    known = {name: value for name, value in fields.items() if name in SCHEMA_FIELDS or name not in NEWER_SCHEMA_FIELDS}
    return io.Schema(category=CATEGORY, **known)


def advanced(widget: type[io.WidgetInput], *arguments: Any, **fields: Any) -> io.Input:
    """A widget that ComfyUI folds away under "advanced", where it can (since 0.10); else an ordinary one."""
    if "advanced" in inspect.signature(widget).parameters:
        fields["advanced"] = True
    return widget(*arguments, **fields)


def show_text(node: type[io.ComfyNode], text: str) -> None:
    """Show ``text`` on the node in the page; it must have asked for ``io.Hidden.unique_id``.

    Where no server runs, as in a script that calls the node, nobody is looking and nothing is sent.
    """
    identity = node.hidden.unique_id if node.hidden is not None else None
    server = sys.modules.get("server")  # ComfyUI's; importing it here would start loading a server where there is none
    running = getattr(server.PromptServer, "instance", None) if server is not None else None
    if identity is not None and running is not None:
        running.send_progress_text(text, identity)


def count(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
