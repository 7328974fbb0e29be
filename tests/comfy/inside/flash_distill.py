"""Flash Distill and Flash Save LoRA on the demo and on a tiny MODEL of each family (see ``test_flash_distill.py``).

python flash_distill.py COMFYUI ROOT FOLDER FAMILY...

A FAMILY is "demo", one of ``tests/families``, or one of ``tiny_native.py``. FOLDER holds for each of ``tests/families``
the diffusers network, ``FAMILY.safetensors`` and ``FAMILY.json``, and a batch of conditions,
``FAMILY.given.safetensors``.
The last line on the output is a JSON object of facts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from boot import boot

PROMPTS = "red apple\nunicorn\nsmiling face\ntangerine"
SHORT = {"updates": 6, "trajectories": 8, "samples": 4, "at_once": 2, "teacher_steps": 4, "preview_every": 0}
SHORT |= {"width": 64, "height": 64}
LEARNS = {"updates": 20, "trajectories": 24, "samples": 8, "preview_every": 0}
FALLS_IN = 20  # updates of a tiny model


def main(comfyui: Path, root: Path, folder: Path, families: list[str]) -> None:
    """Run everything in inference mode, as ComfyUI runs nodes."""
    boot(comfyui, root)
    import folder_paths
    import torch

    torch.set_num_threads(1)
    folder_paths.set_output_directory(str(folder / "output"))
    folder_paths.folder_names_and_paths["loras"] = ([str(folder / "loras")], {".safetensors"})
    facts: dict[str, Any] = {"settings": settings()}
    with torch.inference_mode():
        for family in families:
            facts[family] = demo(folder) if family == "demo" else tiny(family, folder)
    sys.stdout.write("\n" + json.dumps(facts))


def settings() -> dict[str, Any]:
    """Return the numbers by size and by family."""
    from dropped_in.nodes.distil.training import settings as of_node

    names = ("LEARNING_RATES", "DISCRIMINATOR_RATES", "RANKS", "AT_ONCE")
    found: dict[str, Any] = {name: list(getattr(of_node, name).items()) for name in names}
    found["families"] = {
        name: [usual.guidance, usual.teacher_steps, list(usual.targets)] for name, usual in of_node.FAMILIES.items()
    }
    found["critic's warm-up"] = of_node.CRITIC_WARMUP
    found["rates"] = [of_node.by_size(of_node.LEARNING_RATES, size) for size in (1e6, 5e6, 6.6e7, 8.6e8, 1e10)]
    return found


def distil(model: Any, **inputs: Any) -> tuple[Any, ...]:
    """Run Flash Distill with these inputs, and defaults for the rest."""
    from dropped_in.nodes.distil.nodes import FlashDistill

    defaults = {"prompts": PROMPTS, "name": "test", "preset": "quick try"}
    defaults |= {"width": 0, "height": 0, "guidance": 0.0, "seed": 0}
    return FlashDistill.train(model, **{**defaults, **inputs}).args


def sampled(model: Any, positive: list, negative: list, shape: tuple[int, ...]) -> Any:
    """Return a latent of core's sampler."""
    import comfy.sample
    import torch

    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros_like(noise)
    return comfy.sample.sample(model, noise, 2, 3.0, "euler", "simple", positive, negative, zeros, seed=1)


def hooks(model: Any) -> int:
    """Return how many hooks the model's modules have."""
    return sum(len(module._forward_hooks) for module in model.model.modules())


def bytes_of_tensors() -> int:
    """Return the memory of all tensors that Python still holds."""
    import gc

    import torch

    gc.collect()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
    }
    return sum(storages.values())


def loads(model: Any, trained: Any, lora: Any, name: str, draw: Any) -> dict[str, Any]:
    """Save the LoRA, load it with Flash LoRA Loader and with core's two ways, and compare latents."""
    import comfy.sd
    import comfy.utils
    import folder_paths
    from dropped_in.nodes.distil.lora_output import FlashSaveLora
    from dropped_in.nodes.lora.loader import FlashLoraLoader

    (saved,) = FlashSaveLora.execute(lora, name).args
    (again,) = FlashSaveLora.execute(lora, name).args
    expected = draw(trained)
    path = folder_paths.get_full_path_or_raise("loras", saved)
    ours, report = FlashLoraLoader.execute(model, saved, 1.0).args
    core, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(path), 1.0, 0)
    direct, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    layers = len([key for key in lora if key.endswith((".lora_down.weight", ".lora_A.weight"))])
    metadata = ours.get_attachment("flash_metadata")
    return {
        "saved": [saved, again],
        "report": report,
        "layers": layers,
        "patched by core": len(core.patches),
        "differences": [float((draw(one) - expected).abs().max() / expected.std()) for one in (ours, core, direct)],
        "changed": float((draw(model) - expected).abs().max() / expected.std()),
        "metadata": [metadata.base, metadata.prediction, metadata.stochasticity.get(4), metadata.timesteps[4]],
        "same metadata": metadata == trained.get_attachment("flash_metadata"),
    }


