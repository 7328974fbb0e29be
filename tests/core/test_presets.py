"""The presets of published few-step LoRAs: recognised by whole names only, sampled as diffusers, listed in the help."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, TCDScheduler, UNet2DConditionModel
from torch import Tensor, nn

from flash_diffusion.flash_core.families import family_of, name_of
from flash_diffusion.flash_core.presets import MAX_STEPS, PRESETS, Preset, in_words, preset_of, recognise, usual_layout
from flash_diffusion.flash_core.presets.naming import LAYOUTS
from flash_diffusion.flash_core.process import FlowProcess, VPProcess
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise

from .helpers.networks import random_network
from .test_sampler import BETAS, SHAPE, denoiser

HELP = Path(__file__).resolve().parents[2] / "web" / "docs" / "FlashSampler.md"

# -- names -----------------------------------------------------------------------------------------------------------

# The files of the cards, and names that people give them.
PUBLISHED_NAMES = [
    ("latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors", "sdxl", "LCM-LoRA"),
    ("lcm-lora-sdv1-5.safetensors", "sd15", "LCM-LoRA"),
    ("lcm-lora-ssd-1b.safetensors", "sdxl", "LCM-LoRA"),
    ("LCM_LoRA_Weights_SD15.safetensors", "sd15", "LCM-LoRA"),
    ("lcm_sdxl_lora.safetensors", "sdxl", "LCM-LoRA"),
    ("lcm-lora-sdxl-rank1.safetensors", "sdxl", "LCM-LoRA"),
    ("sdxl_lightning_2step_lora.safetensors", "sdxl", "SDXL-Lightning, 2 steps"),
    ("speed\\SDXL-Lightning 8steps LoRA fp16.safetensors", "sdxl", "SDXL-Lightning, 8 steps"),
    ("Hyper-SDXL-1step-lora.safetensors", "sdxl", "Hyper-SD 1-step (unified)"),
    ("Hyper-SDXL-4steps-lora.safetensors", "sdxl", "Hyper-SD, 4 steps"),
    ("sdxl_hyper_sd_4step_lora.safetensors", "sdxl", "Hyper-SD, 4 steps"),
    ("Hyper-SD15-8steps-lora.safetensors", "sd15", "Hyper-SD, 8 steps"),
    ("Hyper-SD15-12steps-CFG-lora.safetensors", "sd15", "Hyper-SD CFG, 12 steps"),
    ("Hyper-SD3-8steps-CFG-lora.safetensors", "sd3", "Hyper-SD3, 8 steps"),
    ("Hyper-FLUX.1-dev-16steps-lora.safetensors", "flux", "Hyper-FLUX, 16 steps"),
    ("FLUX.1-Turbo-Alpha/diffusion_pytorch_model.safetensors", "flux", "FLUX.1-Turbo-Alpha"),
    ("FLUX.1-Turbo-Alpha.safetensors", "flux", "FLUX.1-Turbo-Alpha"),
    ("dmd2_sdxl_4step_lora_fp16.safetensors", "sdxl", "DMD2, 4 steps"),
    ("TCD-SDXL-LoRA/pytorch_lora_weights.safetensors", "sdxl", "TCD"),
    ("TCD-SD15-LoRA.safetensors", "sd15", "TCD"),
    ("TCD-SD21-base-LoRA/pytorch_lora_weights.safetensors", "sd21", "TCD"),
    ("pcm_sdxl_smallcfg_2step_converted.safetensors", "sdxl", "PCM small CFG, 2 steps"),
    ("pcm_sd15_normalcfg_16step_converted.safetensors", "sd15", "PCM normal CFG, 16 steps"),
    ("pcm_sdxl_lcmlike_lora_converted.safetensors", "sdxl", "PCM LCM-like"),
    ("sd_xl_turbo_lora_v1.safetensors", "sdxl", "SDXL-Turbo LoRA"),
    ("Qwen-Image-Lightning-4steps-V1.0-bf16.safetensors", "qwen-image", "Qwen-Image-Lightning, 4 steps"),
    ("Qwen-Image-Edit-2509-Lightning-8steps-V1.0-fp32.safetensors", "qwen-image", "Qwen-Image-Lightning, 8 steps"),
    ("Z-Image-Fun-Lora-Distill-8-Steps-2603-ComfyUI.safetensors", "z-image", "Z-Image-Fun distill, 8 steps"),
    ("TDM_sd3_lora/pytorch_lora_weights.safetensors", "sd3", "TDM for SD3"),
]
ORDINARY_NAMES = [
    "lightning_strike_style",
    "sdxl_lightning_strike_style",
    "sdxl_lightning_4step_anime_style",
    "white_lightning_sdxl_v1",
    "hyper-realism",
    "hyper_sdxl_detail",
    "Hyper-SDXL-realism-lora",
    "hyperdetailed_sd15",
    "turbo_car",
    "sdxl_turbo_car_lora",
    "flux_turbo_racing",
    "flux 1 turbo alpha romeo",
    "lcm_logo",
    "lcm",
    "lcm_lora_sdxl_anime",
    "anime_lcm_lora_sdxl",
    "lcm-lora-flower",
    "dmd2",
    "my_dmd2_sdxl_4step_lora_merge",
    "tcd_character_lora",
    "tdm_sd3_anime_lora",
    "tcd",
    "pcm_audio_waves_sdxl",
    "pcm_sdxl_headphones",
    "qwen_image_lightning_bolt",
    "qwen-image-2512-Lightning-4steps-V1.0",  # no card names its settings
    "Qwen-Image-2.1-Lightning",
    "z-image-fun-park",
    "detail_tweaker_xl",
    "pytorch_lora_weights",
    "add_detail",
    "4step",
    "sdxl_lightning_5step_lora",
    "Hyper-SD15-3steps-lora",
    "",
]


@pytest.mark.parametrize(("name", "base", "told"), PUBLISHED_NAMES)
def test_a_published_name_is_recognised(name: str, base: str, told: str) -> None:
    found = recognise(name, {}, base)
    assert found is not None
    assert found.name == told
    assert found.how == ("by its folder's name" if "/" in name else "by its file name")


def test_every_preset_has_a_published_name() -> None:
    titles = {told.split(", ")[0] for _, _, told in PUBLISHED_NAMES}
    assert titles == {preset.title for preset in PRESETS}


@pytest.mark.parametrize("name", ORDINARY_NAMES)
def test_an_ordinary_name_is_not_recognised(name: str) -> None:
    families = {family for preset in PRESETS for family in preset.families}
    for base in families:
        assert recognise(f"{name}.safetensors", {}, base) is None
        assert (
            recognise(f"Lightning/{name}.safetensors", {"modelspec.title": name, "ss_output_name": name}, base) is None
        )


@pytest.mark.parametrize(("name", "base", "_"), PUBLISHED_NAMES)
def test_a_lora_of_another_family_is_not_recognised(name: str, base: str, _: str) -> None:
    for other in {"sd15", "sd21", "sdxl", "sd3", "sd35", "flux", "pixart", "qwen-image", "z-image", None} - {base}:
        assert recognise(name, {}, other) is None


def test_the_header_tells_where_the_name_is_lost() -> None:
    found = recognise("my_speed_lora.safetensors", {"ss_output_name": "sdxl_lightning_4step_lora"}, "sdxl")
    assert found is not None
    assert (found.name, found.how) == ("SDXL-Lightning, 4 steps", "by the name in its header")


ADAPTED = re.compile(
    r"(^|\.)(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut"
    r"|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)$"
)


@pytest.mark.parametrize(
    ("base", "megabytes"),
    [
        ("sd15", 269),  # Hyper-SD15-Nsteps-lora, in float32
        ("sdxl", 787),  # Hyper-SDXL-Nsteps-lora, dmd2_sdxl_4step_lora, in float32
    ],
)
def test_the_usual_layout_by_diffusers_networks(base: str, megabytes: float) -> None:
    """Counted on networks of the published sizes; the published files are as large."""
    sdxl = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        network = UNet2DConditionModel(**(sdxl if base == "sdxl" else {"cross_attention_dim": 768}))
    layers, values = 0, 0
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ADAPTED.search(name):
            layers += 1
            values += 64 * (module.weight[0].numel() + module.weight.shape[0])
    assert LAYOUTS[base] == (layers, values)
    assert 4 * values / 1e6 == pytest.approx(megabytes, abs=0.5)
    assert usual_layout(base, (64,), layers, values)
    assert not usual_layout(base, (32,), layers, values)
    assert not usual_layout(None, (64,), layers, values)


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_consistent() -> None:
    assert len({preset.key for preset in PRESETS}) == len({preset.title for preset in PRESETS}) == len(PRESETS)
    assert MAX_STEPS == 16
    for preset in PRESETS:
        assert preset_of(preset.title) is preset
        assert preset.source.startswith("https://")
        assert list(preset.steps) == sorted(preset.steps)
        assert set(preset.guidance_at) <= set(preset.steps)
        assert all(family_of(family) for family in preset.families)
        assert preset.shift is None or preset.kind == "flow"
    assert preset_of("Lightening") is None


def row(preset: Preset) -> str:
    """Return the preset's row of the help page."""
    steps = 4 if 4 in preset.steps else preset.steps[0]
    shift = math.exp(1.15) if "flux" in preset.families else 3.0  # in ComfyUI; Flux' at 1024 x 1024 pixels in diffusers
    process = FlowProcess(shift) if preset.kind == "flow" else VPProcess.from_betas()
    timesteps = ", ".join(f"{round(t, 1):g}" for t in preset.grid(process, steps))
    if preset.kind == "flow" and preset.shift is None:
        timesteps += f" at the model's shift {shift:.3g}"
    elif preset.kind == "flow":
        timesteps += f", always shift {preset.shift:g}"
    guidance = in_words(preset.guidance)
    single = {in_words(bounds): steps for steps, bounds in preset.guidance_at.items()}
    if single:
        guidance += f" ({', '.join(f'{steps} steps: {words}' for words, steps in single.items())})"
    if preset.distilled_guidance is not None:
        guidance += f", FluxGuidance {preset.distilled_guidance:g}"
    counts = [str(count) for count in preset.steps]
    told = f"{counts[0]} to {counts[-1]}" if len(counts) > 4 else ", ".join(counts)
    families = ", ".join(name_of(family) for family in preset.families)
    address = preset.source.removeprefix("https://").removeprefix("huggingface.co/")
    return (
        f"| {preset.title} | {families} | {told} | {timesteps} | {preset.noise_in_words} | {guidance} | "
        f"{preset.strength:g} | [{address}]({preset.source}) |"
    )


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)
def test_the_help_lists_every_preset_as_the_code_has_it(preset: Preset) -> None:
    assert row(preset) in HELP.read_text(encoding="utf-8").splitlines()


