"""Recognise a published few-step LoRA by the name of its file, or by a name in its header."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from .preset import Preset, in_words
from .table import PRESETS

# Names that many downloads share: the folder's name counts then.
SHARED_NAMES = ("pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model")

# Header fields in which training and conversion tools keep a file's name.
TITLES = ("modelspec.title", "ss_output_name")

# What uploaders add behind a name: precision, rank, version, tool.
_ADDED = r"lora|loras|bf16|fp16|fp32|fp8|rank ?\d+|r\d+|v\d+(?: \d+)?|converted|comfyui|pytorch|weights"
TAIL = rf"(?: (?:{_ADDED}))*"

# {family: (layers, values)} of most of them: every attention, feed-forward and convolution layer, with rank 64.
# LCM-LoRA's card counts 197 M values for SDXL; Hyper-SD's, DMD2's, TCD's and PCM's files are as large.
# A test counts both numbers on diffusers' networks.
LAYOUTS: Mapping[str, tuple[int, int]] = {"sd15": (278, 67_252_224), "sdxl": (788, 196_751_360)}
LAYOUT_RANK = 64


@dataclass(frozen=True)
class Recognised:
    """A LoRA that was taken for one of a preset.

    Attributes:
        preset: of its kind.
        steps: the step count that the file is made for, or None for a file of several step counts.
        how: the reason: "by its file name".
    """

    preset: Preset
    steps: int | None
    how: str

    @property
    def name(self) -> str:
        """``SDXL-Lightning, 4 steps``."""
        if self.steps is None:
            return self.preset.title
        return f"{self.preset.title}, {self.steps} step{'' if self.steps == 1 else 's'}"

    def advice(self, strength: float | None = None) -> tuple[str, ...]:
        """Return a report's lines: what the LoRA was taken for, how Flash Sampler samples it, what to set, the source.

        Args:
            strength: of the LoRA, if it is known; another one than the preset's is said.
        """
        preset = self.preset
        steps = self.steps or (4 if 4 in preset.steps else preset.steps[0])
        lines = [
            f"preset: taken for {self.name}, {self.how}",
            f"Flash Sampler's 'auto' samples it so: {preset.noise_in_words}; another preset can be chosen there",
            f"set there: steps {steps}, guidance {in_words(preset.guidance_for(steps))}",
        ]
        if preset.distilled_guidance is not None:
            lines.append(f"set in FluxGuidance: guidance {preset.distilled_guidance:g}")
        lines += self.strength_note(preset.strength if strength is None else strength)
        if preset.note:
            lines.append(f"note: {preset.note}")
        return (*lines, f"source: {preset.source}")

    def strength_note(self, strength: float) -> list[str]:
        """Return a line where ``strength`` is not the preset's; else nothing."""
        if strength == self.preset.strength:
            return []
        return [
            f"note: {self.preset.title} is made for strength {self.preset.strength:g}; here strength is {strength:g}"
        ]


def plain_name(text: str) -> str:
    """Return a name in lower case, with one space for every run of other characters than letters and digits.

    The ending of a file is left out: ``SDXL-Lightning_4step_lora.safetensors`` is ``sdxl lightning 4step lora``.
    """
    return " ".join(re.findall(r"[a-z0-9]+", re.sub(r"\.(safetensors|sft)$", "", text.lower())))


def recognise(file_name: str, header: Mapping[str, str], base: str | None) -> Recognised | None:
    """Return the kind of few-step LoRA that a file is, or None.

    A name must match as a whole: "sdxl_lightning_4step_lora_fp16" does, "lightning_strike_style" and
    "anime_lcm_lora_sdxl" do not. A LoRA for another family than the preset's is not taken for one.

    Args:
        file_name: the path below the folder of LoRAs.
        header: the file's header strings.
        base: the key of the family that the LoRA fits; None is no family, and then nothing is recognised.
    """
    path = PurePath(file_name.replace("\\", "/"))
    if path.stem in SHARED_NAMES:
        names = [(path.parent.name, "by its folder's name")]
    else:
        names = [(path.name, "by its file name")]
    names += [(header[field], "by the name in its header") for field in TITLES if header.get(field)]
    for name, how in names:
        for preset in PRESETS:
            steps = _steps_in(plain_name(name), preset, base)
            if steps is not None:
                return Recognised(preset, steps or None, how)
    return None


def _steps_in(name: str, preset: Preset, base: str | None) -> int | None:
    """Return the step count in a name of the preset's, 0 for a name without one, or None for another name or family."""
    if base not in preset.families:
        return None
    for pattern in preset.names:
        met = re.fullmatch(f"(?:{pattern.pattern}){TAIL}", name)
        if met is None:
            continue
        told = {group for group, text in met.groupdict().items() if text}
        steps = int(met["steps"]) if "steps" in told else 0
        if told <= {"steps", base} and steps in (0, *preset.steps):
            return steps
    return None


def usual_layout(base: str | None, ranks: tuple[int, ...], layers: int, values: int) -> bool:
    """Return whether a LoRA adapts the layers that most few-step LoRAs of its family adapt, with their rank."""
    return ranks == (LAYOUT_RANK,) and LAYOUTS.get(base or "") == (layers, values)
