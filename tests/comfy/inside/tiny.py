"""The tiny networks of ``tests/families/networks.py`` as ComfyUI MODELs with the same weights.

Import it after :func:`boot.boot`. ComfyUI's own classes, converters and configurations of each family, with the sizes
of the tiny network; only its recognition by published sizes is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

CONFIGS = {
    "sd15": comfy.supported_models.SD15,
    "sd21": comfy.supported_models.SD20,
    "sdxl": comfy.supported_models.SDXL,
    "pixart_alpha": comfy.supported_models.PixArtAlpha,
    "pixart_sigma": comfy.supported_models.PixArtSigma,
    "sd3": comfy.supported_models.SD3,
    "sd35": comfy.supported_models.SD3,
    "flux": comfy.supported_models.Flux,
}
V_PREDICTION = {"sd21"}


def tiny_model(
    family: str,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    v_prediction: bool | None = None,
    sampling_settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL on the CPU.

    Args:
        weights: the diffusers network's ``state_dict()``.
        config: its ``dict(network.config)``; needed for what the weights' shapes do not tell.
        v_prediction: for UNets (default: as the family's published model, v for ``sd21``).
        sampling_settings: overrides, such as ``{"zsnr": True}`` or ``{"shift": 1.0}``.
        dtype: what the weights are stored and computed in.
    """
    build = _unet if "down_block_types" in config else _transformer
    # Copies, since ComfyUI's converter swaps scale and shift in the tensors it is given.
    sizes, native = build(family, {key: value.clone() for key, value in weights.items()}, config)
    model_config = CONFIGS[family](sizes)
    model_config.unet_config.update(sizes)  # what the class sets for the published sizes
    model_config.sampling_settings.update(sampling_settings or {})
    if "down_block_types" in config:
        wants_v = family in V_PREDICTION if v_prediction is None else v_prediction
        kind = comfy.model_base.ModelType.V_PREDICTION if wants_v else comfy.model_base.ModelType.EPS
        model_config.model_type = lambda state_dict, prefix="": kind
    model_config.set_inference_dtype(dtype, None)
    model = model_config.get_model(native, "")
    model.load_model_weights({key: value.to(dtype) for key, value in native.items()}, "")
    missing = set(model.diffusion_model.state_dict()) - set(native)
    if missing:
        raise ValueError(f"{family}: the tiny network has no weights for {sorted(missing)[:5]}")
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def _unet(
    family: str, weights: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """ComfyUI's arguments for a UNet, and the weights under ComfyUI's names."""
    widths = config["block_out_channels"]
    layers = config["layers_per_block"]
    depth = config["transformer_layers_per_block"]
    depths = [depth] * len(widths) if isinstance(depth, int) else list(depth)
    attention = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    heads = config["attention_head_dim"]
    by_heads = isinstance(heads, int)
    adm = config["projection_class_embeddings_input_dim"]
    sizes = {
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [d * a for d, a in zip(depths, attention, strict=True) for _ in range(layers)],
        "transformer_depth_output": [d * a for d, a in zip(depths, attention, strict=True) for _ in range(layers + 1)],
        "transformer_depth_middle": depths[-1],
        "use_linear_in_transformer": config["use_linear_projection"],
        "context_dim": config["cross_attention_dim"],
        "num_heads": heads if by_heads else -1,
        "num_head_channels": -1 if by_heads else widths[0] // heads[0],
        "adm_in_channels": adm,
        **({} if adm is None else {"num_classes": "sequential"}),
        "use_temporal_attention": False,
    }
    names = comfy.utils.unet_to_diffusers(sizes)
    return sizes, {names[key]: value for key, value in weights.items()}


def _transformer(
    family: str, weights: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same for a transformer."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if family.startswith("pixart"):
        native = _rename(
            weights, comfy.utils.pixart_to_diffusers({"depth": config["num_layers"], "hidden_size": width})
        )
        native.setdefault("y_embedder.y_embedding", torch.zeros(120, config["caption_channels"]))
    else:
        native = comfy.model_detection.convert_diffusers_mmdit(weights, "")
    sizes = comfy.model_detection.detect_unet_config(native, "")
    if family == "flux":
        sizes |= {"axes_dim": list(config["axes_dims_rope"]), "num_heads": config["num_attention_heads"]}
    if family.startswith("pixart"):
        sizes |= {
            "hidden_size": width,
            "num_heads": config["num_attention_heads"],
            "caption_channels": config["caption_channels"],
            "input_size": config["sample_size"],
            "pe_interpolation": max(config["sample_size"] // 64, 1),
        }
    return sizes, native


def _rename(weights: Mapping[str, Tensor], names: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights under other names; ``(name, (dimension, start, length))`` joins several into one."""
    slices: dict[str, list[tuple[int, Tensor]]] = {}
    native: dict[str, Tensor] = {}
    for key, value in weights.items():
        target = names.get(key)
        if isinstance(target, str):
            native[target] = value
        elif target is not None:
            slices.setdefault(target[0], []).append((target[1][1], value))
    for name, parts in slices.items():
        native[name] = torch.cat([value for _, value in sorted(parts, key=lambda part: part[0])])
    return native
