"""Where a teacher's parts are, and the stock diffusers pipeline they make: a folder, a Hub name or a single file.

Everything is loaded through diffusers itself, from safetensors alone; a pickle is refused before it is opened.
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
from ..errors import UserError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
INDEX = "model_index.json"
# What the single files of the field put before the names of the weights beside the denoiser's.
SINGLE_FILE_PARTS = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}

AnyPipeline = TypeVar("AnyPipeline", bound=DiffusionPipeline)


@dataclass(frozen=True)
class Source:
    """Where a model is.

    Attributes:
        config: the diffusers folder or Hub name that has the configuration of every part, and the weights of those
            parts that ``file`` lacks.
        file: the single file with the weights, or None where ``config`` has them all.
        variant: which of a folder's weights, such as ``fp16``; None for the plain ones.
    """

    config: str
    file: Path | None = None
    variant: str | None = None

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.file.stem if self.file is not None else Path(self.config).name

    def part_config(self, part: str) -> dict[str, Any]:
        """The configuration of one part, such as ``unet`` or ``scheduler``; ``""`` is the pipeline's own.

        Raises:
            UserError: there is none.
        """
        # Each of diffusers' configured classes reads its own file name; the scheduler's and the pipeline's differ.
        name = {"scheduler": "scheduler_config.json", "": INDEX}.get(part, "config.json")
        reader = type("Reader", (ConfigMixin,), {"config_name": name})
        try:
            loaded: dict[str, Any] = reader.load_config(self.config, subfolder=part or None)
        except OSError as error:
            if self.file is None:
                raise UserError(f"{self.incomplete()}: {error}") from error
            raise UserError(
                f"model.config: the configuration of {self.file.name} can't be read from {self.config}: {error}\n"
                "Without a network, set model.config to the diffusers folder of a model of the same kind"
            ) from error
        return loaded

    def incomplete(self) -> str:
        """What a user reads where a part of a folder or Hub name can't be had."""
        if Path(self.config).is_dir():
            return f"model.path: {self.config} is not a complete diffusers folder"
        return (
            f"model.path: {self.config} is not a complete diffusers model on the Hub, or the Hub can't be reached; "
            "without a network give a diffusers folder or a .safetensors file"
        )

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration, with what a single file says of its own noise.

        Fine-tunes of SDXL that predict v carry a tensor named ``v_pred``, and ``ztsnr`` where their schedule ends in
        pure noise; nothing but the names counts.

        Raises:
            UserError: there is no configuration, or the file is of a kind that is not known here.
        """
        config = self.part_config("scheduler")
        names = set() if self.file is None else set(weight_names(self.file))
        if names & {"edm_mean", "edm_vpred.sigma_max"}:
            raise UserError(f"model.path: {self.name} has the noise of EDM, which no family here has")
        if "v_pred" in names:
            config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names}
        return config


def locate(model: ModelSection, default_config: str) -> Source:
    """Where the model is that a recipe names.

    Args:
        default_config: the Hub name whose configuration single files of this family have unless the recipe says so.

    Raises:
        UserError: no path, nothing there, or nothing that can be loaded.
    """
    if model.path is None:
        raise UserError(
            f"model.path: is missing; expected the diffusers folder, Hub name or .safetensors file of a {model.family} "
            "model"
        )
    path = Path(model.path)
    if model.config is not None and not path.is_file():
        raise UserError(
            "model.config: is for a single file; a folder and a Hub repository have their own configuration"
        )
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise UserError(f"model.path: {path} has no {INDEX}; expected a diffusers folder")
        return Source(str(path), variant=model.variant or _only_variant(path))
    if path.suffix in PICKLES:
        raise UserError(
            f"model.path: {path.name} is a pickle, which can run code when it is loaded, so it is refused; give a "
            ".safetensors file or a diffusers folder"
        )
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
            f"model.path: {model.path} is not a diffusers folder, Hub name or .safetensors file: there is nothing at "
            "that path, and a Hub name looks like owner/model"
        )
    return Source(model.path, variant=model.variant)


def load_pipeline(
    pipeline: type[AnyPipeline], source: Source, dtype: torch.dtype, without: Sequence[str] = (), **options: Any
) -> AnyPipeline:
    """A stock pipeline with its weights on the CPU: the VAE in float32, everything else in ``dtype``.

    SDXL's VAE overflows in float16, and every VAE is small; so none is stored with less. Parts that a single file lacks
    are loaded from the folder of its configuration.

    Args:
        without: the parts that are not wanted.
        options: more of the pipeline's own arguments.

    Raises:
        UserError: a part is missing or does not fit its configuration.
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
                f"model.path: {source.file} has no {' and no '.join(absent)}; set model.config to a diffusers folder "
                f"that has the weights ({source.config} does not), or model.path to a complete model"
            ) from error
        given = {part: getattr(rest, part) for part in absent}
    try:
        with _quiet():
            if "vae" not in given:
                given["vae"] = AutoencoderKL.from_single_file(
                    str(source.file), config=source.config, subfolder="vae", torch_dtype=torch.float32
                )
            loaded = pipeline.from_single_file(
                str(source.file), config=source.config, torch_dtype=dtype, **given, **options
            )
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
        # A weight that the file lacks stays on the meta device, which is all that can be said of it then.
        reason = "it lacks some of the weights" if isinstance(error, NotImplementedError) else error
        raise UserError(
            f"model.path: {source.file} does not fit the configuration of {source.config} (model.config): {reason}"
        ) from error
    _check_complete(loaded.components, source)
    return loaded


