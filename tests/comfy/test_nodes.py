"""The nodes in a running ComfyUI: use with core's nodes, previews, interrupts, masks, and errors."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from . import prompts
from .client import Client
from .loras import save_random_lora, save_sd15_lora

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def lora(server) -> str:
    """Save a Flash LoRA with random weights, and return its name in ComfyUI."""
    path: Path = server.base / "models" / "loras" / "random_nodes.safetensors"
    save_random_lora(path, prompts.TEACHER)
    return path.name


def custom_sampling(lora: str, seed: int, sampler: list, steps: int = 4, denoise: float = 1.0) -> prompts.Prompt:
    """Make the workflow of :func:`prompts.latents` with SamplerCustomAdvanced instead of Flash Sampler."""
    prompt = prompts.latents(lora, seed=seed)
    prompt["noise"] = prompts.node("RandomNoise", noise_seed=seed)
    prompt["guider"] = prompts.node("BasicGuider", model=[prompts.LORA, 0], conditioning=[prompts.TEXT, 0])
    prompt["sigmas"] = prompts.node("FlashScheduler", model=[prompts.LORA, 0], steps=steps, denoise=denoise)
    prompt["flash"] = prompts.node("FlashSamplerSelect", stochasticity=1.0)
    prompt["ddim"] = prompts.node("FlashSamplerSelect", stochasticity=0.0)
    prompt["euler"] = prompts.node("KSamplerSelect", sampler_name="euler")
    prompt[prompts.SAMPLER] = prompts.node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=sampler,
        sigmas=["sigmas", 0],
        latent_image=[prompts.EMPTY, 0],
    )
    return prompt


def latent_of(client: Client, prompt: prompts.Prompt) -> torch.Tensor:
    run = client.run(prompt)
    assert run.succeeded, run.error
    return client.latent(run, "latent")


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_scheduler_and_sampler_in_custom_sampling_equal_flash_sampler(client: Client, lora: str, steps: int) -> None:
    ours = latent_of(client, prompts.latents(lora, seed=5, steps=steps))
    custom = latent_of(client, custom_sampling(lora, 5, ["flash", 0], steps=steps))
    assert torch.equal(ours, custom)


def test_stochasticity_0_equals_ddim(client: Client, lora: str) -> None:
    """Core's euler on the same noise levels is an independent DDIM."""
    ours = latent_of(client, custom_sampling(lora, 6, ["ddim", 0]))
    core = latent_of(client, custom_sampling(lora, 6, ["euler", 0]))
    assert float((ours - core).abs().max() / core.std()) < 1e-4


def test_split_sigmas_pass_a_noisy_latent_on(client: Client, lora: str) -> None:
    """One sampler for the first two steps and one for the rest equal a single sampler (without fresh noise)."""
    whole = custom_sampling(lora, 7, ["ddim", 0])
    split = custom_sampling(lora, 7, ["ddim", 0])
    split["split"] = prompts.node("SplitSigmas", sigmas=["sigmas", 0], step=2)
    split["none"] = prompts.node("DisableNoise")
    split["first"] = prompts.node(**{"kind": "SamplerCustomAdvanced", **split[prompts.SAMPLER]["inputs"]})
    split["first"]["inputs"]["sigmas"] = ["split", 0]
    split[prompts.SAMPLER]["inputs"].update(noise=["none", 0], sigmas=["split", 1], latent_image=["first", 0])
    expected = latent_of(client, whole)
    assert float((latent_of(client, split) - expected).abs().max() / expected.std()) < 1e-3


