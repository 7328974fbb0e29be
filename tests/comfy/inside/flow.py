"""The few-step sampler on a flow model (see ``test_flow.py``): a velocity in closed form, ComfyUI's own sampling.

python flow.py COMFYUI ROOT OUTPUTS
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

from boot import boot


def main(comfyui: Path, root: Path, outputs: Path) -> None:
    """Write the trained noise levels of a flow model with shift 3, and the sampler's outputs."""
    boot(comfyui, root)
    import comfy.model_sampling
    import comfy.sample
    import torch
    from dropped_in.nodes.sampling.few_step import flash_grid, flash_sampler
    from safetensors.torch import save_file

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        """ComfyUI's sampling class for SD3."""

    sampling = Sampling(SimpleNamespace(sampling_settings={"shift": 3.0}))
    inner = SimpleNamespace(
        model_sampling=sampling,
        scale_latent_inpaint=lambda sigma, noise, latent_image, **_: sampling.noise_scaling(
            sigma.reshape(-1, 1, 1, 1), noise, latent_image
        ),
    )
    seen = []

    class Model:
        """The velocity ``tanh(z) / 2 + s`` in the form in which ComfyUI's guider gives a model to a sampler."""

        inner_model = inner
        model_patcher = SimpleNamespace(model=inner, get_attachment=lambda name: None)
        cfg = 1.0  # newer ComfyUI writes both into its log

        def __call__(self, x, sigma, model_options=None, seed=None):
            seen.append(x)
            velocity = torch.tanh(x) / 2 + sigma.reshape(-1, 1, 1, 1)
            return sampling.calculate_denoised(sigma, velocity, x)

    patcher = SimpleNamespace(get_model_object=lambda name: sampling, get_attachment=lambda key: None)
    results = {}
    for steps in (1, 2, 4):
        sigmas = flash_grid(patcher, steps).sigmas
        empty = torch.zeros(1, 16, 8, 8)
        noise = comfy.sample.prepare_noise(empty, 21)
        arguments = {"seed": 21, "model_options": {}}
        results[f"sigmas.{steps}"] = sigmas
        results[f"sampled.{steps}"] = flash_sampler().sample(Model(), sigmas, arguments, None, noise, empty)
    # Half of the picture masked, a quarter of it half masked: what the model is given at the second of two steps.
    sigmas, latent = flash_grid(patcher, 2).sigmas, torch.full((1, 16, 64, 64), 0.5)
    noise = comfy.sample.prepare_noise(latent, 5)
    mask = torch.zeros_like(latent)
    mask[..., :32], mask[..., 32:48] = 1.0, 0.5
    seen.clear()
    predictions = []
    arguments = {"seed": 5, "model_options": {}}
    flash_sampler().sample(
        Model(), sigmas, arguments, lambda index, z0, z, total: predictions.append(z0), noise, latent, mask
    )
    results["soft.given"], results["soft.first_prediction"] = seen[1], predictions[0]
    results["soft.sigma"], results["soft.first_noise"], results["soft.mask"] = sigmas[1:2], noise, mask
    save_file({name: value.contiguous() for name, value in results.items()}, outputs)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
