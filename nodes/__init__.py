"""The ComfyUI nodes: thin V3 shells over flash_core, one file per family as a user finds it in the menu."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import ComfyExtension, io

from .adapters import FlashAdapterApply
from .compare import FlashCompare
from .conditioning import FlashConcatConditioning
from .demo_models import SHIPPED_ADAPTERS, SHIPPED_LORAS
from .face_swap import FlashFaceSwapPrepare
from .inpaint import FlashInpaintPrepare, FlashInpaintStitch
from .loaders import FlashDemoModels, FlashLoraLoader
from .lora_stack import FlashLoraStack
from .sampling import FlashSampler, FlashSamplerSelect, FlashScheduler
from .upscale import FlashUpscale

NODES: list[type[io.ComfyNode]] = [
    FlashDemoModels,
    FlashLoraLoader,
    FlashLoraStack,
    FlashSampler,
    FlashScheduler,
    FlashSamplerSelect,
    FlashInpaintPrepare,
    FlashInpaintStitch,
    FlashFaceSwapPrepare,
    FlashConcatConditioning,
    FlashUpscale,
    FlashCompare,
    FlashAdapterApply,
]


class FlashExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes; every loader, core's too, gets to see the LoRAs and the adapters that ship with the demo.

        Registered here because ComfyUI 0.3.75 never calls ``on_load``.
        """
        folder_paths.add_model_folder_path("loras", str(SHIPPED_LORAS))
        folder_paths.add_model_folder_path("controlnet", str(SHIPPED_ADAPTERS))
        return NODES
