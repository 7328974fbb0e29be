"""The teacher of a rehearsal: the family's own class around a stock pipeline whose parts have no values."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from ...config import ModelSection
from ...errors import UserError
from ...tasks.base import Task
from ...teachers import family
from ...teachers.base import Outline, Teacher
from ...teachers.loading.source import Source
from .beside import PretendImageAdapter, outline_with
from .fakes import Fakes
from .published import PublishedSource, published_source

logger = logging.getLogger(__name__)


@dataclass
class Tokens:
    """What a tokenizer returns."""

    input_ids: Any
    attention_mask: Any


class PretendTokenizer:
    """Gives every prompt its full length of tokens, so that no vocabulary is needed.

    Args:
        length: tokens of a prompt.
    """

    def __init__(self, length: int) -> None:
        self.model_max_length = length
        self.added_tokens_encoder: dict[str, int] = {}

    def tokenize(self, prompt: str) -> list[str]:
        """Return the words of a prompt."""
        return prompt.split()

    def __call__(
        self, prompts: Sequence[str] | str, *, max_length: int | None = None, return_tensors: str = "", **_: Any
    ) -> Tokens:
        """Return as many tokens for each prompt as the encoder reads; two if no tensors are asked for."""
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        if not return_tensors:
            return Tokens([[0, 1] for _ in rows], [[1, 1] for _ in rows])
        shape = (len(rows), max_length or self.model_max_length)
        return Tokens(torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long))


def outlined(model: ModelSection, task: Task, resolution: int | None) -> tuple[Outline, Source, bool]:
    """Return a teacher without weights, where its configuration is from, and True where a published one stood in.

    The model's own files decide. Where a Hub name can't be read, the published model of its family stands in.

    Raises:
        UserError: the model is missing, or does not fit the recipe.
    """
    kind = family(model.family)
    source = kind.locate(model)
    if source.folder is None:
        try:
            source.part_config(kind.network_part)
        except UserError as error:
            published = published_source(model)
            if published is None:
                raise
            logger.debug("%s", error)
            latents = published.part_config("vae")["latent_channels"]
            source = published_source(model, latents + task.extra_channels(latents)) or source
    outline, stood_in = outline_with(source, model, resolution)
    return outline, source, stood_in or isinstance(source, PublishedSource)


def in_dtype_of_base(model: ModelSection, outline: Outline) -> None:
    """Give the outline's networks the dtype of the recipe's base; a base in few bits has its dtypes already."""
    networks: list[nn.Module] = [] if model.storage is not None else [outline.denoiser.network]
    networks += [outline.control.network] if outline.control is not None else []
    for network in networks:
        nn.Module.to(network, getattr(torch, model.dtype))  # diffusers' own warns of modules to keep in float32


def pretend_teacher(model: ModelSection, outline: Outline, source: Source, fakes: Fakes) -> Teacher:
    """Return the family's teacher; its denoiser is the outline's, with tensors without values.

    Args:
        outline: its network's adapters are added already.
    """
    kind = family(model.family)
    dtype = getattr(torch, model.dtype)
    network = fakes.module(outline.denoiser.network)
    if outline.control is not None:
        fakes.module(outline.control.network)
        outline.denoiser.control = outline.control
    parts = _parts(kind, source, fakes, dtype, _absent(kind, model, source))
    pipeline = kind.pipeline_class(**parts, **{kind.network_part: network}, **kind.pipeline_options)
    teacher = kind(pipeline, outline.denoiser, outline.latent_shape, outline.name)
    if model.image_adapter is not None:
        encoder = PretendImageAdapter(network, model.image_adapter.image_encoder, fakes, dtype)  # type: ignore[arg-type]
        teacher.image_adapter = encoder  # type: ignore[assignment]
    return teacher


def _absent(kind: type[Teacher], model: ModelSection, source: Source) -> tuple[str, ...]:
    return kind.unused_parts if isinstance(source, PublishedSource) else kind.absent_parts(model)


def _parts(
    kind: type[Teacher], source: Source, fakes: Fakes, dtype: torch.dtype, absent: Sequence[str]
) -> dict[str, Any]:
    """Return the pipeline's parts but the network: encoders and VAE without values, schedulers, tokenizers."""
    index: Mapping[str, Any] = source.part_config("")
    parts: dict[str, Any] = {}
    needed, optional = kind.pipeline_class._get_signature_keys(kind.pipeline_class)
    for part in sorted({*needed, *optional} - {kind.network_part, *kind.pipeline_options, "self"}):
        made: Any = index.get(part)
        if part in needed and (part in absent or made is None or made[0] is None):
            parts[part] = None
        elif part.startswith("tokenizer"):
            parts[part] = PretendTokenizer(_length(source, part))
        elif part.endswith("scheduler"):
            parts[part] = getattr(diffusers, made[1]).from_config(_plain(source.part_config(part)))
        elif part == "vae":
            with init_empty_weights():
                vae: nn.Module = diffusers.AutoencoderKL.from_config(_plain(source.part_config(part)))
            parts[part] = fakes.module(vae, torch.float32).requires_grad_(False).eval()
        elif part.startswith("text_encoder"):
            parts[part] = fakes.module(_encoder(made[1], source.part_config(part)), dtype).requires_grad_(False).eval()
        elif part == "force_zeros_for_empty_prompt":
            parts[part] = made
    return parts


def _encoder(name: str, config: Mapping[str, Any]) -> nn.Module:
    kind: Any = getattr(transformers, name)
    with init_empty_weights(include_buffers=False):
        encoder: nn.Module = kind(kind.config_class.from_dict(_plain(config)))
    return encoder


def _length(source: Source, part: str) -> int:
    """Return the tokens of a prompt: as many as the encoder has positions, T5's default without such a number."""
    config = source.part_config(part.replace("tokenizer", "text_encoder"))
    return int(config.get("max_position_embeddings", config.get("n_positions", 77)))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def pictures(teacher: Teacher, count: int) -> Tensor:
    """Return random pictures (B, 3, H, W) in [-1, 1] of the teacher's size; their values are never learnt from."""
    height, width = teacher.resolution
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
