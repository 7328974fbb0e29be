"""Layers' names: from the flattened and the native ones of other tools to diffusers' dotted paths.

ComfyUI knows all of these names for the models it runs, and its nodes need nothing of this. Files that diffusers and
PEFT shall load need diffusers' own, and native transformers fuse layers that diffusers keeps apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .weights import LoraModule, flat_name

# The words of diffusers' module paths; those that hold an underscore stand first.
_TOKEN = re.compile(
    r"""(?:
    down_blocks | up_blocks | mid_block | single_transformer_blocks | transformer_blocks
    | to_q | to_k | to_v | to_out | to_add_out | add_q_proj | add_k_proj | add_v_proj | proj_in | proj_out | proj_mlp
    | ff_context | norm1_context | norm_out | linear_1 | linear_2 | conv_shortcut | conv_in | conv_out | time_emb_proj
    | time_embedding | add_embedding | class_embedding | time_text_embed | timestep_embedder | text_embedder
    | guidance_embedder | resolution_embedder | aspect_ratio_embedder | context_embedder | x_embedder | pos_embed
    | adaln_single | caption_projection
    | text_model | self_attn | q_proj | k_proj | v_proj | out_proj | text_projection  # the text encoders'
    | attentions | resnets | downsamplers | upsamplers | conv1 | conv2 | conv | attn1 | attn2 | attn | ff | net | proj
    | norm1 | norm2 | norm3 | norm | linear | emb | encoder | layers | mlp | fc1 | fc2 | \d+
    )(?=_|$)""",
    re.VERBOSE,
)


def dotted(name: str) -> str | None:
    """Return diffusers' path of a flattened name (``mid_block_attentions_0_proj_in``), or None without one."""
    parts: list[str] = []
    position = 0
    while position < len(name):
        token = _TOKEN.match(name, position)
        if token is None:
            return None
        parts.append(token.group())
        position = token.end() + 1
    return ".".join(parts) or None


# -- UNets: Stable Diffusion's own names, three input and three output blocks a level ----------------------------------

