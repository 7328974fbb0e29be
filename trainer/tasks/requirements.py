"""Check that a model fits a task: its input channels, and the networks that read hints or image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import ModelSection
from ..errors import UserError

if TYPE_CHECKING:
    from ..teachers.base import Outline, Teacher
    from .base import Task


def check_control(task: Task, model: ModelSection) -> None:
    """Check that a task with hints or tokens has a network that reads them, and that other tasks have none.

    Raises:
        UserError: a task without its network, or a network without its task.
    """
    if task.gives_hint and model.control is None:
        raise UserError(
            f"model.control: is missing; the task {task.name} needs a ControlNet or T2I-adapter, so set "
            "model.control.path"
        )
    if model.control is not None and not task.gives_hint:
        raise UserError(
            f"model.control: {model.control.path} reads hints, but the task {task.name} has no hints; set task.name: "
            "control, or remove model.control"
        )
    if task.gives_image_tokens and model.image_adapter is None:
        raise UserError(
            f"model.image_adapter: is missing; the task {task.name} needs an IP-Adapter, which reads a picture as "
            "tokens, so set model.image_adapter.path"
        )
    if model.image_adapter is not None and not task.gives_image_tokens:
        raise UserError(
            f"model.image_adapter: {model.image_adapter.path} reads a picture's tokens, but the task {task.name} with "
            "these options has no tokens; set task.name: face-swap and task.options.identity: tokens, or remove "
            "model.image_adapter"
        )


def check_channels(task: Task, teacher: Teacher | Outline) -> None:
    """Check that the network reads as many channels as the task gives.

    Raises:
        UserError: the network reads more or fewer channels.
    """
    latent = teacher.latent_shape[0]
    wanted, found = latent + task.extra_channels(latent), teacher.denoiser.network.config["in_channels"]
    if found != wanted:
        raise UserError(
            f"task.name: {task.name} needs a model that reads {wanted} channels ({latent} of the latent and "
            f"{wanted - latent} of the task), but {teacher.name} reads {found}; choose a model made for this task, or "
            "another task"
        )
