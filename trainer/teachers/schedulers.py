"""diffusers' schedulers as noise processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...flash_core.process import FlowProcess, Process, VPProcess
from ..errors import UserError


def process_from_scheduler(config: Mapping[str, Any]) -> Process:
    """Return the noise process of a diffusers scheduler configuration: variance-preserving, or flow with its shift.

    Raises:
        UserError: the schedule is not supported.
    """
    scheduler = config.get("_class_name", "")
    if "FlowMatch" in scheduler:
        if config.get("use_dynamic_shifting"):
            raise UserError(
                "the model's scheduler changes the shift with the picture's size (use_dynamic_shifting: true), but a "
                "LoRA is trained at one shift. In scheduler_config.json set use_dynamic_shifting to false and shift to "
                "a number"
            )
        return FlowProcess(shift=config.get("shift", 1.0))
    if scheduler.startswith("EDM"):
        raise UserError(
            f"the model's scheduler is {scheduler}, and EDM schedules are not supported; choose a model with a "
            "variance-preserving or flow schedule"
        )
    prediction = config.get("prediction_type", "epsilon")
    try:
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
            return VPProcess(torch.cumprod(1 - betas, 0), prediction)
        return VPProcess.from_betas(
            schedule=config.get("beta_schedule", "linear"),
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            prediction=prediction,
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
            num_timesteps=config.get("num_train_timesteps", 1000),
        )
    except ValueError as error:
        raise UserError(f"the model's scheduler configuration can't be used: {error}") from error
