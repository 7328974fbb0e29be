"""IP-Adapters in a UNet (arXiv 2308.06721): cross-attention reads a picture beside the text, in every role.

A CLIP vision encoder turns the picture into tokens. The adapter projects the tokens and gives every cross-attention a
key and a value for them. diffusers loads and runs the adapter. Here the adapter stays frozen, and tokens are encoded
once before training, like prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import IPAdapterMixin
from diffusers.models.embeddings import ImageProjection
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from ....flash_core.families import of_text_width
from ...config import ImageAdapterSection
from ...errors import UserError
from ..loading.hub import why_offline

PICTURE, STATES = "the picture's embedding", "the encoder's hidden states"
# The input of an adapter, by a weight of its projection. Other kinds (FaceID) read a face recogniser's output.
KINDS = {"image_proj.proj.weight": PICTURE, "image_proj.latents": STATES, "image_proj.proj.3.weight": STATES}
ATTENTION = "ip_adapter."


class ImageAdapter:
    """The picture encoder of a frozen IP-Adapter: encodes pictures to tokens.

    Args:
        pipeline: holds the encoder, and the UNet with the adapter inside.
        name: what the adapter is called.

    Attributes:
        absent: (1, N, D) the tokens of no picture, for the unconditional branch of guidance.
    """

    def __init__(self, pipeline: Any, name: str) -> None:
        self.pipeline = pipeline
        self.name = name
        side = pipeline.image_encoder.config.image_size
        first = next(pipeline.image_encoder.parameters())
        # As in diffusers' pipelines: zeros for the embedding, or the hidden states of a grey picture.
        _, absent = self._encoded(torch.zeros(1, 3, side, side, dtype=first.dtype, device=first.device))
        self.absent = absent

    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens (B, N, D), float32, of pictures (B, 3, H, W) in [-1, 1], as diffusers' pipeline does."""
        if self.pipeline is None:
            raise RuntimeError("the picture encoder was released; encode pictures before release()")
        pictures = self.pipeline.image_processor.postprocess(images, output_type="pil")
        found, _ = self._encoded(pictures)
        return found

    def reading(self) -> tuple[str, str]:
        """Return what decides a picture's tokens beside the encoder's weights: its output, and how pictures come in."""
        extractor = self.pipeline.feature_extractor
        return STATES if reads_states(self.pipeline.unet) else PICTURE, extractor.to_json_string() if extractor else ""

    def release(self) -> None:
        """Free the encoder's memory; ``absent`` stays."""
        self.pipeline = None

    @torch.no_grad()
    def _encoded(self, pictures: Any) -> tuple[Tensor, Tensor]:
        states = reads_states(self.pipeline.unet)
        found, absent = self.pipeline.encode_image(pictures, self.pipeline.image_encoder.device, 1, states)
        shape = (len(found), -1, found.shape[-1])
        return found.reshape(shape).float(), absent.reshape(shape)[:1].float()


def reads_states(network: UNet2DConditionModel) -> bool:
    """Return True if the adapter reads the encoder's hidden states, False if it reads the picture's embedding."""
    assert network.encoder_hid_proj is not None
    return not isinstance(network.encoder_hid_proj.image_projection_layers[0], ImageProjection)


def image_embeds(network: UNet2DConditionModel, tokens: Tensor) -> list[Tensor]:
    """Return tokens (B, N, D) in the form that a UNet with one IP-Adapter reads."""
    return [tokens[:, None] if reads_states(network) else tokens]


def load_image_adapter(pipeline: Any, network: nn.Module, section: ImageAdapterSection, title: str) -> ImageAdapter:
    """Put an IP-Adapter into a UNet, and its encoder into the pipeline.

    Args:
        pipeline: a stock pipeline with everything else.
        network: the UNet that will draw.
        title: the name of the model, for messages.

    Raises:
        UserError: no such file or encoder, a pickle, or an adapter for another model or encoder.
    """
    file = _checked(type(pipeline), network, section, title)
    pipeline.unet = network
    first = next(network.parameters())
    encoder = _encoder(section.image_encoder, first.dtype).to(first.device).requires_grad_(False).eval()
    pipeline.register_modules(image_encoder=encoder)
    try:
        pipeline.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise _misfit(file, title, error) from error
    _check_encoder(pipeline, section, file.name)
    pipeline.set_ip_adapter_scale(section.scale)
    return ImageAdapter(pipeline, file.stem)


