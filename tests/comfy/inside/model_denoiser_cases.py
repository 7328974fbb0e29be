"""Patches, hooks and conditions of a MODEL, and errors (see ``test_model_denoiser.py``).

python model_denoiser_cases.py COMFYUI ROOT FOLDER

FOLDER holds the tiny networks of ``sd15``, ``sd3`` and ``flux``: ``FAMILY.safetensors`` and ``FAMILY.json``. The answer
goes to stdout, one JSON object of facts by name.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path

from boot import boot

TARGETS = ["to_q", "to_v"]


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Collect the facts."""
    boot(comfyui, root)
    import comfy.model_management
    import comfy.patcher_extension
    import comfy.sample
    import comfy_extras.nodes_model_advanced as advanced
    import torch
    from dropped_in.flash_core.denoiser import Conditioning
    from dropped_in.flash_core.lora import LoraFile
    from dropped_in.nodes.distil.denoiser import ModelDenoiser
    from dropped_in.nodes.lora.patches import apply_lora
    from safetensors.torch import load_file
    from tiny import tiny_model

    torch.set_num_threads(1)
    facts = {}
    generator = torch.Generator().manual_seed(2)

    def build(family="sd15", **options):
        config = json.loads((folder / f"{family}.json").read_text())
        with torch.inference_mode():  # as a loader node does
            return tiny_model(family, load_file(folder / f"{family}.safetensors"), config, **options)

    def prompt(length, **options):
        return [torch.randn(1, length, 32, generator=generator), options]

    z_t = torch.randn(3, 4, 8, 8, generator=generator)
    t = torch.tensor([999.0, 500.0, 20.0])
    tokens = torch.randn(3, 5, 32, generator=generator)
    conditions = Conditioning(cross_attention=tokens)
    noise, blank = torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    positive, negative = prompt(5), prompt(5)

    def sample(of):
        with torch.inference_mode():
            return comfy.sample.sample(of, noise, 2, 3.0, "euler", "simple", [positive], [negative], blank, seed=1)

    def outcome(function):
        try:
            return repr(function())
        except (ValueError, RuntimeError) as error:
            return str(error)

    # A LoRA in the MODEL belongs to the teacher, and stays as it is.
    model = build()
    with ModelDenoiser(model) as denoiser:
        denoiser.add_adapter("student", 2, 2.0, TARGETS, seed=7)
        with torch.no_grad():
            for name, value in denoiser.adapter_parameters("student").items():
                value.copy_(torch.randn(value.shape, generator=generator) * (0.3 if name.endswith("up") else 1.0))
        style = LoraFile(denoiser.adapter("student"), dialect="none", alpha_source="file")
        with torch.no_grad(), denoiser.role("student"):
            styled = denoiser.predict(z_t, t, conditions)
        kept = weakref.ref(next(iter(denoiser.adapter_parameters("student").values())))
    del denoiser, value
    gc.collect()
    facts["adapter freed"] = kept() is None
    model = build()
    style = LoraFile({name.replace(".", "_"): module for name, module in style.modules.items()}, "none", "file")
    with torch.inference_mode():
        patched, _ = apply_lora(style, model, 1.0)
        before = sample(model), sample(patched)
    facts["inference weights"] = any(value.is_inference() for value in model.model.parameters())
    with ModelDenoiser(patched) as denoiser:
        denoiser.add_adapter("student", 2, 2.0, TARGETS)
        denoiser.add_adapter("critic", 2, 2.0, TARGETS)
        output = denoiser.predict(z_t, t, conditions)
        facts["style in the teacher"] = float((output - styled).abs().max())
        with denoiser.role("student"):
            denoiser.predict(z_t, t, conditions).sum().backward()
        gradients = {
            role: [value.grad for value in denoiser.adapter_parameters(role).values()] for role in ("student", "critic")
        }
        facts["student has gradients"] = all(value is not None for value in gradients["student"])
        facts["critic has none"] = all(value is None for value in gradients["critic"])
        facts["base has none"] = all(value.grad is None for value in model.model.parameters())
    facts["unchanged with a LoRA"] = torch.equal(before[1], sample(patched)) and torch.equal(before[0], sample(model))

    # An exception inside.
    with torch.inference_mode():
        before = sample(model)
        try:
            with ModelDenoiser(model) as denoiser:
                denoiser.add_adapter("student", 2, 2.0, TARGETS)
                with torch.no_grad():
                    for value in denoiser.adapter_parameters("student").values():
                        value.add_(1)
                with denoiser.role("student"):
                    comfy.model_management.interrupt_current_processing()
                    denoiser.predict(z_t, t, conditions)
        except comfy.model_management.InterruptProcessingException:
            facts["interrupted"] = True
        facts["inference mode again"] = torch.is_inference_mode_enabled()
        facts["unchanged after it"] = torch.equal(before, sample(model))
    facts["hooks after it"] = sum(len(module._forward_hooks) for module in model.model.modules())
    facts["outside"] = outcome(lambda: denoiser.predict(z_t, t, conditions))

    # Token sequences of different lengths.
    with ModelDenoiser(model) as denoiser, torch.no_grad():
        entries = [prompt(5), prompt(9), prompt(5)]
        ragged, short = denoiser.conditions(entries, [prompt(5)], (4, 8, 8))
        facts["lengths"] = ragged.attention_mask.sum(1).tolist() + short.attention_mask.sum(1).tolist()
        apart = []
        for row, entry in enumerate(entries):
            (alone, _) = denoiser.conditions([entry], [entry], (4, 8, 8))
            one = slice(row, row + 1)
            apart.append([denoiser.predict(z_t[one], t[one], alone), *denoiser.features(z_t[one], t[one], alone)])
        together = [denoiser.predict(z_t, t, ragged), *denoiser.features(z_t, t, ragged)]
        facts["ragged"] = max(
            float((whole - torch.cat(parts)).abs().max())
            for whole, parts in zip(together, zip(*apart, strict=True), strict=True)
        )

    # Half precision: the base computes in it, adapters do not.
    with ModelDenoiser(model) as denoiser, torch.no_grad():
        exact = denoiser.predict(z_t, t, conditions)
    for dtype in (torch.bfloat16, torch.float16):
        with ModelDenoiser(build(dtype=dtype)) as denoiser:
            denoiser.add_adapter("student", 2, 2.0, TARGETS)
            with denoiser.role("student"):
                output = denoiser.predict(z_t, t, conditions)
                output.square().mean().backward()
            values = list(denoiser.adapter_parameters("student").values())
            facts[str(dtype)] = {
                "types": sorted({str(value.dtype) for value in (output, *values)}),
                "trains": all(bool(value.grad.isfinite().all()) for value in values)
                and any(bool(value.grad.abs().max() > 0) for value in values),
                "error": float((output.detach() - exact).abs().max() / exact.std()),
            }

    # Patches and wrappers of the MODEL are part of the teacher.
    wrapped = model.clone()
    calls = []
    wrapped.set_model_attn1_output_patch(lambda out, options: out * 0)
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL

    def function_wrapper(call, given):
        calls.append("function")
        return call(given["input"], given["timestep"], **given["c"])

    def apply_wrapper(executor, *given, **named):
        calls.append("apply")
        return executor(*given, **named)

    def twice(executor, *given, **named):
        return executor(*given, **named) + executor(*given, **named)

    wrapped.set_model_unet_function_wrapper(function_wrapper)
    wrapped.add_wrapper(kind, apply_wrapper)
    with ModelDenoiser(wrapped) as denoiser, torch.no_grad():
        output = denoiser.predict(z_t, t, conditions)
    facts["wrappers called"] = calls
    facts["patch felt"] = float((output - exact).abs().max())
    wrapped = model.clone()
    wrapped.set_model_output_block_patch(lambda h, skip, options: (h, skip.mul_(0.5)))  # in place, as FreeU's
    with ModelDenoiser(wrapped) as denoiser:
        denoiser.add_adapter("student", 2, 2.0, TARGETS)
        with denoiser.role("student"):
            denoiser.predict(z_t, t, conditions).sum().backward()
        gradients = [value.grad for value in denoiser.adapter_parameters("student").values()]
        facts["through a patch in place"] = all(bool(value.isfinite().all()) for value in gradients)
    wrapped = model.clone()
    wrapped.add_wrapper(kind, twice)
    with ModelDenoiser(wrapped) as denoiser, torch.no_grad():
        facts["called twice"] = outcome(lambda: denoiser.predict(z_t, t, conditions))

    # A model with input channels of its own: ComfyUI makes them of the mask and the masked picture.
    weights = load_file(folder / "sd15.safetensors")
    added = torch.randn(32, 5, 3, 3, generator=generator) * 0.1
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], added], 1)
    config = json.loads((folder / "sd15.json").read_text()) | {"in_channels": 9}
    inpainting = tiny_model("sd15", weights, config)
    picture, mask = torch.randn(1, 4, 8, 8, generator=generator), torch.ones(1, 1, 8, 8)
    with ModelDenoiser(inpainting) as denoiser, torch.no_grad():
        entry = prompt(5, concat_latent_image=picture, concat_mask=mask)
        masked, _ = denoiser.conditions([entry], [entry], (4, 8, 8))
        output = denoiser.predict(z_t[1:2], t[1:2], masked)
        channels = torch.cat([z_t[1:2], mask, picture * 0.18215], 1)
        expected = inpainting.model.diffusion_model(channels, t[1:2], context=entry[0])
        facts["inpainting"] = float((output - expected).abs().max())

    # What cannot be distilled is refused in words.
    with ModelDenoiser(model) as denoiser:
        facts["masked prompt"] = outcome(
            lambda: denoiser.conditions([prompt(5, mask=torch.ones(1, 8, 8))], [prompt(5)], (4, 8, 8))
        )
        facts["no prompt"] = outcome(lambda: denoiser.conditions([], [prompt(5)], (4, 8, 8)))
        hinted = Conditioning(
            cross_attention=tokens, hint=torch.zeros(3, 3, 8, 8), residuals=(torch.zeros(3, 1, 1, 1),)
        )
        facts["hint"] = outcome(lambda: denoiser.predict(z_t, t, hinted))
        facts["no adapter"] = outcome(lambda: denoiser.role("student").__enter__())
        facts["no such layer"] = outcome(lambda: denoiser.add_adapter("student", 2, 2.0, ["to_q", "to_nothing"]))
    with ModelDenoiser(build("sd3")) as denoiser:
        facts["another LoRA"] = outcome(lambda: denoiser.load_adapter("student", style.modules))
        facts["sd3 shift"] = denoiser.process.shift
    with ModelDenoiser(build("flux")) as denoiser:
        facts["flux shift"] = denoiser.process.shift
        references = prompt(5, pooled_output=torch.zeros(1, 40), reference_latents=[torch.zeros(1, 16, 8, 8)])
        facts["reference latents"] = outcome(lambda: denoiser.conditions([references], [references], (16, 8, 8)))
    for name in ("lcm", "x0", "v_prediction"):
        (patched,) = advanced.ModelSamplingDiscrete().patch(model, name, zsnr=name == "v_prediction")
        facts[name] = outcome(lambda of=patched: ModelDenoiser(of).process.prediction)
        if name == "v_prediction":
            facts["last alpha"] = float(ModelDenoiser(patched).process.alphas_cumprod[-1])
    (patched,) = advanced.ModelSamplingDiscrete().patch(model, "eps", zsnr=True)
    facts["eps without signal"] = outcome(lambda: ModelDenoiser(patched))
    with ModelDenoiser(model) as denoiser:
        latents = denoiser.latents(torch.ones(1, 4, 2, 2))
        facts["latent scale"] = float(latents.mean())
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