def _from_folder(
    pipeline: type[AnyPipeline], source: Source, dtype: torch.dtype, parts: Sequence[str], options: Mapping[str, Any]
) -> AnyPipeline:
    # Libraries stumble over a folder that is not there in their own ways, and not all of them say so.
    lacking = [part for part in parts if not (Path(source.config) / part).is_dir()]
    if Path(source.config).is_dir() and lacking:
        raise UserError(f"{source.incomplete()}: it lacks {lacking[0]}/")
    types = {"default": dtype, "vae": torch.float32}
    try:
        with _quiet():
            return pipeline.from_pretrained(
                source.config, torch_dtype=types, variant=source.variant, use_safetensors=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source.incomplete()}: {error}") from error


def weight_names(file: Path) -> list[str]:
    """The names of a single file's tensors.

    Raises:
        UserError: it is no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.path: {file} is not a readable safetensors file: {error}") from error


def _absent_parts(file: Path, parts: Sequence[str]) -> list[str]:
    """Which of the parts a single file has no weights of."""
    names = weight_names(file)
    known = {part: prefixes for part, prefixes in SINGLE_FILE_PARTS.items() if part in parts}
    return [part for part, prefixes in known.items() if not any(name.startswith(prefixes) for name in names)]


def _check_complete(parts: Mapping[str, Any], source: Source) -> None:
    """A text encoder's weights that a single file lacks stay on the ``meta`` device without a word."""
    for part, module in parts.items():
        if isinstance(module, nn.Module):
            missing = [name for name, value in module.named_parameters() if value.is_meta]
            if missing:
                raise UserError(
                    f"model.path: {source.file} lacks {len(missing)} weights of {part}, such as {missing[0]}; it may "
                    f"be of another kind than {source.config} (model.config)"
                )


def _only_variant(folder: Path) -> str | None:
    """The variant of a folder where some part has weights of no other: ``x.fp16.safetensors`` without an ``x``."""
    found = set()
    for part in folder.iterdir():
        needed = part.is_dir() and part.name.startswith(("unet", "transformer", "vae", "text_encoder"))
        names = [path.name.split(".") for path in part.glob("*.safetensors")] if needed else []
        if names and all(len(name) == 3 for name in names):
            found |= {name[1].split("-")[0] for name in names}
    return found.pop() if len(found) == 1 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of diffusers' own, and no warning that it gives of every model it casts, about no modules."""

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