def outline_image_adapter(pipeline: type, network: nn.Module, section: ImageAdapterSection, title: str) -> None:
    """Put an IP-Adapter without weights into a UNet without weights.

    Raises:
        UserError: as in :func:`load_image_adapter`; the encoder is not checked.
    """
    file = _checked(pipeline, network, section, title)
    assert isinstance(network, UNet2DConditionModel)
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            part, _, name = key.partition(".")
            if part in parts:
                parts[part][name] = torch.empty(opened.get_slice(key).get_shape(), device="meta")
    try:
        network._load_ip_adapter_weights([parts])
    except (RuntimeError, ValueError, KeyError) as error:
        raise _misfit(file, title, error) from error


def _checked(pipeline: type, network: nn.Module, section: ImageAdapterSection, title: str) -> Path:
    """Return the adapter's file; raise UserError if the adapter does not fit."""
    if not issubclass(pipeline, IPAdapterMixin) or not isinstance(network, UNet2DConditionModel):
        raise UserError(
            f"model.image_adapter: {title} takes no IP-Adapter; choose an SD 1.5, SD 2 or SDXL model, or remove "
            "model.image_adapter"
        )
    file = _file(section)
    try:
        with safe_open(file, framework="pt") as opened:
            names: Mapping[str, None] = dict.fromkeys(opened.keys())
            widths = {name: opened.get_slice(name).get_shape()[-1] for name in names if name.endswith("to_k_ip.weight")}
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.image_adapter: {file} is not a readable safetensors file: {error}") from error
    if not any(name.startswith(ATTENTION) for name in names) or not any(key in names for key in KINDS):
        raise UserError(
            f"model.image_adapter: {file.name} is no IP-Adapter that reads {PICTURE} or {STATES}; choose such a "
            "file, for example ip-adapter_sd15.safetensors (FaceID adapters are not supported)"
        )
    wanted, found = network.config["cross_attention_dim"], set(widths.values())
    if found != {wanted}:
        family = of_text_width(min(found)) if len(found) == 1 else None
        raise UserError(
            f"model.image_adapter: {file.name} is for {'another model' if family is None else family.name}, whose "
            f"attention reads {', '.join(map(str, sorted(found)))} channels, but {title} reads {wanted}; choose an "
            "IP-Adapter made for this model"
        )
    return file


def _file(section: ImageAdapterSection) -> Path:
    """Return the adapter's safetensors file, on the disk or from the Hub."""
    name = section.weight_name or section.path
    if Path(name).suffix != ".safetensors":
        raise UserError(
            f"model.image_adapter: {name} is not a .safetensors file; loading other files can run code. Set path "
            "to a .safetensors file, or weight_name to one in the folder or Hub repository of path"
        )
    if section.weight_name is None or Path(section.path).is_dir():
        file = Path(section.path) if section.weight_name is None else Path(section.path) / section.weight_name
        if not file.is_file():
            raise UserError(f"model.image_adapter: the file {file} does not exist; check path and weight_name")
        return file
    try:
        return Path(hf_hub_download(section.path, section.weight_name, local_files_only=bool(why_offline())))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.image_adapter: {section.path} is no folder, and {section.weight_name} can't be loaded from the "
            f"Hub repository of this name: {error}"
        ) from error


def _encoder(name: str, dtype: torch.dtype) -> nn.Module:
    """Load the picture encoder from a folder, a Hub name, or a folder inside a Hub repository; safetensors only."""
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    source, subfolder = (name, "") if Path(name).is_dir() else (f"{owner}/{repository}", inside)
    try:
        encoder: nn.Module = CLIPVisionModelWithProjection.from_pretrained(
            source,
            subfolder=subfolder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=Path(name).is_dir() or bool(why_offline()),
        )
        return encoder
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model.image_adapter.image_encoder: {name} is not the folder or Hub name of a CLIP vision encoder with "
            f"safetensors weights: {error}"
        ) from error


def _check_encoder(pipeline: Any, section: ImageAdapterSection, name: str) -> None:
    states, config = reads_states(pipeline.unet), pipeline.image_encoder.config
    layer = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    wanted = next(module.in_features for module in layer.modules() if isinstance(module, nn.Linear))
    found = config.hidden_size if states else config.projection_dim
    if wanted != found:
        raise UserError(
            f"model.image_adapter.image_encoder: {name} reads {STATES if states else PICTURE} of width {wanted}, but "
            f"{section.image_encoder} makes width {found}; choose the encoder of the adapter's training"
        )


def _misfit(file: Path, title: str, error: Exception) -> UserError:
    return UserError(f"model.image_adapter: {file.name} does not fit the UNet of {title}: {error}")
