"""Tiled upscaling in the real ComfyUI: one tile equals the ordinary sampler, several show no seam, every size works."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import prompts
from .client import Client, Run
from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

TEXT_WIDTH = 32
SEED = 9  # of the script's runs
TILE, PATCH = 128, 8  # pixels: the demo's own size, and what a position of its latent stands for
REACH = 8  # pixels
SIZE = {"width": 96, "height": 72}


def tiny_x4() -> UNet2DConditionModel:
    """Make a tiny x4 upscaler: 7 input channels, and the noise level as a class."""
    torch.manual_seed(5)
    network = UNet2DConditionModel(
        sample_size=16,
        in_channels=7,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=(False, True),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        num_class_embeds=1000,
    )
    return network.eval()


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    """Make a prompt and a small picture for the x4 upscaler."""
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "picture": torch.rand(1, 24, 40, 3, generator=generator),
    }


@pytest.fixture(scope="module")
def results(
    runtime: ModuleType, given: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Run the script in ComfyUI's process and return its results."""
    folder = tmp_path_factory.mktemp("upscale")
    network = tiny_x4()
    weights = {f"x4.{name}": value for name, value in network.state_dict().items()}
    metadata = {"config": json.dumps(dict(network.config))}
    save_file({**weights, **given}, folder / "given.safetensors", metadata=metadata)
    run_inside(runtime, "upscale.py", folder / "given.safetensors", folder / "results.safetensors")
    return load_file(folder / "results.safetensors")


@pytest.mark.parametrize("denoise", ["0.25", "1.0"])
def test_one_tile_equals_the_ordinary_samplers_image_to_image(results: dict[str, Tensor], denoise: str) -> None:
    """The two pictures are sampled together there and one after the other here, so the last bits differ."""
    assert torch.allclose(results[f"one.{denoise}"], results[f"whole.{denoise}"], atol=1e-5)


def excess(picture: Tensor, lines: Tensor, axis: int) -> float:
    """Return the colours' slope at tile borders / elsewhere: 1 if no seam shows.

    Args:
        picture: (1, H, W, 3).
        lines: the borders along ``axis``, in pixels.
    """
    others = [dimension for dimension in range(4) if dimension != axis]
    steepness = picture.diff(dim=axis).abs().mean(dim=others)
    # A seam may lie a little beside the line, since the decoder looks at its surroundings.
    steepest = torch.nn.functional.max_pool1d(steepness[None], 2 * REACH + 1, 1, REACH)[0]
    places = torch.arange(len(steepest))
    apart = (places[:, None] - lines).abs().min(1).values > 2 * REACH
    apart &= (places > 2 * REACH) & (places < len(places) - 2 * REACH)  # the picture's own border is no seam
    return float(steepest[lines.long() - 1].mean() / steepest[apart].mean())


def test_the_models_tiles_show_no_seam(results: dict[str, Tensor]) -> None:
    """The demo draws an emoji into each tile of any other picture: without blending, every border shows."""
    starts = results["starts"] * PATCH  # of rows and columns alike: the picture is a square
    borders = torch.cat([starts[1:], starts[:-1] + TILE])
    middles = (starts[1:] + starts[:-1] + TILE) / 2

    def mean_excess(name: str, lines: Tensor) -> float:
        return (excess(results[name], lines, 1) + excess(results[name], lines, 2)) / 2

    assert mean_excess("blended", borders) < 1.25
    assert mean_excess("blended", middles) < 1.25
    # The same tiles, each sampled to its end alone and then cut in the middle of the overlap; and no overlap.
    assert mean_excess("cut", middles) > 1.6
    assert mean_excess("unblended", torch.tensor([TILE])) > 3


def test_the_vaes_tiles_show_no_seam(results: dict[str, Tensor]) -> None:
    """Encode and decode 576 pixels in tiles of 512, and compare with the VAE without tiles."""
    tiled, whole = results["vae.tiled"], results["vae.whole"]
    starts = results["vae.starts"] * PATCH
    borders = torch.cat([starts[1:], starts[:-1] + 512])
    assert float((tiled - whole).abs().mean()) < 0.01
    for axis in (1, 2):
        assert excess(tiled, borders, axis) < 1.25


