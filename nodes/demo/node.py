"""The demo's models as a node."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import io

from ..shared.schema import node_schema
from .models import TASK_ADAPTERS, TEXT_TO_IMAGE, build_demo, demo_tasks


class FlashDemoModels(io.ComfyNode):
    """The embedded teacher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="FlashDemoModels",
            display_name="Flash Demo Models",
            search_aliases=["demo checkpoint", "emoji", "load checkpoint", "tiny model", "flash diffusion"],
            description="A small text-to-image model that ships with this extension: emoji of 128 x 128 pixels.",
            inputs=[
                io.Combo.Input(
                    "task",
                    options=demo_tasks(),
                    default=TEXT_TO_IMAGE,
                    optional=True,
                    tooltip="What the model is for. Other tasks are the same model with further input channels: "
                    "inpainting takes Flash Inpaint Prepare, face-swap Flash Face Swap Prepare, super-resolution Flash "
                    "Upscale.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The demo's UNet (v-prediction). Works with every core node."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="Its text encoder: up to 22 tokens, short names work best."
                ),
                io.Vae.Output(
                    display_name="vae", tooltip="Its VAE: 8 pixels to a latent position, as Stable Diffusion's."
                ),
            ],
        )

    @classmethod
    def execute(cls, task: str = TEXT_TO_IMAGE) -> io.NodeOutput:
        """MODEL, CLIP and VAE; see :mod:`.demo_models`."""
        adapter = None if task == TEXT_TO_IMAGE else TASK_ADAPTERS / f"{task}.safetensors"
        model, clip, vae = build_demo(embedding_directory=folder_paths.get_folder_paths("embeddings"), adapter=adapter)
        return io.NodeOutput(model, clip, vae)
