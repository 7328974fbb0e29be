"""Stand-ins of the published files that the workflows load: the same names, layouts and architectures, made tiny.

Base models and the ControlNet are written by ``write.py`` in a process with ComfyUI in it, LoRAs and the T2I-adapter
here, in the spelling of the published file. ``node_pack`` lets ComfyUI's loaders recognise the base models.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ...families.adapters import save_weights, tiny_controlnet, tiny_t2i_adapter, tiny_unet
from ...families.networks import tiny_network

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RANK = 4
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "linear", "linear_1", "linear_2", "proj_out")

# (down, up) key of a layer, as diffusers' training scripts, kohya's and PEFT spell it.
DIFFUSERS = ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight")
PEFT = ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")


def stand_in_network(family: str) -> nn.Module:
    """Make the tiny network of a family.

    SDXL's network has three levels, for its adapters. SD3's reads text at the width to which ComfyUI pads it, and
    larger pictures. ``sd15_inpainting`` is SD 1.5's with the channels of a mask and a masked picture.
    """
    if family == "sdxl":
        return tiny_unet(family)
    if family not in ("sd3", "sd15_inpainting"):
        return tiny_network(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "sd3":
            config = {**tiny_network(family).config, "joint_attention_dim": 4096, "pos_embed_max_size": 64}
            return SD3Transformer2DModel.from_config(config)
        return UNet2DConditionModel.from_config({**tiny_network("sd15").config, "in_channels": 9})


def lora_layers(network: nn.Module, targets: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) of every linear layer whose name ends in one of the targets."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    return {
        name: (draw(RANK, layer.in_features), draw(layer.out_features, RANK))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(targets)
    }


def spelt(keys: tuple[str, str]) -> Callable[[dict[str, tuple[Tensor, Tensor]]], dict[str, Tensor]]:
    """A file's tensors without alpha, under these keys."""

    def tensors(layers: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {key.format(name): half for name, pair in layers.items() for key, half in zip(keys, pair, strict=True)}

    return tensors


def kohya(layers: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A file's tensors with alpha, as kohya's scripts spell them."""
    tensors = {}
    for name, (down, up) in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    return tensors


# file in models/loras -> (family, adapted layers, spelling)
LORAS = {
    "flash-sd.safetensors": ("sd15", ATTENTION, spelt(DIFFUSERS)),
    "FlashSDXL.safetensors": ("sdxl", ATTENTION, kohya),
    "flash-pixart.safetensors": ("pixart_alpha", TRANSFORMER, spelt(PEFT)),
    "flash-sd3.safetensors": ("sd3", TRANSFORMER, spelt(PEFT)),
    "pixel-art-xl.safetensors": ("sdxl", ATTENTION, kohya),
}
FAMILIES = [*dict.fromkeys(family for family, _, _ in LORAS.values()), "sd15_inpainting"]
T2I_ADAPTER = "t2i-adapter-canny-sdxl-1.0.safetensors"


def write_stand_ins(base: Path, runtime: ModuleType) -> None:
    """Fill a ComfyUI base directory with everything the workflows load, and with the node pack.

    Args:
        base: the private base directory that the server will be started with.
        runtime: ``scripts/comfy_runtime.py``.
    """
    networks, models = base / "networks", base / "models"
    for folder in (networks, models / "loras", models / "controlnet", base / "custom_nodes"):
        folder.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        network = stand_in_network(family)
        save_weights(network, networks / f"{family}.safetensors")
        (networks / f"{family}.json").write_text(json.dumps(dict(network.config)))
    for name, (family, targets, spelling) in LORAS.items():
        save_file(spelling(lora_layers(stand_in_network(family), targets)), models / "loras" / name)
    save_weights(tiny_t2i_adapter("full_adapter_xl"), models / "controlnet" / T2I_ADAPTER)
    save_weights(tiny_controlnet(tiny_unet("sd15")), networks / "controlnet.safetensors")
    script = [sys.executable, str(HERE / "write.py")]
    paths = [str(path) for path in (runtime.comfyui_folder(), ROOT, networks, models)]
    subprocess.run([*script, *paths], check=True, env=runtime.environment())
    (base / "custom_nodes" / "stand_ins").symlink_to(HERE / "node_pack", target_is_directory=True)
