"""Loading: a Flash LoRA into any model, and the demo's own models."""

from __future__ import annotations

import os

import comfy.utils
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ...flash_core.lora import read_lora
from ..shared.model_facts import METADATA_KEY
from ..shared.schema import advanced, node_schema
from .patches import apply_lora


class FlashLoraLoader(io.ComfyNode):
    """A few-step LoRA into a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="FlashLoraLoader",
            display_name="Flash LoRA Loader",
            search_aliases=["lora", "load lora", "few-step lora", "lcm lora", "turbo lora", "flash diffusion"],
            description="Loads a few-step (Flash) LoRA of any dialect at its true scale, or says why it does not fit.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was made for, or a fine-tune of it."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A .safetensors file from models/loras, or the demo's LoRA that ships with this extension.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    round=0.01,
                    tooltip="1 is what it was trained for; 0 leaves the model unchanged.",
                ),
                advanced(
                    io.Boolean.Input,
                    "allow_partial",
                    default=False,
                    optional=True,
                    tooltip="Load a LoRA of which only a part fits this model. The report lists what was left out.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with the LoRA. It also tells Flash Sampler its timesteps."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was loaded: base, rank, alpha, matched layers, what was left out, trained steps.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: object) -> str:
        """Load again where the file was replaced, as it is after further training."""
        if lora_name is None:  # comes over a link, and then its node decides
            return ""
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        return f"{path} {os.stat(path).st_mtime_ns}"

    @classmethod
    def execute(
        cls, model: ModelPatcher, lora_name: str, strength: float, allow_partial: bool = False
    ) -> io.NodeOutput:
        """Patch a clone of the model; see :func:`~.lora_patches.apply_lora`."""
        if strength == 0:
            return io.NodeOutput(model, "strength 0: the model is unchanged")
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        file = read_lora(path, mapped=not getattr(comfy.utils, "DISABLE_MMAP", False))  # --disable-mmap
        patched, report = apply_lora(file, model, strength, allow_partial)
        if file.metadata is not None:
            patched.set_attachments(METADATA_KEY, file.metadata)
        return io.NodeOutput(patched, report.text())
