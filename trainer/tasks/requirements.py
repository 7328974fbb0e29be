"""What a task asks of a model: the channels it reads, and the networks that read hints or image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import ModelSection
from ..errors import UserError

if TYPE_CHECKING:
    from ..teachers.base import Outline, Teacher
    from .base import Task


def check_control(task: Task, model: ModelSection) -> None:
    """Look whether a task that gives hints or tokens has a network that reads them, and no other task has one.

    Raises:
        UserError: one is there without the other.
    """
    if task.gives_hint and model.control is None:
        raise UserError(
            f"model.control: is missing; the task {task.name} gives hints, which a ControlNet or T2I-adapter reads, so "
            "set model.control.path to one"
        )
    if model.control is not None and not task.gives_hint:
        raise UserError(
            f"model.control: {model.control.path} reads hints, but the task {task.name} gives none; set task.name: "
            "control, or leave model.control out"
        )
    if task.gives_image_tokens and model.image_adapter is None:
        raise UserError(
            f"model.image_adapter: is missing; the task {task.name} shows the model a picture as tokens, which an "
            "IP-Adapter reads, so set model.image_adapter.path to one"
        )
    if model.image_adapter is not None and not task.gives_image_tokens:
        raise UserError(
            f"model.image_adapter: {model.image_adapter.path} reads a picture's tokens, but the task {task.name}, as "
            "its options are, gives none; set task.name: face-swap and task.options.identity: tokens, or leave "
            "model.image_adapter out"
        )


def check_channels(task: Task, teacher: Teacher | Outline) -> None:
    """Look whether the network reads the channels that the task gives it.

    Raises:
        UserError: it reads more or fewer.
    """
    latent = teacher.latent_shape[0]
    wanted, found = latent + task.extra_channels(latent), teacher.denoiser.network.config["in_channels"]
    if found != wanted:
        raise UserError(
            f"task.name: {task.name} wants a model that reads {wanted} channels (latents of {latent} and "
            f"{wanted - latent} of the task's), but {teacher.name} reads {found}; choose the model or the task that "
            "belongs to the other"
        )