_UNET_BASIC = {
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET_BLOCK = re.compile(
    r"^(?P<side>input_blocks_(?P<i>\d+)|output_blocks_(?P<o>\d+)|middle_block)_(?P<part>\d)_(?P<rest>.+)$"
)


def unet_path(name: str, layers_per_block: int = 2) -> str | None:
    """Return diffusers' path of a layer in a UNet.

    Args:
        name: Stable Diffusion's own, flattened (``input_blocks_1_0_in_layers_2``).
        layers_per_block: of a level on the way down, 2 in every published UNet; one that samples follows them, and on
            the way up there is one more.

    Returns:
        The dotted path, or None where the layer has none.
    """
    blocks_a_level = layers_per_block + 1
    if name in _UNET_BASIC:
        return _UNET_BASIC[name]
    found = _UNET_BLOCK.match(name)
    if found is None:
        return None
    part, rest = int(found["part"]), found["rest"]
    if found["i"] is not None:
        level, index = divmod(int(found["i"]) - 1, blocks_a_level)
        block, sampler = f"down_blocks.{level}", ("op", f"down_blocks.{level}.downsamplers.0.conv")
    elif found["o"] is not None:
        level, index = divmod(int(found["o"]), blocks_a_level)
        block, sampler = f"up_blocks.{level}", ("conv", f"up_blocks.{level}.upsamplers.0.conv")
    else:
        block, index, sampler = "mid_block", part // 2, ("", "")
        part %= 2
    if rest == sampler[0]:
        return sampler[1]
    if rest in _RESNET:
        return f"{block}.resnets.{index}.{_RESNET[rest]}"
    inner = dotted(rest)
    return f"{block}.attentions.{0 if block == 'mid_block' else index}.{inner}" if part == 1 and inner else None


# -- transformers: (native name, diffusers' paths in the order in which the native layer holds them) -------------------

_JOINT = r"joint_blocks_(\d+)_"
_MMDIT = (
    (_JOINT + "x_block_attn_qkv", ("transformer_blocks.{}.attn.to_q", ".to_k", ".to_v")),
    (_JOINT + "x_block_attn2_qkv", ("transformer_blocks.{}.attn2.to_q", ".to_k", ".to_v")),
    (_JOINT + "context_block_attn_qkv", ("transformer_blocks.{}.attn.add_q_proj", ".add_k_proj", ".add_v_proj")),
    (_JOINT + "x_block_attn_proj", ("transformer_blocks.{}.attn.to_out.0",)),
    (_JOINT + "x_block_attn2_proj", ("transformer_blocks.{}.attn2.to_out.0",)),
    (_JOINT + "context_block_attn_proj", ("transformer_blocks.{}.attn.to_add_out",)),
    (_JOINT + "x_block_mlp_fc1", ("transformer_blocks.{}.ff.net.0.proj",)),
    (_JOINT + "x_block_mlp_fc2", ("transformer_blocks.{}.ff.net.2",)),
    (_JOINT + "context_block_mlp_fc1", ("transformer_blocks.{}.ff_context.net.0.proj",)),
    (_JOINT + "context_block_mlp_fc2", ("transformer_blocks.{}.ff_context.net.2",)),
    (_JOINT + "x_block_adaLN_modulation_1", ("transformer_blocks.{}.norm1.linear",)),
    (_JOINT + "context_block_adaLN_modulation_1", ("transformer_blocks.{}.norm1_context.linear",)),
    ("x_embedder_proj", ("pos_embed.proj",)),
    ("y_embedder_mlp_0", ("time_text_embed.text_embedder.linear_1",)),
    ("y_embedder_mlp_2", ("time_text_embed.text_embedder.linear_2",)),
    ("t_embedder_mlp_0", ("time_text_embed.timestep_embedder.linear_1",)),
    ("t_embedder_mlp_2", ("time_text_embed.timestep_embedder.linear_2",)),
    ("context_embedder", ("context_embedder",)),
    ("final_layer_linear", ("proj_out",)),
    ("final_layer_adaLN_modulation_1", ("norm_out.linear",)),
)
_BLOCK = r"blocks_(\d+)_"
_PIXART = (
    (_BLOCK + "attn_qkv", ("transformer_blocks.{}.attn1.to_q", ".to_k", ".to_v")),
    (_BLOCK + "attn_proj", ("transformer_blocks.{}.attn1.to_out.0",)),
    (_BLOCK + "cross_attn_q_linear", ("transformer_blocks.{}.attn2.to_q",)),
    (_BLOCK + "cross_attn_kv_linear", ("transformer_blocks.{}.attn2.to_k", ".to_v")),
    (_BLOCK + "cross_attn_proj", ("transformer_blocks.{}.attn2.to_out.0",)),
    (_BLOCK + "mlp_fc1", ("transformer_blocks.{}.ff.net.0.proj",)),
    (_BLOCK + "mlp_fc2", ("transformer_blocks.{}.ff.net.2",)),
    ("x_embedder_proj", ("pos_embed.proj",)),
    ("y_embedder_y_proj_fc1", ("caption_projection.linear_1",)),
    ("y_embedder_y_proj_fc2", ("caption_projection.linear_2",)),
    ("t_embedder_mlp_0", ("adaln_single.emb.timestep_embedder.linear_1",)),
    ("t_embedder_mlp_2", ("adaln_single.emb.timestep_embedder.linear_2",)),
    ("csize_embedder_mlp_0", ("adaln_single.emb.resolution_embedder.linear_1",)),
    ("csize_embedder_mlp_2", ("adaln_single.emb.resolution_embedder.linear_2",)),
    ("ar_embedder_mlp_0", ("adaln_single.emb.aspect_ratio_embedder.linear_1",)),
    ("ar_embedder_mlp_2", ("adaln_single.emb.aspect_ratio_embedder.linear_2",)),
    ("t_block_1", ("adaln_single.linear",)),
    ("final_layer_linear", ("proj_out",)),
)
_DOUBLE, _SINGLE_BLOCK = r"double_blocks_(\d+)_", r"single_blocks_(\d+)_"
_FLUX = (
    (_DOUBLE + "img_attn_qkv", ("transformer_blocks.{}.attn.to_q", ".to_k", ".to_v")),
    (_DOUBLE + "txt_attn_qkv", ("transformer_blocks.{}.attn.add_q_proj", ".add_k_proj", ".add_v_proj")),
    (_DOUBLE + "img_attn_proj", ("transformer_blocks.{}.attn.to_out.0",)),
    (_DOUBLE + "txt_attn_proj", ("transformer_blocks.{}.attn.to_add_out",)),
    (_DOUBLE + "img_mlp_0", ("transformer_blocks.{}.ff.net.0.proj",)),
    (_DOUBLE + "img_mlp_2", ("transformer_blocks.{}.ff.net.2",)),
    (_DOUBLE + "txt_mlp_0", ("transformer_blocks.{}.ff_context.net.0.proj",)),
    (_DOUBLE + "txt_mlp_2", ("transformer_blocks.{}.ff_context.net.2",)),
    (_DOUBLE + "img_mod_lin", ("transformer_blocks.{}.norm1.linear",)),
    (_DOUBLE + "txt_mod_lin", ("transformer_blocks.{}.norm1_context.linear",)),
    (
        _SINGLE_BLOCK + "linear1",
        ("single_transformer_blocks.{}.attn.to_q", ".to_k", ".to_v", "single_transformer_blocks.{}.proj_mlp"),
    ),
    (_SINGLE_BLOCK + "linear2", ("single_transformer_blocks.{}.proj_out",)),
    (_SINGLE_BLOCK + "modulation_lin", ("single_transformer_blocks.{}.norm.linear",)),
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in_in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in_out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("vector_in_in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in_out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("guidance_in_in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in_out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    ("final_layer_linear", ("proj_out",)),
    ("final_layer_adaLN_modulation_1", ("norm_out.linear",)),
)
_NATIVE_MARKS = (("joint_blocks_", _MMDIT), ("double_blocks_", _FLUX), ("single_blocks_", _FLUX), ("blocks_", _PIXART))


def is_transformer(modules: Mapping[str, LoraModule]) -> bool:
    """Return True for the layers of a transformer (SD3, PixArt, Flux), False for the layers of a UNet."""
    marks = ("transformer_blocks_", "single_transformer_blocks_", *(mark for mark, _ in _NATIVE_MARKS))
    return any(name.startswith(marks) for name in modules)


def with_diffusers_names(modules: Mapping[str, LoraModule]) -> dict[str, LoraModule]:
    """Return the same updates by diffusers' dotted paths; fused native layers are split.

    Raises:
        ValueError: a layer does not exist in diffusers' networks; the message names the layer.
    """
    table = next((table for mark, table in _NATIVE_MARKS if any(name.startswith(mark) for name in modules)), None)
    result: dict[str, LoraModule] = {}
    for name, module in modules.items():
        if table is None:
            path = module.path if _is_diffusers(module.path) else dotted(name) or unet_path(name)
            parts = None if path is None else [replace(module, path=path)]
        else:
            parts = _split(name, module, table)
        if parts is None:
            raise ValueError(f"layer {module.path} does not exist in diffusers' networks")
        for part in parts:
            result[part.path] = part
    return result


def _is_diffusers(path: str) -> bool:
    return "." in path and not path.startswith(
        ("input_blocks.", "output_blocks.", "middle_block.", "out.", "label_emb.", "time_embed.")
    )


def _split(name: str, module: LoraModule, table: tuple[tuple[str, tuple[str, ...]], ...]) -> list[LoraModule] | None:
    for pattern, places in table:
        found = re.fullmatch(pattern, name)
        if found is None:
            continue
        paths: list[str] = []
        for place in places:
            # ".to_k" stands beside the path before it.
            path = paths[-1].rsplit(".", 1)[0] + place if place.startswith(".") else place.format(*found.groups())
            paths.append(path)
        up = _swap_halves(module.up) if _is_final_modulation(name, module) else module.up
        rows, width = up.shape[0], module.down.shape[1]
        # Flux's linear1 holds q, k, v and the MLP's input, which is wider: what is left of the rows.
        sizes = [rows // len(paths)] * len(paths) if "proj_mlp" not in paths[-1] else [width] * 3 + [rows - 3 * width]
        if sum(sizes) != rows or min(sizes) <= 0:
            raise ValueError(f"layer {module.path} with {rows} outputs can't be split into {len(paths)} layers")
        pieces = torch.split(up, sizes)
        return [replace(module, path=path, up=piece) for path, piece in zip(paths, pieces, strict=True)]
    return None


def _is_final_modulation(name: str, module: LoraModule) -> bool:
    """Return whether diffusers has scale and shift in another order: in last layers with these two parts only."""
    return name == "final_layer_adaLN_modulation_1" or (
        name.endswith("context_block_adaLN_modulation_1") and module.up.shape[0] == 2 * module.down.shape[1]
    )


def _swap_halves(up: Tensor) -> Tensor:
    shift, scale = up.chunk(2)
    return torch.cat([scale, shift])


# -- text encoders -----------------------------------------------------------------------------------------------------

_KOHYA_TEXT = re.compile(r"^lora_te(?P<number>[123]?)_(?P<rest>.+)$")
_DIFFUSERS_TEXT = re.compile(r"^text_encoder(?:_(?P<number>[23]))?\.(?P<rest>.+)$")


def text_encoder_path(path: str) -> tuple[int, str] | None:
    """Return a layer's text encoder (1, 2, 3) and the dotted path inside it; None for a name of neither kohya's nor
    diffusers' form."""
    kohya = _KOHYA_TEXT.match(path)
    if kohya:
        inner = dotted(kohya["rest"])
        return None if inner is None else (int(kohya["number"] or 1), inner)
    diffusers = _DIFFUSERS_TEXT.match(path)
    return (int(diffusers["number"] or 1), diffusers["rest"]) if diffusers else None


def kohya_text_name(number: int, path: str, several: bool) -> str:
    """Return kohya's name of a text encoder's layer: ``lora_te_``, or ``lora_te1_`` and ``lora_te2_`` of several."""
    return f"lora_te{number if several else ''}_{flat_name(path)}"
