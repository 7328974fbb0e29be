"""The demo MODEL distilled inside ComfyUI (see ``test_model_denoiser.py``).

python model_denoiser_demo.py COMFYUI ROOT FOLDER UPDATES

FOLDER holds what the headless trainer started from: ``given.safetensors`` (latents, tokens), the two adapters as LoRA
files and the discriminator. Written there: ``results.safetensors``, and the student's LoRA ``trained.safetensors``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from boot import PACKAGE, boot
from model_denoiser_updates import TERMS, Updates


def main(comfyui: Path, root: Path, folder: Path, count: int) -> None:
    """Distil as a node would: in inference mode, with the objects that ComfyUI gives a node."""
    boot(comfyui, root)
    import comfy.sample
    import torch
    from dropped_in.flash_core.lora import FlashMetadata, read_lora, write_lora
    from dropped_in.nodes.demo.models import build_demo
    from dropped_in.nodes.distil.denoiser import ModelDenoiser
    from dropped_in.nodes.lora.patches import apply_lora
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    results = {}
    with torch.inference_mode():
        given = load_file(folder / "given.safetensors")
        model, _, _ = build_demo()
        positive = [[given["tokens"][row : row + 1].clone(), {}] for row in range(len(given["tokens"]))]
        negative = [[given["empty"].clone(), {}]]
        noise = given["noise"].clone()

        def sample(of):
            cpu = torch.zeros_like(noise)
            return comfy.sample.sample(of, noise, 2, 3.0, "euler", "simple", positive[:1], negative, cpu, seed=1)

        samples = model.model.process_latent_out(given["z0"].clone())
        results["sampled.before"] = sample(model)
        with ModelDenoiser(model) as denoiser:
            for role in ("student", "critic"):
                denoiser.load_adapter(role, read_lora(folder / f"{role}.safetensors").modules)
            z0 = denoiser.latents(samples)
            conditions, unconditional = denoiser.conditions(positive, negative, z0.shape[1:])
            unconditional = unconditional.rows(torch.zeros(len(z0), dtype=torch.long))
            updates = Updates(
                PACKAGE,
                denoiser,
                load_file(folder / "discriminator.safetensors"),
                given["channels"].tolist(),
                teacher_steps=4,
                solver="dpmpp_2m",
                learning_rate=2e-3,
            )
            fixed = updates.rollout(z0, conditions, unconditional, seed=1000)
            errors, losses = [updates.error(fixed)], []
            for index in range(count):
                losses.append(updates.update(updates.rollout(z0, conditions, unconditional, index), index))
            errors.append(updates.error(fixed))
            with torch.no_grad(), denoiser.role("student"):
                results["student"] = denoiser.predict(fixed.z_t, fixed.t, fixed.conditioning)
            trained = denoiser.adapter("student")
            metadata = FlashMetadata("flash-demo", "v_prediction", "vp", timesteps={4: (999.0, 749.0, 499.0, 249.0)})
            write_lora(folder / "trained.safetensors", trained, metadata)
        results["sampled.after"] = sample(model)
        patched, _ = apply_lora(read_lora(folder / "trained.safetensors"), model, 1.0)
        with ModelDenoiser(patched) as denoiser, torch.no_grad():
            results["patched"] = denoiser.predict(fixed.z_t, fixed.t, fixed.conditioning)
        results["sampled.again"] = sample(model)
    results |= {term: torch.tensor([loss[term] for loss in losses]) for term in TERMS}
    results |= {"errors": torch.tensor(errors), "z_t": fixed.z_t, "t": fixed.t}
    save_file(
        {name: value.detach().clone().contiguous() for name, value in results.items()}, folder / "results.safetensors"
    )


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), int(sys.argv[4]))
