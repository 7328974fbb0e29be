"""Inpainting and outpainting with the demo in the real ComfyUI: changed pixels, kept bits, and errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from . import prompts
from .client import Client, Run

pytestmark = pytest.mark.comfy

WIDTH, HEIGHT = 200, 160
MASK = (60, 50, 110, 90)  # left, top, right, bottom
GROW, FEATHER = 3, 6


def picture(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Make a picture of smooth colours; every pixel has another colour."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x / max(width - 1, 1), y / max(height - 1, 1), (x + y) % 32 / 31], axis=-1)


def save(server, name: str, pixels: np.ndarray, mask: tuple[int, int, int, int] | None = None) -> str:
    """Save a PNG in ComfyUI's input folder; Load Image makes the mask from its transparency."""
    rgb = (pixels * 255).round().astype(np.uint8)
    alpha = np.full((*rgb.shape[:2], 1), 255, np.uint8)
    if mask is not None:
        left, top, right, bottom = mask
        alpha[top:bottom, left:right] = 0
    Image.fromarray(np.concatenate([rgb, alpha], axis=-1)).save(server.base / "input" / name)
    return name


def graph(name: str, pictures: int = 1, **settings: object) -> prompts.Prompt:
    """Make the graph: load, prepare, sample, stitch, save; "before" saves the loaded picture."""
    prompt = prompts.latents(None, seed=3, steps=2, text="red apple")
    for unused in (prompts.EMPTY, prompts.DECODE, prompts.SAVE, "latent"):
        del prompt[unused]
    inputs = {"size": 0, "context": 1.5, "grow": GROW, "feather": FEATHER}
    inputs |= {f"pad_{side}": 0 for side in ("left", "top", "right", "bottom")}
    prompt["load"] = prompts.node("LoadImage", image=name)
    prompt["prepare"] = prompts.node(
        "FlashInpaintPrepare",
        model=[prompts.MODELS, 0],
        vae=[prompts.MODELS, 2],
        positive=[prompts.TEXT, 0],
        image=["load", 0],
        **{"mask": ["load", 1], **inputs, **settings},
    )
    prompt["several"] = prompts.node("RepeatLatentBatch", samples=["prepare", 2], amount=pictures)
    prompt[prompts.SAMPLER]["inputs"].update(positive=["prepare", 0], latent_image=["several", 0])
    prompt["decode"] = prompts.node("VAEDecode", samples=[prompts.SAMPLER, 0], vae=[prompts.MODELS, 2])
    prompt["stitch"] = prompts.node("FlashInpaintStitch", stitch=["prepare", 3], image=["decode", 0])
    prompt["after"] = prompts.node("SaveImage", images=["stitch", 0], filename_prefix="after")
    prompt["before"] = prompts.node("SaveImage", images=["load", 0], filename_prefix="before")
    prompt["crop"] = prompts.node("PreviewImage", images=["prepare", 4])
    return prompt


def arrays(client: Client, run: Run, node: str) -> list[np.ndarray]:
    assert run.succeeded, run.error
    return [np.asarray(image, dtype=int) for image in client.images(run, node)]


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (before != after).any(-1)


def test_only_the_mask_changes_and_the_rest_keeps_its_bits(client: Client, server) -> None:
    name = save(server, "inpaint.png", picture(), MASK)
    run = client.run(graph(name))
    (before,), (after,) = arrays(client, run, "before"), arrays(client, run, "after")
    assert after.shape == before.shape == (HEIGHT, WIDTH, 3)
    different = changed(before, after)
    left, top, right, bottom = MASK
    reach = GROW + FEATHER
    outside = np.ones_like(different)
    outside[top - reach : bottom + reach, left - reach : right + reach] = False
    assert not different[outside].any()
    assert different[top:bottom, left:right].mean() > 0.95
    (crop,) = arrays(client, run, "crop")
    assert 0.6 < crop.shape[0] * crop.shape[1] / 128**2 < 1.6  # the demo's own size


def test_several_variants_of_one_picture_are_stitched(client: Client, server) -> None:
    name = save(server, "variants.png", picture(), MASK)
    first, second = arrays(client, client.run(graph(name, pictures=2)), "after")
    left, top, right, bottom = MASK
    assert changed(first, second)[top:bottom, left:right].mean() > 0.9
    assert not changed(first, second)[:, : left - GROW - FEATHER].any()


