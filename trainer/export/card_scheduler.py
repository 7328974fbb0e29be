"""The scheduler in a model card's Python: diffusers' own where its noise is the sampler's, else a few lines of code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...flash_core.grid import trailing_fractions, trailing_timesteps
from ...flash_core.process import Process

OWN = "FlashScheduler"
# Both mix at full strength: mean + s x fresh noise + (1 - s^2)^(1/2) x the noise that the prediction implies.
VP_MIXTURE = """\
class FlashScheduler(LCMScheduler):
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        latents, z0 = super().step(model_output, timestep, sample, generator, return_dict=False)
        if self.step_index < len(self.timesteps):
            now, later = (self.alphas_cumprod[int(t)] for t in (timestep, self.timesteps[self.step_index]))
            mean = later.sqrt() * z0
            implied = (1 - later).sqrt() * (sample - now.sqrt() * z0) / (1 - now).sqrt()
            latents = mean + {share:g} * (latents - mean) + (1 - {share:g}**2) ** 0.5 * implied
        return latents, z0
"""
FLOW_MIXTURE = """\
class FlashScheduler(FlowMatchEulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        (latents,) = super().step(model_output, timestep, sample, generator=generator, return_dict=False)
        now, later = self.sigmas[self.step_index - 1], self.sigmas[self.step_index]
        z0 = sample - now * model_output
        mean, implied = (1 - later) * z0, later * (z0 + model_output)
        return (mean + {share:g} * (latents - mean) + (1 - {share:g}**2) ** 0.5 * implied,)
"""


@dataclass(frozen=True)
class SchedulerCode:
    """The scheduler of a card.

    Attributes:
        diffusers: the class to import from ``diffusers``.
        definition: Python of a class derived from it; empty where diffusers' own serves.
        setting: the line that sets ``pipe.scheduler``.
        option: the argument of the pipeline's call that gives the timesteps.
    """

    diffusers: str
    definition: str
    setting: str
    option: str


def scheduler_code(process: Process, steps: int, stochasticity: float, takes_timesteps: bool) -> SchedulerCode:
    """Return the scheduler that draws as the few-step sampler does.

    Args:
        stochasticity: share of fresh noise between steps. 1: LCM, or stochastic flow matching. 0: DDIM, or Euler.
            Between: a class derived from the former.
        takes_timesteps: True if the pipeline's call has a list of timesteps; else a number of steps.
    """
    if process.kind == "flow":
        name = "FlowMatchEulerDiscreteScheduler"
        settings = f", stochastic_sampling={stochasticity > 0}"
        option = f"sigmas={trailing_fractions(steps)}"  # the scheduler shifts uniform time itself
        mixture = FLOW_MIXTURE
    elif stochasticity == 0:
        name, mixture = "DDIMScheduler", ""
        settings = ', timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False' + _prediction(process)
        option = f"num_inference_steps={steps}"
    else:
        name, mixture = "LCMScheduler", VP_MIXTURE
        # Of its 100 timesteps the trained ones are some; of its usual 50 they are not, and it would warn.
        settings = ", original_inference_steps=100" + _prediction(process)
        grid = ", ".join(f"{t:g}" for t in trailing_timesteps(process, steps))
        option = f"timesteps=[{grid}]" if takes_timesteps else f"num_inference_steps={steps}"
    mixed = 0 < stochasticity < 1
    return SchedulerCode(
        name,
        mixture.format(share=stochasticity) if mixed else "",
        f"pipe.scheduler = {OWN if mixed else name}.from_config(pipe.scheduler.config{settings})",
        option,
    )


def _prediction(process: Process) -> str:
    """Return the settings that a pipeline from a single file may not know."""
    settings = "" if process.prediction == "epsilon" else f', prediction_type="{process.prediction}"'
    if float(process.alpha_sigma(torch.tensor([process.timestep(1)]))[0]) == 0:
        settings += ", rescale_betas_zero_snr=True"
    return settings
