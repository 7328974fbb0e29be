"""Several LoRAs at once: one Flash LoRA and style LoRAs, with one report that says where they fight."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import comfy.lora
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.v0_0_2 import io

from ...flash_core.lora import LoraError, LoraFile, LoraModule, flat_name, merge, read_lora
from ...flash_core.lora.matching import same_weight
from ...flash_core.lora.overlap import SIZE_LIMIT, Overlap, common_names, cosine, norm, overlap, suggested_strength
from ..shared.model_facts import METADATA_KEY
from ..shared.schema import advanced, node_schema, show_text
from .patches import LoraMismatch, Target, apply_lora, fit, layer_shape, lora_patch

NONE = "none"
STYLES = 4  # slots; more by connecting one stack to the next
LOADED_KEY = "flash_lora_stack"  # the ModelPatcher attachment that lists what stacks before this one have loaded

# Two styles whose updates point the same way by this much are told to add up, or to cancel where they are opposed.
STYLE_COSINE = 0.3


@dataclass(frozen=True)
class Loaded:
    """A LoRA that is in the model.

    Attributes:
        name: as the user chose it.
        flash: whether it is the few-step one.
        modules: its layers by common names.
    """

    name: str
    flash: bool
    strength: float
    modules: Mapping[str, LoraModule]


class FlashLoraStack(io.ComfyNode):
    """A few-step LoRA and style LoRAs into a model."""

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
                    tooltip="A style, subject or detail LoRA of any spelling, or none. The order does not matter.",
                ),
                io.Float.Input(
                    f"style_{slot}_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    round=0.01,
                    optional=True,
                    tooltip="For the model and, where clip is connected, for the text encoder. 0 leaves it out. The "
                    "report suggests a lower one where it fights with the Flash LoRA.",
                ),
            ]
        return node_schema(
            node_id="FlashLoraStack",
            display_name="Flash LoRA Stack",
            search_aliases=["lora stack", "multi lora", "style lora", "load lora", "lcm lora", "flash diffusion"],
            description="A few-step (Flash) LoRA together with style LoRAs; says where they fight and what to lower.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRAs were made for, or another Flash LoRA Stack."),
                io.Combo.Input(
                    "flash_lora",
                    options=files,
                    default=NONE,
                    tooltip="The few-step LoRA: one for the whole model. None where the model has one already.",
                ),
                io.Float.Input(
                    "flash_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    round=0.01,
                    tooltip="1 is what it was trained for. Lower the styles before this.",
                ),
                *slots,
                advanced(
                    io.Boolean.Input,
                    "allow_partial",
                    default=False,
                    optional=True,
                    tooltip="Load LoRAs of which only a part fits this model. The report lists what was left out.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Connect it for style LoRAs that change the text encoder as well; without, that part is "
                    "left out.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with all LoRAs. It tells Flash Sampler its timesteps."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="The text encoder with the LoRAs' part for it, where one is connected."
                ),
                io.String.Output(
                    display_name="report", tooltip="What was loaded, how far the LoRAs meet, and what to lower."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Load again where a file was replaced; a name that comes over a link is None, and then its node decides."""
        names = [inputs.get("flash_lora"), *(inputs.get(f"style_{slot}") for slot in range(1, STYLES + 1))]
        paths = [folder_paths.get_full_path_or_raise("loras", name) for name in names if name not in (None, NONE)]
        return " ".join(f"{path} {os.stat(path).st_mtime_ns}" for path in paths)

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
        # One at strength 0 changes nothing and is no second Flash LoRA.
        files = [
            (name, read_lora(folder_paths.get_full_path_or_raise("loras", name)), strength, few_step)
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
            try:
                model, clip, modules, text = load(file, model, clip, strength, allow_partial)
            except (LoraMismatch, LoraError) as error:
                raise LoraMismatch(f"{name}: {error}") from error
            if flash and file.metadata is not None:
                model.set_attachments(METADATA_KEY, file.metadata)
            loaded.append(Loaded(name, flash, strength, common_names(modules)))
            kind = "Flash LoRA" if flash else "LoRA"
            paragraphs.append(f"{kind} {name}, strength {strength:g}\n{text}")
        model = model.clone()  # which it is already, unless all LoRAs were for the text encoder only
        model.set_attachments(LOADED_KEY, tuple(loaded))
        meeting = describe_meeting(loaded, model)
        warnings = [line for line in meeting if line.startswith("WARNING")]
        show_text(cls, "\n".join(warnings) or f"{len(loaded)} LoRA{'s' if len(loaded) > 1 else ''}, no conflict")
        return io.NodeOutput(model, clip, "\n\n".join([*paragraphs, "\n".join(meeting)]).strip())


def is_flash(file: LoraFile, few_step_slot: bool) -> bool:
    """Whether this is the LoRA that makes the model few-step: by the slot it is in, or by what it says of itself."""
    return few_step_slot or file.metadata is not None


def check_single_flash(model: ModelPatcher, before: Sequence[Loaded], names: Sequence[str]) -> None:
    """Raise ValueError where the model would have two Flash LoRAs, naming both.

    Args:
        before: what earlier stacks have loaded.
        names: the Flash LoRAs that are to be loaded now.
    """
    present = [one.name for one in before if one.flash]
    metadata = model.get_attachment(METADATA_KEY)
    if metadata is not None and not present:
        present = [f"{metadata.title!r} (which the model brings)"]
    found = [*present, *names]
    if len(found) > 1:
        raise ValueError(
            f"These are two Flash LoRAs: {found[0]} and {found[1]}. Each makes the model few-step on its own, and "
            "together they overdo it: keep one, and set the other to 'none' (or remove its loader)."
        )


def load(
    file: LoraFile, model: ModelPatcher, clip: CLIP | None, strength: float, allow_partial: bool
) -> tuple[ModelPatcher, CLIP | None, Mapping[str, LoraModule], str]:
    """Clones with one LoRA, which of its layers the model got, and the report in words.

    Raises:
        LoraMismatch: it is for another architecture, or only for a text encoder that is not connected.
    """
    lines = []
    modules = file.modules
    if modules:
        # The text encoder's part is told of below, by what becomes of it here.
        patched, report = apply_lora(dataclasses.replace(file, text_encoder={}), model, strength, allow_partial)
        if not report.complete:
            modules = {name: modules[name] for name in fit(file, model)[0].matched}
        model = patched
        lines.append(report.text())
    elif clip is None:
        raise LoraMismatch(
            f"it changes the text encoder only ({len(file.text_encoder)} layers), and no text encoder is connected. "
            "Connect the checkpoint's CLIP to 'clip', and go on with the 'clip' that comes out."
        )
    layers = len(file.text_encoder)
    if layers and clip is None:
        lines.append(f"left out: its {layers} text encoder layers; connect 'clip' to use them")
    elif layers:
        clip, matched = apply_to_clip(file, clip, strength)
        missing = "" if matched == layers else " (WARNING: the others have no place in this text encoder)"
        lines.append(f"text encoder: {matched}/{layers} layers{missing}")
    return model, clip, modules, "\n".join(lines)


def apply_to_clip(file: LoraFile, clip: CLIP, strength: float) -> tuple[CLIP, int]:
    """A clone of the text encoder with the LoRA's part for it, and how many of its layers that has.

    Raises:
        LoraMismatch: it has none of them.
        LoraError: numbers that are not finite.
    """
    targets = {
        flat_name(key): target for key, target in comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}).items()
    }
    patches = {}
    for name, module in file.text_encoder.items():
        target = _find(targets, name)
        shape = None if target is None else layer_shape(clip.patcher, target)
        if target is None or shape is None or not same_weight(shape, module.shape):
            continue
        if not (torch.isfinite(module.up).all() and torch.isfinite(module.down).all()):
            raise LoraError(f"text encoder layer {module.path} holds values that are not finite numbers")
        patches[target] = lora_patch(name, module)
    if not patches:
        name, module = next(iter(file.text_encoder.items()))
        raise LoraMismatch(
            f"none of its {len(file.text_encoder)} text encoder layers has its place in this CLIP (e.g. {name}, "
            f"{' x '.join(map(str, module.shape))}). Connect the CLIP of the checkpoint that the LoRA was made for, or "
            "none, which leaves that part out."
        )
    patched = clip.clone()
    patched.add_patches(patches, strength)
    return patched, len(patches)


