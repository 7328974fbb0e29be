"""Read recipes: YAML files, shipped or the user's own, with the recipe that they extend and with overrides.

A recipe that ``extends`` another one holds only the differences: sections are merged field by field, lists and values
are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import Recipe, parse_recipe
from ..errors import UserError

RECIPES = Path(__file__).resolve().parent
EXTENDS = "extends"
LORA_FILE = "lora.safetensors"  # the LoRA in the folder of a distillation, beside config.yaml


def shipped_recipes() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides.

    Args:
        name: a YAML file, or the name of a shipped recipe with or without ``.yaml``.
        overrides: ``section.field=value``, the value in YAML; ``phases.0.updates=10`` reaches into lists.

    Raises:
        UserError: no such recipe, not YAML, or a wrong field; the message names field, value and expected value.
    """
    path = _find(name, Path())
    content = _read(path, ())
    for override in overrides:
        _apply_override(content, override)
    return parse_recipe(content, str(path))


def load_run_recipe(folder: Path) -> Recipe:
    """Read the recipe of a distillation from its folder.

    Raises:
        UserError: the folder has no ``config.yaml``, or the file is not a recipe.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} is not the folder of a distillation (no config.yaml); give the folder that `flash-diffusion "
            "distill` wrote (--output)"
        )
    return load_recipe(str(path))


def _find(name: str, folder: Path) -> Path:
    path = folder / name
    if path.is_file():
        return path
    shipped = RECIPES / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if Path(name).parent != Path() or not shipped.is_file():
        raise UserError(
            f"there is no recipe {name!r}; give a YAML file, or a shipped recipe: {', '.join(shipped_recipes())}"
        )
    return shipped


def _read(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """Return a recipe's content, merged over the content of the recipe that it extends."""
    path = path.resolve()
    if path in extended_by:
        raise UserError(f"{path} extends itself, through {', '.join(map(str, extended_by))}; remove one `extends`")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as 'model:' and 'data:', not {type(content).__name__}")
    if EXTENDS not in content:
        return content
    base = content.pop(EXTENDS)
    if not isinstance(base, str):
        raise UserError(f"{path}: {EXTENDS} must be a YAML file or the name of a shipped recipe, not {base!r}")
    return _merged(_read(_find(base, path.parent), (*extended_by, path)), content)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    outcome = dict(base)
    for key, value in changes.items():
        below = outcome.get(key)
        outcome[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return outcome


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set takes key=value, such as optimizer.lr=1e-4; got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not readable YAML: {error}") from error
    *parents, last = key.strip().split(".")
    node: Any = content
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_position(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise UserError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    else:
        node[last] = value


def _position(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"--set {override}: expected a position in 0..{len(items) - 1} instead of {part!r}")
    return int(part)
