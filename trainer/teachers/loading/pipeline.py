"""Load a model as a diffusers pipeline: from a folder, a Hub name or a single file.

diffusers loads everything, from safetensors only; a pickle is refused before it is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders import single_file as diffusers_single_file
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor, nn

from ...errors import UserError
from .folder import check_folder, fast_tokenizers
from .scaled import is_scaled, true_weights
from .single_file import absent_parts
from .source import Source

AnyPipeline = TypeVar("AnyPipeline", bound=DiffusionPipeline)


def load_pipeline(
    pipeline: type[AnyPipeline], source: Source, dtype: torch.dtype, without: Sequence[str] = (), **options: Any
) -> AnyPipeline:
    """Load a diffusers pipeline on the CPU: the VAE in float32, the other parts in ``dtype``.

    SDXL's VAE overflows in float16 and every VAE is small, so all VAEs are float32. Parts that a single file lacks are
    loaded from the folder of the configuration.

    Args:
        without: parts that are not loaded.
        options: more arguments of the pipeline.

    Raises:
        UserError: a part is missing, or does not fit its configuration.
    """
    options |= dict.fromkeys(without)
    index = source.part_config("")
    parts = [part for part, made in index.items() if isinstance(made, list) and made[0] and part not in without]
    if source.file is None:
        loaded = _from_folder(pipeline, source, dtype, parts, options)
    else:
        loaded = _from_file(pipeline, source, source.file, dtype, parts, options)
    _limit_prompts(loaded)
    return loaded


def _from_file(
    pipeline: type[AnyPipeline],
    source: Source,
    file: Path,
    dtype: torch.dtype,
    parts: Sequence[str],
    options: Mapping[str, Any],
) -> AnyPipeline:
    scaled = true_weights(file, dtype) if is_scaled(file) else None
    absent = absent_parts(file, parts)
    given: dict[str, Any] = {}
    if absent:
        others = dict.fromkeys(part for part in parts if part not in absent)
        try:
            rest = _from_folder(pipeline, source, dtype, absent, {**options, **others})
        except UserError as error:
            raise UserError(
                f"model.path: {file} has no {' and no '.join(absent)}, and {source.config} has no weights for "
                f"it; set model.config to a diffusers folder with these weights, or model.path to a complete model"
                f"\n{error}"
            ) from error
        given = {part: getattr(rest, part) for part in absent}
    if source.folder is not None:
        given |= fast_tokenizers(source.folder, parts, source.part_config(""))
    try:
        with _quiet(), _read_as(scaled):
            where = {"config": source.config, "local_files_only": source.local_only}
            if "vae" not in given:
                given["vae"] = AutoencoderKL.from_single_file(
                    str(file) if scaled is None else dict(scaled),
                    subfolder="vae",
                    torch_dtype=torch.float32,
                    **where,
                )
            reader: Any = pipeline  # not DiffusionPipeline, but every family's pipeline has from_single_file
            loaded: AnyPipeline = reader.from_single_file(str(file), torch_dtype=dtype, **where, **given, **options)
    except (
        OSError, ValueError, LookupError, RuntimeError, TypeError, SafetensorError, SingleFileComponentError
    ) as error:  # fmt: skip
        # A weight that the file lacks stays on the meta device, and moving it raises NotImplementedError.
        reason = "it lacks some of the weights" if isinstance(error, NotImplementedError) else error
        raise UserError(
            f"model.path: {file} does not fit the configuration of {source.config} (model.config): {reason}"
        ) from error
    _check_complete(loaded.components, source)
    return loaded


def _from_folder(
    pipeline: type[AnyPipeline], source: Source, dtype: torch.dtype, parts: Sequence[str], options: Mapping[str, Any]
) -> AnyPipeline:
    if source.folder is not None:
        # Libraries fail on missing and unreadable parts with different errors, and not all of these name the part.
        check_folder(source.folder, parts)
        tokenizers = fast_tokenizers(source.folder, parts, source.part_config(""))
        options = {**options, **dict.fromkeys(tokenizers)}
    else:
        tokenizers = {}
    types = {"default": dtype, "vae": torch.float32}
    try:
        with _quiet():
            loaded: AnyPipeline = pipeline.from_pretrained(
                source.config,
                torch_dtype=types,
                variant=source.variant,
                use_safetensors=True,
                local_files_only=source.local_only,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise source.unreadable(error) from error
    # Put in afterwards: from_pretrained refuses a tokenizer of a class that the pipeline's index does not name.
    loaded.register_modules(**tokenizers)  # type: ignore[no-untyped-call]
    return loaded


def _limit_prompts(pipeline: DiffusionPipeline) -> None:
    """Let no tokenizer make more tokens than its text encoder has positions: some files name a greater length."""
    for name, encoder in pipeline.components.items():
        tokenizer = pipeline.components.get(name.replace("text_encoder", "tokenizer"))
        positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if name.startswith("text_encoder") and tokenizer is not None and positions is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    tokenizer = pipeline.components.get("tokenizer")
    if tokenizer is not None and hasattr(pipeline, "tokenizer_max_length"):  # SD3's pipeline keeps a copy
        pipeline.tokenizer_max_length = tokenizer.model_max_length


def _check_complete(parts: Mapping[str, Any], source: Source) -> None:
    """Raise UserError for missing weights: diffusers leaves them on the ``meta`` device without an error."""
    for part, module in parts.items():
        if isinstance(module, nn.Module):
            tie_weights = getattr(module, "tie_weights", None)
            if tie_weights is not None:
                tie_weights()  # diffusers with transformers 5 forgets that T5 embeds by its shared weight
            missing = [name for name, value in module.named_parameters() if value.is_meta]
            if missing:
                raise UserError(
                    f"model.path: {source.file} lacks {len(missing)} weights of {part}, such as {missing[0]}; the file "
                    f"may belong to another family than {source.config} (model.config)"
                )


@contextmanager
def _read_as(tensors: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Give diffusers' pipelines tensors in memory where they open a single file: they take nothing but a path."""
    if tensors is None:
        yield
        return
    opener = diffusers_single_file.load_single_file_checkpoint
    diffusers_single_file.load_single_file_checkpoint = lambda *_args, **_options: dict(tensors)
    try:
        yield
    finally:
        diffusers_single_file.load_single_file_checkpoint = opener


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide diffusers' progress bars, and its warning about an empty list of modules to keep in float32."""

    def sensible(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    logger = logging.getLogger("diffusers.models.modeling_utils")
    enabled = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    logger.addFilter(sensible)
    try:
        yield
    finally:
        logger.removeFilter(sensible)
        if enabled:
            diffusers_logging.enable_progress_bar()