def test_the_help_lists_no_other_preset() -> None:
    section = HELP.read_text(encoding="utf-8").split("\n## Presets\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "](https://" in line]
    assert len(rows) == len(PRESETS)


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tcd_equals_diffusers_at_every_gamma(gamma: float, steps: int) -> None:
    process, network = VPProcess.from_betas(), random_network(steps)
    preset = Preset("x", "x", ("sdxl",), "TCD", "reference", (steps,), "", gamma=gamma)
    scheduler = TCDScheduler(**BETAS)
    scheduler.set_timesteps(steps)
    timesteps = preset.grid(process, steps)
    assert timesteps == [float(t) for t in scheduler.timesteps]

    generator = torch.Generator().manual_seed(4)
    z = torch.randn(SHAPE, generator=generator)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t.expand(len(z))), t, z, eta=gamma, generator=generator).prev_sample

    generator = torch.Generator().manual_seed(4)
    ours = torch.randn(SHAPE, generator=generator)
    alphas, sigmas = (values.tolist() for values in process.alpha_sigma(torch.tensor(timesteps)))
    ours = few_step_sample(
        denoiser(process, network, timesteps),
        ours,
        alphas,
        sigmas,
        generator_noise(ours, generator),
        stochasticity=preset.stochasticity(process, timesteps),
        end=preset.end(process),
    )
    assert float((ours - z).abs().max() / z.std()) <= 1e-4


