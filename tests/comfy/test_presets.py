"""Flash Sampler with each preset of published few-step LoRAs equals diffusers' scheduler of that preset.

Tiny networks of the true architectures with random weights, as in ``test_sampling_families.py``. Flash Sampler runs in
a process with ComfyUI (``inside/presets.py``). Here diffusers' schedulers run as the model cards set them up, and tell
which timesteps the network is asked for.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash_diffusion.flash_core.presets import PRESETS, Preset

from ..families.networks import tiny_network
from .inside_comfyui import relative, run_inside
from .test_sampling_families import BETAS, is_flow, make_given, predict

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

FAMILIES = ("sd15", "sd21", "sdxl", "sd3")
SEED = 2024
TOLERANCE = 1e-3  # of the latent's standard deviation

CASES = [
    pytest.param(preset, family, steps, id=f"{preset.key}-{family}-{steps}")
    for preset in PRESETS
    # SD3 stands for Flux, Qwen-Image and Z-Image: to the sampler they are flow models.
    for family in dict.fromkeys(family if family in FAMILIES else "sd3" for family in preset.families)
    for steps in (preset.steps if len(preset.steps) < 5 else (preset.steps[0], 4, preset.steps[-1]))
]


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the networks, run the script in ComfyUI's process, and return the folder with its results."""
    folder = tmp_path_factory.mktemp("presets")
    for family in FAMILIES:
        network = tiny_network(family)
        save_file(
            {key: value.contiguous() for key, value in network.state_dict().items()}, folder / f"{family}.safetensors"
        )
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
        save_file(make_given(family), folder / f"{family}.given.safetensors")
    run_inside(runtime, "presets.py", folder, *FAMILIES)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "presets.results")


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "presets.json").read_text())


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    return {family: tiny_network(family) for family in FAMILIES}


def scheduler_of(preset: Preset, family: str, steps: int) -> tuple[Any, dict[str, Any]]:
    """Make the scheduler as the preset's card does, with the base model's settings; and the arguments of its steps."""
    # The published schedulers of SD 1.5, SD 2 and SDXL set clip_sample and set_alpha_to_one to False.
    base = BETAS | {"prediction_type": "v_prediction" if family == "sd21" else "epsilon"}
    ddim = base | {"clip_sample": False, "set_alpha_to_one": False}
    if preset.key == "dmd2":
        scheduler = LCMScheduler(**ddim)
        scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
        return scheduler, {}
    if preset.key in ("lcm", "pcm-lcm", "sdxl-turbo"):
        scheduler, options = LCMScheduler(**ddim), {}
    elif preset.key == "lightning":
        scheduler, options = EulerDiscreteScheduler(**base, timestep_spacing="trailing"), {}
    elif preset.key in ("hyper", "hyper-cfg", "pcm-small", "pcm-normal"):
        scheduler, options = DDIMScheduler(**ddim, timestep_spacing="trailing"), {}
    elif preset.key in ("hyper-1", "tcd"):
        scheduler, options = TCDScheduler(**ddim), {"eta": {"hyper-1": 1.0, "tcd": 0.3}[preset.key]}
    elif preset.key == "tdm-sd3":
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6)
        options = {}
    elif preset.key == "hyper-sd3":
        scheduler, options = FlowMatchEulerDiscreteScheduler(shift=3.0), {}
    else:
        # Flux' and Qwen-Image's pipelines give the scheduler these noise levels. Qwen-Image-Lightning shifts them by
        # log 3 (so here, for a model whose shift is 5); Flux and Z-Image by the model's own shift.
        scheduler, options = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=math.log(3.0))
        return scheduler, options
    scheduler.set_timesteps(steps)
    return scheduler, options


def asked_timesteps(scheduler: Any) -> list[float]:
    """Return the timesteps that a network is asked for; DPMSolverMultistepScheduler rounds its own to whole numbers."""
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return [1000 * float(sigma) for sigma in scheduler.sigmas[:-1]]
    return [float(t) for t in scheduler.timesteps]


@torch.no_grad()
def diffusers_run(network: torch.nn.Module, family: str, scheduler: Any, options: dict[str, Any]) -> Tensor:
    """Run the loop of a stock pipeline with one generator; its first draw is the first noise."""
    generator = torch.Generator().manual_seed(SEED)
    z = torch.randn(make_given(family)["picture"].shape, generator=generator)
    z = z * getattr(scheduler, "init_noise_sigma", 1.0)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options = options | {"generator": generator}
    timesteps = [int(t) for t in scheduler.timesteps] if isinstance(scheduler, DDIMScheduler) else []
    for index, (t, asked) in enumerate(zip(scheduler.timesteps, asked_timesteps(scheduler), strict=True)):
        if timesteps:
            # DDIMScheduler goes on to t - 1000 // steps. With 12 or 16 steps this is not its next timestep, but 1 more
            # or less. Here it goes to its next timestep, and from the last one below 0.
            gap = timesteps[index] - timesteps[index + 1] if index + 1 < len(timesteps) else 1000
            scheduler.register_to_config(num_train_timesteps=gap)
            scheduler.num_inference_steps = 1
        scaled = z if is_flow(family) else scheduler.scale_model_input(z, t)
        at = t if float(t) == asked else torch.tensor(asked)
        z = scheduler.step(predict(family, network, scaled, at, "positive"), t, z, **options).prev_sample
    return z


