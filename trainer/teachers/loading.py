"""Find a teacher's parts and load them as a diffusers pipeline: from a folder, a Hub name or a single file.

diffusers loads everything, from safetensors only; a pickle is refused before it is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config import ModelSection
from ..errors import UserError, refuse_pickle

INDEX = "model_index.json"
# Prefixes of the weights of each part in single files.
SINGLE_FILE_PARTS = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}

AnyPipeline = TypeVar("AnyPipeline", bound=DiffusionPipeline)


@dataclass(frozen=True)
class Source:
    """The place of a model.

    Attributes:
        config: the diffusers folder or Hub name with the configuration of every part, and with the weights of parts
            that ``file`` lacks.
        file: the single file with the weights; None if ``config`` has all weights.
        variant: the variant of a folder's weights, such as ``fp16``; None for weights without a variant.
    """

    config: str
    file: Path | None = None
    variant: str | None = None

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.file.stem if self.file is not None else Path(self.config).name

    def part_config(self, part: str) -> dict[str, Any]:
        """Read the configuration of one part, such as ``unet`` or ``scheduler``; ``""`` is the pipeline's index.

        Raises:
            UserError: the configuration can't be read.
        """
        # Each of diffusers' configured classes reads its own file name; the scheduler's and the pipeline's differ.
        name = {"scheduler": "scheduler_config.json", "": INDEX}.get(part, "config.json")
        reader: Any = type("Reader", (ConfigMixin,), {"config_name": name})
        try:
            loaded: dict[str, Any] = reader.load_config(self.config, subfolder=part or None)
        except OSError as error:
            if self.file is None:
                raise UserError(f"{self.incomplete()}: {error}") from error
            raise UserError(
                f"model.config: the configuration of {self.file.name} can't be read from {self.config}: {error}\n"
                "If the Hub can't be reached, set model.config to the diffusers folder of a model of the same family"
            ) from error
        return loaded

    def incomplete(self) -> str:
        """Return the start of the error for a missing part of a folder or Hub repository."""
        if Path(self.config).is_dir():
            return f"model.path: {self.config} is not a complete diffusers folder"
        return (
            f"model.path: {self.config} is not a complete diffusers model on the Hub, or the Hub can't be reached "
            "(then set model.path to a diffusers folder or a .safetensors file)"
        )

    def scheduler_config(self) -> dict[str, Any]:
        """Return the scheduler's configuration, with the noise settings that a single file has in tensor names.

        Fine-tunes of SDXL that predict v carry a tensor named ``v_pred``, and ``ztsnr`` where their schedule ends in
        pure noise. The values of these tensors have no meaning.

        Raises:
            UserError: there is no configuration, or the file has an EDM schedule.
        """
        config = self.part_config("scheduler")
        names = set() if self.file is None else set(weight_names(self.file))
        if names & {"edm_mean", "edm_vpred.sigma_max"}:
            raise UserError(
                f"model.path: {self.name} has an EDM noise schedule, which is not supported; choose another model"
            )
        if "v_pred" in names:
            config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names}
        return config


def locate(model: ModelSection, default_config: str) -> Source:
    """Find the model that a recipe names.

    Args:
        default_config: the Hub name with the configuration for single files, unless the recipe sets ``model.config``.

    Raises:
        UserError: no path, or no model at the path.
    """
    if model.path is None:
        raise UserError(
            f"model.path: is missing; expected the diffusers folder, Hub name or .safetensors file of a {model.family} "
            "model"
        )
    path = Path(model.path)
    if model.config is not None and not path.is_file():
        raise UserError(
            "model.config: is for a single file, but model.path is a folder or Hub name, which has its own "
            "configuration; remove model.config"
        )
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise UserError(f"model.path: {path} has no {INDEX}; expected a diffusers folder")
        return Source(str(path), variant=model.variant or _only_variant(path))
    refuse_pickle(path, "model.path")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"model.path: {path} is not a diffusers folder, Hub name or .safetensors file; expected one of these"
            )
        config = model.config or default_config
        if not Path(config).is_dir():
            return Source(config, path, model.variant)
        if not (Path(config) / INDEX).is_file():
            raise UserError(f"model.config: {config} has no {INDEX}; expected a diffusers folder")
        return Source(config, path, model.variant or _only_variant(Path(config)))
    if path.suffix == ".safetensors" or path.is_absolute() or model.path.count("/") != 1:
        raise UserError(
            f"model.path: {model.path} does not exist, and is not a Hub name (owner/model); expected a diffusers "
            "folder, a Hub name or a .safetensors file"
        )
    return Source(model.path, variant=model.variant)


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
        return _from_folder(pipeline, source, dtype, parts, options)
    absent = _absent_parts(source.file, parts)
    given: dict[str, Any] = {}
    if absent:
        others = dict.fromkeys(part for part in parts if part not in absent)
        try:
            rest = _from_folder(pipeline, source, dtype, absent, options | others)
        except UserError as error:
            raise UserError(
                f"model.path: {source.file} has no {' and no '.join(absent)}, and {source.config} has no weights for "
                "it; set model.config to a diffusers folder with these weights, or model.path to a complete model"
            ) from error
        given = {part: getattr(rest, part) for part in absent}
    try:
        with _quiet():
            if "vae" not in given:
                given["vae"] = AutoencoderKL.from_single_file(
                    str(source.file), config=source.config, subfolder="vae", torch_dtype=torch.float32
                )
            reader: Any = pipeline  # not DiffusionPipeline, but every family's pipeline has from_single_file
            loaded: AnyPipeline = reader.from_single_file(
                str(source.file), config=source.config, torch_dtype=dtype, **given, **options
            )
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
        # A weight that the file lacks stays on the meta device, and moving it raises NotImplementedError.
        reason = "it lacks some of the weights" if isinstance(error, NotImplementedError) else error
        raise UserError(
            f"model.path: {source.file} does not fit the configuration of {source.config} (model.config): {reason}"
        ) from error
    _check_complete(loaded.components, source)
    return loaded


def _from_folder(
    pipeline: type[AnyPipeline], source: Source, dtype: torch.dtype, parts: Sequence[str], options: Mapping[str, Any]
) -> AnyPipeline:
    # Libraries fail on a missing folder with different errors, and not all of these name the folder.
    lacking = [part for part in parts if not (Path(source.config) / part).is_dir()]
    if Path(source.config).is_dir() and lacking:
        raise UserError(f"{source.incomplete()}: it lacks {lacking[0]}/")
    types = {"default": dtype, "vae": torch.float32}
    try:
        with _quiet():
            loaded: AnyPipeline = pipeline.from_pretrained(
                source.config, torch_dtype=types, variant=source.variant, use_safetensors=True, **options
            )
            return loaded
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source.incomplete()}: {error}") from error


def weight_names(file: Path) -> list[str]:
    """Return the names of a single file's tensors.

    Raises:
        UserError: the file is no readable safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.path: {file} is not a readable safetensors file: {error}") from error


def _absent_parts(file: Path, parts: Sequence[str]) -> list[str]:
    """Return the parts without weights in a single file."""
    names = weight_names(file)
    known = {part: prefixes for part, prefixes in SINGLE_FILE_PARTS.items() if part in parts}
    return [part for part, prefixes in known.items() if not any(name.startswith(prefixes) for name in names)]


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


def _only_variant(folder: Path) -> str | None:
    """Return the variant of a folder that has no plain weights: "fp16" of ``x.fp16.safetensors`` without ``x``."""
    found = set()
    for part in folder.iterdir():
        needed = part.is_dir() and part.name.startswith(("unet", "transformer", "vae", "text_encoder"))
        names = [path.name.split(".") for path in part.glob("*.safetensors")] if needed else []
        if names and all(len(name) == 3 for name in names):
            found |= {name[1].split("-")[0] for name in names}
    return found.pop() if len(found) == 1 else None


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
