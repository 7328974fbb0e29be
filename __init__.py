"""Flash Diffusion: distil any conditional diffusion model into a few-step LoRA, and use it in ComfyUI.

ComfyUI imports this module when the folder lies in ``custom_nodes``; pip installs the same tree as ``flash_diffusion``.
It must stay cheap to import (< 0.3 s inside ComfyUI): everything heavy is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import FlashExtension

__version__ = "0.1.0"

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> FlashExtension:
    """The V3 entry point that ComfyUI calls once at start to get the list of nodes."""
    from .nodes import FlashExtension

    return FlashExtension()
