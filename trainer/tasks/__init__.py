"""Tasks: what a model is conditioned on beside text, one file each.

To add a task, write a module with a :class:`~.base.Task` and name it in ``TASKS``; nothing else knows tasks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ..errors import UserError

if TYPE_CHECKING:
    from ..config import TaskSection
    from .base import Task

# What a recipe calls the task -> (module here, class there). The modules are heavy: imported when asked for.
TASKS = {
    "text-to-image": ("base", "TextToImage"),
    "inpainting": ("inpainting", "Inpainting"),
    "super-resolution": ("super_resolution", "SuperResolution"),
    "face-swap": ("face_swap", "FaceSwap"),
    "control": ("control", "Control"),
}


def build_task(section: TaskSection) -> Task:
    """Return the task that a recipe names, with its options.

    Raises:
        UserError: there is no such task, or an option is wrong.
    """
    if section.name not in TASKS:
        raise UserError(f"task.name: there is no task {section.name!r}; expected one of {', '.join(TASKS)}")
    module, attribute = TASKS[section.name]
    kind: type[Task] = getattr(import_module(f".{module}", __name__), attribute)
    try:
        options = kind.options_class.model_validate(section.options)
    except ValidationError as error:
        known = ", ".join(kind.options_class.model_fields) or "none"
        lines = [f"the task {section.name} can't use these options; it has {known}:"]
        for problem in error.errors(include_url=False):
            field = ".".join(str(part) for part in problem["loc"])
            lines.append(f"  task.options.{field}: {problem['msg']}, got {problem['input']!r}")
        raise UserError("\n".join(lines)) from error
    return kind(options)
