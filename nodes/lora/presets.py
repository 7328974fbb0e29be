"""What a loader says about a LoRA without metadata: the preset that it was taken for, or how to choose one."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ...flash_core.lora import LoraFile, base_of
from ...flash_core.presets import Recognised, recognise, usual_layout
from ..shared.model_facts import METADATA_KEY, PRESET_KEY, model_base


def recognise_file(file: LoraFile, name: str, model: ModelPatcher) -> Recognised | None:
    """Return the kind of published few-step LoRA that a file is taken for; None for one with metadata of its own.

    Args:
        name: the file's path below the folder of LoRAs.
        model: the MODEL that its layers fit; its family counts where the layers belong to several.
    """
    if file.metadata is not None:
        return None
    return recognise(name, file.header, base_of(file) or model_base(model))


def sampling_lines(
    recognised: Recognised | None, file: LoraFile, strength: float, model: ModelPatcher
) -> tuple[str, ...]:
    """Return the report's lines on how Flash Sampler samples a file; none for a file with metadata.

    Args:
        model: the MODEL before it gets the file; it may have a few-step LoRA already.
    """
    if file.metadata is not None:
        return ()
    if recognised is None:
        present = few_step_name(model)
        if present is not None:
            return (f"no few-step LoRA by its header and name: Flash Sampler's 'auto' goes on to follow {present}",)
        return (_unknown(file),)
    return recognised.advice(strength)


def few_step_name(model: ModelPatcher) -> str | None:
    """Return the name of the few-step LoRA whose facts are in the model, or None."""
    metadata, recognised = model.get_attachment(METADATA_KEY), model.get_attachment(PRESET_KEY)
    if metadata is not None:
        return repr(metadata.title)
    return None if recognised is None else str(recognised.name)


def face(recognised: Recognised, strength: float) -> str:
    """Return the lines for the loader's face."""
    return "\n".join([f"{recognised.name} ({recognised.how})", *recognised.strength_note(strength)])


def _unknown(file: LoraFile) -> str:
    text = "no Flash metadata and no known name: Flash Sampler uses trailing timesteps and fresh noise"
    values = sum(module.values for module in file.modules.values())
    if usual_layout(base_of(file), file.ranks, len(file.modules), values):
        text += ". Its layers and rank are those of LCM-LoRA, SDXL-Lightning, Hyper-SD, DMD2, TCD and PCM"
    return f"{text}. If it is a few-step LoRA, choose its preset in Flash Sampler"


def attach(model: ModelPatcher, file: LoraFile, recognised: Recognised | None) -> tuple[str, ...]:
    """Put the sampler's facts of a few-step LoRA into a clone that has its patches.

    The last few-step LoRA counts: a model has either metadata or a preset.

    Returns:
        A WARNING line if the model already had the facts of another few-step LoRA; else nothing.
    """
    if file.metadata is None and recognised is None:
        return ()
    present = few_step_name(model)
    model.remove_attachments(METADATA_KEY)
    model.remove_attachments(PRESET_KEY)
    if file.metadata is not None:
        model.set_attachments(METADATA_KEY, file.metadata)
    else:
        model.set_attachments(PRESET_KEY, recognised)
    if present is None:
        return ()
    return (
        f"WARNING: the model already has a few-step LoRA, {present}. Two of them seldom work together; Flash Sampler's "
        "'auto' follows the one that was loaded last",
    )
