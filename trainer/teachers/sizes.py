"""The picture sizes that a model takes: whole latent pixels and patches, within its table of positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

FAR = 2.0  # area of a picture over that of the model's own, or its inverse, from which a user is warned


@dataclass(frozen=True)
class Sizes:
    """The picture sizes of one model, in pixels.

    Attributes:
        name: the name of the model.
        scale: pixels per latent pixel.
        grain: height and width are multiples of it.
        own: side of the squares that the model was trained on; None if its configuration has no side.
        most: the longest side; None without a limit.
        channels: channels of the latent.
    """

    name: str
    scale: int
    grain: int
    own: int | None
    most: int | None
    channels: int

    @classmethod
    def of(cls, name: str, network: Any, config: Mapping[str, Any], vae: Mapping[str, Any]) -> Sizes:
        """Read the sizes from configurations.

        UNets take every latent: diffusers and ComfyUI let the way up follow the sizes of the way down.

        Args:
            network: the network's class, whose defaults stand for settings that ``config`` lacks.
            config: of the network.
            vae: the autoencoder's configuration.
        """

        def setting(key: str) -> Any:
            default = inspect.signature(network).parameters.get(key)
            return config.get(key, None if default is None else default.default)

        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        patch = setting("patch_size") or 1
        own, positions = setting("sample_size"), setting("pos_embed_max_size")
        return cls(
            name,
            scale,
            scale * patch,
            own * scale if isinstance(own, int) else None,
            positions * patch * scale if positions else None,
            vae["latent_channels"],
        )

    def check(self, height: int, width: int) -> None:
        """Check that the model takes pictures of a size.

        Raises:
            UserError: the sides are no multiples of the grain, or longer than the model's positions reach.
        """
        shown = str(width) if height == width else f"{width} x {height}"
        if height % self.grain or width % self.grain:
            near = [max(round(side / self.grain), 1) * self.grain for side in (width, height)]
            example = str(near[0]) if height == width else f"{near[0]} x {near[1]}"
            raise UserError(
                f"data.resolution: {shown} is no whole number of patches of {self.name}; expected a multiple of "
                f"{self.grain} pixels, such as {example}"
            )
        if self.most is not None and max(height, width) > self.most:
            raise UserError(
                f"data.resolution: {shown} is above the {self.most} pixels that the positions of {self.name} reach "
                f"(pos_embed_max_size in its configuration); expected at most {self.most}"
            )

    def latent(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a picture of height x width pixels."""
        return self.channels, height // self.scale, width // self.scale

    def latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        """Return (C, h, w) of a square picture.

        Args:
            resolution: its side in pixels; None = the model's own.

        Raises:
            UserError: the model does not take the size, or has no size of its own.
        """
        side = self.own if resolution is None else resolution
        if side is None:
            raise UserError(
                f"data.resolution: is missing, and {self.name} has no size of its own (sample_size in its "
                "configuration); set data.resolution to the side of the pictures that the model was trained on"
            )
        if resolution is not None:
            self.check(resolution, resolution)
        return self.latent(side, side)

    def warning(self, height: int, width: int) -> str:
        """Return a sentence for a picture size far from the model's own; empty if the size is near it."""
        if self.own is None:
            return ""
        ratio = height * width / self.own**2
        if 1 / FAR <= ratio <= FAR:
            return ""
        far, times = ("larger", ratio) if ratio > 1 else ("smaller", 1 / ratio)
        return (
            f"pictures of {width} x {height} pixels are {times:.3g} times {far} in area than the "
            f"{self.own} x {self.own} that {self.name} was trained on. A teacher draws badly at such a size, and the "
            f"LoRA learns it. Set data.resolution to {self.own}, or choose a model of this size"
        )