@pytest.mark.parametrize(("preset", "family", "steps"), CASES)
def test_a_preset_equals_diffusers_scheduler(
    preset: Preset,
    family: str,
    steps: int,
    results: dict[str, Tensor],
    facts: dict[str, Any],
    networks: dict[str, torch.nn.Module],
) -> None:
    scheduler, options = scheduler_of(preset, family, steps)
    name = f"{preset.key}.{family}.{steps}"
    assert facts[name] == pytest.approx(asked_timesteps(scheduler), abs=1e-2)
    assert relative(results[name], diffusers_run(networks[family], family, scheduler, options)) <= TOLERANCE


def test_the_two_ddim_schedules_differ_by_one_timestep_at_most() -> None:
    """What the test above corrects: see :func:`diffusers_run`."""
    for steps in (12, 16):
        scheduler = DDIMScheduler(timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        timesteps = [int(t) for t in scheduler.timesteps]
        reached = [t - 1000 // steps for t in timesteps[:-1]]
        assert reached != timesteps[1:]
        assert max(abs(a - b) for a, b in zip(reached, timesteps[1:], strict=True)) == 1


SDXL_PRESETS = [preset for preset in PRESETS if "sdxl" in preset.families]


@pytest.mark.parametrize("preset", SDXL_PRESETS, ids=lambda preset: preset.key)
@pytest.mark.parametrize("way", ["auto", "select", "select.auto"])
def test_every_way_to_a_preset_gives_the_same_latent(results: dict[str, Tensor], preset: Preset, way: str) -> None:
    """Chosen by hand or recognised; in Flash Sampler, or in Flash Scheduler and Flash Sampler Select."""
    by_hand = results[f"{preset.key}.sdxl.{preset.steps[0]}"]
    assert relative(results[f"{preset.key}.{way}"], by_hand) <= 1e-5


def test_a_mask_keeps_the_picture_clean(results: dict[str, Tensor]) -> None:
    """Hyper-SD's DDIM leaves 3 % of the noise at its end, but not in the user's picture."""
    picture = make_given("sdxl")["picture"]
    half = picture.shape[3] // 2
    assert relative(results["masked"][..., half:], picture[..., half:]) <= 1e-5
    assert relative(results["masked"][..., :half], picture[..., :half]) > 0.1


def test_a_number_takes_the_place_of_the_presets_noise(
    results: dict[str, Tensor], networks: dict[str, torch.nn.Module]
) -> None:
    """Lightning's timesteps and start with LCM's noise: diffusers' LCM at these timesteps, but for Euler's start."""
    scheduler = LCMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
    expected = diffusers_run(networks["sdxl"], "sdxl", scheduler, {})
    assert relative(results["own noise"], expected) <= 2e-2
    assert relative(results["own noise"], results["lightning.sdxl.4"]) > 0.1


def test_a_run_from_a_picture_starts_at_the_presets_timestep(
    results: dict[str, Tensor], networks: dict[str, torch.nn.Module]
) -> None:
    """Half of Lightning's 4 steps: 499 and 249, from the picture with noise."""
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    picture = make_given("sdxl")["picture"]
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(SEED))
    z = scheduler.add_noise(picture, noise, scheduler.timesteps[2:3])
    scheduler.set_begin_index(2)
    with torch.no_grad():
        for t in scheduler.timesteps[2:]:
            output = predict("sdxl", networks["sdxl"], scheduler.scale_model_input(z, t), t, "positive")
            z = scheduler.step(output, t, z).prev_sample
    assert relative(results["picture"], z) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "recognised",
            [
                "t = 999, 749, 499, 249",
                "SDXL-Lightning, 4 steps (by its file name): Euler, no fresh noise, guidance 1",
                "(4 evaluations, predicts epsilon)",
            ],
        ),
        ("other steps", ["WARNING: 8 steps; this LoRA is made for 4"]),
        ("steps of no file", ["WARNING: 3 steps; SDXL-Lightning is made for 2, 4 or 8", "t = 999, 666, 332"]),
        ("guidance", ["WARNING: guidance 1; Hyper-SD CFG is made for 5 to 8"]),
        (
            "distilled guidance",
            ["WARNING: the prompt's guidance is 2 (FluxGuidance); FLUX.1-Turbo-Alpha is made for 3.5"],
        ),
        ("other family", ["WARNING: SDXL-Lightning is for SDXL; the model is SD 1.5"]),
        ("other process", ["The preset SDXL-Lightning is for SDXL; the model is SD3", "or 'auto'"]),
        ("flow on vp", ["The preset Qwen-Image-Lightning is for Qwen-Image; the model is SDXL"]),
        ("no such preset", ["preset is 'Lightening'; expected auto, or one of: LCM-LoRA, SDXL-Lightning"]),
        ("own number", ["(your choice): Euler, no fresh noise, guidance 1; stochasticity 0.5 in place of it"]),
        ("custom", ["t = 999, 600\n"]),
        ("reference", ["t = 999, 759, 499, 259\n"]),
        ("shift", ["t = 1000, 900, 750, 500\n", "flow shift 3"]),
        ("half", ["t = 499\n"]),
        ("over metadata", ["t = 999, 749, 499, 249\n"]),
        ("metadata", ["t = 999, 700, 400, 100\n"]),
    ],
)
def test_the_node_says_what_it_does(facts: dict[str, Any], name: str, lines: list[str]) -> None:
    for line in lines:
        assert line in facts["words"][name]


def test_good_settings_give_no_warning(facts: dict[str, Any]) -> None:
    for name in ("recognised", "guidance inside", "shift", "custom"):
        told = facts["words"][name]
        assert "WARNING" not in told.replace("WARNING: Qwen-Image-Lightning is for Qwen-Image; the model is SD3", "")
