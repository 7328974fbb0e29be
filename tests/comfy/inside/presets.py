"""Sample tiny models with every preset of published few-step LoRAs (see ``test_presets.py``).

python presets.py COMFYUI ROOT FOLDER FAMILY...

FOLDER holds the families' networks as for ``sampling_families.py``. Written there are ``presets.results``, latents as
the network sees them, and ``presets.json``: the timesteps that the network was asked for, and the texts on the nodes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from boot import boot

SEED = 2024


def main(comfyui: Path, root: Path, folder: Path, *families: str) -> None:
    """Sample each preset at each of its step counts, on each of its families."""
    boot(comfyui, root)
    import torch
    from dropped_in.flash_core.presets import PRESETS
    from safetensors.torch import load_file, save_file
    from sampling_families import load

    torch.set_num_threads(1)
    models = {family: load(family, folder) for family in families}
    given = {family: load_file(folder / f"{family}.given.safetensors") for family in families}
    latents, facts = {}, {}
    with torch.inference_mode():
        for preset in PRESETS:
            # SD3 stands for Flux, Qwen-Image and Z-Image: to the sampler they are flow models.
            for family in dict.fromkeys(family if family in models else "sd3" for family in preset.families):
                for steps in preset.steps if len(preset.steps) < 5 else (preset.steps[0], 4, preset.steps[-1]):
                    name = f"{preset.key}.{family}.{steps}"
                    latents[name], facts[name] = run(models[family], given[family], preset.title, steps)
        latents |= other_ways(models["sdxl"], given["sdxl"])
        facts["words"] = words(models, given)
    save_file({name: value.contiguous() for name, value in latents.items()}, folder / "presets.results")
    (folder / "presets.json").write_text(json.dumps(facts))


def run(model, given, title, steps, **options):
    """Sample with Flash Sampler; return the latent, and the timesteps that the network was asked for."""
    import torch
    from sampling_families import conditioning, sample

    asked = []

    def count(executor, x, t, *arguments, **named):
        sampling = model.get_model_object("model_sampling")
        asked.append(float(sampling.timestep(t[0])))
        return executor(x, t, *arguments, **named)

    from comfy.patcher_extension import WrappersMP

    counted = model.clone()
    counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    latent = {"samples": torch.zeros_like(given["picture"])}
    shown = sample(counted, conditioning(given, "positive"), latent, steps=steps, preset=title, **options)
    return shown, asked


def other_ways(model, given):
    """The other ways to the same latent, a mask, a user's own noise, and a run from a picture."""
    import comfy.sample
    import comfy.samplers
    import torch
    from dropped_in.flash_core.presets import PRESETS, Recognised, preset_of
    from dropped_in.nodes.sampling.nodes import FlashSamplerSelect, FlashScheduler
    from dropped_in.nodes.shared.model_facts import PRESET_KEY
    from sampling_families import conditioning, sample

    positive = conditioning(given, "positive")
    empty = {"samples": torch.zeros_like(given["picture"])}
    known = model.model.process_latent_out(given["picture"].clone())
    results = {}
    for preset in PRESETS:
        if "sdxl" not in preset.families:
            continue
        recognised = model.clone()
        recognised.set_attachments(PRESET_KEY, Recognised(preset, None, "by its file name"))
        steps = preset.steps[0]
        results[f"{preset.key}.auto"] = sample(recognised, positive, empty, steps=steps)
        by_hand = (model, preset.title, FlashSamplerSelect.execute("auto", preset.title))
        for name, (one, choice, sampler) in {
            "select": by_hand,
            "select.auto": (recognised, "auto", FlashSamplerSelect.execute("auto")),
        }.items():
            sigmas = FlashScheduler.execute(one, steps, 1.0, preset=choice).args[0]
            noise = comfy.sample.prepare_noise(empty["samples"], SEED)
            latent = comfy.sample.sample_custom(
                one,
                noise,
                1.0,
                sampler.args[0],
                sigmas,
                positive,
                positive,
                empty["samples"],
                disable_pbar=True,
                seed=SEED,
            )
            results[f"{preset.key}.{name}"] = model.model.process_latent_in(latent)
    height, width = given["picture"].shape[2:]
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    masked = {"samples": known, "noise_mask": mask}
    results["masked"] = sample(model, positive, masked, steps=4, preset=preset_of("Hyper-SD").title)
    results["own noise"] = sample(model, positive, empty, steps=4, preset="SDXL-Lightning", stochasticity=1.0)
    results["picture"] = sample(model, positive, {"samples": known}, steps=4, denoise=0.5, preset="SDXL-Lightning")
    return results


def words(models, given):
    """The texts of grids, and the warnings and errors."""
    from dropped_in.flash_core.lora import FlashMetadata
    from dropped_in.flash_core.presets import Recognised, preset_of
    from dropped_in.nodes.sampling.few_step import flash_grid, grid_transitions, text_on_node
    from dropped_in.nodes.sampling.presets import guidance_warnings
    from dropped_in.nodes.shared.model_facts import METADATA_KEY, PRESET_KEY

    def text(family, steps, guidance=1.0, denoise=1.0, options=None, stochasticity=None, recognised=None, **grid):
        model = models[family].clone()
        if recognised is not None:
            model.set_attachments(PRESET_KEY, recognised)
        try:
            chosen = flash_grid(model, steps, denoise, **grid)
        except ValueError as error:
            return str(error)
        warned = guidance_warnings(chosen.preset, steps, guidance, [[None, options or {}]])
        return text_on_node(chosen.text, grid_transitions(model, chosen, stochasticity), warned)

    lightning = Recognised(preset_of("SDXL-Lightning"), 4, "by its file name")
    with_metadata = models["sdxl"].clone()
    metadata = FlashMetadata("sdxl", "epsilon", "vp", {4: (999.0, 700.0, 400.0, 100.0)})
    with_metadata.set_attachments(METADATA_KEY, metadata)
    return {
        "recognised": text("sdxl", 4, recognised=lightning),
        "other steps": text("sdxl", 8, recognised=lightning),
        "steps of no file": text("sdxl", 3, preset="SDXL-Lightning"),
        "guidance": text("sdxl", 8, 1.0, preset="Hyper-SD CFG"),
        "guidance inside": text("sdxl", 8, 6.0, preset="Hyper-SD CFG"),
        "distilled guidance": text("sd3", 8, options={"guidance": 2.0}, preset="FLUX.1-Turbo-Alpha"),
        "other family": text("sd15", 4, preset="SDXL-Lightning"),
        "other process": text("sd3", 4, preset="SDXL-Lightning"),
        "flow on vp": text("sdxl", 4, preset="Qwen-Image-Lightning"),
        "no such preset": text("sdxl", 4, preset="Lightening"),
        "own number": text("sdxl", 4, stochasticity=0.5, preset="SDXL-Lightning"),
        "custom": text("sdxl", 4, grid="custom", timesteps="999, 600", recognised=lightning),
        "reference": text("sdxl", 4, grid="reference", recognised=lightning),
        "shift": text("sd3", 4, preset="Qwen-Image-Lightning"),
        "half": text("sdxl", 2, denoise=0.7, preset="SDXL-Lightning"),
        "over metadata": flash_grid(with_metadata, 4, preset="SDXL-Lightning").text,
        "metadata": flash_grid(with_metadata, 4).text,
    }


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), *sys.argv[4:])
