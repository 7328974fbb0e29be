"""Flash LoRA Loader: one few-step LoRA into a model."""

from __future__ import annotations

from dataclasses import replace

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..shared.inputs import allow_partial_input, files_fingerprint, strength_input
from ..shared.page import card
from ..shared.schema import node_schema, show_text
from .loaded import LOADED_KEY, check_single_flash
from .patches import apply_lora, read_chosen
from .presets import attach, face, recognise_file, sampling_lines


class FlashLoraLoader(io.ComfyNode):
    """Load a few-step LoRA into a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="loaders",
            node_id="FlashLoraLoader",
            display_name="Flash LoRA Loader",
            search_aliases=[
                "lora",
                "load lora",
                "few-step lora",
                "fast lora",
                "lcm lora",
                "turbo lora",
                "lightning lora",
                "hyper sd lora",
                "dmd2 lora",
                "tcd lora",
                "qwen lightning",
                "flash diffusion",
            ],
            description="Load a few-step (Flash) LoRA of any format at its trained scale, or explain why it does not "
            "fit.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was made for, or a fine-tune of it."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A .safetensors file from models/loras, or a LoRA of the demo.",
                ),
                strength_input(
                    "strength",
                    "1 as in training; 0 leaves the model unchanged. Hyper-SD3 and Hyper-FLUX need .125, as "
                    "the report says.",
                ),
                allow_partial_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the LoRA, and with its timesteps for Flash Sampler."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Base, rank, alpha, matched layers, left-out layers, trained steps, preset.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
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
        recognised = recognise_file(file, lora_name, model)
        warned = attach(patched, file, recognised)
        report = replace(report, sampling=sampling_lines(recognised, file, strength, model))
        if recognised is not None:
            show_text(cls, face(recognised, strength))
        rows = report.rows(strength)
        if recognised is not None:
            rows.append(("preset", f"{recognised.name}, {recognised.how}"))
        return io.NodeOutput(patched, "\n".join([report.text(), *warned]), ui=card(rows))
