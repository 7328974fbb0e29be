"""Load LoRAs with the names of published few-step LoRAs into tiny models (see ``test_preset_loaders.py``).

python preset_loaders.py COMFYUI ROOT FOLDER

FOLDER holds the networks of ``sampling_families.py`` for SDXL and SD3, and ``loras``. Written there are
``loaders.results``, latents as the network sees them, and ``loaders.json``: reports, and the presets in the models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from boot import boot

LIGHTNING = "sdxl_lightning_4step_lora.safetensors"


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Load every file with every loader, and sample."""
    boot(comfyui, root)
    import folder_paths
    import torch
    from dropped_in.nodes.lora.loader import FlashLoraLoader
    from dropped_in.nodes.lora.stack import FlashLoraStack
    from dropped_in.nodes.shared.model_facts import METADATA_KEY, PRESET_KEY
    from safetensors.torch import load_file, save_file
    from sampling_families import conditioning, load, sample

    from nodes import LoraLoaderModelOnly

    folder_paths.add_model_folder_path("loras", str(folder / "loras"))
    torch.set_num_threads(1)
    facts, latents = {}, {}

    def note(name, model, report):
        recognised = model.get_attachment(PRESET_KEY)
        facts[name] = {
            "report": report,
            "preset": None if recognised is None else recognised.name,
            "metadata": model.get_attachment(METADATA_KEY) is not None,
        }

    with torch.inference_mode():
        models = {family: load(family, folder) for family in ("sdxl", "sd3")}
        given = load_file(folder / "sdxl.given.safetensors")
        loaded = {}
        for path in sorted((folder / "loras").rglob("*.safetensors")):
            name = path.relative_to(folder / "loras").as_posix()
            model = models["sd3" if "SD3" in name else "sdxl"]
            strength = 0.125 if "eighth" in path.parent.name else 1.0
            loaded[name], report = FlashLoraLoader.execute(model, name, strength).args
            note(name, loaded[name], report)
        note("untouched", models["sdxl"], "")
        stacked, _, report = FlashLoraStack.execute(models["sdxl"], LIGHTNING, 1.0).args
        note("stack", stacked, report)
        styled, _, report = FlashLoraStack.execute(
            models["sdxl"], "none", 1.0, style_1=LIGHTNING, style_1_strength=1.0
        ).args
        note("style slot", styled, report)
        twice, report = FlashLoraLoader.execute(loaded["dmd2_sdxl_4step_lora_fp16.safetensors"], LIGHTNING, 1.0).args
        note("twice", twice, report)
        over, report = FlashLoraLoader.execute(loaded["with_metadata.safetensors"], LIGHTNING, 1.0).args
        note("over metadata", over, report)
        own, report = FlashLoraLoader.execute(loaded[LIGHTNING], "with_metadata.safetensors", 1.0).args
        note("metadata over preset", own, report)
        style, report = FlashLoraLoader.execute(loaded[LIGHTNING], "lightning_strike_style.safetensors", 0.5).args
        note("style after", style, report)
        core = LoraLoaderModelOnly().load_lora_model_only(models["sdxl"], LIGHTNING, 1.0)[0]
        note("core", core, "")

        positive = conditioning(given, "positive")
        empty = {"samples": torch.zeros_like(given["picture"])}
        latents["auto"] = sample(loaded[LIGHTNING], positive, empty)
        latents["stack"] = sample(stacked, positive, empty)
        latents["core, by hand"] = sample(core, positive, empty, preset="SDXL-Lightning")
        latents["core, auto"] = sample(core, positive, empty)
        latents["renamed"] = sample(loaded["lightning_strike_style.safetensors"], positive, empty)
    save_file({name: value.contiguous() for name, value in latents.items()}, folder / "loaders.results")
    (folder / "loaders.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
