"""Sections on how a run uses its machine: switches for speed and memory that leave the result as it is."""

from __future__ import annotations

from pydantic import Field

from .section import Section


class SpeedSection(Section):
    """Switches for speed; the result is the same but for rounding."""

    channels_last: bool = Field(
        False, description="keep a UNet's weights in the order that GPUs' convolutions prefer (half precision)"
    )


class MemorySection(Section):
    """Switches for memory; the result is the same."""

    offload: bool = Field(
        False,
        description="while training, the VAE waits in the computer's memory; while a preview is decoded, the network "
        "waits there",
    )