def test_outpainting_extends_the_picture(client: Client, server) -> None:
    name = save(server, "outpaint.png", picture())
    run = client.run(graph(name, pad_right=40, pad_top=24))
    (before,), (after,) = arrays(client, run, "before"), arrays(client, run, "after")
    assert after.shape == (HEIGHT + 24, WIDTH + 40, 3)
    kept = after[24 + GROW + FEATHER :, : WIDTH - GROW - FEATHER]
    assert np.array_equal(kept, before[GROW + FEATHER :, : WIDTH - GROW - FEATHER])
    new = after[:, WIDTH:]
    assert len(np.unique(new.reshape(-1, 3), axis=0)) > 100


def test_an_alpha_channel_is_kept(client: Client, server) -> None:
    name = save(server, "alpha.png", picture(), MASK)
    prompt = graph(name)
    prompt["half"] = prompts.node("SolidMask", value=0.25, width=WIDTH, height=HEIGHT)
    prompt["rgba"] = prompts.node("JoinImageWithAlpha", image=["load", 0], alpha=["half", 0])
    prompt["prepare"]["inputs"]["image"] = ["rgba", 0]
    (after,) = arrays(client, client.run(prompt), "after")
    assert after.shape == (HEIGHT, WIDTH, 4)
    assert len(np.unique(after[..., 3])) == 1


def test_another_mask_at_the_stitch(client: Client, server) -> None:
    """Only its white pixels change, and they are those that the prepared mask would have pasted."""
    prompt = graph(save(server, "stitch_mask.png", picture(), MASK))
    (whole,) = arrays(client, client.run(prompt), "after")
    prompt["black"] = prompts.node("SolidMask", value=0.0, width=WIDTH, height=HEIGHT)
    prompt["white"] = prompts.node("SolidMask", value=1.0, width=20, height=12)
    prompt["own"] = prompts.node(
        "MaskComposite", destination=["black", 0], source=["white", 0], x=70, y=60, operation="add"
    )
    prompt["stitch"]["inputs"]["mask"] = ["own", 0]
    run = client.run(prompt)
    (after,) = arrays(client, run, "after")
    before = (picture() * 255).round().astype(int)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[60:72, 70:90] = True
    assert np.array_equal(after[~inside], before[~inside])
    assert np.array_equal(after[inside], whole[inside])  # within the painted mask, whose weight is 1

    prompt["stitch"]["inputs"]["mask"] = ["black", 0]
    error = client.run(prompt).error
    assert error is not None
    assert "nothing would be pasted" in error["exception_message"]


def test_shifted_colours_of_a_crop_are_mended(client: Client, server) -> None:
    """The crop itself comes back 5 % darker: with match_colors its kept surroundings say so."""
    prompt = graph(save(server, "drift.png", picture() * 0.5 + 0.25, MASK))
    prompt["shade"] = prompts.node("EmptyImage", width=8, height=8, batch_size=1, color=0)
    prompt["whole"] = prompts.node("SolidMask", value=1.0, width=WIDTH, height=HEIGHT)
    prompt["dark"] = prompts.node(
        "ImageBlend", image1=["prepare", 4], image2=["shade", 0], blend_factor=0.05, blend_mode="normal"
    )
    prompt["stitch"]["inputs"] |= {"image": ["dark", 0], "mask": ["whole", 0]}
    distances = []
    for match in (False, True):
        prompt["stitch"]["inputs"]["match_colors"] = match
        prompt["before"]["inputs"]["filename_prefix"] = f"before_{match}"  # else it is cached, and shows nothing
        run = client.run(prompt)
        (before,), (after,) = arrays(client, run, "before"), arrays(client, run, "after")
        distances.append(abs(after - before)[changed(before, after)].mean())
    assert distances[1] < 0.5 * distances[0]


