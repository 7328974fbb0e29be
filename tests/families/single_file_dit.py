"""The single-file form of an SD3 or SD3.5 folder: tensors under the original code's names."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from .single_file import vae_names

# diffusers' name and the original's, of layers outside the blocks and of layers in them.
_ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def native_sd3(folder: Path, *, t5: bool = True) -> dict[str, Tensor]:
    """The tensors of an SD3 or SD3.5 checkpoint with its text encoders and its VAE.

    Args:
        folder: the diffusers folder.
        t5: whether the third text encoder is in it.
    """
    transformer = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = {f"model.diffusion_model.{name}": value for name, value in _native_mmdit(transformer).items()}
    vae = vae_names(AutoencoderKL.from_pretrained(folder / "vae"))
    tensors |= {f"first_stage_model.{name}": value for name, value in vae.items()}
    parts = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"} | ({"t5xxl": "text_encoder_3"} if t5 else {})
    for name, part in parts.items():
        encoder = load_file(folder / part / "model.safetensors")
        if name == "clip_l":
            del encoder["text_projection.weight"]  # the identity
        tensors |= {f"text_encoders.{name}.transformer.{key}": value for key, value in encoder.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def _native_mmdit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    native: dict[str, Tensor] = {}
    for theirs, ours in _ENDS.items():
        native |= _renamed(weights, theirs, ours)
    for index in range(blocks):
        source, target = f"transformer_blocks.{index}", f"joint_blocks.{index}"
        for theirs, ours in _BLOCK.items():
            native |= _renamed(weights, f"{source}.{theirs}", f"{target}.{ours}")
        for ours, parts in _FUSED.items():
            for end in ("weight", "bias"):
                names = [f"{source}.{part}.{end}" for part in parts]
                if names[0] in weights:
                    native[f"{target}.{ours}.{end}"] = torch.cat([weights[name] for name in names])
    # The original's order is shift, scale; diffusers' is scale, shift.
    for layer in ("final_layer", f"joint_blocks.{blocks - 1}.context_block"):
        for end in ("weight", "bias"):
            name = f"{layer}.adaLN_modulation.1.{end}"
            native[name] = torch.cat(native[name].chunk(2)[::-1])
    assert sum(value.numel() for value in native.values()) == sum(value.numel() for value in weights.values())
    return native


def _renamed(weights: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    named = {theirs: ours} | {f"{theirs}.{end}": f"{ours}.{end}" for end in ("weight", "bias")}
    return {target: weights[source] for source, target in named.items() if source in weights}
