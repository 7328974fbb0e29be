"""The ComfyUI nodes: thin V3 shells over flash_core, in rooms by use."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import ComfyExtension, io

from .control.nodes import FlashAdapterApply
from .demo.models import SHIPPED_ADAPTERS, SHIPPED_LORAS
from .demo.node import FlashDemoModels
from .distil.lora_output import FlashSaveLora
from .distil.nodes import FlashDistill
from .evaluate.node import FlashEvaluate
from .headless.nodes import FlashDistillHeadless, FlashDistillRuns
from .lora.loader import FlashLoraLoader
from .lora.stack import FlashLoraStack
from .picture.concat import FlashConcatConditioning
from .picture.face_swap import FlashFaceSwapPrepare
from .picture.inpaint import FlashInpaintPrepare, FlashInpaintStitch
from .picture.upscale import FlashUpscale
from .sampling.compare import FlashCompare
from .sampling.nodes import FlashSampler, FlashSamplerSelect, FlashScheduler

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
    FlashDistill,
    FlashSaveLora,
    FlashEvaluate,
    FlashDistillHeadless,
    FlashDistillRuns,
]


class FlashExtension(ComfyExtension):
    """The extension's list of nodes for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes, and add the demo's LoRAs and adapters to the lists of all loaders, core's too.

        This is the place for it because ComfyUI 0.3.75 never calls ``on_load``.
        """
        folder_paths.add_model_folder_path("loras", str(SHIPPED_LORAS))
        folder_paths.add_model_folder_path("controlnet", str(SHIPPED_ADAPTERS))
        return NODES
