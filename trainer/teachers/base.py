"""What every family of teachers offers around its denoiser: text in, pixels in and out, and its facts.

A teacher is a stock diffusers pipeline taken apart: its network becomes the denoiser, its VAE stays, and its text
encoders make the conditions until they are freed. What families share is here; a family says which pipeline it is, how
its network is called and what its prompts become.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ...flash_core.denoiser import Conditioning
from ...flash_core.process import FlowProcess, Process, VPProcess
from ..config import ModelSection
from ..errors import UserError
from .conditions.control import Control, find_control
from .conditions.image_tokens import ImageAdapter, load_image_adapter, outline_image_adapter
from .conditions.task_adapters import find_task_adapter, widened
from .denoiser import DiffusersDenoiser
from .loading import Source, load_pipeline, locate
from .lora_layers import merge_style


@dataclass(frozen=True)
class Outline:
    """A teacher as its configuration files describe it; the network is on the ``meta`` device and holds no weights.

    Attributes:
        denoiser: the network without weights, to be given adapters and counted.
        latent_shape: (C, h, w) at the resolution asked for.
        parameters: of the whole base.
        name: what the model calls itself.
        control: the ControlNet or T2I-adapter that steers it, without weights; None without one.
    """

    denoiser: DiffusersDenoiser
    latent_shape: tuple[int, int, int]
    parameters: int
    name: str
    control: Control | None = None


class Teacher(ABC):
    """A diffusion model with everything around its denoiser.

    Class attributes:
        base: the family's key in :data:`flash_core.families.FAMILIES`, as LoRA metadata has it.
        pipeline_class: the family's stock pipeline, which loads and which encodes prompts.
        network_class: the class of its denoising network.
        network_part: what the pipeline calls that network: ``unet`` or ``transformer``.
        denoiser_class: how the network is called.
        default_config: the Hub name that has the configuration of this family's single files.
        unused_parts: parts of the pipeline that nothing here needs; they are not loaded.
        pipeline_options: more arguments of the pipeline's.
        transformer: whether the denoiser is a transformer, which decides how a LoRA is written.
        default_targets: what the adapted layers' paths end in unless a recipe says otherwise.
        loading_code: how diffusers loads the LoRA, for the model card; ``{folder}``, ``{file}`` and ``{rank}`` are
            filled in.
        call_options: what the model card passes to the pipeline beside prompt and grid.
        task_pipelines: how the names of diffusers' pipelines for further tasks begin: "StableDiffusion" of
            StableDiffusionInpaintPipeline; empty where a family has none.

    Attributes:
        pipeline: the stock pipeline, None once :meth:`release_encoders` was called.
        denoiser: the backbone, switched between roles.
        latent_shape: (C, h, w).
        image_adapter: makes the tokens that an IP-Adapter in the network reads; None without one.
        low_resolution_process: the process of the noise that the model is told its low-resolution input has; None
            where it is told none.
        scale_factor: pixels per latent pixel.
        name: what the model is called.
    """

    base: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    network_class: ClassVar[type[ModelMixin]]
    network_part: ClassVar[str]
    denoiser_class: ClassVar[type[DiffusersDenoiser]]
    default_config: ClassVar[str]
    unused_parts: ClassVar[tuple[str, ...]] = ()
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    transformer: ClassVar[bool] = False
    default_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    loading_code: ClassVar[str] = 'pipe.load_lora_weights("{folder}", weight_name="{file}")'
    call_options: ClassVar[Mapping[str, Any]] = {}
    task_pipelines: ClassVar[str] = ""
    image_adapter: ImageAdapter | None = None
    low_resolution_process: Process | None = None

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoiser: DiffusersDenoiser,
        latent_shape: tuple[int, int, int],
        name: str,
    ) -> None:
        self.pipeline: Any = pipeline
        self.denoiser = denoiser
        self.vae: AutoencoderKL = pipeline.vae
        self.latent_shape = latent_shape
        self.scale_factor = _scale_factor(self.vae.config)
        self.name = name
        self._warned = False
        self._empty = self.encode_empty()

    # -- what a family says ------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def check_network(cls, config: Mapping[str, Any], name: str) -> None:
        """Look whether a network's configuration is this family's, before its weights are loaded.

        Args:
            name: what the model is called, for the message.

        Raises:
            UserError: it is another family's; says which.
        """

    @classmethod
    def absent_parts(cls, model: ModelSection) -> tuple[str, ...]:
        """The parts of the pipeline that this recipe does without."""
        return cls.unused_parts

    @abstractmethod
    def text_conditions(self, prompts: Sequence[str]) -> Conditioning:
        """Conditions of the prompts, as the family's stock pipeline makes them; its encoders are there."""

    def encode_empty(self) -> Conditioning:
        """What the family's stock pipeline takes for no prompt, once (a batch of 1)."""
        return self.encode_prompts([""])

    # -- what families share -----------------------------------------------------------------------------------------

    @classmethod
    def locate(cls, model: ModelSection) -> Source:
        """Where the model is.

        Raises:
            UserError: nothing there that can be loaded.
        """
        return locate(model, cls.default_config)

    @classmethod
    def title(cls, source: Source) -> str:
        """What the model is called."""
        return source.name

    @classmethod
    def load(cls, model: ModelSection, device: str, resolution: int | None) -> Teacher:
        """Load the weights of a diffusers folder, a Hub repository or a single file; only safetensors are read.

        Args:
            device: where its networks run.
            resolution: width and height in pixels (default: the model's own).

        Raises:
            UserError: no such model, a part is missing, or it is of another family.
        """
        source = cls.locate(model)
        network_config = source.part_config(cls.network_part)
        cls.check_network(network_config, cls.title(source))
        if model.control is not None:
            with init_empty_weights(include_buffers=True):  # a mismatch is found before anything heavy is read
                find_control(model.control).build(cls.network_class.from_config(network_config), cls.title(source))
        process = process_from_scheduler(source.scheduler_config())
        pipeline = load_pipeline(
            cls.pipeline_class, source, getattr(torch, model.dtype), cls.absent_parts(model), **cls.pipeline_options
        )
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to(device).requires_grad_(False).eval()
        for style in model.style_lora:
            merge_style(pipeline, cls.network_part, style)
        network = getattr(pipeline, cls.network_part)
        shape = _latent_shape(network.config, pipeline.vae.config, resolution)
        if model.task_adapter is not None:
            network = widened(network, find_task_adapter(model.task_adapter), cls.title(source))
        image_adapter = None
        if model.image_adapter is not None:
            image_adapter = load_image_adapter(pipeline, network, model.image_adapter, cls.title(source))
        denoiser = cls.denoiser_class(network, process)
        if model.control is not None:
            denoiser.control = find_control(model.control).build(network, cls.title(source))
            denoiser.control.check_size(shape)
        teacher = cls(pipeline, denoiser, shape, cls.title(source))
        teacher.image_adapter = image_adapter
        return teacher

    @classmethod
    def outline(cls, model: ModelSection, resolution: int | None) -> Outline:
        """Read the configuration files alone."""
        source = cls.locate(model)
        network_config = source.part_config(cls.network_part)
        cls.check_network(network_config, cls.title(source))
        with init_empty_weights(include_buffers=True):  # SD3.5 tables 226 M numbers of positions
            network = cls.network_class.from_config(network_config)
            vae = AutoencoderKL.from_config(source.part_config("vae"))
            if model.task_adapter is not None:
                network = widened(network, find_task_adapter(model.task_adapter), cls.title(source))
            control = None
            if model.control is not None:
                control = find_control(model.control).build(network, cls.title(source))
                control.check_size(_latent_shape(network.config, vae.config, resolution))
        if model.image_adapter is not None:
            outline_image_adapter(cls.pipeline_class, network, model.image_adapter, cls.title(source))
        return Outline(
            cls.denoiser_class(network, process_from_scheduler(source.scheduler_config())),
            _latent_shape(network.config, vae.config, resolution),
            count_parameters(network),
            cls.title(source),
            control,
        )

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return next(self.denoiser.network.parameters()).device

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        _, height, width = self.latent_shape
        return height * self.scale_factor, width * self.scale_factor

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), float32: the posterior's mode, shifted and scaled."""
        if self.vae.encoder is None:
            raise RuntimeError("the image encoder was released; encode images before release_encoders()")
        with self._full_precision():
            mode = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
            return ((mode - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor).float()

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in about [-1, 1], float32; differentiable."""
        with self._full_precision():
            latents = z.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
            return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditions of the prompts, as the family's stock pipeline makes them; long ones are cut as there."""
        if self.pipeline is None:
            raise RuntimeError("the text encoders were released; encode prompts before release_encoders()")
        with self._full_precision(), self._one_warning_of_cut_prompts():
            return self.text_conditions(prompts)

    def unconditional(self, batch: int) -> Conditioning:
        """What the family's pipeline takes for no prompt, and for no picture where it reads one, ``batch`` times."""
        empty = self._empty
        if self.image_adapter is not None:
            empty = empty.joined(Conditioning(image_tokens=self.image_adapter.absent))
        return empty.map(lambda value: value.expand(batch, *value.shape[1:]))

    def release_encoders(self) -> None:
        """Free the memory of text and image encoders; :meth:`unconditional` and :meth:`decode` still work."""
        self.pipeline = None
        if self.image_adapter is not None:
            self.image_adapter.release()
        self.vae.encoder = self.vae.quant_conv = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def weights_hash(self) -> str:
        """SHA-256 over the base's parameters in the order of their names; a merged style LoRA counts."""
        return weights_hash(self.denoiser.network)

    @contextmanager
    def _one_warning_of_cut_prompts(self) -> Iterator[None]:
        """Pipelines warn of every prompt that is too long for their encoders; here, of the first."""

        def first(record: logging.LogRecord) -> bool:
            cut = "was truncated" in record.getMessage()
            self._warned, told = self._warned or cut, self._warned
            return not (cut and told)

        logger = logging.getLogger(type(self.pipeline).__module__)
        logger.addFilter(first)
        try:
            yield
        finally:
            logger.removeFilter(first)

    def _full_precision(self) -> torch.autocast:
        """Autocast is off: VAEs overflow or blur in few bits, and what is encoded once may be encoded well."""
        return torch.autocast(self.device.type, enabled=False)


def process_from_scheduler(config: Mapping[str, Any]) -> Process:
    """The process a diffusers scheduler configuration describes: variance-preserving, or flow with its shift.

    Raises:
        UserError: a schedule this package does not know.
    """
    scheduler = config.get("_class_name", "")
    if "FlowMatch" in scheduler:
        if config.get("use_dynamic_shifting"):
            raise UserError(
                "the model's scheduler shifts its schedule with the picture's size (use_dynamic_shifting), but a LoRA "
                "is trained at one shift; set it to false, and shift to a number, in scheduler_config.json"
            )
        return FlowProcess(shift=config.get("shift", 1.0))
    if scheduler.startswith("EDM"):
        raise UserError(f"the model's scheduler, {scheduler}, is of a kind that is not known here: EDM")
    prediction = config.get("prediction_type", "epsilon")
    try:
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
            return VPProcess(torch.cumprod(1 - betas, 0), prediction)
        return VPProcess.from_betas(
            schedule=config.get("beta_schedule", "linear"),
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            prediction=prediction,
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
            num_timesteps=config.get("num_train_timesteps", 1000),
        )
    except ValueError as error:
        raise UserError(f"the model's scheduler configuration can't be used: {error}") from error


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over a network's parameters in the order of their names, without the LoRAs that are on it."""
    digest = hashlib.sha256()
    for name, value in sorted(network.named_parameters()):
        if ".lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module's parameters hold."""
    return sum(value.numel() for value in module.parameters())


def _scale_factor(vae_config: Any) -> int:
    return 2 ** (len(vae_config.block_out_channels) - 1)


def _latent_shape(network_config: Any, vae_config: Any, resolution: int | None) -> tuple[int, int, int]:
    size = network_config.sample_size if resolution is None else resolution // _scale_factor(vae_config)
    return vae_config.latent_channels, size, size
