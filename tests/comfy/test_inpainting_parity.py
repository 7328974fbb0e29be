"""Few-step inpainting with a 9-channel model in ComfyUI is diffusers': mask and masked picture beside the latent.

The loop is written over diffusers' UNet and LCMScheduler as StableDiffusionInpaintPipeline runs them, from pure noise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..families.networks import TEXT_WIDTH, tiny_network

pytestmark = pytest.mark.comfy

TIMESTEPS = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]}
SCALE = 0.18215  # of SD 1.5's latents; ComfyUI hands out unscaled ones
TOLERANCE = 1e-3  # of the latents' standard deviation


def inpainting_network() -> UNet2DConditionModel:
    """The inpainting sibling of a tiny SD 1.5."""
    plain = tiny_network("sd15")
    wide = UNet2DConditionModel.from_config(plain.config, in_channels=9)
    weights = plain.state_dict()
    generator = torch.Generator().manual_seed(8)
    further = 0.1 * torch.randn(len(weights["conv_in.weight"]), 5, 3, 3, generator=generator)
    wide.load_state_dict({**weights, "conv_in.weight": torch.cat([weights["conv_in.weight"], further], 1)})
    return wide.eval()


@pytest.fixture(scope="module")
def run(
    runtime: ModuleType, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[UNet2DConditionModel, dict[str, Tensor], dict[str, Tensor]]:
    """The UNet, what both sides are given, and what ComfyUI made of it."""
    folder = tmp_path_factory.mktemp("inpainting")
    network = inpainting_network()
    save_file(network.state_dict(), folder / "unet.safetensors")
    (folder / "unet.json").write_text(json.dumps(dict(network.config)))
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:13, 2:10] = 1
    given = {
        "masked": torch.randn(1, 4, 16, 16, generator=generator) / SCALE,
        "context": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "mask": mask,
    }
    save_file(given, folder / "given.safetensors")
    script = Path(__file__).resolve().parent / "inside" / "inpainting.py"
    command = [sys.executable, script, runtime.comfyui_folder(), root, folder]
    done = subprocess.run(command, env=runtime.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return network, given, load_file(folder / "results.safetensors")


@pytest.mark.parametrize("steps", TIMESTEPS)
@torch.no_grad()
def test_it_is_diffusers_inpainting(run, steps: int) -> None:
    network, given, results = run
    scheduler = LCMScheduler(original_inference_steps=100)
    scheduler.set_timesteps(timesteps=TIMESTEPS[steps])
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(given["masked"].shape, generator=generator)
    for t in scheduler.timesteps:
        read = torch.cat([z, given["mask"], given["masked"] * SCALE], dim=1)
        output = network(read, t, encoder_hidden_states=given["context"]).sample
        z, expected = scheduler.step(output, t, z, generator=generator, return_dict=False)
    ours = results[str(steps)] * SCALE
    assert float((ours - expected).abs().max() / expected.std()) <= TOLERANCE
