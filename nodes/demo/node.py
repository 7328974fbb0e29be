"""Flash Demo Models: the demo's teachers as a node."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import io

from ..shared.schema import node_schema
from .models import TASK_ADAPTERS, TEXT_TO_IMAGE, build_demo, demo_tasks


class FlashDemoModels(io.ComfyNode):
    """Load the embedded teacher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="loaders",
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
                    tooltip="The model's task. Use inpainting with Flash Inpaint Prepare, face-swap with Flash Face "
                    "Swap Prepare, and super-resolution with Flash Upscale.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The demo's UNet (v-prediction). It works with every core node."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="The text encoder: up to 22 tokens. Short names work best."
                ),
                io.Vae.Output(
                    display_name="vae", tooltip="The VAE: 8 pixels for each latent position, as in Stable Diffusion."
                ),
            ],
        )

    @classmethod
    def execute(cls, task: str = TEXT_TO_IMAGE) -> io.NodeOutput:
        """Build MODEL, CLIP and VAE with :func:`~.models.build_demo`."""
        adapter = None if task == TEXT_TO_IMAGE else TASK_ADAPTERS / f"{task}.safetensors"
        model, clip, vae = build_demo(embedding_directory=folder_paths.get_folder_paths("embeddings"), adapter=adapter)
        return io.NodeOutput(model, clip, vae)
