"""The single-file form of a UNet family's pipeline: one .safetensors with the original code's names.

The names are those of the published checkpoints, written down here on their own: diffusers only has the way back.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

_UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "class_embedding.": "label_emb.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE_NAMES = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.group_norm.": "mid.attn_1.norm.",
    "mid_block.attentions.0.to_q.": "mid.attn_1.q.",
    "mid_block.attentions.0.to_k.": "mid.attn_1.k.",
    "mid_block.attentions.0.to_v.": "mid.attn_1.v.",
    "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".resnets.": ".block.",
    "down_blocks.": "down.",
}
_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.": ".attn.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def save_single_file(
    pipeline: DiffusionPipeline,
    path: Path,
    *,
    without: str | tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    marks: tuple[str, ...] = (),
) -> Path:
    """Write a pipeline's weights as one file.

    Args:
        without: prefixes of the names that are left out, such as ``first_stage_model.``.
        dtype: what they are stored in (default: as they are).
        marks: names of empty tensors, by which some files say what kind they are.
    """
    tensors = {f"model.diffusion_model.{name}": value for name, value in unet_names(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in vae_names(pipeline.vae).items()}
    first = pipeline.text_encoder
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= {f"conditioner.embedders.0.transformer.{name}": value for name, value in clip_names(first).items()}
        second = open_clip_names(pipeline.text_encoder_2)
        tensors |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    elif first.config.hidden_act == "gelu":  # SD 2's encoder is OpenCLIP's
        tensors |= {f"cond_stage_model.model.{name}": value for name, value in open_clip_names(first).items()}
    else:
        tensors |= {f"cond_stage_model.transformer.{name}": value for name, value in clip_names(first).items()}
    kept = {name: value for name, value in tensors.items() if not name.startswith(without)}
    kept |= {name: torch.tensor([]) for name in marks}
    save_file({name: value.to(dtype or value.dtype).contiguous() for name, value in kept.items()}, path)
    return path


def unet_names(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A UNet's weights by the original code's names: its levels are one row of input and one of output blocks."""
    layers = unet.config.layers_per_block
    named = {}
    for name, value in unet.state_dict().items():
        part, _, rest = name.partition(".")
        if part in ("down_blocks", "up_blocks"):
            block, kind, index, rest = rest.split(".", 3)
            first = 1 + int(block) * (layers + 1) if part == "down_blocks" else int(block) * (layers + 1)
            row = "input_blocks" if part == "down_blocks" else "output_blocks"
            if kind == "downsamplers":
                name = f"{row}.{first + layers}.0.op.{rest.removeprefix('conv.')}"
            elif kind == "upsamplers":
                attended = hasattr(unet.up_blocks[int(block)], "attentions")
                name = f"{row}.{first + layers}.{2 if attended else 1}.{rest}"
            elif kind == "attentions":
                name = f"{row}.{first + int(index)}.1.{rest}"
            else:
                name = f"{row}.{first + int(index)}.0.{_replaced(rest, _UNET_RESNET)}"
        elif part == "mid_block":
            kind, index, rest = rest.split(".", 2)
            if kind == "attentions":
                name = f"middle_block.1.{rest}"
            else:
                name = f"middle_block.{2 * int(index)}.{_replaced(rest, _UNET_RESNET)}"
        else:
            name = _replaced(name, _UNET_ENDS)
        named[name] = value
    return named


def vae_names(vae: AutoencoderKL) -> dict[str, Tensor]:
    """A VAE's weights by the original code's names; its attention is made of 1 x 1 convolutions there."""
    last = len(vae.config.block_out_channels) - 1
    named = {}
    for name, value in vae.state_dict().items():
        attention = "attentions.0.to_" in name and name.endswith("weight")
        name = _replaced(name, _VAE_NAMES)
        for level in range(last + 1):  # the decoder counts its levels from the other end
            name = name.replace(f"up_blocks.{level}.", f"up.{last - level}.")
        named[name] = value[:, :, None, None] if attention else value
    return named


def clip_names(encoder: nn.Module) -> dict[str, Tensor]:
    """Return a CLIP text encoder's weights by the names in files. Newer transformers drop ``text_model.`` in memory."""
    heads = ("text_model.", "text_projection.")
    weights = encoder.state_dict()
    return {name if name.startswith(heads) else f"text_model.{name}": value for name, value in weights.items()}


def open_clip_names(encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIP text encoder's weights by OpenCLIP's names: query, key and value are one matrix."""
    state = clip_names(encoder)
    named = {}
    for name, value in state.items():
        if name == "text_projection.weight":
            named["text_projection"] = value.T
        elif ".q_proj." in name:
            joined = torch.cat([value, *(state[name.replace("q_proj", part)] for part in ("k_proj", "v_proj"))])
            path, _, kind = _replaced(name, _OPEN_CLIP).partition(".q_proj.")
            named[f"{path}.in_proj_{kind}"] = joined
        elif ".k_proj." not in name and ".v_proj." not in name:
            named[_replaced(name, _OPEN_CLIP)] = value
    return named


def _replaced(name: str, parts: dict[str, str]) -> str:
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name
