"""Teacher, student, critic and discriminator see every part of the conditions, and guidance batches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from flash_diffusion.flash_core.denoiser import Conditioning, guided_z0, predict_z0
from flash_diffusion.flash_core.process import VPProcess
from flash_diffusion.trainer.teachers.conditions.control import Control
from flash_diffusion.trainer.teachers.families.stable_diffusion import UNetDenoiser
from flash_diffusion.trainer.teachers.families.stable_diffusion_xl import SDXLDenoiser

from ..families.image_adapters import EMBEDDING, save_image_adapter
from ..families.networks import POOLED_WIDTH, TEXT_WIDTH, tiny_network

BATCH, SIZE = 2, 8  # of latents, in latent pixels
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ROLES = ("teacher", "student", "critic")


def _spread(network: nn.Module) -> nn.Module:
    """Random weights everywhere: what is added to a network starts at zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for value in network.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return network


def _other(**fields: object) -> UNet2DConditionModel:
    """SD 1.5's tiny UNet with another field."""
    config = {name: value for name, value in tiny_network("sd15").config.items() if not name.startswith("_")}
    return _spread(UNet2DConditionModel(**config | fields))


def _text() -> dict[str, torch.Tensor]:
    return {"cross_attention": torch.randn(BATCH, 7, TEXT_WIDTH)}


def _plain(_: Path) -> tuple[UNetDenoiser, dict[str, object]]:
    return UNetDenoiser(tiny_network("sd15"), VPProcess.from_betas()), _text()


def _concat(_: Path) -> tuple[UNetDenoiser, dict[str, object]]:
    denoiser = UNetDenoiser(_other(in_channels=9), VPProcess.from_betas())
    return denoiser, {**_text(), "concat": torch.randn(BATCH, 5, SIZE, SIZE)}


def _noise_level(_: Path) -> tuple[UNetDenoiser, dict[str, object]]:
    denoiser = UNetDenoiser(_other(num_class_embeds=50), VPProcess.from_betas())
    return denoiser, {**_text(), "noise_level": torch.tensor([3, 30])}


def _residuals(_: Path) -> tuple[UNetDenoiser, dict[str, object]]:
    network = tiny_network("sd15")
    control = _spread(ControlNetModel.from_unet(network))
    text = _text()
    down, middle = control(
        torch.randn(BATCH, 4, SIZE, SIZE), 500, text["cross_attention"], torch.rand(BATCH, 3, 64, 64), return_dict=False
    )
    residuals = tuple(value.detach() for value in (*down, middle))
    return UNetDenoiser(network, VPProcess.from_betas()), {**text, "residuals": residuals}


def _controlnet(_: Path) -> tuple[UNetDenoiser, dict[str, object]]:
    denoiser, conditions = _plain(_)
    denoiser.control = Control(_spread(ControlNetModel.from_unet(denoiser.network)))
    return denoiser, {**conditions, "hint": torch.rand(BATCH, 3, 64, 64)}


def _t2i_adapter(_: Path) -> tuple[UNetDenoiser, dict[str, object]]:
    denoiser, conditions = _plain(_)
    channels = list(denoiser.network.config["block_out_channels"])
    denoiser.control = Control(_spread(T2IAdapter(channels=channels, num_res_blocks=1)))
    return denoiser, {**conditions, "hint": torch.rand(BATCH, 3, 64, 64)}


def _image_tokens(folder: Path) -> tuple[UNetDenoiser, dict[str, object]]:
    network = tiny_network("sd15")
    save_image_adapter(folder / "adapter.safetensors", network)
    tensors = load_file(folder / "adapter.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    network._load_ip_adapter_weights([parts])
    return UNetDenoiser(network, VPProcess.from_betas()), {**_text(), "image_tokens": torch.randn(BATCH, 1, EMBEDDING)}


def _sdxl(_: Path) -> tuple[UNetDenoiser, dict[str, object]]:
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * BATCH)
    further = {"vector": torch.randn(BATCH, POOLED_WIDTH), "size_ids": sizes}
    return SDXLDenoiser(tiny_network("sdxl"), VPProcess.from_betas()), {**_text(), **further}


PARTS: dict[str, tuple[Callable[[Path], tuple[UNetDenoiser, dict[str, object]]], str]] = {
    "words": (_plain, "cross_attention"),
    "channels": (_concat, "concat"),
    "noise level": (_noise_level, "noise_level"),
    "residuals": (_residuals, "residuals"),
    "hint of a ControlNet": (_controlnet, "hint"),
    "hint of a T2I-adapter": (_t2i_adapter, "hint"),
    "image tokens": (_image_tokens, "image_tokens"),
    "pooled text": (_sdxl, "vector"),
    "sizes": (_sdxl, "size_ids"),
}


@pytest.mark.parametrize("case", PARTS)
def test_every_role_and_the_discriminator_read_every_condition(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, part = PARTS[case]
    denoiser, conditions = build(tmp_path)
    for seed, role in enumerate(ROLES[1:]):
        denoiser.add_adapter(role, 2, 2.0, TARGETS, seed)
        for value in denoiser.adapter_parameters(role).values():
            torch.nn.init.normal_(value, std=0.2)
    value = conditions[part]
    other = tuple(each.flip(0) for each in value) if isinstance(value, tuple) else value.flip(0)  # type: ignore[attr-defined]
    if part == "size_ids":
        other = value + 8  # type: ignore[operator]
    first = Conditioning(**conditions)  # type: ignore[arg-type]
    second = replace(first, **{part: other})
    z, t = torch.randn(BATCH, 4, SIZE, SIZE), torch.tensor([700.0, 300.0])
    outputs = []
    with torch.no_grad():
        for role in ROLES:
            with denoiser.role(role):
                output = denoiser.predict(z, t, first)
                outputs.append(output)
                assert float((output - denoiser.predict(z, t, second)).abs().max()) > 1e-4, role
        features = zip(denoiser.features(z, t, first), denoiser.features(z, t, second), strict=True)
        assert any(float((a - b).abs().max()) > 1e-4 for a, b in features)
        # Roles differ, so that what was seen was each one's own.
        assert all(float((a - b).abs().max()) > 1e-4 for a, b in ((outputs[0], outputs[1]), (outputs[1], outputs[2])))
        # Both branches of guidance in one batch are both branches one after the other.
        guidance = torch.tensor([3.0, 7.0])
        guided = guided_z0(denoiser, z, t, first, second, guidance)
        positive, negative = (predict_z0(denoiser, z, t, each) for each in (first, second))
    torch.testing.assert_close(
        guided, negative + guidance.reshape(-1, 1, 1, 1) * (positive - negative), rtol=1e-4, atol=1e-4
    )