def _find(targets: Mapping[str, Target], name: str) -> Target | None:
    """A text encoder's layer, by the file's flat name: PEFT puts a prefix before it, and one alone has none."""
    bare = name.removeprefix("base_model_model_")
    return next((targets[key] for key in (name, bare, f"text_encoder_{bare}") if key in targets), None)


def describe_meeting(loaded: Sequence[Loaded], model: ModelPatcher) -> list[str]:
    """How the LoRAs meet, a line each, and a line that begins with WARNING where that is too much."""
    flash = next((one for one in loaded if one.flash), None)
    styles = [one for one in loaded if not one.flash and one.modules]
    lines = []
    if flash is None and model.get_attachment(METADATA_KEY) is not None and styles:
        lines.append(
            "The model brings its Flash LoRA from another loader: choose it here instead, and its overlap with the "
            "styles is measured."
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
                f"WARNING: {style.name} outweighs {flash.name} in the layers that both change ({met.size:.2f} times "
                f"its update, most in {met.largest}): few-step pictures may turn soft or break. Suggested strength: "
                f"{better:g}"
            )
    if len(styles) > 1 and max(sizes) <= SIZE_LIMIT:  # else the above is to be put right first
        together = merge([(style.modules, style.strength) for style in styles])
        size = overlap(flash.modules, together, flash.strength).size
        if size > SIZE_LIMIT:
            better = ", ".join(f"{style.name} {suggested_strength(style.strength, size):g}" for style in styles)
            lines.append(
                f"WARNING: the styles together outweigh {flash.name} in the layers that they share with it "
                f"({size:.2f} times its update). Suggested strengths: {better}"
            )
    return lines


def _facts(met: Overlap) -> str:
    if not met.layers:
        return f"shares no layer with the Flash LoRA (it changes {met.others} others)"
    shared = f"shares {len(met.layers)} of its {len(met.layers) + met.others} layers with the Flash LoRA"
    if not met.first:
        return f"{shared}, which changes nothing there"
    return (
        f"{shared}; there its update is {met.size:.2f} times as large, {met.inside:.0%} of it in the Flash LoRA's own "
        f"directions, cosine {met.cosine:+.2f}"
    )


def _between_styles(one: Loaded, other: Loaded, angle: float) -> str:
    """Two styles that push the same way, with the strengths at which they are as strong as if unrelated; or opposed."""
    if angle < 0:
        return (
            f"WARNING: {one.name} and {other.name} work against each other (cosine {angle:+.2f}): each takes back what "
            "the other does. Use one of them."
        )
    first, second = norm(one.modules) * one.strength, norm(other.modules) * other.strength
    unrelated = first**2 + second**2
    factor = math.sqrt(unrelated / (unrelated + 2 * angle * abs(first * second)))
    return (
        f"WARNING: {one.name} and {other.name} push the same way (cosine {angle:+.2f}) and add up. Suggested "
        f"strengths: {one.strength * factor:.2f} and {other.strength * factor:.2f}"
    )