def demo(folder: Path) -> dict[str, Any]:
    """Distil the demo: whole, and once stopped at every kind of place and queued again."""
    import torch
    from dropped_in.nodes.demo.models import build_demo

    model, clip, vae = build_demo()
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    draw = lambda one: sampled(one, encode("red apple"), encode(""), (16, 16, 16))  # noqa: E731
    before = draw(model)
    facts: dict[str, Any] = {}

    def unchanged() -> bool:
        return torch.is_inference_mode_enabled() and hooks(model) == 0 and torch.equal(draw(model), before)

    # A run that learns.
    trained, lora, picture, text, losses = distil(model, clip=clip, vae=vae, name="learns", **LEARNS)
    facts |= {"text": text, "picture": list(picture.shape), "losses": losses["loss"], "unchanged": unchanged()}
    facts |= {"loads": loads(model, trained, lora, "mine/demo", draw)}
    _, again, _, text, _ = distil(model, clip=clip, name="learns", **LEARNS)
    facts["finished run again"] = all(torch.equal(again[key], lora[key]) for key in lora) and "resumed at" in text

    with without_figures():
        return facts | short_runs(model, trained, clip, folder, unchanged)


@contextmanager
def without_figures() -> Iterator[None]:
    """Leave out the figures and the picture of runs that are looked at for something else: most of a short run's work.

    They read the student, and change nothing that is trained or kept.
    """
    from dropped_in.nodes.distil import run

    usual = run.Bench.errors, run.report_picture
    run.Bench.errors = lambda self: dict.fromkeys(run.STEPS, 1.0)
    run.report_picture = lambda bench, decode, losses: None
    try:
        yield
    finally:
        run.Bench.errors, run.report_picture = usual


def short_runs(model: Any, trained: Any, clip: Any, folder: Path, unchanged: Callable[[], bool]) -> dict[str, Any]:
    """Distil the demo in short runs: stopped anywhere, other inputs, latents, a damaged state.

    Args:
        trained: the model with a LoRA.
        unchanged: returns whether the model still has its bits.
    """
    import torch
    from dropped_in.nodes.distil.training import loop
    from safetensors.torch import load_file

    facts: dict[str, Any] = {"changes": []}
    # The same short run whole, and stopped three times: in the trajectories, in an update, in the heads' warm-up.
    short = {**SHORT, "adversarial": True, "critic": True}
    _, whole, _, _, _ = distil(model, clip=clip, name="whole", **short)
    stops = {"trajectories": 4, "updates": 3, "helpers": 2}
    usual = loop.Training._clip, loop.RunFolder.save_part

    def failing_clip(self: Any, means: Any) -> None:
        place = "helpers" if self.update >= 4 and self.warmed_up < 6 else "updates"
        done = self.warmed_up if place == "helpers" else self.update
        if stops.get(place) == done:
            del stops[place]
            raise torch.cuda.OutOfMemoryError(place)
        usual[0](self, means)

    def failing_part(self: Any, number: int, tensors: Any) -> None:
        if "trajectories" in stops and number == 2:
            del stops["trajectories"]
            raise torch.cuda.OutOfMemoryError("trajectories")
        usual[1](self, number, tensors)

    loop.Training._clip, loop.RunFolder.save_part = failing_clip, failing_part
    places = []
    for _ in range(4):
        try:
            _, resumed, _, text, _ = distil(model, clip=clip, name="stopped", **short)
        except torch.cuda.OutOfMemoryError as error:
            places.append(str(error).rpartition("(")[2].rstrip(")"))
            facts["changes"].append(not unchanged())
    loop.Training._clip, loop.RunFolder.save_part = usual
    facts["stopped at"] = places
    facts["resumed"] = text
    facts["same bits"] = all(torch.equal(resumed[key], whole[key]) for key in whole) and len(resumed) == len(whole)
    states = [next((folder / "output" / "flash_distill").glob(f"{name}-*")) for name in ("whole", "stopped")]
    facts["files"] = sorted(path.name for path in states[0].iterdir())
    tensors = [load_file(path / "state.safetensors") for path in states]
    facts["same state"] = all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    facts["helpers moved"] = [moved(tensors[0], part) for part in ("discriminator", "critic")]

    # Another model, seed or prompt is another run; a style LoRA in the teacher is part of the teacher.
    names = set()
    facts["bytes"] = []
    for inputs in ({}, {"seed": 1}, {"prompts": "red apple"}, {"guidance": 5.0}):
        distil(model, clip=clip, name="own", **{**SHORT, "updates": 1, "trajectories": 2, "samples": 2, **inputs})
        facts["bytes"].append(bytes_of_tensors())
    distil(
        trained_without_flash(trained),
        clip=clip,
        name="own",
        **{**SHORT, "updates": 1, "trajectories": 2, "samples": 2},
    )
    names = {path.name for path in (folder / "output" / "flash_distill").glob("own-*")}
    facts["runs"] = len(names)

    # Latents to start from, one prompt for all of them; and a damaged state.
    latents = {"samples": torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(3))}
    _, _, _, text, _ = distil(
        model, clip=clip, name="latents", prompts="red apple", latents=latents, **{**SHORT, "updates": 2}
    )
    facts["latents"] = text
    state = states[0] / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    try:
        distil(model, clip=clip, name="whole", **short)
    except ValueError as error:
        facts["damaged"] = str(error)
    facts["unchanged at the end"] = unchanged()
    return facts


