"""Few-step inpainting in ComfyUI equals diffusers' stock inpainting pipelines: 4 and 9 channels, SD 1.5 and SDXL.

The same tiny networks, prompt, picture, mask and noise on both sides. Flash Sampler runs in a process with ComfyUI
(``inside/inpainting.py``), StableDiffusionInpaintPipeline and StableDiffusionXLInpaintPipeline here, with LCMScheduler
on the same timesteps.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..families.networks import POOLED_WIDTH, TEXT_WIDTH, tiny_network
from ..families.pipelines import VAE_SCALES, tiny_vae
from .inside_comfyui import relative, run_inside

pytestmark = pytest.mark.comfy

FAMILIES = ("sd15", "sdxl")
CHANNELS = (4, 9)
SEED = 2024
SHAPE = (1, 4, 16, 24)
TOLERANCE = 1e-4  # of the latents' standard deviation; the target is 1e-3
# By hand: round(1000 (N - i) / N) - 1; at .75 the one nearest to t = 749, and at 2 steps the earlier of two as near.
TIMESTEPS = {
    "1, 1.0": [999],
    "2, 1.0": [999, 499],
    "4, 1.0": [999, 749, 499, 249],
    "1, 0.75": [749],
    "2, 0.75": [749, 249],
    "4, 0.75": [749, 499, 249],
}


def network(family: str, channels: int) -> UNet2DConditionModel:
    """Make a tiny UNet, or an inpainting UNet with five more channels."""
    plain = tiny_network(family)
    if channels == 4:
        return plain
    wide = UNet2DConditionModel.from_config(plain.config, in_channels=channels)
    weights = plain.state_dict()
    generator = torch.Generator().manual_seed(8)
    further = 0.1 * torch.randn(len(weights["conv_in.weight"]), 5, 3, 3, generator=generator)
    wide.load_state_dict({**weights, "conv_in.weight": torch.cat([weights["conv_in.weight"], further], 1)})
    return wide.eval()


def make_given(family: str) -> dict[str, Tensor]:
    """Make prompts, a picture's latent, a masked picture's latent, and a hard mask (1: made anew)."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(1, 1, *SHAPE[2:])
    mask[..., 4:13, 2:10] = 1
    given = {
        "positive": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "negative": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "picture": 0.8 * torch.randn(SHAPE, generator=generator) + 0.5,
        "masked": torch.randn(SHAPE, generator=generator),
        "mask": mask,
    }
    if family == "sdxl":
        given["positive.pooled"] = torch.randn(1, POOLED_WIDTH, generator=generator)
        given["negative.pooled"] = torch.randn(1, POOLED_WIDTH, generator=generator)
    return given


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the networks, run the script in ComfyUI's process, and return the folder with its results."""
    folder = tmp_path_factory.mktemp("inpainting")
    for channels in CHANNELS:
        (folder / str(channels)).mkdir()
    for family in FAMILIES:
        save_file(make_given(family), folder / f"{family}.given.safetensors")
        for channels in CHANNELS:
            unet = network(family, channels)
            save_file(unet.state_dict(), folder / str(channels) / f"{family}.safetensors")
            (folder / str(channels) / f"{family}.json").write_text(json.dumps(dict(unet.config)))
    run_inside(runtime, "inpainting.py", folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "results.safetensors")