@pytest.mark.parametrize("shift", [1.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 16])
def test_steps_of_second_order_equal_diffusers(steps: int, shift: float) -> None:
    process, network = FlowProcess(shift), random_network(steps)
    preset = Preset("x", "x", ("sd3",), "flow DPM-Solver++", "solver", (steps,), "", shift=shift)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    timesteps = preset.grid(process, steps)
    assert timesteps == pytest.approx([1000 * float(sigma) for sigma in scheduler.sigmas[:-1]])

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    z = noise
    for t, at in zip(scheduler.timesteps, timesteps, strict=True):
        z = scheduler.step(network(z, torch.full((len(z),), at)), t, z).prev_sample
    alphas, sigmas = (values.tolist() for values in process.alpha_sigma(torch.tensor(timesteps)))
    denoise = denoiser(process, network, timesteps)
    share = preset.stochasticity(process, timesteps)
    found = {
        order: few_step_sample(denoise, noise, alphas, sigmas, lambda: noise, stochasticity=share, second_order=order)
        for order in (True, False)
    }
    assert preset.second_order
    assert float((found[True] - z).abs().max() / z.std()) <= 1e-4
    assert (float((found[False] - z).abs().max() / z.std()) > 1e-3) == (steps > 2)


def test_steps_of_second_order_begin_at_pure_noise_too() -> None:
    """There log(alpha/sigma) is infinite, and the first prediction says nothing of the slope."""
    asked = [torch.full(SHAPE, 3.0), torch.full(SHAPE, 1.0), torch.full(SHAPE, 2.0)]
    found = few_step_sample(
        lambda z, index: asked[index],
        torch.ones(SHAPE),
        (0.0, 0.5, 0.8),
        (1.0, 0.5, 0.2),
        lambda: torch.zeros(SHAPE),
        stochasticity=0.0,
        second_order=True,
    )
    assert torch.equal(found, asked[2])


