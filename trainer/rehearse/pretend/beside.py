"""What stands beside a rehearsed network: ControlNets, T2I-adapters and IP-Adapters without values.

A file or folder that is there decides. For a Hub name that can't be read, the published sizes of its kind do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ...config import ModelSection
from ...errors import UserError
from ...teachers import family
from ...teachers.base import Outline
from ...teachers.conditions.control import Control
from ...teachers.conditions.image_tokens import reads_states
from ...teachers.loading.source import Source
from .fakes import Fakes

# TencentARC's T2I-adapters (config.json): what differs is the step in pixels, and the first level of SDXL's.
T2I = {"in_channels": 3, "channels": [320, 640, 1280, 1280], "num_res_blocks": 2}
# h94/IP-Adapter's image encoder: OpenCLIP's ViT-H/14.
VIT_H = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu",
}  # fmt: skip
RESAMPLER_LAYERS, RESAMPLED_TOKENS = 4, 16  # of "plus" IP-Adapters


def outline_with(source: Source, model: ModelSection, resolution: int | None) -> tuple[Outline, bool]:
    """Return a teacher's outline with what stands beside it, and True where a published one stood in.

    Raises:
        UserError: the model does not fit the recipe.
    """
    kind = family(model.family)
    try:
        return kind.outline_of(source, model, resolution), False
    except UserError:
        unread = {
            name: None
            for name, path in (
                ("control", model.control and model.control.path),
                ("image_adapter", model.image_adapter and model.image_adapter.path),
            )
            if path and not Path(path).exists() and Path(path).suffix != ".safetensors"
        }
        if not unread:
            raise
    outline = kind.outline_of(source, model.model_copy(update=unread), resolution)
    network = outline.denoiser.network
    assert isinstance(network, UNet2DConditionModel)  # the recipe's task was checked
    if "control" in unread and model.control is not None:
        with init_empty_weights(include_buffers=True):
            beside = _published_control(network, model)
        outline = replace(outline, control=Control(beside, model.control.scale, Path(model.control.path).name))
    if "image_adapter" in unread:
        network._load_ip_adapter_weights([_published_adapter(network)])
    return outline, True


def _published_control(network: UNet2DConditionModel, model: ModelSection) -> ControlNetModel | T2IAdapter:
    assert model.control is not None
    if "t2i" not in model.control.path.lower():
        beside: ControlNetModel = ControlNetModel.from_unet(network, load_weights_from_unet=False)
        return beside
    large = model.family == "sdxl"
    adapter: T2IAdapter = T2IAdapter(
        **T2I, downscale_factor=16 if large else 8, adapter_type="full_adapter_xl" if large else "full_adapter"
    )
    return adapter


def _published_adapter(network: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """Return the weights of a "plus" IP-Adapter, whose resampler reads the encoder's hidden states."""
    width, states = network.config["cross_attention_dim"], VIT_H["hidden_size"]
    assert isinstance(states, int)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    resampler = {
        "latents": empty(1, RESAMPLED_TOKENS, width),
        "proj_in.weight": empty(width, states),
        "proj_in.bias": empty(width),
        "proj_out.weight": empty(width, width),
        "proj_out.bias": empty(width),
        "norm_out.weight": empty(width),
        "norm_out.bias": empty(width),
    }
    for layer in range(RESAMPLER_LAYERS):
        shapes = {
            "0.norm1.weight": (width,), "0.norm1.bias": (width,), "0.norm2.weight": (width,), "0.norm2.bias": (width,),
            "0.to_q.weight": (width, width), "0.to_kv.weight": (2 * width, width), "0.to_out.weight": (width, width),
            "1.0.weight": (width,), "1.0.bias": (width,), "1.1.weight": (4 * width, width),
            "1.3.weight": (width, 4 * width),
        }  # fmt: skip
        resampler |= {f"layers.{layer}.{name}": empty(*shape) for name, shape in shapes.items()}
    attention: dict[str, Tensor] = {}
    crossing = [name for name in network.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(crossing):
        shape = network.get_parameter(f"{name.removesuffix('.processor')}.to_k.weight").shape
        attention |= {f"{2 * index + 1}.{part}.weight": empty(*shape) for part in ("to_k_ip", "to_v_ip")}
    return {"image_proj": resampler, "ip_adapter": attention}


class PretendImageAdapter:
    """The picture encoder of an IP-Adapter without values, in place of the teacher's ``ImageAdapter``.

    Args:
        network: has the adapter's layers.

    Attributes:
        absent: (1, N, D) the tokens of no picture.
    """

    def __init__(self, network: UNet2DConditionModel, path: str, fakes: Fakes, dtype: torch.dtype) -> None:
        config = CLIPVisionConfig.from_pretrained(path) if Path(path).is_dir() else CLIPVisionConfig(**VIT_H)
        with init_empty_weights():
            encoder = CLIPVisionModelWithProjection(config)
        self.encoder: nn.Module | None = fakes.module(encoder, dtype).requires_grad_(False).eval()
        self.side = int(config.image_size)
        self.states = reads_states(network)
        self.dtype, self.device = dtype, fakes.device
        self.absent = self._encoded(1)

    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens (B, N, D) of pictures, which the encoder gets at its own size."""
        return self._encoded(len(images))

    def release(self) -> None:
        """Free the encoder's memory."""
        self.encoder = None

    @torch.no_grad()
    def _encoded(self, count: int) -> Tensor:
        assert self.encoder is not None
        shown = torch.zeros(count, 3, self.side, self.side, dtype=self.dtype, device=self.device)
        made = self.encoder(shown, output_hidden_states=True)
        found: Tensor = made.hidden_states[-2] if self.states else made.image_embeds
        return found.reshape(count, -1, found.shape[-1]).float()