def stock_run(
    family: str, channels: int, timesteps: list[int], *, full: bool, blended: bool = False, guidance: float = 1.0
) -> Tensor:
    """Run the stock pipeline with one generator, whose first draw is ComfyUI's first noise.

    Args:
        full: strength 1; else a lower strength that leaves exactly these timesteps.
        blended: put the picture back after each step; for 4 channels the pipelines do so themselves.
    """
    given = make_given(family)
    xl = family == "sdxl"
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = LCMScheduler(**betas, clip_sample=False, steps_offset=1)
    parts: dict[str, Any] = {
        "vae": tiny_vae(VAE_SCALES[family]),
        "unet": network(family, channels),
        "scheduler": scheduler,
        "tokenizer": None,
        "text_encoder": None,
        "feature_extractor": None,
    }
    arguments: dict[str, Any] = {}
    if xl:
        parts |= {"tokenizer_2": None, "text_encoder_2": None}
        arguments["pooled_prompt_embeds"] = given["positive.pooled"]
        if guidance > 1:
            arguments["negative_pooled_prompt_embeds"] = given["negative.pooled"]
    else:
        parts["safety_checker"] = None
    pipeline = (StableDiffusionXLInpaintPipeline if xl else StableDiffusionInpaintPipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))

    def blend(pipe: Any, step: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        known = given["picture"]
        if step + 1 < len(timesteps):
            known = scheduler.add_noise(known, noise, torch.tensor([timesteps[step + 1]]))
        return {"latents": torch.where(given["mask"] > 0, values["latents"], known)}

    if blended:
        arguments |= {"callback_on_step_end": blend, "callback_on_step_end_tensor_inputs": ["latents"]}
    count = len(timesteps)
    height, width = (8 * side for side in SHAPE[2:])
    return pipeline(
        prompt_embeds=given["positive"],
        negative_prompt_embeds=given["negative"] if guidance > 1 else None,
        image=given["picture"],
        mask_image=given["mask"].repeat_interleave(8, 2).repeat_interleave(8, 3),
        masked_image_latents=given["masked"],
        height=height,
        width=width,
        # The pipelines leave out the first timesteps of a list, as many as the strength says.
        timesteps=timesteps if full else [999, *timesteps],
        strength=1.0 if full else (count + 0.5) / (count + 1),
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **arguments,
    ).images


@pytest.mark.parametrize("kind", ["4", "9", "9, masked"])
@pytest.mark.parametrize("run", TIMESTEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_sampler_equals_diffusers_inpainting(
    results: dict[str, Tensor], family: str, run: str, kind: str
) -> None:
    """With a noise mask, as from Flash Inpaint Prepare, a 9-channel model also keeps the picture."""
    expected = stock_run(
        family, int(kind[0]), TIMESTEPS[run], full=run.endswith("1.0"), blended=kind.endswith("masked")
    )
    assert relative(results[f"{family}, {run}, {kind}"], expected) < TOLERANCE


def test_timesteps_by_hand(folder: Path) -> None:
    assert json.loads((folder / "timesteps.json").read_text()) == TIMESTEPS


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_equals_diffusers(results: dict[str, Tensor], family: str) -> None:
    expected = stock_run(family, 4, TIMESTEPS["4, 1.0"], full=True, guidance=3.0)
    assert relative(results[f"{family}, guided"], expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hard_mask_is_the_limit_of_soft_ones(results: dict[str, Tensor], family: str) -> None:
    hard = results[f"{family}, 4, 1.0, 4"]
    assert relative(results[f"{family}, almost hard"], hard) < 1e-2  # its mask is 1e-4 beside 0 and 1
    assert relative(results[f"{family}, soft"], hard) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_at_denoise_1_a_replaced_picture_leaves_no_trace(results: dict[str, Tensor], family: str) -> None:
    assert torch.equal(results[f"{family}, a picture"], results[f"{family}, no picture"])
    assert relative(results[f"{family}, everywhere"], results[f"{family}, no picture"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_sampler_select_in_core_equals_flash_sampler(results: dict[str, Tensor], family: str) -> None:
    """Core adds noise to the picture; Flash Sampler Select corrects this, core's own samplers do not.

    With one step all samplers predict once from the same noise, so only their starting points differ.
    """
    assert torch.equal(results[f"{family}, SamplerCustom"], results[f"{family}, 4, 1.0, 4"])
    made = make_given(family)["mask"].expand(SHAPE) > 0
    ours, core = results[f"{family}, 1, 1.0, 4"], results[f"{family}, euler in SamplerCustom"]
    assert relative(core[made], ours[made]) > 20 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_without_noise_a_noised_latent_is_not_changed(results: dict[str, Tensor], family: str) -> None:
    """Core's sampler does not change it either; with one step both predict the same."""
    assert relative(results[f"{family}, continued"], results[f"{family}, euler, continued"]) < TOLERANCE
