"""Put the content of recipes on top of each other, before it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes`` on top: sections are merged field by field, lists and values are replaced."""
    outcome = dict(base)
    for key, value in changes.items():
        below = outcome.get(key)
        outcome[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return outcome


def with_value(content: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return ``content`` with the field ``section.field`` set."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return merged(content, value)


def value_at(content: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return the field ``section.field``, or ``default`` where it is missing."""
    value: Any = content
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value
