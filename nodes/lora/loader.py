"""Flash LoRA Loader: one few-step LoRA into a model."""

from __future__ import annotations

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..shared.inputs import allow_partial_input, files_fingerprint, strength_input
from ..shared.model_facts import METADATA_KEY
from ..shared.schema import node_schema
from .loaded import LOADED_KEY, check_single_flash
from .patches import apply_lora, read_chosen


class FlashLoraLoader(io.ComfyNode):
    """Load a few-step LoRA into a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="FlashLoraLoader",
            display_name="Flash LoRA Loader",
            search_aliases=["lora", "load lora", "few-step lora", "lcm lora", "turbo lora", "flash diffusion"],
            description="Load a few-step (Flash) LoRA of any format at its trained scale, or explain why it does not "
            "fit.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was made for, or a fine-tune of it."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A .safetensors file from models/loras, or a LoRA of the demo.",
                ),
                strength_input("strength", "1 as in training; 0 leaves the model unchanged."),
                allow_partial_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the LoRA, and with its timesteps for Flash Sampler."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Base, rank, alpha, matched layers, left-out layers, trained steps.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: object) -> str:
        """Change when the file was replaced."""
        return files_fingerprint("loras", [lora_name])

    @classmethod
    def execute(
        cls, model: ModelPatcher, lora_name: str, strength: float, allow_partial: bool = False
    ) -> io.NodeOutput:
        """Patch a clone of the model; see :func:`~.patches.apply_lora`."""
        if strength == 0:
            return io.NodeOutput(model, "strength 0: the model is unchanged")
        file = read_chosen(lora_name)
        if file.metadata is not None:
            check_single_flash(model, model.get_attachment(LOADED_KEY) or (), [lora_name])
        patched, report = apply_lora(file, model, strength, allow_partial)
        if file.metadata is not None:
            patched.set_attachments(METADATA_KEY, file.metadata)
        return io.NodeOutput(patched, report.text())