def moved(state: dict[str, Any], part: str) -> bool:
    """Return whether AdamW has changed a part of a state: some of its second moments are above 0."""
    moments = [value for key, value in state.items() if key.startswith(f"optimizer/{part}/") and "exp_avg_sq" in key]
    return any(bool(value.any()) for value in moments)


def trained_without_flash(model: Any) -> Any:
    """Return the model with its LoRA, as if it were a style LoRA."""
    clone = model.clone()
    clone.attachments.pop("flash_metadata")
    return clone


def given_family(family: str, folder: Path) -> tuple[Any, list, list, tuple[int, ...]]:
    """Return a family's MODEL, positive and negative CONDITIONING, and the shape of a latent."""
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
    from safetensors.torch import load_file
    from tiny import tiny_model

    config = json.loads((folder / f"{family}.json").read_text())
    model = tiny_model(family, load_file(folder / f"{family}.safetensors"), config)
    if family == "sdxl":
        model.model.embedder = Timestep(config["addition_time_embed_dim"])
    given = load_file(folder / f"{family}.given.safetensors")
    extras = {name: given[name] for name in ("pooled_output",) if name in given}
    positive = [
        [given["tokens"][row : row + 1], {name: value[row : row + 1] for name, value in extras.items()}]
        for row in range(len(given["tokens"]))
    ]
    negative = [[given["empty"], {name: torch.zeros_like(value[:1]) for name, value in extras.items()}]]
    return model, positive, negative, tuple(given["z0"].shape[1:])


def native_family(family: str) -> tuple[Any, list, list, tuple[int, ...]]:
    """Return the same of a family in ComfyUI's own classes."""
    from tiny_native import native_model, native_prompts

    model = native_model(family)
    channels, dimensions = model.model.latent_format.latent_channels, model.model.latent_format.latent_dimensions
    return model, *native_prompts(2), (channels, *([1] * (dimensions - 2)), 8, 8)


def gradients(
    model: Any, positive: list, negative: list, shape: tuple[int, ...], checkpointing: bool
) -> tuple[Any, int]:
    """Return an adapter's gradients, and how often a layer in a block was called for them."""
    import torch
    from dropped_in.nodes.distil.checkpointing import blocks_of
    from dropped_in.nodes.distil.denoiser import ModelDenoiser

    with ModelDenoiser(model, checkpointing=checkpointing) as denoiser:
        denoiser.add_adapter("student", 4, 4, ())
        conditions, _ = denoiser.conditions(positive, negative, shape)
        z = torch.randn(len(conditions), *shape, generator=torch.Generator().manual_seed(2))
        calls: list[int] = []
        block = blocks_of(model.model.diffusion_model)[-1]
        layer = next(module for module in block.modules() if getattr(module, "out_features", None))
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        with denoiser.role("student"):
            denoiser.predict(z, torch.full((len(z),), 500.0), conditions).square().mean().backward()
        handle.remove()
        found = [
            value.grad.flatten() for value in denoiser.adapter_parameters("student").values() if value.grad is not None
        ]
        return torch.cat(found).clone(), len(calls)


def tiny(family: str, folder: Path) -> dict[str, Any]:
    """Distil a tiny model of a family from CONDITIONING."""
    import torch

    here = (folder / f"{family}.json").is_file()
    model, positive, negative, shape = given_family(family, folder) if here else native_family(family)
    draw = lambda one: sampled(one, positive[:1], negative, shape)  # noqa: E731
    before = draw(model)
    trained, lora, picture, text, losses = distil(
        model,
        name=family,
        positive=positive,
        negative=negative,
        width=8 * shape[-1],
        height=8 * shape[-2],
        rank=4,
        learning_rate=1e-2,
        updates=FALLS_IN,
        trajectories=8,
        samples=4,
        teacher_steps=4,
        preview_every=0,
    )
    small = (shape[0], *shape[-2:])
    plain, again = (gradients(model, positive, negative, small, on) for on in (False, True))
    return {
        "text": text,
        "losses": losses["loss"],
        "checkpointed": {
            "calls": [plain[1], again[1]],
            "difference": float((again[0] - plain[0]).norm() / plain[0].norm()),
        },
        "picture": list(picture.shape),
        "unchanged": torch.equal(draw(model), before) and hooks(model) == 0,
        "loads": loads(model, trained, lora, family, draw),
    }


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), sys.argv[4:])
