"""Stable Diffusion 1.x and 2.x, and the embedded demo, which has their shape.

One UNet on text by cross-attention; epsilon, v or sample prediction as the model's scheduler says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ...flash_core.denoiser import Conditioning
from ..config import ModelSection
from ..demo import TEACHER
from ..errors import UserError
from .base import Outline, Teacher, count_parameters, process_from_scheduler
from .denoiser import DiffusersDenoiser


class UNetDenoiser(DiffusersDenoiser):
    """``UNet2DConditionModel`` conditioned on text, and on extra input channels where the model has them."""

    network: UNet2DConditionModel

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output (B, C, H, W)."""
        if conditioning.residuals or conditioning.vector is not None:
            raise ValueError("this family takes text and extra input channels; residuals or a vector were given")
        if conditioning.concat is not None:
            z_t = torch.cat([z_t, conditioning.concat], dim=1)
        return self.network(z_t, t, encoder_hidden_states=conditioning.cross_attention, return_dict=False)[0]

    def feature_blocks(self) -> Sequence[nn.Module]:
        """All levels below the first: at full resolution hidden states are mostly the noise that came in."""
        down, up = self.network.down_blocks, self.network.up_blocks
        return [*list(down)[1:], self.network.mid_block, *list(up)[:-1]]


class StableDiffusion(Teacher):
    """A Stable Diffusion 1.x or 2.x model from a diffusers folder."""

    base: ClassVar[str]

    def __init__(
        self,
        denoiser: UNetDenoiser,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        latent_shape: tuple[int, int, int],
        name: str,
    ) -> None:
        self.denoiser = denoiser
        self.vae = vae.requires_grad_(False).eval()
        self.text_encoder: CLIPTextModel | None = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.latent_shape = latent_shape
        self.scale_factor = _scale_factor(vae.config)
        self.name = name
        self._null = self.encode_prompts([""])

    @classmethod
    def load(cls, model: ModelSection, device: str, resolution: int | None) -> StableDiffusion:
        """Load a diffusers folder (or Hub repository); only safetensors are read."""
        path = cls.locate(model)
        dtype = getattr(torch, model.dtype)
        try:
            scheduler = DDIMScheduler.load_config(path, subfolder="scheduler")
            unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=dtype, use_safetensors=True)
            vae = AutoencoderKL.from_pretrained(path, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True)
            text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", use_safetensors=True)
            tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        except OSError as error:
            raise UserError(f"model.path: {path} is not a complete diffusers folder: {error}") from error
        return cls(
            UNetDenoiser(unet.to(device), process_from_scheduler(scheduler)),
            vae.to(device),
            text_encoder.to(device, dtype),
            tokenizer,
            _latent_shape(unet.config, vae.config, resolution),
            cls.title(path),
        )

    @classmethod
    def outline(cls, model: ModelSection, resolution: int | None) -> Outline:
        """Read ``config.json`` of UNet and VAE and the scheduler's."""
        path = cls.locate(model)
        try:
            scheduler = DDIMScheduler.load_config(path, subfolder="scheduler")
            unet_config = UNet2DConditionModel.load_config(path, subfolder="unet")
            vae_config = AutoencoderKL.load_config(path, subfolder="vae")
        except OSError as error:
            raise UserError(f"model.path: {path} is not a complete diffusers folder: {error}") from error
        with init_empty_weights():
            unet = UNet2DConditionModel.from_config(unet_config)
            vae = AutoencoderKL.from_config(vae_config)
        return Outline(
            UNetDenoiser(unet, process_from_scheduler(scheduler)),
            _latent_shape(unet.config, vae.config, resolution),
            count_parameters(unet),
            cls.title(path),
        )

    @classmethod
    def title(cls, path: str) -> str:
        """What the model is called."""
        return Path(path).name

    @classmethod
    def locate(cls, model: ModelSection) -> str:
        """Where the model is: a folder, or a Hub repository's name.

        Raises:
            UserError: no path, or nothing there.
        """
        if model.path is None:
            raise UserError(f"model.path: is missing; expected the diffusers folder of a {model.family} model")
        path = Path(model.path)
        if path.is_dir():
            if not (path / "unet").is_dir():
                raise UserError(f"model.path: {path} has no 'unet' folder; expected a diffusers folder")
            return str(path)
        if path.is_file() or path.is_absolute() or model.path.count("/") != 1:
            raise UserError(
                f"model.path: {model.path} is not a diffusers folder; expected one (with unet/, vae/, text_encoder/, "
                "tokenizer/, scheduler/), or a Hub name such as owner/model"
            )
        return model.path

    def encode(self, images: Tensor) -> Tensor:
        """Scaled and shifted mode of the VAE's posterior (B, C, h, w)."""
        if self.vae.encoder is None:
            raise RuntimeError("the image encoder was released; encode images before release_encoders()")
        mode = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return ((mode - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor).float()

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1]."""
        latents = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The text encoder's last hidden states (B, L, D)."""
        if self.text_encoder is None:
            raise RuntimeError("the text encoder was released; encode prompts before release_encoders()")
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # SD 2 encoders say that padding is masked; SD 1 attends to it.
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        device = self.text_encoder.device
        mask = tokens.attention_mask.to(device) if masked else None
        hidden = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        return Conditioning(cross_attention=hidden)

    def unconditional(self, batch: int) -> Conditioning:
        """The empty prompt."""
        return self._null.map(lambda value: value.expand(batch, *value.shape[1:]))

    def release_encoders(self) -> None:
        """Free the text encoder and the encoding half of the VAE."""
        self.text_encoder = None
        self.vae.encoder = self.vae.quant_conv = None

    def weights_hash(self) -> str:
        """SHA-256 over the UNet's parameters in the order of their names."""
        digest = hashlib.sha256()
        for name, value in sorted(self.denoiser.network.named_parameters()):
            if ".lora_" not in name:
                digest.update(name.replace(".base_layer", "").encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class StableDiffusion15(StableDiffusion):
    """SD 1.x."""

    base = "sd15"


class StableDiffusion21(StableDiffusion):
    """SD 2.x: v-prediction or epsilon, as its scheduler says."""

    base = "sd21"


class Demo(StableDiffusion):
    """The teacher embedded in this package."""

    base = "flash-demo"

    @classmethod
    def title(cls, path: str) -> str:
        """The same wherever it lies."""
        return "the Flash demo"

    @classmethod
    def locate(cls, model: ModelSection) -> str:
        """The embedded folder, unless the recipe names another of the same shape."""
        if model.path is not None:
            return super().locate(model)
        if not (TEACHER / "unet").is_dir():
            raise UserError(
                f"the embedded teacher is missing at {TEACHER}; make it with `flash-diffusion demo-teacher`"
            )
        return str(TEACHER)


def _scale_factor(vae_config: Any) -> int:
    return 2 ** (len(vae_config.block_out_channels) - 1)


def _latent_shape(unet_config: Any, vae_config: Any, resolution: int | None) -> tuple[int, int, int]:
    size = unet_config.sample_size if resolution is None else resolution // _scale_factor(vae_config)
    return vae_config.latent_channels, size, size