def test_one_step_equals_cores_one_step(client: Client, lora: str) -> None:
    """With one step every sampler predicts once, from KSampler's first noise, at our timestep."""
    ours = latent_of(client, prompts.latents(lora, seed=8, steps=1))
    core = prompts.latents(lora, seed=8)
    core[prompts.SAMPLER] = prompts.node(
        "KSampler",
        model=[prompts.LORA, 0],
        positive=[prompts.TEXT, 0],
        negative=[prompts.TEXT, 0],
        latent_image=[prompts.EMPTY, 0],
        seed=8,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    expected = latent_of(client, core)
    assert float((ours - expected).abs().max() / expected.std()) < 1e-3


def test_a_batch_item_alone_gives_the_same_latent_in_custom_sampling(client: Client, lora: str) -> None:
    batch = latent_of(client, custom_sampling(lora, 9, ["flash", 0]))
    prompt = custom_sampling(lora, 9, ["flash", 0])
    prompt["from"] = prompts.node("LatentFromBatch", samples=[prompts.EMPTY, 0], batch_index=1, length=1)
    prompt[prompts.SAMPLER]["inputs"]["latent_image"] = ["from", 0]
    alone = latent_of(client, prompt)
    assert alone.shape[0] == 1
    assert float((alone - batch[1:]).abs().max() / batch.std()) < 1e-4


def test_a_run_split_in_two_gives_each_picture_fresh_noise_of_its_own(client: Client, lora: str) -> None:
    """The second sampler of a split run gets no noise that would distinguish the items."""
    prompt = custom_sampling(lora, 9, ["flash", 0])
    prompt["split"] = prompts.node("SplitSigmas", sigmas=["sigmas", 0], step=1)
    prompt["none"] = prompts.node("DisableNoise")
    prompt["first"] = prompts.node(**{"kind": "SamplerCustomAdvanced", **prompt[prompts.SAMPLER]["inputs"]})
    prompt["first"]["inputs"]["sigmas"] = ["split", 0]
    prompt["again"] = prompts.node("RepeatLatentBatch", samples=["first", 0], amount=2)
    prompt[prompts.SAMPLER]["inputs"].update(noise=["none", 0], sigmas=["split", 1], latent_image=["again", 0])
    first, second, third, fourth = latent_of(client, prompt)
    assert float((first - second).abs().max()) > 0.1
    assert float((first - third).abs().max()) < 1e-4  # the same latent: the same picture, wherever it stands
    assert float((second - fourth).abs().max()) < 1e-4


def test_the_timesteps_are_shown_on_the_node(client: Client, lora: str) -> None:
    run = client.run(prompts.latents(lora, seed=19))
    text = "t = 999, 749, 499, 249\nstochasticity 1\n(4 evaluations, predicts v)"
    assert run.texts == {prompts.SAMPLER: text}
    prompt = custom_sampling(lora, 19, ["flash", 0], denoise=0.5)
    prompt["sigmas"]["inputs"] |= {"grid": "custom", "timesteps": "999, 600, 120"}
    assert client.run(prompt).texts == {"sigmas": "t = 600, 120\n(2 evaluations, predicts v)"}


@pytest.mark.parametrize(
    ("grid", "timesteps", "levels"),
    [("reference", "", [999, 759, 499, 259]), ("custom", "950, 400", [950, 400]), ("custom", "999", [999])],
)
def test_another_grid_is_evaluated_by_both_nodes(
    client: Client, lora: str, grid: str, timesteps: str, levels: list[int]
) -> None:
    ours = prompts.latents(lora, seed=20, grid=grid, timesteps=timesteps)
    run = client.run(ours)
    assert run.succeeded, run.error
    assert f"t = {', '.join(str(t) for t in levels)}\n" in run.texts[prompts.SAMPLER]
    assert max(total for _, total in run.progress) == len(levels)
    custom = custom_sampling(lora, 20, ["flash", 0])
    custom["sigmas"]["inputs"] |= {"grid": grid, "timesteps": timesteps}
    assert torch.equal(client.latent(run, "latent"), latent_of(client, custom))


def test_a_wrong_list_of_timesteps_raises_a_readable_error(client: Client, lora: str) -> None:
    run = client.run(prompts.latents(lora, seed=20, grid="custom", timesteps="999, 1200"))
    assert run.error is not None
    assert "'1200' is no timestep of this model. Write whole numbers of 0 to 999" in run.error["exception_message"]


def test_stochasticity_equals_that_of_the_sampler_node(client: Client, lora: str) -> None:
    ours = latent_of(client, prompts.latents(lora, seed=21, stochasticity=0.0))
    assert torch.equal(ours, latent_of(client, custom_sampling(lora, 21, ["ddim", 0])))
    assert not torch.equal(ours, latent_of(client, prompts.latents(lora, seed=21, stochasticity=0.5)))


def test_previews_and_progress_arrive_at_every_step(client: Client, lora: str) -> None:
    run = client.run(prompts.latents(lora, seed=10, steps=4))
    assert run.succeeded, run.error
    assert [step for step in run.progress if step[1] == 4] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(run.previews) == 4
    assert len(run.previews[-1].getcolors(1 << 24)) > 16


def test_an_interrupt_stops_the_sampler_and_the_next_run_is_unharmed(client: Client, lora: str) -> None:
    reference = latent_of(client, prompts.latents(lora, seed=11, pictures=2))
    long = prompts.latents(lora, seed=12, steps=8, pictures=16)
    stopped = client.run(long, interrupt_at_step=2)
    assert stopped.interrupted
    assert max(value for value, total in stopped.progress if total == 8) < 8
    assert "latent" not in stopped.outputs
    # The parts do what the node does, and ComfyUI has no result of theirs that it could hand out again.
    again = client.run(custom_sampling(lora, 11, ["flash", 0]))
    assert prompts.SAMPLER in again.executed
    assert torch.equal(client.latent(again, "latent"), reference)


def test_a_mask_keeps_the_rest_of_the_latent(client: Client, lora: str) -> None:
    prompt = prompts.latents(lora, seed=13, pictures=1)
    prompt["picture"] = prompts.node("EmptyImage", width=128, height=128, batch_size=1, color=0xFF8800)
    prompt["encoded"] = prompts.node("VAEEncode", pixels=["picture", 0], vae=[prompts.MODELS, 2])
    prompt["left"] = prompts.node("SolidMask", value=1.0, width=64, height=128)
    prompt["none"] = prompts.node("SolidMask", value=0.0, width=128, height=128)
    prompt["mask"] = prompts.node(
        "MaskComposite", destination=["none", 0], source=["left", 0], x=0, y=0, operation="add"
    )
    prompt["masked"] = prompts.node("SetLatentNoiseMask", samples=["encoded", 0], mask=["mask", 0])
    prompt[prompts.SAMPLER]["inputs"]["latent_image"] = ["masked", 0]
    prompt["before"] = prompts.node("SaveLatent", samples=["encoded", 0], filename_prefix="before")
    run = client.run(prompt)
    assert run.succeeded, run.error
    before, after = client.latent(run, "before"), client.latent(run, "latent")
    assert float((before - after)[..., 9:].abs().max()) < 1e-5
    assert float((before - after)[..., :7].abs().mean()) > 0.1


def test_image_to_image_keeps_more_of_the_picture_the_lower_denoise_is(client: Client) -> None:
    """The shipped LoRA redraws an animal as a fruit: the higher denoise, the less remains of the animal's latent.

    At .75 almost nothing remains: the demo's alpha_bar is .0034 at t = 749.
    """
    distances = []
    for denoise in (0.25, 0.5, 0.75):
        prompt = prompts.latents("flash_demo.safetensors", seed=14, text="fresh fruit", denoise=denoise)
        prompt["animal"] = prompts.node("CLIPTextEncode", clip=[prompts.MODELS, 1], text="animal face")
        inputs = prompt[prompts.SAMPLER]["inputs"]
        prompt["before"] = prompts.node(
            "FlashSampler", **inputs | {"positive": ["animal", 0], "denoise": 1.0, "seed": 3}
        )
        inputs["latent_image"] = ["before", 0]
        prompt["saved"] = prompts.node("SaveLatent", samples=["before", 0], filename_prefix="before")
        run = client.run(prompt)
        assert run.succeeded, run.error
        before, after = client.latent(run, "saved"), client.latent(run, "latent")
        distances.append(float((before - after).square().mean().sqrt() / before.std()))
    assert all(later > 1.1 * earlier for earlier, later in pairwise(distances)), distances


def test_guidance_needs_and_uses_a_negative_prompt(client: Client, lora: str) -> None:
    alone = client.run(prompts.latents(lora, seed=15, guidance=2.0))
    assert alone.error is not None
    assert "guidance is 2" in alone.error["exception_message"]
    assert "negative" in alone.error["exception_message"]
    prompt = prompts.latents(lora, seed=15, guidance=2.0)
    prompt["negative"] = prompts.node("CLIPTextEncode", clip=[prompts.MODELS, 1], text="")
    prompt[prompts.SAMPLER]["inputs"]["negative"] = ["negative", 0]
    guided = latent_of(client, prompt)
    assert not torch.equal(guided, latent_of(client, prompts.latents(lora, seed=15)))


def test_the_loader_reports_what_it_loaded(client: Client, lora: str) -> None:
    prompt = prompts.latents(lora, seed=16)
    prompt["report"] = prompts.node("PreviewAny", source=[prompts.LORA, 1])
    run = client.run(prompt)
    assert run.succeeded, run.error
    (report,) = run.outputs["report"]["text"]
    for part in ("the Flash demo", "rank: 4", "alpha: 6", "1, 2, 4 steps", "guidance 1"):
        assert part in report
    matched, total = report.split("matched: ")[1].split(" ")[0].split("/")
    assert matched == total
    assert int(total) > 8


def test_a_lora_for_another_model_raises_an_error_with_names(client: Client, server) -> None:
    save_sd15_lora(server.base / "models" / "loras" / "for_sd15.safetensors")
    run = client.run(prompts.latents("for_sd15.safetensors", seed=17))
    assert run.error is not None
    assert run.error["node_type"] == "FlashLoraLoader"
    message = run.error["exception_message"]
    assert "SD 1.5 (attn2 reads 768 channels)" in message
    assert "the Flash demo (attn2 reads 128 channels)" in message
    assert "of its 3 layers fit" in message


def test_loader_and_sampler_tell_the_page_what_they_know(client: Client) -> None:
    prompt = prompts.shipped()
    prompt[prompts.LORA]["inputs"]["strength"] = 0.97  # else it may be cached, and tells nothing
    run = client.run(prompt)
    assert run.succeeded, run.error
    assert run.outputs[prompts.LORA]["flash_card"] == [
        ["made for", "the Flash demo"],
        ["LoRA", "rank 32, scale 1, strength 0.97"],
        ["layers", "124 of 124"],
        ["steps", "1 to 8, best 4"],
    ]
    lines = [value for label, value in run.outputs[prompts.SAMPLER]["flash_card"] if not label]
    assert lines == run.texts[prompts.SAMPLER].splitlines()