def test_frames_of_a_video_share_one_crop_and_keep_what_is_not_masked(client: Client, server) -> None:
    """The mask moves from frame to frame; the crop holds all of it, and every frame changes only within its mask."""
    prompt = graph(save(server, "frames.png", picture()))
    prompt["frames"] = prompts.node("RepeatImageBatch", image=["load", 0], amount=3)
    prompt["black"] = prompts.node("SolidMask", value=0.0, width=WIDTH, height=HEIGHT)
    prompt["white"] = prompts.node("SolidMask", value=1.0, width=30, height=30)
    places = (40, 60, 80)
    for number, x in enumerate(places):
        prompt[f"mask_{number}"] = prompts.node(
            "MaskComposite", destination=["black", 0], source=["white", 0], x=x, y=60, operation="add"
        )
        prompt[f"picture_{number}"] = prompts.node("MaskToImage", mask=[f"mask_{number}", 0])
    prompt["two"] = prompts.node("ImageBatch", image1=["picture_0", 0], image2=["picture_1", 0])
    prompt["three"] = prompts.node("ImageBatch", image1=["two", 0], image2=["picture_2", 0])
    prompt["masks"] = prompts.node("ImageToMask", image=["three", 0], channel="red")
    prompt["prepare"]["inputs"] |= {"image": ["frames", 0], "mask": ["masks", 0]}
    run = client.run(prompt)
    frames = arrays(client, run, "after")
    (before,) = arrays(client, run, "before")
    assert len({crop.shape for crop in arrays(client, run, "crop")}) == 1
    reach = GROW + FEATHER
    for x, frame in zip(places, frames, strict=True):
        outside = np.ones((HEIGHT, WIDTH), bool)
        outside[60 - reach : 90 + reach, x - reach : x + 30 + reach] = False
        assert np.array_equal(frame[outside], before[outside])
        assert changed(before, frame)[60:90, x : x + 30].mean() > 0.9


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (128, 128), (129, 131)])
def test_every_picture_size_works(client: Client, server, size: tuple[int, int]) -> None:
    width, height = size
    name = save(server, f"any_{width}x{height}.png", picture(width, height), (0, 0, (width + 1) // 2, height))
    run = client.run(graph(name))
    (before,), (after,) = arrays(client, run, "before"), arrays(client, run, "after")
    assert after.shape == before.shape


def use_mask(prompt: prompts.Prompt, value: float, width: int, height: int) -> None:
    prompt["solid"] = prompts.node("SolidMask", value=value, width=width, height=height)
    prompt["prepare"]["inputs"]["mask"] = ["solid", 0]


def without_mask(prompt: prompts.Prompt) -> None:
    del prompt["prepare"]["inputs"]["mask"]


def with_empty_mask(prompt: prompts.Prompt) -> None:
    use_mask(prompt, 0.0, WIDTH, HEIGHT)


def with_a_mask_of_another_shape(prompt: prompts.Prompt) -> None:
    use_mask(prompt, 1.0, 64, 128)


def with_two_pictures_and_three_masks(prompt: prompts.Prompt) -> None:
    prompt["two"] = prompts.node("RepeatImageBatch", image=["load", 0], amount=2)
    prompt["three"] = prompts.node("RepeatImageBatch", image=["load", 0], amount=3)
    prompt["masks"] = prompts.node("ImageToMask", image=["three", 0], channel="red")
    prompt["prepare"]["inputs"].update(image=["two", 0], mask=["masks", 0])


def with_one_crop_for_two_pictures(prompt: prompts.Prompt) -> None:
    prompt["two"] = prompts.node("RepeatImageBatch", image=["load", 0], amount=2)
    prompt["prepare"]["inputs"]["image"] = ["two", 0]
    prompt["one"] = prompts.node("ImageFromBatch", image=["decode", 0], batch_index=0, length=1)
    prompt["stitch"]["inputs"]["image"] = ["one", 0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_mask, ["nothing to inpaint", "no mask is connected"]),
        (with_empty_mask, ["nothing to inpaint", "the mask is empty", "Invert Mask"]),
        (with_a_mask_of_another_shape, ["64 x 128", f"{WIDTH} x {HEIGHT}"]),
        (with_two_pictures_and_three_masks, ["3 masks for 2 pictures"]),
        (with_one_crop_for_two_pictures, ["1 inpainted crop for 2 pictures"]),
    ],
)
def test_wrong_input_raises_a_readable_error(
    client: Client, server, spoil: Callable[[prompts.Prompt], None], words: list[str]
) -> None:
    prompt = graph(save(server, "bad.png", picture(), MASK))
    spoil(prompt)
    run = client.run(prompt)
    assert run.error is not None
    assert run.error["node_type"].startswith("FlashInpaint")
    for word in words:
        assert word in run.error["exception_message"]


def test_a_smaller_mask_of_the_same_shape_fits(client: Client, server) -> None:
    """Examples: a mask of a thumbnail, or Load Image's empty 64 x 64 mask with padding."""
    prompt = graph(save(server, "small.png", picture(), MASK))
    use_mask(prompt, 1.0, WIDTH // 2, HEIGHT // 2)
    (after,) = arrays(client, client.run(prompt), "after")
    assert after.shape == (HEIGHT, WIDTH, 3)
