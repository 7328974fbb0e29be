"""Where a model is: a diffusers folder, a Hub name or a single file, and the configuration of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin

from ...config import ModelSection
from ...errors import UserError, refuse_pickle
from .hub import why_offline
from .single_file import check_complete_model, weight_names

INDEX = "model_index.json"


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

    @property
    def folder(self) -> Path | None:
        """The folder of the configuration; None for a Hub name."""
        return Path(self.config) if Path(self.config).is_dir() else None

    @property
    def local_only(self) -> bool:
        """True if nothing can be loaded from the Hub: only this machine's cache of it is read."""
        return self.folder is not None or bool(why_offline())

    def part_config(self, part: str) -> dict[str, Any]:
        """Read the configuration of one part, such as ``unet`` or ``scheduler``; ``""`` is the pipeline's index.

        Raises:
            UserError: the configuration can't be read, or the part is quantised.
        """
        # Each of diffusers' configured classes reads its own file name; schedulers' and the pipeline's differ.
        name = "scheduler_config.json" if part.endswith("scheduler") else {"": INDEX}.get(part, "config.json")
        reader: Any = type("Reader", (ConfigMixin,), {"config_name": name})
        try:
            loaded: dict[str, Any] = reader.load_config(
                self.config, subfolder=part or None, local_files_only=self.local_only
            )
        except OSError as error:
            raise self.unreadable(error) from error
        if "quantization_config" in loaded:
            raise UserError(
                f"model.path: the {part} of {self.name} is quantised (quantization_config in its {name}), and only "
                "float weights can be the base of a training; choose the model's float32, bfloat16 or float16 weights"
            )
        return loaded

    def unreadable(self, error: Exception) -> UserError:
        """Return the error for a part of the configuration that can't be read."""
        offline = "" if self.folder is not None else why_offline()
        if offline and self.file is None:
            return UserError(
                f"model.path: {self.config} is a Hub name, the Hub can't be reached ({offline}), and this machine's "
                "cache does not hold the model. Connect to the network, or set model.path to a diffusers folder or a "
                ".safetensors file"
            )
        if offline:
            return UserError(
                f"model.config: the configuration of {self.file} is on the Hub ({self.config}), which can't be reached "
                f"({offline}), and this machine's cache does not hold it. Connect to the network, or set model.config "
                "to the diffusers folder of a model of the same family"
            )
        if self.file is None:
            return UserError(f"{self.incomplete()}: {error}")
        return UserError(
            f"model.config: the configuration of {self.file.name} can't be read from {self.config}: {error}\n"
            "If the Hub can't be reached, set model.config to the diffusers folder of a model of the same family"
        )

    def incomplete(self) -> str:
        """Return the start of the error for a missing part of a folder or Hub repository."""
        if self.folder is not None:
            return f"model.path: {self.config} is not a complete diffusers folder"
        return (
            f"model.path: {self.config} is not a complete diffusers model on the Hub with safetensors weights, or the "
            "Hub can't be reached (then set model.path to a diffusers folder or a .safetensors file)"
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


def locate(model: ModelSection, default_config: str, reader: str) -> Source:
    """Find the model that a recipe names.

    Args:
        default_config: the Hub name with the configuration for single files, unless the recipe sets ``model.config``.
        reader: the diffusers pipeline that reads the family's pickles, for the message that refuses them.

    Raises:
        UserError: no path, no model at the path, or a file of another kind, such as a LoRA.
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
        _check_index(path, "model.path")
        return Source(str(path), variant=model.variant or _only_variant(path))
    refuse_pickle(path, "model.path", reader)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"model.path: {path} is not a diffusers folder, Hub name or .safetensors file; expected one of these"
            )
        check_complete_model(path)
        config = model.config or default_config
        if not Path(config).is_dir():
            return Source(config, path, model.variant)
        _check_index(Path(config), "model.config")
        return Source(config, path, model.variant or _only_variant(Path(config)))
    if path.suffix == ".safetensors" or path.is_absolute() or model.path.count("/") != 1:
        raise UserError(
            f"model.path: {model.path} does not exist, and is not a Hub name (owner/model); expected a diffusers "
            "folder, a Hub name or a .safetensors file"
        )
    return Source(model.path, variant=model.variant)


def _check_index(folder: Path, field: str) -> None:
    """Raise UserError for a folder that is no diffusers pipeline, and say what it is where that can be told."""
    if (folder / INDEX).is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{field}: {folder} is the folder of a PEFT LoRA, not of a model; to train on top of it, convert it to a "
            "file (`flash-diffusion lora convert`) and set model.style_lora to the file"
        )
    if (folder / "config.json").is_file():
        raise UserError(
            f"{field}: {folder} has no {INDEX}, so it is one part of a model; expected a diffusers folder with all "
            f"parts, such as {folder.resolve().parent}"
        )
    raise UserError(f"{field}: {folder} has no {INDEX}; expected a diffusers folder")


def _only_variant(folder: Path) -> str | None:
    """Return the variant of a folder that has no plain weights: "fp16" of ``x.fp16.safetensors`` without ``x``."""
    found = set()
    for part in folder.iterdir():
        needed = part.is_dir() and part.name.startswith(("unet", "transformer", "vae", "text_encoder"))
        names = [path.name.split(".") for path in part.glob("*.safetensors")] if needed else []
        if names and all(len(name) == 3 for name in names):
            found |= {name[1].split("-")[0] for name in names}
    return found.pop() if len(found) == 1 else None
