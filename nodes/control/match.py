"""Check that a ControlNet or T2I-adapter belongs to a model.

ComfyUI adds an adapter's output wherever the shapes agree, and only logs a line where they do not. So an adapter of
another family has no effect, half of its effect, or ends with the error of a matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_base
import comfy.t2i_adapter.adapter
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...flash_core.families import name_of, of_comfy_class, of_text_width, of_vector_width
from ..shared.model_facts import family_name
from .control_lora import check_control_lora

PUBLISHED_MAPS = (320, 640, 1280, 1280)  # channels of the T2I-adapters of SD 1 and 2 and of SDXL
XL_UNSHUFFLED = (256, 768)  # 16 x 16 pixels of 1 or 3 channels; other adapters unshuffle 8 x 8 pixels

# ComfyUI's modules with ControlNets for transformers, and the class in comfy.model_base of the models they belong to.
TRANSFORMER_CONTROLS = {
    "comfy.cldm.mmdit": "SD3",
    "comfy.cldm.dit_embedder": "SD3",
    "comfy.ldm.flux.controlnet": "Flux",
    "comfy.ldm.hydit.controlnet": "HunyuanDiT",
    "comfy.ldm.qwen_image.controlnet": "QwenImage",
}
PATCH_EMBEDDINGS = ("x_embedder.proj.weight", "img_in.weight")  # of those transformers: (width, ...)


class Place(NamedTuple):
    """The place where a T2I-adapter's feature map is added.

    Attributes:
        block: the UNet's input block after which the map is added; None for the middle block.
        channels: of the map.
        scale: the latent's side / the map's side.
    """

    block: int | None
    channels: int
    scale: int


def is_xl_unshuffle(channels: int) -> bool:
    """Return whether an adapter that reads this many channels of unshuffled pixels is of SDXL's kind."""
    return channels in XL_UNSHUFFLED


def adapter_places(unet: UNetModel) -> list[Place]:
    """Return where diffusers' UNet adds a T2I-adapter's feature maps, in ComfyUI's numbering of blocks.

    A map is added after each level's last attention, before the downsampler; in a level without attention, after the
    downsampler. One further map is for the middle block.
    """
    places, block = [], 0
    for level, factor in enumerate(unet.channel_mult):
        block += unet.num_res_blocks[level]
        attends = any(isinstance(layer, SpatialTransformer) for layer in unet.input_blocks[block])
        last = level == len(unet.channel_mult) - 1
        late = not (attends or last)
        places.append(Place(block + late, factor * unet.model_channels, 2 ** (level + late)))
        block += not last
    return [*places, Place(None, places[-1].channels, 2 ** (len(places) - 1))]


@dataclass(frozen=True)
class ControlledUNet:
    """The sizes that a ControlNet and its UNet share.

    Attributes:
        channels: after each input block.
        text: width of the text embeddings; None for a ControlNet that reads no text.
        vector: width of SDXL's vector (pooled embedding and sizes); None for models without it.
    """

    channels: tuple[int, ...]
    text: int | None
    vector: int | None

    def __str__(self) -> str:
        """Describe the sizes for an error message."""
        levels = ", ".join(str(channels) for channels in dict.fromkeys(self.channels))
        parts = [f"{len(self.channels)} blocks of {levels} channels"]
        parts += [] if self.text is None else [f"text of width {self.text}"]
        parts += [] if self.vector is None else [f"a vector of {self.vector}"]
        return ", ".join(parts)

    def family(self) -> str:
        """The published family of these sizes, or "another model"."""
        if self.channels[0] != PUBLISHED_MAPS[0]:
            return "another model"
        family = of_vector_width(self.vector or 0) or of_text_width(self.text or 0, self.channels[-1])
        return "another model" if family is None else family.name


def unet_side(unet: UNetModel, config: Mapping[str, Any]) -> ControlledUNet:
    """Return the sizes of a UNet.

    Args:
        config: ComfyUI's arguments of the UNet; the shapes of quantized weights do not show all sizes.
    """
    channels = [unet.model_channels]
    for level, factor in enumerate(unet.channel_mult):
        width = factor * unet.model_channels
        scaled_down = level < len(unet.channel_mult) - 1
        channels += [width] * (unet.num_res_blocks[level] + scaled_down)
    return ControlledUNet(tuple(channels), config.get("context_dim"), config.get("adm_in_channels"))


def controlnet_side(weights: Mapping[str, Tensor]) -> ControlledUNet:
    """Return the sizes of the UNet that a ControlNet or Control-LoRA was made for.

    Args:
        weights: in ComfyUI's names.
    """
    channels: list[int] = []
    while True:
        name = f"zero_convs.{len(channels)}.0"
        # A Control-LoRA may have two factors ("up" and "down") instead of a matrix.
        wrote = weights.get(f"{name}.weight", weights.get(f"{name}.up"))
        if wrote is None:
            return ControlledUNet(tuple(channels), *_text_and_vector(weights))
        channels.append(wrote.shape[0])


