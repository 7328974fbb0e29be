"""Sections on how a run uses its machine: switches for speed and memory that leave the result as it is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import Section


class SpeedSection(Section):
    """Switches for speed; the result is the same but for rounding."""

    channels_last: bool = Field(
        False, description="keep a UNet's weights in the order that GPUs' convolutions prefer (half precision)"
    )
    compile: Literal["blocks"] | None = Field(
        None,
        description="`blocks`: torch.compile for the network's transformer blocks; each role of a block is compiled "
        "when it is first asked, and the log has the time (default: no compiling)",
    )


class MemorySection(Section):
    """Switches for memory; the LoRA is the same."""

    base: Literal["device", "cpu"] = Field(
        "device",
        description="where the weights of the base's blocks are while training: `cpu` keeps them in the computer's "
        "memory, and each layer fetches its own in every pass; slower, for cards below 8 GB",
    )
    offload: bool = Field(
        False,
        description="while training, the VAE waits in the computer's memory; while a preview is decoded, the network "
        "waits there",
    )
    preview_tiles: bool = Field(
        False,
        description="decode previews above 512 pixels in tiles that overlap: a quarter of the memory; a preview then "
        "differs a little from the whole picture",
    )
