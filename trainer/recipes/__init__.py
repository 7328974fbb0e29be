"""Read recipes: YAML files, shipped or the user's own, with the recipe that they extend and with overrides.

A recipe that ``extends`` another one holds only the differences: sections are merged field by field, lists and values
are replaced. A recipe with a ``preset`` holds only the model, the data and what differs from the preset.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from ..config import Recipe, parse_recipe
from ..errors import UserError
from .merging import merged
from .preset import PRESET, preset_names, with_preset

__all__ = ["LORA_FILE", "RECIPES", "load_recipe", "load_run_recipe", "preset_names", "read_recipe", "shipped_recipes"]

RECIPES = Path(__file__).resolve().parent
EXTENDS = "extends"
LORA_FILE = "lora.safetensors"  # the LoRA in the folder of a distillation, beside config.yaml


def shipped_recipes() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), preset: str | None = None) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides; see :func:`read_recipe`."""
    return read_recipe(name, overrides, preset)[0]


def read_recipe(name: str, overrides: Sequence[str] = (), preset: str | None = None) -> tuple[Recipe, list[str]]:
    """Return a recipe with overrides applied, and lines that say what its preset chose and why.

    Args:
        name: a YAML file, or the name of a shipped recipe with or without ``.yaml``.
        overrides: ``section.field=value``, the value in YAML; ``phases.0.updates=10`` reaches into lists.
        preset: takes the place of the recipe's preset.

    Raises:
        UserError: no such recipe or preset, not YAML, or a wrong field; the message names field, value and expected
            value.
    """
    path = _find(name, Path())
    content = _read(path, ())
    reasons: list[str] = []
    if preset is not None:
        content[PRESET] = preset
    if PRESET in content or any(override.split("=")[0].strip() == PRESET for override in overrides):
        # The preset must know the true model and data; what the overrides say of its own lists comes after.
        given = deepcopy(content)
        for override in overrides:
            if not any(part.strip().isdigit() for part in override.partition("=")[0].split(".")):
                _apply_override(given, override)
        chosen = given.pop(PRESET)
        content, reasons = with_preset(chosen, given)
    for override in overrides:
        _apply_override(content, override)
    content.pop(PRESET, None)
    return parse_recipe(content, str(path)), reasons


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
    return merged(_read(_find(base, path.parent), (*extended_by, path)), content)


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