def _text_and_vector(weights: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    text = vector = None
    for name, value in weights.items():
        if text is None and name.endswith((".attn2.to_k.weight", ".attn2.to_k.down")):
            text = value.shape[1]
        elif name in ("label_emb.0.0.weight", "label_emb.0.0.down"):
            vector = value.shape[1]
    return text, vector


def check_adapter(control: Any, model: ModelPatcher, name: str) -> str:
    """Check that an adapter belongs to the model, and return its kind in words.

    Args:
        control: a CONTROL_NET of ComfyUI.
        model: the MODEL.
        name: the adapter's name in an error.

    Raises:
        ValueError: the adapter was made for another model.
    """
    if not isinstance(control, comfy.controlnet.ControlBase):
        raise ValueError(
            f"{name} is a {type(control).__name__}; expected a ControlNet or T2I-adapter of ComfyUI. Connect Load "
            "ControlNet Model, or choose a file under adapter_name."
        )
    if isinstance(control, comfy.controlnet.T2IAdapter):
        _check_t2i(control.t2i_model, model, name)
        return "T2I-adapter"
    network = getattr(control, "control_model", None)
    if isinstance(control, comfy.controlnet.ControlLora):
        try:
            check_control_lora(control.control_weights)
        except ValueError as error:
            raise ValueError(f"{name} is incomplete: {error}.") from error
        _check_unet_control(control.control_weights, model, name)
        return "Control-LoRA"
    if isinstance(network, comfy.cldm.cldm.ControlNet):
        _check_unet_control(network.state_dict(), model, name)
        return "ControlNet"
    wanted = TRANSFORMER_CONTROLS.get(type(network).__module__)
    if network is not None and wanted is not None:
        _check_transformer_control(network, wanted, model, name)
        return "ControlNet"
    return f"{type(control).__name__}, not checked against the model"


def _refusal(name: str, kind: str, made_for: str, it: str, model: ModelPatcher, the_model: str) -> ValueError:
    return ValueError(
        f"{name} is a {kind} for {made_for} ({it}); the model is {family_name(model)} ({the_model}). Load the "
        f"checkpoint that the {kind} was made for, or a {kind} made for {family_name(model)}."
    )


def _check_t2i(network: Any, model: ModelPatcher, name: str) -> None:
    unet = model.get_model_object("diffusion_model")
    if not hasattr(network, "xl"):
        raise _refusal(name, "ControlNet", "Stable Cascade", "an effnet of its own", model, type(unet).__name__)
    channels = tuple(network.channels)
    xl = network.xl
    scales = [2, 2, 4, 4] if xl else [2**level for level in range(len(channels))]
    made = list(zip(channels, scales, strict=False))
    made_for = "another model" if channels != PUBLISHED_MAPS else name_of("sdxl" if xl else "sd15")
    if not isinstance(unet, UNetModel):
        raise _refusal(name, "T2I-adapter", made_for, _maps(made), model, "a transformer")
    places = adapter_places(unet)
    fits = len(channels) in (len(places) - 1, len(places))
    fits = fits and made == [(place.channels, place.scale) for place in places[: len(made)]]
    if not fits:
        takes = _maps([(place.channels, place.scale) for place in places])
        raise _refusal(name, "T2I-adapter", made_for, _maps(made), model, f"takes {takes}, the last one optional")
    if isinstance(network, comfy.t2i_adapter.adapter.Adapter | comfy.t2i_adapter.adapter.Adapter_light):
        built_in = [3, 5, 8, None] if xl else [2, 5, 8, 11]
        if built_in != [place.block for place in places[: len(made)]]:
            raise _refusal(
                name, "T2I-adapter", made_for, "with two layers to a level", model, "which has another number of layers"
            )


def _maps(maps: list[tuple[int, int]]) -> str:
    channels = ", ".join(str(channels) for channels, _ in maps)
    sides = ", ".join(f"1/{8 * scale}" for _, scale in maps)
    return f"feature maps of {channels} channels at {sides} of the picture's sides"


def _check_unet_control(weights: Mapping[str, Tensor], model: ModelPatcher, name: str) -> None:
    made = controlnet_side(weights)
    unet = model.get_model_object("diffusion_model")
    if not isinstance(unet, UNetModel):
        raise _refusal(name, "ControlNet", made.family(), str(made), model, "a transformer")
    own = unet_side(unet, model.model.model_config.unet_config)
    reads_other_text = made.text is not None and made.text != own.text
    if made.channels != own.channels or made.vector != own.vector or reads_other_text:
        raise _refusal(name, "ControlNet", made.family(), str(made), model, str(own))


def _check_transformer_control(network: nn.Module, wanted: str, model: ModelPatcher, name: str) -> None:
    kind = getattr(comfy.model_base, wanted)
    own, made = _width(model.get_model_object("diffusion_model")), _width(network)
    if not isinstance(model.model, kind) or (own is not None and made is not None and own != made):
        family = of_comfy_class([wanted])
        label = wanted if family is None else family.name
        raise _refusal(name, "ControlNet", label, f"a transformer of width {made}", model, f"of width {own}")


def _width(network: nn.Module) -> int | None:
    weights = network.state_dict()
    return next((weights[name].shape[0] for name in PATCH_EMBEDDINGS if name in weights), None)
