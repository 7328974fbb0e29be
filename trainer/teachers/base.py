"""The teacher of a family: the denoiser with text encoders, VAE and the facts of the model.

A teacher is a stock diffusers pipeline taken apart: its network becomes the denoiser, its VAE stays, and its text
encoders make the conditions until they are freed. This file holds the code that all families share. A family's file
names its pipeline, calls its network and encodes its prompts.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import lcm
from typing import Any, ClassVar, Protocol

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ...flash_core.denoiser import Conditioning
from ...flash_core.families import family_of
from ...flash_core.process import Process
from ..config import ModelSection
from .conditions.control import Control, find_control
from .conditions.image_tokens import ImageAdapter, load_image_adapter, outline_image_adapter
from .conditions.task_adapters import find_task_adapter, widened
from .denoiser import DiffusersDenoiser
from .hashes import image_encoder_hash, text_encoder_hash, weights_hash
from .in_memory.compact import store_compactly
from .in_memory.stages import NETWORK, PICTURES, TEXT, Stages
from .loading.pipeline import load_pipeline
from .loading.source import Source, locate
from .lora_layers import merge_style
from .prompts import cut, cut_warning, silent_libraries
from .schedulers import process_from_scheduler
from .sizes import Sizes

logger = logging.getLogger(__name__)

ENCODED_AT_ONCE = 1 << 20  # pixels: a GPU is busy with so many, and more only take memory


@dataclass(frozen=True)
class Outline:
    """A teacher without weights, read from its configuration files; the network is on the ``meta`` device.

    Attributes:
        denoiser: the network without weights, for adding adapters and counting parameters.
        latent_shape: (C, h, w) at the requested resolution.
        parameters: the number of parameters of the base.
        name: the name of the model.
        sizes: the picture sizes that the model takes.
        control: the ControlNet or T2I-adapter without weights; None without one.
    """

    denoiser: DiffusersDenoiser
    latent_shape: tuple[int, int, int]
    parameters: int
    name: str
    sizes: Sizes
    control: Control | None = None

    def size_warning(self) -> str:
        """Return a sentence if the pictures' size is far from the model's own; else an empty text."""
        _, height, width = self.latent_shape
        return self.sizes.warning(height * self.sizes.scale, width * self.sizes.scale)


class NetworkClass(Protocol):
    """The class of a diffusers network, such as ``UNet2DConditionModel``."""

    def from_config(self, config: dict[str, Any]) -> Any:
        """Return a network of this class with random weights."""


class Teacher(ABC):
    """A diffusion model: the denoiser, the VAE and the text encoders.

    Class attributes:
        base: the family's key in :data:`flash_core.families.FAMILIES`, as LoRA metadata has it.
        pipeline_class: the family's diffusers pipeline, which loads weights and encodes prompts.
        network_class: the class of its denoising network.
        network_part: the network's name in the pipeline: ``unet`` or ``transformer``.
        denoiser_class: the class that calls the network.
        default_config: the Hub name with the configuration for this family's single files.
        unused_parts: parts of the pipeline that are not loaded.
        pipeline_options: more arguments of the pipeline.
        transformer: True for a transformer, False for a UNet; decides how a LoRA is written.
        default_targets: ends of the adapted layers' paths, unless a recipe sets them.
        loading_code: Python that loads the LoRA in diffusers, for the model card, with ``{folder}``, ``{file}`` and
            ``{rank}``.
        call_options: more arguments of the pipeline's call on the model card.
        task_pipelines: start of the class names of diffusers' pipelines for other tasks: "StableDiffusion" for
            StableDiffusionInpaintPipeline; empty if the family has no such pipelines.

    Attributes:
        pipeline: the diffusers pipeline; None after :meth:`release_encoders`.
        denoiser: the backbone, switched between roles.
        latent_shape: (C, h, w).
        stages: moves its parts on and off the device, where a run asks for it.
        image_adapter: the encoder of an IP-Adapter in the network; None without one.
        low_resolution_process: the process of the noise in a low-resolution input; None if the model reads no noise
            level.
        stochasticity: {step count: share of fresh noise between the steps of the student on this model}; empty = 1, the
            paper's, for all.
        sizes: the picture sizes that the model takes.
        scale_factor: pixels per latent pixel.
        name: the name of the model.
    """

    base: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    network_class: ClassVar[NetworkClass]
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
        device: torch.device | None = None,
        *,
        staged: bool = False,
    ) -> None:
        self.pipeline: Any = pipeline
        self.denoiser = denoiser
        self.vae: AutoencoderKL = pipeline.vae
        self.stages = Stages(device or next(denoiser.network.parameters()).device, self._groups())
        if staged:
            self.stages.begin()
        self.latent_shape = latent_shape
        self.stochasticity: Mapping[int, float] = {}
        self.sizes = Sizes.of(name, type(denoiser.network), denoiser.network.config, self.vae.config)
        self.scale_factor = self.sizes.scale
        self.name = name
        self._hashes: dict[str, str] = {}
        self._warned = False
        self._empty = self.encode_empty()

    # -- what a family says ------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def check_network(cls, config: Mapping[str, Any], name: str) -> None:
        """Check that a network's configuration belongs to this family, before its weights are loaded.

        Args:
            name: the name of the model, for the message.

        Raises:
            UserError: the network belongs to another family; the message names the family.
        """

    @classmethod
    def architecture(cls, config: Mapping[str, Any], process: Process) -> str:
        """Return the model's name in ModelSpec, from its network's configuration and its noise process."""
        found = family_of(cls.base)
        assert found is not None
        heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
        return found.architecture_of(process.prediction, heads * width if cls.transformer and heads and width else 0)

    @classmethod
    def absent_parts(cls, model: ModelSection) -> tuple[str, ...]:
        """Return the parts of the pipeline that are not loaded for this recipe."""
        return cls.unused_parts

    @abstractmethod
    def text_conditions(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditions of the prompts, as the family's pipeline makes them; the encoders are loaded."""

    def prompt_lengths(self) -> dict[str, int]:
        """Return the longest prompt in tokens, markers of begin and end included, of each tokenizer of the pipeline."""
        return {
            name: part.model_max_length
            for name, part in self.pipeline.components.items()
            if name.startswith("tokenizer") and part is not None
        }

    def prompt_as_read(self, prompt: str) -> str:
        """Return a prompt as the pipeline gives it to its tokenizers."""
        return prompt

    def encode_empty(self) -> Conditioning:
        """Return the pipeline's conditions for the empty prompt, a batch of 1."""
        return self.encode_prompts([""])

    # -- what families share -----------------------------------------------------------------------------------------

    @classmethod
    def locate(cls, model: ModelSection) -> Source:
        """Return where the model is.

        Raises:
            UserError: there is no model to load.
        """
        return locate(model, cls.default_config, cls.pipeline_class.__name__)

    @classmethod
    def title(cls, source: Source) -> str:
        """Return the name of the model."""
        return source.name

    @classmethod
    def load(cls, model: ModelSection, device: str, resolution: int | None, *, staged: bool = False) -> Teacher:
        """Load the weights from a diffusers folder, a Hub repository or a single file; only safetensors.

        Args:
            device: where its networks run.
            resolution: width and height in pixels (default: the model's own).
            staged: text encoders, VAE and network are on the device one after the other (:class:`.stages.Stages`),
                until ``stages.end()``.

        Raises:
            UserError: no such model, a part is missing, or the model belongs to another family.
        """
        source = cls.locate(model)
        network_config = source.part_config(cls.network_part)
        cls.check_network(network_config, cls.title(source))
        sizes = Sizes.of(cls.title(source), cls.network_class, network_config, source.part_config("vae"))
        shape = sizes.latent_shape(resolution)
        if model.control is not None:
            with init_empty_weights(include_buffers=True):  # a mismatch is found before anything heavy is read
                find_control(model.control).build(cls.network_class.from_config(network_config), cls.title(source))
        process = process_from_scheduler(source.scheduler_config())
        pipeline = load_pipeline(
            cls.pipeline_class, source, getattr(torch, model.dtype), cls.absent_parts(model), **cls.pipeline_options
        )
        # What changes weights or computes on them while loading does so on the device, whose bits hashes know.
        together = not staged or bool(model.style_lora) or model.image_adapter is not None
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to(device if together else "cpu").requires_grad_(False).eval()
        for style in model.style_lora:
            merge_style(pipeline, cls.network_part, style)
        network = getattr(pipeline, cls.network_part)
        if model.task_adapter is not None:
            network = widened(network, find_task_adapter(model.task_adapter), cls.title(source))
        image_adapter = None
        if model.image_adapter is not None:
            image_adapter = load_image_adapter(pipeline, network, model.image_adapter, cls.title(source))
        denoiser = cls.denoiser_class(network, process)
        if model.control is not None:
            control = find_control(model.control).build(network, cls.title(source))
            control.check_size(shape)
            denoiser.control = control
        if model.storage is not None:
            store_compactly(network, model.storage)
        teacher = cls(pipeline, denoiser, shape, cls.title(source), torch.device(device), staged=staged)
        teacher.image_adapter = image_adapter
        if warning := sizes.warning(*teacher.resolution):
            logger.warning("%s", warning)
        return teacher

    @classmethod
    def outline(cls, model: ModelSection, resolution: int | None) -> Outline:
        """Read the configuration files only."""
        return cls.outline_of(cls.locate(model), model, resolution)

    @classmethod
    def outline_of(cls, source: Source, model: ModelSection, resolution: int | None) -> Outline:
        """Read the configuration files at ``source``."""
        network_config = source.part_config(cls.network_part)
        cls.check_network(network_config, cls.title(source))
        sizes = Sizes.of(cls.title(source), cls.network_class, network_config, source.part_config("vae"))
        shape = sizes.latent_shape(resolution)
        with init_empty_weights(include_buffers=True):  # SD3.5 tables 226 M numbers of positions
            network: ModelMixin = cls.network_class.from_config(network_config)
            if model.task_adapter is not None:
                network = widened(network, find_task_adapter(model.task_adapter), cls.title(source))
            control = None
            if model.control is not None:
                control = find_control(model.control).build(network, cls.title(source))
                control.check_size(shape)
        if model.image_adapter is not None:
            outline_image_adapter(cls.pipeline_class, network, model.image_adapter, cls.title(source))
        parameters = count_parameters(network)
        if model.storage is not None:
            nn.Module.to(network, getattr(torch, model.dtype))
            store_compactly(network, model.storage)
        return Outline(
            cls.denoiser_class(network, process_from_scheduler(source.scheduler_config())),
            shape,
            parameters,
            cls.title(source),
            sizes,
            control,
        )

    @property
    def device(self) -> torch.device:
        """The device on which its parts run."""
        return self.stages.device

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        _, height, width = self.latent_shape
        return height * self.scale_factor, width * self.scale_factor

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), float32: the posterior's mode, scaled.

        Large pictures are encoded in smaller batches: one of 1024 x 1024 takes about 3 GiB.
        """
        if self.vae.encoder is None:
            raise RuntimeError("the image encoder was released; encode images before release_encoders()")
        self.stages.enter(PICTURES)
        with self._full_precision():
            size = max(1, ENCODED_AT_ONCE // images[0, 0].numel()) if len(images) else 1
            parts = images.to(self.vae.device, self.vae.dtype).split(size)
            mode = torch.cat([self.vae.encode(part).latent_dist.mode() for part in parts])
            latents: Tensor = (mode - (self.vae.config["shift_factor"] or 0.0)) * self.vae.config["scaling_factor"]
            return latents.float()

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) in about [-1, 1], float32; differentiable."""
        self.stages.enter(PICTURES)
        with self._full_precision():
            latents = z.float() / self.vae.config["scaling_factor"] + (self.vae.config["shift_factor"] or 0.0)
            images: Tensor = self.vae.decode(latents.to(self.vae.dtype)).sample
            return images.float()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, warn: bool = True) -> Conditioning:
        """Return the conditions of the prompts, as the family's pipeline makes them; long prompts are truncated.

        Args:
            warn: False where the caller counts the long prompts, and warns of them itself: :meth:`warn_of_cut`.
        """
        if self.pipeline is None:
            raise RuntimeError("the text encoders were released; encode prompts before release_encoders()")
        if warn and not self._warned:
            self.warn_of_cut(
                [text for text, is_cut in zip(prompts, self.cut_prompts(prompts), strict=True) if is_cut][:1]
            )
        self.stages.enter(TEXT)
        with self._full_precision(), silent_libraries(self.pipeline):
            return self.text_conditions(prompts)

    def cut_prompts(self, prompts: Sequence[str]) -> list[bool]:
        """Return for each prompt True if it is longer than every text encoder reads: its end has no effect.

        SD3's T5 reads 256 tokens and its CLIP 77, so a prompt of 100 tokens is cut without T5 only.
        """
        if self.pipeline is None:
            raise RuntimeError("the tokenizers were released; count tokens before release_encoders()")
        return cut(prompts, self.pipeline.components, self.prompt_lengths(), self.prompt_as_read)

    def warn_of_cut(self, prompts: Sequence[str], count: int | None = None) -> None:
        """Warn of prompts that are cut, in one sentence. Later ones are like these: nothing more is said of them.

        Args:
            prompts: the first of them; empty where none is cut.
            count: how many they are; None where nobody has counted.
        """
        if prompts and not self._warned:
            self._warned = True
            logger.warning("%s", cut_warning(prompts[0], max(self.prompt_lengths().values()), count))

    def unconditional(self, batch: int) -> Conditioning:
        """Return the conditions of the empty prompt (and of no picture, with an IP-Adapter), ``batch`` times."""
        empty = self._empty
        if self.image_adapter is not None:
            empty = empty.joined(Conditioning(image_tokens=self.image_adapter.absent))
        return empty.map(lambda value: value.expand(batch, *value.shape[1:]))

    def release_encoders(self) -> None:
        """Free the memory of text and image encoders; :meth:`unconditional` and :meth:`decode` still work."""
        self.pipeline = None
        self.stages.groups = self._groups()
        if self.image_adapter is not None:
            self.image_adapter.release()
        self.vae.register_module("encoder", None)
        self.vae.quant_conv = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- picture sizes -----------------------------------------------------------------------------------------------

    def latent_grain(self) -> int:
        """Return the pixels of which height and width of every picture must be multiples.

        It is what the networks take, not what they were trained on: SD's UNets were trained on multiples of 64.
        """
        control = self.denoiser.control
        return self.sizes.grain if control is None else lcm(self.sizes.grain, control.multiple)

    def check_resolution(self, height: int, width: int) -> None:
        """Check that the model takes pictures of a size in pixels.

        Raises:
            UserError: the sides are no multiples of :meth:`latent_grain`, or too long for the model's positions.
        """
        self.sizes.check(height, width)
        if self.denoiser.control is not None:
            self.denoiser.control.check_size(self.sizes.latent(height, width))

    def with_size(self, conditioning: Conditioning, size: tuple[int, int]) -> Conditioning:
        """Return the conditions for pictures of another size, as the family's pipeline makes them for that size.

        Args:
            conditioning: (B) of :meth:`encode_prompts` or :meth:`unconditional`, which are for :attr:`resolution`;
                also without ``size_ids``.
            size: (height, width) in pixels.
        """
        numbers = self.size_ids(*size)
        if not numbers:
            return conditioning
        row = torch.tensor([numbers], dtype=torch.float32, device=self.device)
        return replace(conditioning, size_ids=row.repeat(len(conditioning), 1))

    def size_ids(self, height: int, width: int) -> list[float]:
        """Return the numbers that tell the network a picture's size; empty if the network reads no size."""
        return []

    # -- hashes ------------------------------------------------------------------------------------------------------

    def weights_hash(self) -> str:
        """Return the SHA-256 of the base's parameters, in the order of their names, with a merged style LoRA.

        Call it before the weights are shared among processes for the first time.
        """
        if "weights" not in self._hashes:
            self._hashes["weights"] = weights_hash(self.denoiser.network)
        return self._hashes["weights"]

    def image_encoder_hash(self) -> str:
        """Return the hash of everything that :meth:`encode` depends on: 16 hexadecimal digits.

        Call it before :meth:`release_encoders` for the first time.
        """
        if "image" not in self._hashes:
            if self.vae.encoder is None:
                raise RuntimeError("the image encoder was released; hash it before release_encoders()")
            self._hashes["image"] = image_encoder_hash(self.vae)
        return self._hashes["image"]

    def text_encoder_hash(self) -> str:
        """Return the hash of everything that :meth:`encode_prompts` depends on, but the size: 16 hexadecimal digits.

        Call it before :meth:`release_encoders` for the first time.
        """
        if "text" not in self._hashes:
            if self.pipeline is None:
                raise RuntimeError("the text encoders were released; hash them before release_encoders()")
            parts = {name: part for name, part in self.pipeline.components.items() if part is not None}
            self._hashes["text"] = text_encoder_hash(parts, self.prompt_lengths(), self.base)
        return self._hashes["text"]

    def _groups(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return the modules of each stage; without the encoders once they are released."""
        parts: Mapping[str, Any] = {} if self.pipeline is None else self.pipeline.components
        encoders = [part for name, part in parts.items() if name.startswith("text_encoder") and part is not None]
        beside = [parts["image_encoder"]] if isinstance(parts.get("image_encoder"), nn.Module) else []
        control = self.denoiser.control
        networks: list[nn.Module] = [self.denoiser.network, *([] if control is None else [control.network])]
        return {TEXT: tuple(encoders), PICTURES: (self.vae, *beside), NETWORK: tuple(networks)}

    def _full_precision(self) -> AbstractContextManager[Any]:
        """Turn autocast off: VAEs overflow or blur in low precision, and prompts are encoded only once."""
        return full_precision(self.device)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off on a device; a device without autocast has none to turn off."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def count_parameters(module: nn.Module) -> int:
    """Return the number of values of a module's parameters."""
    return sum(value.numel() for value in module.parameters())
