"""A few updates on a tiny MODEL of each family (see ``test_model_denoiser.py``).

python model_denoiser_families.py COMFYUI ROOT FOLDER FAMILY...

FOLDER holds, for each family, the diffusers network's weights, its configuration and a batch: ``FAMILY.safetensors``,
``FAMILY.json``, ``FAMILY.given.safetensors``. Written there: ``FAMILY.results.safetensors`` and the student's LoRA,
``FAMILY.trained.safetensors``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from boot import PACKAGE, boot
from model_denoiser_updates import TERMS, Updates

UPDATES = 10
TARGETS = {
    "sd15": ["to_q", "to_k", "to_v", "to_out.0", "conv1"],
    "sd21": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"],
    "sdxl": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"],
    "pixart_alpha": ["to_q", "to_k", "to_v", "to_out.0", "pos_embed.proj", "adaln_single.linear"],
    "pixart_sigma": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"],
    "sd3": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "norm_out.linear"],
    "sd35": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"],
    "flux": ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "norm_out.linear"],
}
BASES = {"pixart_alpha": "pixart", "pixart_sigma": "pixart-sigma"}  # in a LoRA's metadata, where it is another name
STEP = 1e-2  # of the finite differences: far above float32's rounding, far below where the network bends


def main(comfyui: Path, root: Path, folder: Path, families: list[str]) -> None:
    """Distil each family's model on one batch."""
    boot(comfyui, root)
    import torch

    torch.set_num_threads(1)
    for family in families:
        with torch.inference_mode():
            distil(family, folder)


def distil(family: str, folder: Path) -> None:
    """Distil as a node would: in inference mode, with the objects that ComfyUI gives a node."""
    import comfy.sample
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
    from dropped_in.flash_core.discriminator import Discriminator
    from dropped_in.flash_core.lora import FlashMetadata, read_lora, write_lora
    from dropped_in.flash_core.process import FlowProcess
    from dropped_in.nodes.distil.denoiser import ModelDenoiser
    from dropped_in.nodes.lora.patches import apply_lora
    from safetensors.torch import load_file, save_file
    from tiny import tiny_model

    config = json.loads((folder / f"{family}.json").read_text())
    model = tiny_model(family, load_file(folder / f"{family}.safetensors"), config)
    if family == "sdxl":
        model.model.embedder = Timestep(config["addition_time_embed_dim"])
    given = {name: value.clone() for name, value in load_file(folder / f"{family}.given.safetensors").items()}
    extras = {name: given[name] for name in ("pooled_output",) if name in given}
    positive = [
        [given["tokens"][row : row + 1], {name: value[row : row + 1] for name, value in extras.items()}]
        for row in range(len(given["tokens"]))
    ]
    negative = [[given["empty"], {name: torch.zeros_like(value[:1]) for name, value in extras.items()}]]
    noise, blank = torch.ones_like(given["z0"][:1]), torch.zeros_like(given["z0"][:1])
    results = {}

    def sample(of):
        return comfy.sample.sample(of, noise, 2, 3.0, "euler", "simple", positive[:1], negative, blank, seed=1)

    results["sampled.before"] = sample(model)
    with ModelDenoiser(model) as denoiser:
        z0 = given["z0"].clone()
        t = given["t"].clone()
        conditions, unconditional = denoiser.conditions(positive, negative, z0.shape[1:])
        unconditional = unconditional.rows(torch.zeros(len(z0), dtype=torch.long))

        # The network's output and its gradient, to be compared with diffusers'.
        z_t = z0.clone().requires_grad_()
        output = denoiser.predict(z_t, t, conditions)
        results["output"] = output
        results["gradient"] = torch.autograd.grad((output * given["weight"].clone()).sum(), z_t)[0]

        flow = isinstance(denoiser.process, FlowProcess)
        for seed, role in enumerate(("student", "critic")):
            denoiser.add_adapter(role, 2, 4.0, TARGETS[family], seed=seed)
        with torch.no_grad():
            states = denoiser.features(z0, t, conditions)
        results |= {f"features.{index}": state for index, state in enumerate(states)}
        channels = [state.shape[1] for state in states]
        torch.manual_seed(0)
        heads = Discriminator(channels, hidden=16).state_dict()
        updates = Updates(
            PACKAGE,
            denoiser,
            heads,
            channels,
            teacher_steps=4,
            solver="euler" if flow else "dpmpp_2m",
            learning_rate=3e-3,
        )
        rollout = updates.rollout(z0, conditions, unconditional, seed=0)
        losses = [updates.update(rollout, seed=0) for _ in range(UPDATES)]
        results["slopes"] = torch.tensor(slopes(denoiser, rollout, given["weight"].clone()))
        with torch.no_grad(), denoiser.role("student"):
            results["student"] = denoiser.predict(z0, t, conditions)
        kind = "flow" if flow else "vp"
        metadata = FlashMetadata(BASES.get(family, family), denoiser.process.prediction, kind, timesteps={})
        transformer = not hasattr(model.model.diffusion_model, "input_blocks")
        path = folder / f"{family}.trained.safetensors"
        write_lora(path, denoiser.adapter("student"), metadata, transformer=transformer)
    results["sampled.after"] = sample(model)
    patched, _ = apply_lora(read_lora(path), model, 1.0)
    with ModelDenoiser(patched) as denoiser, torch.no_grad():
        results["patched"] = denoiser.predict(z0, t, conditions)
    results["sampled.again"] = sample(model)
    hooks = [len(module._forward_hooks) for module in model.model.modules()]
    results["hooks"] = torch.tensor(sum(hooks))
    results |= {term: torch.tensor([loss[term] for loss in losses]) for term in TERMS}
    written = {name: value.detach().clone().contiguous() for name, value in results.items()}
    save_file(written, folder / f"{family}.results.safetensors")


def slopes(denoiser, rollout, weight) -> tuple[float, float]:
    """Return the slope of the student's output along the gradient: by autograd and by finite difference."""
    import torch

    parameters = list(denoiser.adapter_parameters("student").values())

    def value() -> torch.Tensor:
        return (denoiser.predict(rollout.z_t, rollout.t, rollout.conditioning) * weight).sum()

    with denoiser.role("student"):
        gradients = torch.autograd.grad(value(), parameters)
        slope = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        values = []
        with torch.no_grad():
            start = [parameter.clone() for parameter in parameters]
            for step in (STEP, -STEP):
                for parameter, before, gradient in zip(parameters, start, gradients, strict=True):
                    parameter.copy_(before + step * gradient / slope)
                values.append(float(value()))
            for parameter, before in zip(parameters, start, strict=True):
                parameter.copy_(before)
    return float(slope), (values[0] - values[1]) / (2 * STEP)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), sys.argv[4:])