def test_each_transition_has_its_own_stochasticity_and_asks_for_noise_only_if_it_is_above_0() -> None:
    drawn: list[Tensor] = []
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        drawn.append(torch.randn(SHAPE, generator=generator))
        return drawn[-1]

    z = torch.randn(SHAPE, generator=generator)
    seen: list[Tensor] = []

    def denoise(z: Tensor, index: int) -> Tensor:
        seen.append(z)
        return torch.zeros_like(z)

    result = few_step_sample(
        denoise, z, [0.0, 0.5, 0.8, 0.9], [1.0, 0.8, 0.6, 0.4], noise, stochasticity=(0.0, 1.0, 0.6), end=(0.99, 0.1)
    )
    assert len(drawn) == 2
    assert torch.allclose(seen[1], 0.8 * z)
    assert torch.allclose(seen[2], 0.6 * drawn[0])
    assert torch.allclose(seen[3], 0.4 * (0.8 * drawn[0] + 0.6 * drawn[1]))
    assert torch.allclose(result, 0.1 / 0.4 * seen[3])


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.5, 0.5), (0.5, 1.1)])
def test_a_wrong_number_of_shares_is_named(shares: tuple[float, ...]) -> None:
    levels: Any = [1.0, 0.5, 0.25]
    with pytest.raises(ValueError, match="one for each of the 2 transitions"):
        few_step_sample(lambda z, index: z, torch.zeros(SHAPE), levels, levels, lambda: None, stochasticity=shares)
