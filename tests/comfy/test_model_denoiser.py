"""A ComfyUI MODEL as a Denoiser: losses equal the headless trainer's, outputs equal diffusers' in every family."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash_diffusion.flash_core.discriminator import Discriminator
from flash_diffusion.flash_core.lora import FlashMetadata, flat_name, read_lora, write_lora
from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.teachers import load_teacher

from ..families.networks import FAMILIES, POOLED_WIDTH, SD3_POOLED_WIDTH, TEXT_WIDTH, tiny_network
from .inside.model_denoiser_updates import TERMS, Updates
from .inside_comfyui import relative, run_inside

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

PROMPTS = ["a red apple", "smiling face with sunglasses"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "time_emb_proj"]
COMPARED = 10
UPDATES = 100


@pytest.fixture(scope="module")
def demo(
    runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], dict[str, list[float]], Path]:
    """Return the results of ComfyUI's process for the demo, the headless trainer's losses, and the folder."""
    folder = tmp_path_factory.mktemp("model_denoiser")
    teacher = load_teacher(ModelSection(family="demo"))
    denoiser = teacher.denoiser
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(2, teacher.latent_shape[0], 8, 8, generator=generator)
    conditions, unconditional = teacher.encode_prompts(PROMPTS), teacher.unconditional(2)
    for seed, role in enumerate(("student", "critic")):
        denoiser.add_adapter(role, 4, 4.0, TARGETS, seed=seed)
        metadata = FlashMetadata("flash-demo", "v_prediction", "vp", timesteps={})
        write_lora(folder / f"{role}.safetensors", denoiser.adapter(role), metadata)
    with torch.no_grad():
        features = denoiser.features(z0, torch.tensor([500.0, 500.0]), conditions)
    channels = [feature.shape[1] for feature in features]
    torch.manual_seed(0)
    heads = Discriminator(channels, hidden=16).state_dict()
    save_file(heads, folder / "discriminator.safetensors")
    given = {
        "z0": z0,
        "noise": torch.randn(1, *z0.shape[1:], generator=generator),
        "tokens": conditions.cross_attention,
        "empty": unconditional.cross_attention[:1],
        "channels": torch.tensor(channels),
    }
    save_file({name: value.contiguous() for name, value in given.items()}, folder / "given.safetensors")
    run_inside(runtime, "model_denoiser_demo.py", folder, UPDATES)
    updates = Updates(
        "flash_diffusion",
        denoiser,
        heads,
        channels,
        teacher_steps=4,
        solver="dpmpp_2m",
        learning_rate=2e-3,
    )
    losses: dict[str, list[float]] = {term: [] for term in TERMS}
    for index in range(COMPARED):
        rollout = updates.rollout(z0, conditions, unconditional, index)
        for term, value in updates.update(rollout, index).items():
            losses[term].append(value)
    return load_file(folder / "results.safetensors"), losses, folder


# -- the demo, beside the headless trainer ----------------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS)
def test_the_first_losses_equal_the_headless_trainers(demo, term: str) -> None:
    results, losses, _ = demo
    assert torch.allclose(results[term][:COMPARED], torch.tensor(losses[term]), rtol=1e-3)


def test_a_hundred_updates_bring_the_student_to_the_teacher(demo) -> None:
    results, _, _ = demo
    before, after = results["errors"].tolist()
    assert after < 0.7 * before
    assert all(len(results[term]) == UPDATES and bool(results[term].isfinite().all()) for term in TERMS)


def test_the_demo_model_is_unchanged_after_distillation(demo) -> None:
    results, _, _ = demo
    assert torch.equal(results["sampled.before"], results["sampled.after"])
    assert torch.equal(results["sampled.before"], results["sampled.again"])


@torch.no_grad()
def test_the_trained_lora_gives_the_student_in_comfyui_and_in_the_trainer(demo) -> None:
    results, _, folder = demo
    assert float((results["patched"] - results["student"]).abs().max()) < 1e-4
    headless = load_teacher(ModelSection(family="demo"))
    headless.denoiser.load_adapter("student", read_lora(folder / "trained.safetensors").modules)
    with headless.denoiser.role("student"):
        output = headless.denoiser.predict(results["z_t"], results["t"], headless.encode_prompts(PROMPTS))
    assert float((output - results["student"]).abs().max()) < 1e-4


# -- every family ------------------------------------------------------------------------------------------------------

POOLED = {"sdxl": POOLED_WIDTH, "sd3": SD3_POOLED_WIDTH, "sd35": SD3_POOLED_WIDTH, "flux": SD3_POOLED_WIDTH}
FLUX_GUIDANCE = 3.5  # what ComfyUI tells Flux where a CONDITIONING says nothing
BATCH, TOKENS = 2, 6


def batch_of(family: str, network: torch.nn.Module) -> dict[str, Tensor]:
    """Latents, timesteps and conditions for a tiny network."""
    generator = torch.Generator().manual_seed(5)
    # See networks.py: PixArt's position embeddings agree on these sizes only.
    size = (40, 48) if family.startswith("pixart") else (8, 8)
    shape = (BATCH, 16 if family == "flux" else network.config.in_channels, *size)
    given = {
        "z0": torch.randn(shape, generator=generator),
        "t": torch.tensor([750.0, 250.0]),
        "weight": torch.randn(shape, generator=generator),
        "tokens": torch.randn(BATCH, TOKENS, TEXT_WIDTH, generator=generator),
        "empty": torch.randn(1, TOKENS, TEXT_WIDTH, generator=generator),
    }
    if family in POOLED:
        given["pooled_output"] = torch.randn(BATCH, POOLED[family], generator=generator)
    return given


def diffusers_output(family: str, network: torch.nn.Module, given: dict[str, Tensor], z_t: Tensor) -> Tensor:
    """Return the diffusers network's output for latents with the batch's conditions."""
    t, tokens, pooled = given["t"], given["tokens"], given.get("pooled_output")
    height, width = (8 * side for side in z_t.shape[-2:])
    if family in ("sd15", "sd21"):
        return network(z_t, t, tokens).sample
    if family == "sdxl":
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).repeat(BATCH, 1)
        return network(z_t, t, tokens, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    if family.startswith("pixart"):
        sizes = {"resolution": None, "aspect_ratio": None}
        if family == "pixart_alpha":
            resolution = torch.tensor([[height, width]], dtype=torch.float32).repeat(BATCH, 1)
            sizes = {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}
        return network(z_t, tokens, timestep=t, added_cond_kwargs=sizes).sample.chunk(2, 1)[0]
    if family in ("sd3", "sd35"):
        return network(z_t, tokens, pooled, t).sample
    rows, columns = z_t.shape[-2] // 2, z_t.shape[-1] // 2
    positions = torch.zeros(rows, columns, 3)
    positions[..., 1] += torch.arange(rows)[:, None]
    positions[..., 2] += torch.arange(columns)[None]
    patches = rearrange(z_t, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    guidance = torch.full((BATCH,), FLUX_GUIDANCE)
    output = network(
        patches, tokens, pooled, t / 1000, positions.reshape(-1, 3), torch.zeros(TOKENS, 3), guidance
    ).sample
    return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)


@pytest.fixture(scope="module")
def families(
    runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[torch.nn.Module, dict[str, Tensor], dict[str, Tensor], Path]]:
    """Return for each family its network, the batch, ComfyUI's results and the trained LoRA."""
    folder = tmp_path_factory.mktemp("families")
    networks = {family: tiny_network(family) for family in FAMILIES}
    batches = {}
    for family, network in networks.items():
        batches[family] = batch_of(family, network)
        save_file(network.state_dict(), folder / f"{family}.safetensors")
        save_file(batches[family], folder / f"{family}.given.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
    run_inside(runtime, "model_denoiser_families.py", folder, *FAMILIES)
    return {
        family: (
            networks[family],
            batches[family],
            load_file(folder / f"{family}.results.safetensors"),
            folder / f"{family}.trained.safetensors",
        )
        for family in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradient_equal_diffusers(families, family: str) -> None:
    """The raw output is in the method's convention. For Flux, only ComfyUI writes in place."""
    network, given, results, _ = families[family]
    z_t = given["z0"].clone().requires_grad_()
    output = diffusers_output(family, network, given, z_t)
    gradient = torch.autograd.grad((output * given["weight"]).sum(), z_t)[0]
    assert relative(results["output"], output.detach()) < 1e-4
    assert relative(results["gradient"], gradient) < 1e-4


def diffusers_states(family: str, network: torch.nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """The hidden states at the depths that the trainer's denoisers read, as maps."""
    if hasattr(network, "mid_block"):
        blocks = [*list(network.down_blocks)[1:], network.mid_block, *list(network.up_blocks)[:-1]]
    else:
        blocks = [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", ())]
        blocks = [blocks[index] for index in sorted({len(blocks) * part // 5 for part in range(1, 5)})]
    states: list[Any] = []
    handles = [block.register_forward_hook(lambda *call: states.append(call[-1])) for block in blocks]
    diffusers_output(family, network, given, given["z0"])
    for handle in handles:
        handle.remove()
    if hasattr(network, "mid_block"):
        return [state[0] if isinstance(state, tuple) else state for state in states]
    tokens = [state[1] if isinstance(state, tuple) else state for state in states]  # joint ones: (text, image)
    rows = given["z0"].shape[-2] // 2
    return [rearrange(state, "b (h w) d -> b d h w", h=rows) for state in tokens]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_the_trainers_hidden_states(families, family: str) -> None:
    network, given, results, _ = families[family]
    expected = diffusers_states(family, network, given)
    states = [results[f"features.{index}"] for index in range(len(expected))]
    assert f"features.{len(expected)}" not in results
    assert len(expected) >= 2
    for state, reference in zip(states, expected, strict=True):
        assert state.shape == reference.shape
        assert relative(state, reference) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_gradients_agree_with_finite_differences(families, family: str) -> None:
    slope, difference = families[family][2]["slopes"].tolist()
    assert slope == pytest.approx(difference, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_updates_on_one_batch_lower_the_loss(families, family: str) -> None:
    results = families[family][2]
    assert all(bool(results[term].isfinite().all()) for term in TERMS)
    for term in ("total", "distillation", "critic"):
        first, last = float(results[term][0]), float(results[term][-1])
        assert last < 0.99 * first, f"{term}: {first} to {last}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_unchanged_after_distillation(families, family: str) -> None:
    results = families[family][2]
    assert torch.equal(results["sampled.before"], results["sampled.after"])
    assert torch.equal(results["sampled.before"], results["sampled.again"])
    assert int(results["hooks"]) == 0


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_lora_gives_the_student_in_comfyui_and_in_diffusers(families, family: str) -> None:
    _, given, results, path = families[family]
    assert relative(results["patched"], results["student"]) < 1e-4
    network = tiny_network(family)
    layers = {flat_name(name): module for name, module in network.named_modules()}
    modules = read_lora(path).modules
    assert modules
    for name, module in modules.items():
        update = (module.up.flatten(1) @ module.down.flatten(1)) * module.scale
        layers[name].weight += update.reshape(layers[name].weight.shape)
    output = diffusers_output(family, network, given, given["z0"])
    assert relative(results["student"], output) < 1e-4
    assert relative(results["student"], results["output"]) > 1e-3


# -- what a MODEL brings along, and what goes wrong -------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the script of cases and return its results."""
    folder = tmp_path_factory.mktemp("cases")
    for family in ("sd15", "sd3", "flux"):
        network = tiny_network(family)
        save_file(network.state_dict(), folder / f"{family}.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
    return json.loads(run_inside(runtime, "model_denoiser_cases.py", folder).splitlines()[-1])


def test_the_models_own_lora_is_part_of_the_teacher_and_stays(facts) -> None:
    assert facts["inference weights"]
    assert facts["style in the teacher"] < 1e-4
    assert facts["unchanged with a LoRA"]


def test_gradients_reach_only_the_adapter_of_the_role(facts) -> None:
    assert facts["student has gradients"]
    assert facts["critic has none"]
    assert facts["base has none"]


def test_an_interrupt_leaves_the_model_unchanged(facts) -> None:
    assert facts["interrupted"]
    assert facts["inference mode again"]
    assert facts["unchanged after it"]
    assert facts["hooks after it"] == 0
    assert "as a context manager" in facts["outside"]
    assert facts["adapter freed"]


def test_prompts_of_different_lengths_do_not_affect_each_other(facts) -> None:
    assert facts["lengths"] == [5, 9, 5, 5]
    assert facts["ragged"] < 1e-4


def test_an_inpainting_model_gets_its_channels(facts) -> None:
    assert facts["inpainting"] < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [("torch.bfloat16", 0.2), ("torch.float16", 0.03)])
def test_a_half_precision_base_trains_float32_adapters(facts, dtype: str, tolerance: float) -> None:
    assert facts[dtype]["types"] == ["torch.float32"]
    assert facts[dtype]["trains"]
    assert facts[dtype]["error"] < tolerance


def test_patches_and_wrappers_are_part_of_the_teacher(facts) -> None:
    assert facts["wrappers called"] == ["function", "apply"]
    assert facts["patch felt"] > 0.01
    assert facts["through a patch in place"]
    assert "called 2 times for one prediction" in facts["called twice"]


def test_the_process_equals_comfyuis_sampling(facts) -> None:
    assert facts["sd3 shift"] == pytest.approx(3.0)
    assert facts["flux shift"] == pytest.approx(math.exp(1.15))  # ComfyUI has the logarithm, 1.15
    assert facts["x0"] == "'sample'"
    assert facts["v_prediction"] == "'v_prediction'"
    assert facts["last alpha"] == 0.0
    assert facts["latent scale"] == pytest.approx(0.18215)  # Stable Diffusion 1.5's


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("masked prompt", "has mask, which cannot be distilled"),
        ("no prompt", "positive CONDITIONING is empty"),
        ("hint", "cannot be distilled with hint, residuals; expected only cross_attention"),
        ("no adapter", "no student adapter"),
        ("no such layer", "This model has no layer 'to_nothing'. Choose from the layers"),
        ("another LoRA", "the model has no layer down_blocks.0"),
        ("reference latents", "Flux is conditioned on 'ref_latents'"),
        ("lcm", "samples with ModelSamplingDiscreteDistilled, LCM, which cannot be distilled"),
        ("eps without signal", "zero terminal SNR"),
    ],
)
def test_a_model_that_cannot_be_distilled_raises_a_readable_error(facts, case: str, words: str) -> None:
    assert words in facts[case]