@pytest.mark.parametrize("kind", ["masked", "hinted"])
def test_masks_hints_guidance_and_noise_belong_to_the_whole_picture(results: dict[str, Tensor], kind: str) -> None:
    """For a model that sees one position at a time, tiles change nothing over four steps with fresh noise."""
    assert torch.allclose(results[f"{kind}.128"], results[f"{kind}.512"], atol=1e-5)
    assert float(results[f"{kind}.512"].std()) > 0.01


def test_the_hint_and_the_mask_matter(results: dict[str, Tensor]) -> None:
    assert float((results["hinted.512"] - results["masked.512"]).abs().mean()) > 0.01


def test_an_area_is_cut_to_the_tile(results: dict[str, Tensor]) -> None:
    """Height 10, width 40 at (20, 4), seen from the tile 16 x 16 at (16, 8)."""
    assert results["area"].tolist() == [10, 16, 4, 0]
    assert bool(results["area.apart"])
    assert int(results["area.kept"]) == 1


def test_models_that_read_a_size_get_the_tiles_size(results: dict[str, Tensor]) -> None:
    """The size is 8 pixels for each latent position, unless the prompt has a size, as here for the height."""
    assert results["told"].tolist() == [256, 300]


def test_the_x4_upscaler_equals_its_network_in_diffusers(results: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """The reference is four steps from noise, written out with diffusers' network and noise schedule."""
    network = tiny_x4()
    schedule = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear").alphas_cumprod
    small = given["picture"].movedim(-1, 1) * 2 - 1
    generator = torch.Generator().manual_seed(SEED)
    z = torch.randn(1, 4, 24, 40, generator=generator)
    timesteps = [999, 749, 499, 249]
    level = torch.tensor([0])
    with torch.no_grad():
        for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
            alpha = schedule[timestep]
            v = network(torch.cat([z, small], 1), timestep, given["tokens"], class_labels=level).sample
            z0 = alpha.sqrt() * z - (1 - alpha).sqrt() * v
            if following is not None:
                noise = torch.randn(z.shape, generator=generator)
                z = schedule[following].sqrt() * z0 + (1 - schedule[following]).sqrt() * noise
    pixels = torch.sigmoid(z0 / 0.08333 / 8)[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert results["x4.one"].shape == (1, 96, 160, 3)
    assert torch.allclose(results["x4.one"], pixels.movedim(1, -1), atol=1e-3)


def test_each_tile_of_the_x4_upscaler_sees_its_part_of_the_small_picture(
    results: dict[str, Tensor], given: dict[str, Tensor]
) -> None:
    small = given["picture"].movedim(-1, 1) * 2 - 1
    expected = [small[..., top : top + 16, left : left + 16] for top in (0, 8) for left in (0, 12, 24)]
    assert torch.allclose(results["x4.seen"], torch.cat(expected), atol=1e-6)


def test_noise_augmentation_adds_the_levels_noise_to_the_small_picture(results: dict[str, Tensor]) -> None:
    assert set(results["x4.levels"].tolist()) == {20}
    added = results["x4.noised.seen"] - results["x4.seen"]
    assert 0.01 < float(added.std()) < 0.3
    # Neighbouring tiles share it where they overlap.
    assert torch.equal(added[0][..., 12:], added[1][..., :4])


def test_other_super_resolution_models_get_the_picture_or_its_latent(
    results: dict[str, Tensor], given: dict[str, Tensor]
) -> None:
    """Models with 3 more channels get the picture; models with twice the latent's channels get the latent."""
    shape = (12, 20)  # 24 x 40 pixels, 4 times larger, at 8 pixels a position
    small = torch.nn.functional.interpolate(given["picture"].movedim(-1, 1), shape, mode="bicubic", antialias=True)
    large = torch.nn.functional.interpolate(
        given["picture"].movedim(-1, 1), scale_factor=4, mode="bicubic", antialias=True
    )
    latent = torch.nn.functional.avg_pool2d(large.clamp(0, 1), 8) * 2 - 1
    latent = torch.cat([latent, latent[:, :1]], 1) * 0.18215  # the scale of SD 1.5's latents
    for channels, whole in ((7, small.clamp(0, 1) * 2 - 1), (8, latent)):
        expected = [whole[..., top : top + 8, left : left + 8] for top in (0, 4) for left in (0, 6, 12)]
        assert torch.allclose(results[f"concat.{channels}.seen"], torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("concat.6", ["reads 2 channels", "a picture has 3", "a latent 4"]),
        ("x4.attached", ["reads 3 channels", "the prompt has 4"]),
        ("concat.attached", ["a latent of 5 x 3", "20 x 12", "Flash Concat Conditioning"]),
        ("x4.vae", ["8 x 8 pixels", "4 x 4", "Connect the VAE"]),
        ("too_large", ["2400000 x 3200000", "GiB", "Lower scale"]),
    ],
)
def test_wrong_channels_and_sizes_raise_a_readable_error(
    results: dict[str, Tensor], name: str, words: list[str]
) -> None:
    message = bytes(results[name].tolist()).decode()
    for word in words:
        assert word in message


def picture(width: int = SIZE["width"], height: int = SIZE["height"], channels: int = 3) -> np.ndarray:
    """Make a picture of smooth colours; its fourth channel goes from opaque to transparent."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    return np.stack([x, y, (x + y) / 2, 1 - x][:channels], axis=-1)


def graph(server, name: str, pixels: np.ndarray | None = None, **settings: object) -> prompts.Prompt:
    """Make the graph: load a picture, enlarge it, save it."""
    Image.fromarray(((picture() if pixels is None else pixels) * 255).round().astype(np.uint8)).save(
        server.base / "input" / f"{name}.png"
    )
    prompt = prompts.latents(prompts.shipped()[prompts.LORA]["inputs"]["lora_name"], seed=3, text="")
    for unused in (prompts.EMPTY, prompts.DECODE, prompts.SAVE, prompts.SAMPLER, "latent"):
        del prompt[unused]
    inputs = {"scale": 2.0, "seed": 3, "steps": 2, "denoise": 0.25, "guidance": 1.0, "tile_size": 0}
    prompt["load"] = prompts.node("LoadImage", image=f"{name}.png")
    prompt["upscale"] = prompts.node(
        "FlashUpscale",
        model=[prompts.LORA, 0],
        vae=[prompts.MODELS, 2],
        positive=[prompts.TEXT, 0],
        image=["load", 0],
        **{**inputs, "overlap": 0.25, "noise_augmentation": 0.0, **settings},
    )
    prompt["after"] = prompts.node("SaveImage", images=["upscale", 0], filename_prefix="after")
    return prompt


def arrays(client: Client, run: Run) -> list[np.ndarray]:
    assert run.succeeded, run.error
    return [np.asarray(image, dtype=int) for image in client.images(run, "after")]


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [((1, 1), 2.0, (2, 2)), ((3, 131), 1.5, (4, 196)), ((97, 65), 1.0, (97, 65)), ((128, 64), 1.25, (160, 80))],
)
def test_every_picture_size_works(
    client: Client, server, size: tuple[int, int], scale: float, expected: tuple[int, int]
) -> None:
    (after,) = arrays(client, client.run(graph(server, "any", picture(*size), scale=scale)))
    assert after.shape == (expected[1], expected[0], 3)


def test_a_low_denoise_keeps_the_picture(client: Client, server) -> None:
    (after,) = arrays(client, client.run(graph(server, "same", steps=8, denoise=0.12)))
    before = Image.fromarray((picture() * 255).round().astype(np.uint8)).resize((192, 144), Image.Resampling.BICUBIC)
    kept, mirrored = np.asarray(before, dtype=int), np.asarray(before, dtype=int)[:, ::-1]
    assert np.abs(after - kept).mean() < np.abs(after - mirrored).mean() / 3


def test_an_alpha_channel_is_enlarged_too(client: Client, server) -> None:
    prompt = graph(server, "alpha")
    prompt["ramp"] = prompts.node("ImageToMask", image=["load", 0], channel="red")
    prompt["rgba"] = prompts.node("JoinImageWithAlpha", image=["load", 0], alpha=["ramp", 0])
    prompt["upscale"]["inputs"]["image"] = ["rgba", 0]
    (after,) = arrays(client, client.run(prompt))
    assert after.shape == (2 * SIZE["height"], 2 * SIZE["width"], 4)
    columns = after[..., 3].mean(0)
    assert np.all(np.diff(columns) <= 0)
    assert after[..., 3].std(0).max() < 1


def test_pictures_of_a_batch_are_enlarged_one_by_one(client: Client, server) -> None:
    """The first of two pictures equals the picture enlarged alone."""
    prompt = graph(server, "batch")
    (alone,) = arrays(client, client.run(prompt))
    prompt["two"] = prompts.node("RepeatImageBatch", image=["load", 0], amount=2)
    prompt["upscale"]["inputs"]["image"] = ["two", 0]
    first, second = arrays(client, client.run(prompt))
    assert np.array_equal(first, alone)
    assert np.abs(first - second).mean() > 0.5


def test_progress_counts_tiles_and_previews_steps(client: Client, server) -> None:
    run = client.run(graph(server, "progress", steps=4, denoise=0.5))
    # 192 x 144 in tiles of 128 with an overlap of 32 at least: 2 x 2 tiles, twice; the VAE's one tile, to and fro.
    # Newer ComfyUI leaves out some that come quickly, but neither the first, nor one with a preview, nor the last.
    shown = [value for value, _ in run.progress if value]
    assert shown == sorted(shown)
    assert {1, 5, 9, 10} <= set(shown) <= set(range(1, 11))
    assert {total for _, total in run.progress} == {10}
    assert len(run.previews) == 2
    assert max(run.previews[0].size) >= 12


def test_an_interrupt_takes_effect_between_tiles(client: Client, server) -> None:
    run = client.run(graph(server, "interrupt", steps=4, denoise=1.0, scale=4.0), interrupt_at_step=3)
    assert run.interrupted
    assert run.progress[-1][0] < run.progress[-1][1] / 2
    arrays(client, client.run(graph(server, "interrupt", steps=1)))


def with_small_tiles(prompt: prompts.Prompt) -> None:
    prompt["upscale"]["inputs"]["tile_size"] = 8


def with_guidance_and_no_negative(prompt: prompts.Prompt) -> None:
    prompt["upscale"]["inputs"]["guidance"] = 3.0


def with_another_vae(prompt: prompts.Prompt) -> None:
    prompt["pixels"] = prompts.node("VAELoader", vae_name="pixel_space")
    prompt["upscale"]["inputs"]["vae"] = ["pixels", 0]


def with_a_model_without_trained_timesteps(prompt: prompts.Prompt) -> None:
    prompt["edm"] = prompts.node(
        "ModelSamplingContinuousEDM", model=[prompts.LORA, 0], sampling="edm", sigma_max=120.0, sigma_min=0.002
    )
    prompt["upscale"]["inputs"]["model"] = ["edm", 0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_small_tiles, ["tile_size is 8", "64 or more"]),
        (with_guidance_and_no_negative, ["guidance is 3", "negative"]),
        (with_another_vae, ["latents of 3 channels", "Connect the VAE"]),
        (with_a_model_without_trained_timesteps, ["no trained timesteps"]),
    ],
)
def test_wrong_input_raises_a_readable_error(
    client: Client, server, spoil: Callable[[prompts.Prompt], None], words: list[str]
) -> None:
    prompt = graph(server, "bad")
    spoil(prompt)
    run = client.run(prompt)
    assert run.error is not None
    assert run.error["node_type"] == "FlashUpscale"
    for word in words:
        assert word in run.error["exception_message"]


@pytest.mark.parametrize(("name", "value"), [("scale", 9.0), ("overlap", 0.6), ("denoise", 0.0), ("steps", 17)])
def test_values_out_of_range_raise_an_error_on_the_page(client: Client, server, name: str, value: float) -> None:
    with pytest.raises(Exception, match=name):
        client.queue(graph(server, "range", **{name: value}))


def test_an_enlarged_picture_made_small_again_equals_the_original(client: Client) -> None:
    """The shipped workflow runs at half of its scale."""
    prompt = json.loads((prompts.SHIPPED.parent / "flash_demo_upscale.json").read_text())
    prompt["9"]["inputs"]["scale"] = 2.0
    prompt["before"] = prompts.node("PreviewImage", images=["6", 0])
    run = client.run(prompt)
    assert run.succeeded, run.error
    (after,) = client.images(run, prompts.SAVE)
    (before,) = client.images(run, "before")
    assert (before.size, after.size) == ((128, 128), (256, 256))
    smaller = np.asarray(after.resize(before.size, Image.Resampling.BOX), dtype=int)
    assert np.abs(smaller - np.asarray(before, dtype=int)).mean() < 12
