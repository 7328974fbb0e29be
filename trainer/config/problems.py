"""Check a recipe's content, with errors that name the field, what it means and what was given."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from ..errors import UserError
from .recipe import Recipe
from .section import Section


def parse_recipe(content: dict[str, Any], where: str = "the recipe") -> Recipe:
    """Check a recipe's content and return the recipe.

    Raises:
        UserError: lists every wrong field.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = explain(error)
        raise UserError(f"{where} has {len(lines)} problem{'s'[: len(lines) > 1]}:\n" + "\n".join(lines)) from error


def explain(error: ValidationError, within: Sequence[str] = ()) -> list[str]:
    """Return one line for each wrong field: its name, the expected value, the given value.

    Args:
        within: names of the fields that hold the checked part.
    """
    problems = error.errors(include_url=False)
    return [_explain({**problem, "loc": (*within, *problem["loc"])}) for problem in problems]


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "the recipe"
    if problem["type"] == "missing":
        return f"  {field}: is missing; expected {_description(problem['loc'])}"
    if problem["type"] == "extra_forbidden":
        siblings = _fields(problem["loc"][:-1])
        return f"  {field}: there is no such field; expected one of {', '.join(siblings)}"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = "" if isinstance(given, dict) else f", got {given!r}"
    meaning = _description(problem["loc"])
    return f"  {field}: {message[:1].lower()}{message[1:]}{shown}" + (f" ({meaning})" if meaning else "")


def _section(loc: Sequence[Any]) -> type[Section] | None:
    """Return the section at ``loc``, a path of field names and list positions."""
    model: type[Section] = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if get_origin(annotation) in (list, Union, UnionType):
            annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return None
        model = annotation
    return model


def _fields(loc: Sequence[Any]) -> list[str]:
    section = _section(loc)
    return list(section.model_fields) if section else []


def _description(loc: Sequence[Any]) -> str:
    names = [part for part in loc if not isinstance(part, int)]
    section = _section(names[:-1]) if names else None
    field = section.model_fields.get(names[-1]) if section else None
    if field is None:
        return ""
    if field.description:
        return field.description
    nested = _section(names)
    return (nested.__doc__ or "").strip().rstrip(".") if nested else ""
