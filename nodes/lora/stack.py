"""Flash LoRA Stack: one Flash LoRA and several style LoRAs, with a report on their conflicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import comfy.lora
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.v0_0_2 import io

from ...flash_core.lora import LoraError, LoraFile, LoraModule, flat_name, merge
from ...flash_core.lora.matching import same_weight
from ...flash_core.lora.overlap import SIZE_LIMIT, Overlap, common_names, cosine, norm, overlap, suggested_strength
from ..shared.inputs import NONE, allow_partial_input, files_fingerprint, strength_input
from ..shared.page import text_card
from ..shared.schema import count, node_schema, show_text
from .loaded import LOADED_KEY, Loaded, check_single_flash
from .patches import LoraMismatch, Target, apply_lora, fit, layer_shape, lora_patch, read_chosen, whole_patches
from .presets import attach, few_step_name, recognise_file, sampling_lines

STYLES = 4  # slots; connect one stack to the next for more

# From this |cosine| between two styles' updates on, the report warns: they add up (> 0) or cancel (< 0).
STYLE_COSINE = 0.3


class FlashLoraStack(io.ComfyNode):
    """Load a few-step LoRA and style LoRAs into a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [NONE, *folder_paths.get_filename_list("loras")]
        slots: list[io.Input] = []
        for slot in range(1, STYLES + 1):
            slots += [
                io.Combo.Input(
                    f"style_{slot}",
                    options=files,
                    default=NONE,
                    optional=True,
                    tooltip="A style, subject or detail LoRA of any format, or none. The order does not matter.",
                ),
                strength_input(
                    f"style_{slot}_strength",
                    "For the model, and for the text encoder if clip is connected. 0 leaves the LoRA out. Lower it "
                    "if the report warns.",
                    optional=True,
                ),
            ]
        return node_schema(
            branch="loaders",
            node_id="FlashLoraStack",
            display_name="Flash LoRA Stack",
            search_aliases=["lora stack", "multi lora", "style lora", "load lora", "lcm lora", "flash diffusion"],
            description="Load a few-step (Flash) LoRA together with style LoRAs, and report which strength to lower.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRAs were made for, or another Flash LoRA Stack."),
                io.Combo.Input(
                    "flash_lora",
                    options=files,
                    default=NONE,
                    tooltip="The few-step LoRA. Choose none if the model already has one: only one is allowed.",
                ),
                strength_input("flash_strength", "1 as in training. Lower the styles before you lower this."),
                *slots,
                allow_partial_input(),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Connect it for style LoRAs that also change the text encoder. Without it, their text "
                    "encoder layers are left out.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with all LoRAs, and with its timesteps for Flash Sampler."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="The text encoder with the LoRAs; empty if clip is not connected."
                ),
                io.String.Output(
                    display_name="report", tooltip="The loaded LoRAs, their overlap, and which strength to lower."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Change when a file was replaced."""
        slots = ("flash_lora", *(f"style_{slot}" for slot in range(1, STYLES + 1)))
        return files_fingerprint("loras", [inputs.get(slot) for slot in slots])

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        flash_lora: str,
        flash_strength: float,
        allow_partial: bool = False,
        clip: CLIP | None = None,
        **styles: Any,
    ) -> io.NodeOutput:
        """Patch clones of the model and the text encoder.

        Args:
            styles: ``style_1``, ``style_1_strength``, ...
        """
        chosen = [(flash_lora, flash_strength, True)]
        for slot in range(1, STYLES + 1):
            chosen.append((styles.get(f"style_{slot}", NONE), styles.get(f"style_{slot}_strength", 1.0), False))
        # A LoRA at strength 0 changes nothing, so it does not count as a second Flash LoRA.
        files = [
            (name, read_chosen(name), strength, few_step)
            for name, strength, few_step in chosen
            if name != NONE and strength != 0
        ]
        if not files:
            return io.NodeOutput(model, clip, "no LoRA is chosen: the model is unchanged")
        before: tuple[Loaded, ...] = model.get_attachment(LOADED_KEY) or ()
        check_single_flash(model, before, [name for name, file, _, few_step in files if is_flash(file, few_step)])
        loaded, paragraphs = list(before), []
        for name, file, strength, few_step in files:
            flash = is_flash(file, few_step)
            recognised = recognise_file(file, name, model) if flash else None
            sampling = sampling_lines(recognised, file, strength, model) if flash else ()
            try:
                model, clip, modules, text = load(file, model, clip, strength, allow_partial, sampling)
            except (LoraMismatch, LoraError) as error:
                raise LoraMismatch(f"{name}: {error}") from error
            if flash and (file.modules or file.differences):
                text = "\n".join([text, *attach(model, file, recognised)])
            loaded.append(Loaded(name, flash, strength, common_names(modules)))
            kind = "Flash LoRA" if flash else "LoRA"
            paragraphs.append(f"{kind} {name}, strength {strength:g}\n{text}")
        model = model.clone()  # not yet a clone if all LoRAs were for the text encoder only
        model.set_attachments(LOADED_KEY, tuple(loaded))
        meeting = describe_meeting(loaded, model)
        warnings = [line for line in meeting if line.startswith("WARNING")]
        summary = "\n".join(warnings) or f"{count(len(loaded), 'LoRA')}, no conflict"
        show_text(cls, summary)
        report = "\n\n".join([*paragraphs, "\n".join(meeting)]).strip()
        return io.NodeOutput(model, clip, report, ui=text_card(summary))


def is_flash(file: LoraFile, few_step_slot: bool) -> bool:
    """Return whether a LoRA makes the model few-step: it is in the Flash slot, or its metadata says so."""
    return few_step_slot or file.metadata is not None


def load(
    file: LoraFile,
    model: ModelPatcher,
    clip: CLIP | None,
    strength: float,
    allow_partial: bool,
    sampling: tuple[str, ...] = (),
) -> tuple[ModelPatcher, CLIP | None, Mapping[str, LoraModule], str]:
    """Add one LoRA to clones of the model and the text encoder.

    Args:
        sampling: the report's lines on how it is sampled.

    Returns:
        ``(model, clip, modules, text)``: the clones, the layers that the model got, and the report.

    Raises:
        LoraMismatch: the LoRA is for another architecture, or only for a text encoder that is not connected.
    """
    lines = []
    modules = file.modules
    layers = len(file.text_encoder) + len(file.text_encoder_differences)
    if modules or file.differences:
        # The report on the text encoder's layers follows below.
        patched, report = apply_lora(file.without_text_encoder(), model, strength, allow_partial)
        if not report.complete:
            modules = {name: modules[name] for name in fit(file, model)[0].matched}
        model = patched
        lines.append(replace(report, sampling=sampling).text())
    elif clip is None:
        raise LoraMismatch(
            f"it changes only the text encoder ({count(layers, 'layer')}), but no text encoder is connected. "
            "Connect the checkpoint's CLIP to 'clip', and use the 'clip' output for the prompts."
        )
    if layers and clip is None:
        lines.append(f"left out: {count(layers, 'text encoder layer')}; connect 'clip' to use them")
    elif layers:
        clip, matched = apply_to_clip(file, clip, strength)
        missing = "" if matched == layers else " (WARNING: this text encoder does not have the other layers)"
        lines.append(f"text encoder: {matched}/{layers} layers{missing}")
    return model, clip, modules, "\n".join(lines)


def apply_to_clip(file: LoraFile, clip: CLIP, strength: float) -> tuple[CLIP, int]:
    """Clone the text encoder, add the LoRA's patches, and count the layers that fit.

    Raises:
        LoraMismatch: no layer fits.
        LoraError: a layer holds NaN or infinite values.
    """
    targets = {
        flat_name(key): target for key, target in comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}).items()
    }
    patches: dict[Target, Any] = {}
    for name, module in file.text_encoder.items():
        target = _find(targets, name)
        shape = None if target is None else layer_shape(clip.patcher, target)
        if target is None or shape is None or not same_weight(shape, module.shape):
            continue
        if not (torch.isfinite(module.up).all() and torch.isfinite(module.down).all()):
            raise LoraError(f"text encoder layer {module.path} holds NaN or infinite values; download the file again")
        patches[target] = lora_patch(name, module)
    for difference in file.text_encoder_differences:
        name = flat_name(difference.path)
        target = _find(targets, name)
        whole, _ = whole_patches([difference], clip.patcher, {} if target is None else {name: target})
        if whole and not torch.isfinite(difference.values).all():
            raise LoraError(
                f"text encoder layer {difference.key} holds NaN or infinite values; download the file again"
            )
        patches |= whole
    if not patches:
        shapes = [(name, module.shape) for name, module in file.text_encoder.items()]
        shapes += [(one.key, tuple(one.values.shape)) for one in file.text_encoder_differences]
        name, expected = shapes[0]
        raise LoraMismatch(
            f"none of its {count(len(shapes), 'text encoder layer')} fits this CLIP (e.g. {name}, "
            f"{' x '.join(map(str, expected))}). Connect the CLIP of the checkpoint that the LoRA was made for. Or "
            "disconnect 'clip': then these layers are left out."
        )
    patched = clip.clone()
    patched.add_patches(patches, strength)
    return patched, len(patches)


def _find(targets: Mapping[str, Target], name: str) -> Target | None:
    """Find a text encoder's layer by the file's flat name, with PEFT's prefix, with ComfyUI's, or with neither."""
    bare = name.removeprefix("base_model_model_")
    return next((targets[key] for key in (name, bare, f"text_encoder_{bare}") if key in targets), None)


def describe_meeting(loaded: Sequence[Loaded], model: ModelPatcher) -> list[str]:
    """Describe the overlap of each style with the Flash LoRA, with a WARNING line for each conflict."""
    flash = next((one for one in loaded if one.flash), None)
    styles = [one for one in loaded if not one.flash and one.modules]
    lines = []
    if flash is None and few_step_name(model) is not None and styles:
        lines.append(
            "The Flash LoRA comes from another loader, so its overlap with the styles is not measured. Choose it in "
            "flash_lora instead."
        )
    if flash is not None:
        lines += _with_flash(flash, styles)
    for one, other in combinations(styles, 2):
        angle = cosine(one.modules, other.modules) * math.copysign(1.0, one.strength * other.strength)
        if abs(angle) >= STYLE_COSINE:
            lines.append(_between_styles(one, other, angle))
    return lines


def _with_flash(flash: Loaded, styles: Sequence[Loaded]) -> list[str]:
    lines, sizes = [], []
    for style in styles:
        met = overlap(flash.modules, style.modules, flash.strength, style.strength)
        sizes.append(met.size)
        lines.append(f"{style.name}: {_facts(met)}")
        if met.size > SIZE_LIMIT:
            better = suggested_strength(style.strength, met.size)
            lines.append(
                f"WARNING: {style.name} outweighs {flash.name} in the layers that both change: its update is "
                f"{met.size:.2f} times as large, most in {met.largest}. Few-step pictures may become soft or break. "
                f"Suggested strength: {better:g}"
            )
    if len(styles) > 1 and max(sizes) <= SIZE_LIMIT:  # else the user should first lower single styles
        together = merge([(style.modules, style.strength) for style in styles])
        size = overlap(flash.modules, together, flash.strength).size
        if size > SIZE_LIMIT:
            lower = ", ".join(f"{style.name} {suggested_strength(style.strength, size):g}" for style in styles)
            lines.append(
                f"WARNING: the styles together outweigh {flash.name} in the layers that they share with it: their "
                f"update is {size:.2f} times as large. Suggested strengths: {lower}"
            )
    return lines


def _facts(met: Overlap) -> str:
    if not met.layers:
        return f"shares no layer with the Flash LoRA (it changes {count(met.others, 'other layer')})"
    shared = f"shares {len(met.layers)} of its {len(met.layers) + met.others} layers with the Flash LoRA"
    if not met.first:
        return f"{shared}, but the Flash LoRA changes nothing there"
    return (
        f"{shared}; there its update is {met.size:.2f} times as large as the Flash LoRA's, {met.inside:.0%} of it in "
        f"the Flash LoRA's directions, cosine {met.cosine:+.2f}"
    )


def _between_styles(one: Loaded, other: Loaded, angle: float) -> str:
    """Warn of two styles that add up, with strengths at which they are as large as unrelated ones, or that cancel."""
    if angle < 0:
        return (
            f"WARNING: {one.name} and {other.name} work against each other (cosine {angle:+.2f}): each undoes a part "
            "of the other. Use one of them."
        )
    first, second = norm(one.modules) * one.strength, norm(other.modules) * other.strength
    unrelated = first**2 + second**2
    factor = math.sqrt(unrelated / (unrelated + 2 * angle * abs(first * second)))
    return (
        f"WARNING: {one.name} and {other.name} change the model in the same direction (cosine {angle:+.2f}) and add "
        f"up. Suggested strengths: {one.strength * factor:.2f} and {other.strength * factor:.2f}"
    )
