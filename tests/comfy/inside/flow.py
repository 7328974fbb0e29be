"""The few-step sampler on a flow model (see ``test_flow.py``): a velocity field written down, ComfyUI's own sampling.

python flow.py COMFYUI ROOT OUTPUTS
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

from boot import boot


def main(comfyui: Path, root: Path, outputs: Path) -> None:
    """Write the trained noise levels of a flow model with shift 3, and what the sampler makes of them."""
    boot(comfyui, root)
    import comfy.model_sampling
    import comfy.sample
    import torch
    from dropped_in.nodes.few_step import flash_grid, flash_sampler
    from safetensors.torch import save_file

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        """What ComfyUI puts together for SD3."""

    sampling = Sampling(SimpleNamespace(sampling_settings={"shift": 3.0}))
    inner = SimpleNamespace(model_sampling=sampling)

    class Model:
        """The velocity ``tanh(z) / 2 + s``, as ComfyUI's guider hands a model to a sampler."""

        inner_model = inner
        model_patcher, cfg = SimpleNamespace(model=inner), 1.0  # newer ComfyUI writes them into its log

        def __call__(self, x, sigma, model_options=None, seed=None):
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
    save_file({name: value.contiguous() for name, value in results.items()}, outputs)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
