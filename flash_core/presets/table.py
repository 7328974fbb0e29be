"""The presets. Each fact comes from the address beside it, read in November 2026.

Guidance is ComfyUI's ``cfg``: diffusers' ``guidance_scale`` 0 and 1 both mean no guidance, which is 1 here.
"""

from __future__ import annotations

import re

from .preset import Preset

_CARD = "https://huggingface.co/"
HYPER = f"{_CARD}ByteDance/Hyper-SD"
PCM = f"{_CARD}wangfuyun/PCM_Weights"

_SD15 = r"(?P<sd15>sd ?v?1 ?5)"
_SDXL = r"(?P<sdxl>sdxl)"
_EITHER = rf"(?:{_SD15}|{_SDXL})"
_N = r"(?P<steps>\d+) ?steps?"


def _names(*patterns: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern) for pattern in patterns)


PRESETS: tuple[Preset, ...] = (
    Preset(
        "lcm",
        "LCM-LoRA",
        ("sd15", "sdxl"),
        "LCM",
        "reference",
        steps=tuple(range(2, 9)),
        guidance=(1.0, 2.0),
        # The cards of lcm-lora-sdv1-5 and lcm-lora-ssd-1b (SSD-1B is a smaller SDXL) say the same.
        source=f"{_CARD}latent-consistency/lcm-lora-sdxl",
        names=_names(rf"lcm lora (?:weights )?{_EITHER}", r"lcm lora (?P<sdxl>ssd 1b)", rf"lcm {_EITHER} lora"),
    ),
    Preset(
        "lightning",
        "SDXL-Lightning",
        ("sdxl",),
        "Euler",
        "trailing",
        steps=(2, 4, 8),
        source=f"{_CARD}ByteDance/SDXL-Lightning",
        names=_names(rf"sdxl lightning {_N}"),
    ),
    Preset(
        "hyper",
        "Hyper-SD",
        ("sd15", "sdxl"),
        "DDIM",
        "trailing",
        steps=(2, 4, 8),
        source=HYPER,
        names=_names(rf"hyper {_EITHER} {_N}", rf"{_EITHER} hyper sd {_N}"),
    ),
    Preset(
        "hyper-1",
        "Hyper-SD 1-step (unified)",
        ("sd15", "sdxl"),
        "TCD",
        "reference",
        steps=tuple(range(1, 9)),
        gamma=1.0,
        source=HYPER,
        names=_names(rf"hyper {_EITHER} 1 ?steps?", rf"{_EITHER} hyper sd 1 ?steps?"),
        note="With more than one step a lower gamma gives more detail: lower stochasticity.",
    ),
    Preset(
        "hyper-cfg",
        "Hyper-SD CFG",
        ("sd15", "sdxl"),
        "DDIM",
        "trailing",
        steps=(8, 12),
        guidance=(5.0, 8.0),
        source=HYPER,
        names=_names(rf"hyper {_EITHER} {_N} cfg", rf"{_EITHER} hyper sd {_N} cfg"),
    ),
    Preset(
        "hyper-sd3",
        "Hyper-SD3",
        ("sd3",),
        "flow Euler",
        "reference",
        steps=(4, 8, 16),
        guidance=(3.0, 7.0),
        guidance_at={4: (3.0, 3.0), 8: (5.0, 5.0), 16: (7.0, 7.0)},
        strength=0.125,
        source=HYPER,
        names=_names(rf"hyper sd3 {_N}(?: cfg)?"),
    ),
    Preset(
        "hyper-flux",
        "Hyper-FLUX",
        ("flux",),
        "flow Euler",
        "trailing",
        steps=(8, 16),
        distilled_guidance=3.5,
        strength=0.125,
        source=HYPER,
        names=_names(rf"hyper flux ?1 dev {_N}", rf"hyper flux {_N}"),
    ),
    Preset(
        "turbo-alpha",
        "FLUX.1-Turbo-Alpha",
        ("flux",),
        "flow Euler",
        "trailing",
        steps=(8,),
        distilled_guidance=3.5,
        source=f"{_CARD}alimama-creative/FLUX.1-Turbo-Alpha",
        names=_names(r"flux ?1 turbo alpha"),
    ),
    Preset(
        "dmd2",
        "DMD2",
        ("sdxl",),
        "LCM",
        "trailing",  # 999, 749, 499, 249, as the card gives them
        steps=(4,),
        source=f"{_CARD}tianweiy/DMD2",
        names=_names(rf"dmd2 sdxl {_N}", rf"sdxl dmd2 {_N}"),
        note="The card suggests a lower strength with fine-tuned models.",
    ),
    Preset(
        "tcd",
        "TCD",
        ("sd15", "sd21", "sdxl"),
        "TCD",
        "reference",
        steps=tuple(range(1, 17)),  # any number, as the authors write; 16 is the most here
        gamma=0.3,
        source="https://github.com/jabir-zheng/TCD",
        names=_names(rf"tcd (?:{_SD15}|{_SDXL}|(?P<sd21>sd ?21(?: base)?)) lora"),
        note="With more steps the authors suggest a higher gamma: raise stochasticity.",
    ),
    Preset(
        "pcm-small",
        "PCM small CFG",
        ("sd15", "sdxl"),
        "DDIM",
        "trailing",
        steps=(2, 4, 8, 16),
        guidance=(1.0, 2.0),
        source=PCM,
        names=_names(rf"pcm {_EITHER} smallcfg {_N}"),
    ),
    Preset(
        "pcm-normal",
        "PCM normal CFG",
        ("sd15", "sdxl"),
        "DDIM",
        "trailing",
        steps=(4, 8, 16),
        guidance=(2.0, 9.0),
        guidance_at={4: (2.5, 3.5), 8: (3.0, 6.0)},
        source=PCM,
        names=_names(rf"pcm {_EITHER} normalcfg {_N}"),
    ),
    Preset(
        "pcm-lcm",
        "PCM LCM-like",
        ("sd15", "sdxl"),
        "LCM",
        "reference",
        steps=tuple(range(2, 9)),  # as LCM's; the card names none
        guidance=(1.0, 2.0),
        source=PCM,
        names=_names(rf"pcm {_EITHER} lcmlike"),
        note="The card says that it works as LCM does, and that one step is too few.",
    ),
    Preset(
        "sdxl-turbo",
        "SDXL-Turbo LoRA",
        ("sdxl",),
        "LCM",
        "reference",
        steps=(4,),
        source=f"{_CARD}shiroppo/sd_xl_turbo_lora",
        names=_names(r"(?:sd xl|sdxl) turbo lora"),
    ),
    Preset(
        "qwen-lightning",
        "Qwen-Image-Lightning",
        ("qwen-image",),
        "flow Euler",
        "trailing",
        steps=(4, 8),
        shift=3.0,
        source=f"{_CARD}lightx2v/Qwen-Image-Lightning",
        names=_names(rf"qwen image lightning {_N}", rf"qwen image edit(?: 2509)? lightning {_N}"),
    ),
    Preset(
        "z-image-fun",
        "Z-Image-Fun distill",
        ("z-image",),
        "flow Euler",
        "trailing",
        steps=(2, 4, 8),
        # The card as huggingface.co/Linruo122/Z-Image-Fun-Lora-Distill has it: steps and guidance are distilled.
        source=f"{_CARD}alibaba-pai/Z-Image-Fun-Lora-Distill",
        names=_names(rf"z image fun lora distill {_N}(?: \d{{4}})?"),
        note="The card names no shift: the model's own is used.",
    ),
    Preset(
        "tdm-sd3",
        "TDM for SD3",
        ("sd3",),
        "flow DPM-Solver++",
        "solver",
        steps=(4,),
        strength=0.125,
        shift=6.0,
        source="https://github.com/Luo-Yihong/TDM",  # its card on huggingface.co says the same
        names=_names(r"tdm (?P<sd3>sd3) lora"),
        note="The authors write that the shift may be any from 1 to 6.",
    ),
)


# The most steps of any preset: those of Hyper-FLUX, Hyper-SD3 and PCM.
MAX_STEPS = max(preset.steps[-1] for preset in PRESETS)


def preset_of(title: str) -> Preset | None:
    """Return the preset with that title, or None."""
    return next((preset for preset in PRESETS if preset.title == title), None)
