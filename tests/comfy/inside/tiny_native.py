"""Tiny random MODELs of families that diffusers' networks of ``tests/families`` do not cover, in ComfyUI's own classes.

Import it after :func:`boot.boot`. The true architecture of each family, with less width and depth.
"""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.chroma.model import ChromaParams
from torch import Tensor, nn

TEXT_WIDTH = 32
_CHROMA: dict[str, Any] = {
    "image_model": "chroma",
    **{"in_channels": 64, "out_channels": 64, "patch_size": 2, "context_in_dim": TEXT_WIDTH, "hidden_size": 64},
    **{"mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000},
    **{"qkv_bias": True, "in_dim": 64, "out_dim": 64, "hidden_dim": 64, "n_layers": 1},
}
_NEWER_CHROMA = {"txt_ids_dims": [], "vec_in_dim": None}  # which newer ComfyUI has too
if "txt_ids_dims" in ChromaParams.__dataclass_fields__:
    _CHROMA |= _NEWER_CHROMA
_LUMINA = {
    "image_model": "lumina2",
    **{"patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": TEXT_WIDTH, "n_layers": 2, "qk_norm": True},
    **{"n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "multiple_of": 32, "axes_dims": [16, 16, 16]},
    **{"axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0},
}
_Z_IMAGE = {
    **_LUMINA,
    **{"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32, "rope_theta": 256.0},
    **{"dim": 256, "axes_dims": [32, 48, 48]},  # its modulation reads 256 numbers of the timestep
}
_AURAFLOW = {
    **{"in_channels": 4, "out_channels": 4, "patch_size": 2, "dim": 64, "n_layers": 2, "n_double_layers": 1},
    **{"n_heads": 2, "global_conddim": 64, "cond_seq_dim": TEXT_WIDTH, "max_seq": 64},
}
_QWEN = {
    "image_model": "qwen_image",
    **{"patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 32},
    **{"num_attention_heads": 2, "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (8, 12, 12)},
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "chroma": (comfy.supported_models.Chroma, _CHROMA),
    "lumina2": (comfy.supported_models.Lumina2, _LUMINA),
    "z_image": (comfy.supported_models.ZImage, _Z_IMAGE),
    "auraflow": (comfy.supported_models.AuraFlow, _AURAFLOW),
    "qwen_image": (comfy.supported_models.QwenImage, _QWEN),
}


def native_config(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """ComfyUI's configuration of a tiny model, its weights of a data type, computed in float32."""
    kind, sizes = FAMILIES[family]
    config = kind(sizes)
    config.unet_config.update(sizes)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    return config


def native_model(family: str) -> comfy.model_patcher.ModelPatcher:
    """A MODEL on the CPU in float32, its weights drawn from a fixed seed."""
    model = native_config(family).get_model({}, "")
    _draw_weights(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def _draw_weights(network: nn.Module) -> None:
    """Fill the weights, which ComfyUI leaves undefined: norms about 1, layers with the variance of their inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(value: Tensor, scale: float) -> Tensor:
        return torch.randn(value.shape, generator=generator) * scale

    with torch.no_grad():
        for name, value in network.named_parameters():
            is_norm = value.ndim == 1 and name.endswith(("weight", "scale"))
            value.copy_(
                1 + normal(value, 0.02)
                if is_norm
                else normal(value, 0.02 if value.ndim == 1 else value[0].numel() ** -0.5)
            )


def native_prompts(count: int, tokens: int = 6) -> tuple[list[Any], list[Any]]:
    """Random CONDITIONINGs as these families' text encoders give them: ``count`` prompts, and the empty one."""
    generator = torch.Generator().manual_seed(5)
    entries = [
        [torch.randn(1, tokens, TEXT_WIDTH, generator=generator), {"pooled_output": None}] for _ in range(count + 1)
    ]
    return entries[:count], entries[count:]
