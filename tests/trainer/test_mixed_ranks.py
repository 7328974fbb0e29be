"""A LoRA whose layers differ in rank and scale is the same in stock diffusers, which takes one rank for another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin

from flash_diffusion.flash_core.lora import LoraModule, write_lora

from ..families.networks import tiny_network

LAYERS = {
    "sd15": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (2, 5.0),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": (4, 1.0),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": (3, 3.0),
    },
    "sd3": {
        "transformer_blocks.0.attn.to_q": (2, 5.0),
        "transformer_blocks.0.attn.add_k_proj": (4, 1.0),
        "transformer_blocks.1.ff.net.2": (3, 3.0),
    },
}


@pytest.mark.parametrize("family", LAYERS)
def test_diffusers_scales_every_layer_as_it_should(family: str, tmp_path: Path) -> None:
    network = tiny_network(family)
    generator = torch.Generator().manual_seed(0)
    modules, wanted = {}, {}
    for path, (rank, alpha) in LAYERS[family].items():
        weight = network.get_submodule(path).weight
        down = torch.randn(rank, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], rank, generator=generator)
        modules[path] = LoraModule(path, down, up, alpha)
        wanted[path] = weight.clone() + alpha / rank * up @ down
    write_lora(tmp_path / "lora.safetensors", modules, None, transformer=family == "sd3")
    mixin, load = (
        (SD3LoraLoaderMixin, SD3LoraLoaderMixin.load_lora_into_transformer)
        if isinstance(network, SD3Transformer2DModel)
        else (StableDiffusionLoraLoaderMixin, StableDiffusionLoraLoaderMixin.load_lora_into_unet)
    )
    state = mixin.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    tensors, alphas = state if isinstance(state, tuple) else (state, None)
    if isinstance(network, UNet2DConditionModel):
        load(tensors, network_alphas=alphas, unet=network)
    else:
        load(tensors, network)
    network.fuse_lora()
    for path, weight in wanted.items():
        layer = network.get_submodule(path)
        torch.testing.assert_close(layer.base_layer.weight, weight, atol=1e-4, rtol=1e-4)
