"""ControlNets and T2I-adapters beside a UNet: frozen networks that read a hint and steer every role alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ControlNetModel, T2IAdapter, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ....flash_core.denoiser import Conditioning
from ...config import ControlSection
from ...demo.assets import CONTROLS
from ...errors import UserError, refuse_pickle
from ..loading.hub import why_offline
from .control_lora import MARK, expanded

KINDS = {"ControlNetModel": ControlNetModel, "T2IAdapter": T2IAdapter}
WORDS = {ControlNetModel: "ControlNet", T2IAdapter: "T2I-adapter"}
# Defaults of a recipe's `scale`; T2I-adapters': arXiv 2406.02347, for SDXL and Canny edges.
SCALES = {ControlNetModel: 1.0, T2IAdapter: 0.8}
LATENT_PIXELS = 8  # a latent pixel's width
HUB_SHAPE = 1  # slashes in a Hub name
# The sizes that a ControlNet shares with its UNet, in words.
SHARED = {
    "in_channels": "latent channels",
    "cross_attention_dim": "width of the text",
    "block_out_channels": "channels of the levels",
    "layers_per_block": "layers a level",
    "addition_embed_type": "further conditions",
}
# Keys that identify the kind of a single file.
T2I_KEY = "adapter."
DIFFUSERS_CONTROLNET = "controlnet_cond_embedding.conv_in.weight"
NATIVE_CONTROLNET = "zero_convs.0.0.weight"
NATIVE_PREFIX = "control_model."


class Control:
    """A frozen network that reads a hint and adds residuals inside the UNet.

    Args:
        network: a ControlNet, which reads the hint and the noisy latents, or a T2I-adapter, which reads the hint only.
        scale: factor of the residuals. Default: 1 for ControlNets, 0.8 for T2I-adapters.
        name: the name of the network.
    """

    def __init__(
        self, network: ControlNetModel | T2IAdapter, scale: float | None = None, name: str = "control"
    ) -> None:
        self.network: nn.Module = network.requires_grad_(False).eval()
        self.scale = SCALES[type(network)] if scale is None else scale
        self.name = name

    @property
    def title(self) -> str:
        """The name, the kind and the scale of the network."""
        return f"{self.name} ({WORDS[type(self.network)]}) x {self.scale:g}"

    @property
    def multiple(self) -> int:
        """The pixels of which the height and width of a hint are multiples."""
        if isinstance(self.network, T2IAdapter):
            return int(self.network.config["downscale_factor"])
        return LATENT_PIXELS

    def check_size(self, latent_shape: tuple[int, int, int]) -> None:
        """Check that hints can be read at this size.

        Args:
            latent_shape: (C, h, w).

        Raises:
            UserError: the picture's size is no multiple of the network's step.
        """
        multiple = self.multiple
        height, width = (LATENT_PIXELS * size for size in latent_shape[1:])
        if height % multiple or width % multiple:
            raise UserError(
                f"data.resolution: {self.title} reads hints whose sizes are multiples of {multiple} pixels, not "
                f"{width} x {height}; choose such a resolution"
            )

    def __call__(self, z_t: Tensor, t: Tensor, conditioning: Conditioning, added: dict[str, Any]) -> dict[str, Any]:
        """Return the UNet's arguments for the hint (B, 3, H, W) in [0, 1].

        Args:
            z_t: (B, C, h, w) latents without a task's further channels.
            added: the UNet's conditions other than text; ControlNets of SDXL read these too.
        """
        hint = conditioning.hint
        assert hint is not None
        if isinstance(self.network, T2IAdapter):
            if self.network.config["in_channels"] == 1:
                hint = hint.mean(1, keepdim=True)
            return {"down_intrablock_additional_residuals": [state * self.scale for state in self.network(hint)]}
        down, middle = self.network(
            z_t,
            t,
            encoder_hidden_states=conditioning.cross_attention,
            controlnet_cond=hint,
            conditioning_scale=self.scale,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


@dataclass(frozen=True)
class ControlSource:
    """The place of a recipe's ControlNet or T2I-adapter.

    Attributes:
        file: a single file; None for a folder or Hub name.
        folder: a diffusers folder or Hub name.
        config: the folder's ``config.json``.
        scale: the recipe's.
    """

    file: Path | None
    folder: str
    config: Mapping[str, Any]
    scale: float | None

    @property
    def name(self) -> str:
        """The name of the network."""
        return self.file.stem if self.file is not None else Path(self.folder).name

    def build(self, unet: nn.Module, title: str) -> Control:
        """Load the network for a UNet, in the UNet's dtype and on its device (meta: without weights).

        Args:
            title: the name of the model, for messages.

        Raises:
            UserError: the network is for another model, or incomplete.
        """
        if not isinstance(unet, UNet2DConditionModel):
            raise UserError(
                f"model.control: {title} is no UNet; ControlNets and T2I-adapters need a UNet, so choose an SD 1.5, "
                "SD 2 or SDXL model, or remove model.control"
            )
        network = self._of_file(unet, title) if self.file is not None else self._of_folder(unet, title)
        first = next(unet.parameters())
        if not first.is_meta:
            nn.Module.to(network, first.device, first.dtype)
        return Control(network, self.scale, self.name)

    def _of_folder(self, unet: UNet2DConditionModel, title: str) -> ControlNetModel | T2IAdapter:
        kind = KINDS[self.config["_class_name"]]
        check = check_controlnet if kind is ControlNetModel else check_t2i_adapter
        check(self.config, unet.config, self.name, title)
        first = next(unet.parameters())
        if first.is_meta:
            with torch.device("meta"):
                outline: ControlNetModel | T2IAdapter = kind.from_config(dict(self.config))
                return outline
        try:
            network: ControlNetModel | T2IAdapter = kind.from_pretrained(
                self.folder,
                torch_dtype=first.dtype,
                use_safetensors=True,
                variant=self._variant(),
                local_files_only=Path(self.folder).is_dir() or bool(why_offline()),
            )
            return network
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"model.control.path: {self.folder} can't be loaded: {error}") from error

    def _variant(self) -> str | None:
        """Return the variant of a folder that has no plain weights: "fp16" of ``x.fp16.safetensors``."""
        names = [path.name.split(".") for path in Path(self.folder).glob("*.safetensors")]
        return names[0][1] if names and all(len(name) == 3 for name in names) else None

    def _of_file(self, unet: UNet2DConditionModel, title: str) -> ControlNetModel | T2IAdapter:
        assert self.file is not None
        weights = _weights(self.file, next(unet.parameters()).device)
        if any(key.startswith(T2I_KEY) for key in weights):
            config = _adapter_config(weights, self.file.name)
            check_t2i_adapter(config, unet.config, self.file.name, title)
            with torch.device(next(unet.parameters()).device):
                network: ControlNetModel | T2IAdapter = T2IAdapter(**config)
        elif DIFFUSERS_CONTROLNET in weights:
            embedding = weights[DIFFUSERS_CONTROLNET]
            with torch.device(next(unet.parameters()).device):
                network = ControlNetModel.from_unet(
                    unet, load_weights_from_unet=False, conditioning_channels=embedding.shape[1]
                )
        else:
            plain = {key.removeprefix(NATIVE_PREFIX): value for key, value in weights.items()}
            if MARK in plain or NATIVE_CONTROLNET in plain:
                return expanded(plain, unet, self.file.name)
            raise UserError(
                f"model.control.path: {self.file.name} is no known ControlNet, Control-LoRA or T2I-adapter; its "
                f"first weights are {', '.join(sorted(weights)[:3])}. Set model.control.path to a "
                "diffusers folder or Hub name"
            )
        _load(network, weights, self.file.name)
        return network


def find_control(section: ControlSection) -> ControlSource:
    """Find the ControlNet or T2I-adapter that a recipe names, and read a folder's or Hub name's configuration.

    Raises:
        UserError: there is no such network, or it is no ControlNet or T2I-adapter.
    """
    path = Path(section.path)
    refuse_pickle(path, "model.control.path", "ControlNetModel")
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"model.control.path: the file {path} does not exist; check the path")
        return ControlSource(path, "", {}, section.scale)
    if not path.is_dir() and section.path.count("/") != HUB_SHAPE:
        shipped = {file.stem: file for file in sorted(CONTROLS.glob("*.safetensors"))}
        if section.path not in shipped:
            raise UserError(
                f"model.control.path: {section.path!r} does not exist; expected a diffusers folder, a Hub name "
                "such as owner/model, a .safetensors file, or one of the demo's: "
                f"{', '.join(shipped) or 'none is there; make them with `flash-diffusion demo control`'}"
            )
        return ControlSource(shipped[section.path], "", {}, section.scale)
    reader: Any = type("Reader", (ConfigMixin,), {"config_name": "config.json"})
    offline = "" if path.is_dir() else why_offline()
    try:
        config = reader.load_config(section.path, local_files_only=bool(offline))
    except OSError as error:
        if offline:
            raise UserError(
                f"model.control.path: {section.path} is a Hub name, the Hub can't be reached ({offline}), and this "
                "machine's cache does not hold the model. Connect to the network, or set model.control.path to a "
                "folder or a .safetensors file"
            ) from error
        raise UserError(f"model.control.path: no config.json can be read from {section.path}: {error}") from error
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise UserError(
            f"model.control.path: {section.path} is a {kind} (_class_name in config.json); expected one of "
            f"{', '.join(KINDS)}"
        )
    return ControlSource(None, section.path, config, section.scale)


def check_controlnet(config: Mapping[str, Any], unet: Mapping[str, Any], name: str, title: str) -> None:
    """Check that a ControlNet was made from such a UNet.

    Raises:
        UserError: a size differs; the message names the size.
    """
    for field, meaning in SHARED.items():
        ours, theirs = (_comparable(values.get(field)) for values in (config, unet))
        if ours != theirs:
            raise UserError(
                f"model.control.path: {name} is a ControlNet for another model: its {meaning} ({field}) are "
                f"{ours}, {title} has {theirs}; choose a ControlNet made for this model"
            )


def check_t2i_adapter(config: Mapping[str, Any], unet: Mapping[str, Any], name: str, title: str) -> None:
    """Check that a T2I-adapter's feature maps fit the UNet's levels.

    Raises:
        UserError: the kind or the channels differ; the message names the difference.
    """
    # A UNet without attention in its first level (SDXL) takes the first map after the downsampling: half as large.
    plain_first = not unet["down_block_types"][0].startswith("CrossAttn")
    wanted_kinds = ("full_adapter_xl",) if plain_first else ("full_adapter", "light_adapter")
    pixels = LATENT_PIXELS * (2 if plain_first else 1)
    channels, levels = tuple(config["channels"]), tuple(unet["block_out_channels"])
    if config["adapter_type"] == "light_adapter":
        channels += channels[-1:]  # the last number holds for one more level
    if config["adapter_type"] not in wanted_kinds or config["downscale_factor"] != pixels:
        raise UserError(
            f"model.control.path: {name} is a T2I-adapter of the kind {config['adapter_type']} at "
            f"1/{config['downscale_factor']} of the picture's size; {title} takes {' or '.join(wanted_kinds)} at "
            f"1/{pixels}. Choose a T2I-adapter made for this model"
        )
    if channels[: len(levels)] != levels or len(channels) > len(levels) + 1:
        raise UserError(
            f"model.control.path: {name} is a T2I-adapter for a model with the channels {list(channels)}; {title} has "
            f"{list(levels)}. Choose a T2I-adapter made for this model"
        )


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _adapter_config(weights: Mapping[str, Tensor], file: str) -> dict[str, Any]:
    """Return the arguments of diffusers' class, from the shapes of a full adapter's weights."""
    first, body = weights.get("adapter.conv_in.weight"), "adapter.body."
    levels = {int(key.split(".")[2]) for key in weights if key.startswith(body)}
    resnets = {int(key.split(".")[4]) for key in weights if key.startswith(f"{body}0.resnets.")}
    if first is None or not levels or not resnets:
        raise UserError(
            f"model.control.path: {file} is no full T2I-adapter in diffusers' layout; set model.control.path to "
            "the adapter's diffusers folder"
        )
    widths = [weights[f"{body}{level}.resnets.0.block1.weight"].shape[0] for level in sorted(levels)]
    # 1 or 3 channels of 8 x 8 pixels, or of 16 x 16 for SDXL's kind: the four products differ.
    pixels = 16 if first.shape[1] in (16**2, 3 * 16**2) else 8
    return {
        "in_channels": first.shape[1] // pixels**2,
        "channels": widths,
        "num_res_blocks": len(resnets),
        "downscale_factor": pixels,
        "adapter_type": "full_adapter_xl" if pixels == 16 else "full_adapter",
    }


def _weights(file: Path, device: torch.device) -> dict[str, Tensor]:
    """Return a file's tensors; on the meta device only the shapes are read."""
    try:
        if device.type != "meta":
            return load_file(file)
        with safe_open(file, framework="pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.control.path: {file} is not a readable safetensors file: {error}") from error
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _load(network: nn.Module, weights: Mapping[str, Tensor], file: str) -> None:
    """Load weights into a network; on the meta device only names and shapes are compared."""
    try:
        network.load_state_dict(weights, assign=next(network.parameters()).is_meta)
    except RuntimeError as error:
        raise UserError(f"model.control.path: {file} does not fit the model: {error}") from error
