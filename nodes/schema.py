"""Schemas of nodes: what they share, and fields that are newer than the oldest ComfyUI we run on (0.3.75)."""

from __future__ import annotations

import dataclasses
import inspect
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
