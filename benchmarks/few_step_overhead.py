"""What Flash Sampler adds to its four model calls, in one process, beside ComfyUI's own sampler.

    COMFYUI_PATH=... python benchmarks/few_step_overhead.py [--model sd15|tiny] [--size 512] [--rounds 3]

The model is SD 1.5's UNet at its published size, or one of a few layers, with random weights in float32. Each round
runs in turn the bare network four times, the node at 4 steps and guidance 1, and core's ``lcm`` sampler on the same
four noise levels; hooks on the network tell the time inside it from the time around it. What counts is the time around:
seconds inside a network vary by more than 2 % from call to call on a busy machine, those around it hardly. Times are
the process's own CPU time (one thread), or the clock after a synchronisation on a GPU; the best round of each counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests" / "comfy" / "inside"), str(ROOT / "scripts")]

STEPS = 4
SIZES = {
    "sd15": {"model_channels": 320, "channel_mult": [1, 2, 4, 4], "depth": [1, 1, 1, 0], "context_dim": 768},
    "tiny": {"model_channels": 32, "channel_mult": [1, 2, 4], "depth": [1, 1, 0], "context_dim": 32},
}


def main() -> None:
    """Measure in a process that has ComfyUI's environment, and print one table row for each way to sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="sd15")
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true", help="on ComfyUI's device instead of the CPU")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is None:
        import comfy_runtime

        command = [sys.executable, *sys.argv, "--inside", comfy_runtime.comfyui_folder()]
        sys.exit(subprocess.run(command, env=comfy_runtime.environment(), check=False).returncode)
    sys.argv = sys.argv[:1]  # ComfyUI's modules parse it too
    measure(options)


def build(name: str, device: Any) -> Any:
    """A MODEL of SD 1.5's architecture with random weights."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    sizes = dict(SIZES[name])
    depth = sizes.pop("depth")
    config = comfy.supported_models.SD15(
        {
            **sizes,
            "image_size": 32,
            "use_spatial_transformer": True,
            "use_temporal_attention": False,
            "in_channels": 4,
            "out_channels": 4,
            "legacy": False,
            "num_res_blocks": [2] * len(depth),
            "transformer_depth": [level for level in depth for _ in range(2)],
            "transformer_depth_output": [level for level in depth for _ in range(3)],
            "transformer_depth_middle": 1,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "num_heads": 8,
            "num_head_channels": -1,
        }
    )
    config.unet_config |= {"num_heads": 8, "num_head_channels": -1}
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=torch.device("cpu")).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))


def measure(options: argparse.Namespace) -> None:
    """The three ways in turn."""
    from boot import boot

    boot(options.inside, ROOT)
    from comfy.cli_args import args

    args.cpu = not options.gpu
    import comfy.model_management
    import comfy.sample
    import comfy.samplers
    import torch
    from dropped_in.nodes.sampling.few_step import flash_grid
    from dropped_in.nodes.sampling.nodes import FlashSampler

    if not options.gpu:
        torch.set_num_threads(1)
    with torch.inference_mode():
        device = comfy.model_management.get_torch_device()
        model = build(options.model, device)
        network = model.model.diffusion_model
        comfy.model_management.load_models_gpu([model])
        context = torch.randn(1, 77, SIZES[options.model]["context_dim"])
        latent = torch.zeros(1, 4, options.size // 8, options.size // 8)
        conditioning = [[context, {}]]
        levels = flash_grid(model, STEPS).sigmas
        lcm = comfy.samplers.sampler_object("lcm")

        def now() -> float:
            if options.gpu:
                torch.cuda.synchronize()
                return time.perf_counter()
            return time.process_time()

        def bare() -> None:
            z, text = torch.randn_like(latent).to(device), context.to(device)
            for t in (999.0, 749.0, 499.0, 249.0):
                network(z, torch.tensor([t], device=device), context=text)

        def node() -> None:
            FlashSampler.execute(model, conditioning, {"samples": latent}, 1, STEPS, 1.0, 1.0)

        def core() -> None:
            noise = comfy.sample.prepare_noise(latent, 1)
            comfy.sample.sample_custom(
                model, noise, 1.0, lcm, levels, conditioning, conditioning, latent, disable_pbar=True, seed=1
            )

        inside: list[float] = []
        network.register_forward_pre_hook(lambda *_: inside.append(-now()))
        network.register_forward_hook(lambda *_: inside.append(now()))

        def run(way: Callable[[], None]) -> tuple[float, float]:
            """Seconds inside the network, and around it."""
            inside.clear()
            start = now()
            way()
            whole, calls = now() - start, sum(inside)
            return calls, whole - calls

        ways = {"four bare calls": bare, "Flash Sampler": node, "core's lcm sampler": core}
        for way in ways.values():
            run(way)  # what is done once: buffers, lazy imports
        rounds = [{name: run(way) for name, way in ways.items()} for _ in range(options.rounds)]
    calls = min(seconds[name][0] for seconds in rounds for name in ways)
    size = sum(value.numel() for value in network.parameters()) / 1e6
    lines = [
        f"{options.model}, {size:.1f} M, {options.size} px, {options.inside.name}, on {device}",
        "| way | inside the network | around it | around / four calls |",
        "|---|---|---|---|",
    ]
    for name in ways:
        within, around = (min(seconds[name][part] for seconds in rounds) for part in (0, 1))
        lines.append(f"| {name} | {within:.3f} s | {1000 * around:.2f} ms | {100 * around / calls:.2f} % |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
