"""Tasks: masks and degradations have the properties they claim, and channels are what published models read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.trainer.config import ModelSection, TaskSection
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.tasks.degradation import degrade, gaussian_blur, through_jpeg
from flash_diffusion.trainer.tasks.masks import random_masks
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

KINDS = ("strokes", "box", "outpainting", "blob")


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Teacher:
    """A tiny Stable Diffusion; tasks only use its VAE."""
    return load_teacher(ModelSection(family="sd15", path=str(tiny_model)))


def task(name: str, **options: Any) -> Any:
    return build_task(TaskSection(name=name, options=options))


def pictures(batch: int = 3, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch, 3, size // 8, size // 8, generator=generator) * 2 - 1
    return F.interpolate(coarse, (size, size), mode="bilinear")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30)
@given(st.sampled_from(KINDS), st.integers(8, 80), st.integers(8, 80), st.integers(0, 10**6))
def test_masks_are_black_and_white_and_never_empty(kind: str, height: int, width: int, seed: int) -> None:
    masks = random_masks(4, (height, width), {kind: 1.0}, seeded(seed))
    assert masks.shape == (4, 1, height, width)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert bool((masks.mean((1, 2, 3)) > 0).all())
    assert torch.equal(masks, random_masks(4, (height, width), {kind: 1.0}, seeded(seed)))


def test_blobs_have_the_wanted_area() -> None:
    areas = random_masks(300, (32, 32), {"blob": 1.0}, seeded()).mean((1, 2, 3))
    some = areas[areas < 1]  # a few mask everything, whatever the kind
    assert 0.08 < float(some.min()) < 0.2
    assert 0.5 < float(some.max()) < 0.62
    assert 0.01 < 1 - len(some) / 300 < 0.12


def test_outpainting_masks_lie_at_the_border() -> None:
    masks = random_masks(50, (40, 40), {"outpainting": 1.0}, seeded())
    corners = masks[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert bool((corners.amax(1) == 1).all())


def test_weights_set_the_frequency_of_mask_kinds() -> None:
    boxes = random_masks(10, (16, 16), {"box": 1.0, "blob": 0.0}, seeded(3))
    assert torch.equal(boxes, random_masks(10, (16, 16), {"box": 2.0, "blob": 0.0}, seeded(3)))
    with pytest.raises(ValueError, match="above 0"):
        random_masks(1, (16, 16), {"box": 0.0}, seeded())


@torch.no_grad()
def test_inpainting_gives_the_nine_channels_of_published_models(teacher: Teacher) -> None:
    images = pictures()
    inpainting = task("inpainting", masks={"box": 1})
    assert inpainting.extra_channels(4) == 5
    concat = inpainting.conditions(images, teacher, seeded(5)).concat
    masks = random_masks(3, (64, 64), {"box": 1}, seeded(5))
    # As diffusers' inpainting pipeline prepares them: its mask first, nearest, then the masked picture's latents.
    torch.testing.assert_close(concat[:, :1], F.interpolate(masks, (8, 8)))
    torch.testing.assert_close(concat[:, 1:], teacher.encode(torch.where(masks < 0.5, images, 0.0)))


def test_blurring_is_the_gaussians_convolution() -> None:
    point = torch.zeros(1, 3, 31, 31)
    point[:, :, 15, 15] = 1
    blurred = gaussian_blur(point, 2.0)
    profile = blurred[0, 0, 15]
    wanted = torch.exp(-((torch.arange(31.0) - 15) ** 2) / 8)
    torch.testing.assert_close(profile / profile[15], wanted * (wanted > wanted[15 - 7]), atol=2e-3, rtol=0)
    assert float(blurred.sum()) == pytest.approx(3, rel=1e-4)


def test_a_fine_jpeg_changes_little_and_a_coarse_one_much() -> None:
    images = pictures()
    fine, coarse = (float((through_jpeg(images, quality) - images).abs().mean()) for quality in (95, 5))
    assert fine < 0.03 < coarse


def test_degradation_without_options_only_reduces_the_size() -> None:
    images = pictures(2, 32)
    small = degrade(images, 4, seeded(), blur=(0, 0), noise=(0, 0), jpeg=None)
    assert small.shape == (2, 3, 8, 8)
    torch.testing.assert_close(small, F.interpolate(images, (8, 8), mode="area"), atol=0.2, rtol=0)
    with pytest.raises(ValueError, match="3 times"):
        degrade(images, 3, seeded(), blur=(0, 0), noise=(0, 0), jpeg=None)


def test_degradation_noise_has_the_wanted_strength() -> None:
    grey = torch.zeros(1, 3, 256, 256)
    small = degrade(grey, 2, seeded(), blur=(0, 0), noise=(0.05, 0.05), jpeg=None)
    assert float(small.std()) == pytest.approx(0.1, rel=0.05)


@torch.no_grad()
def test_super_resolution_reads_the_enlarged_pictures_latents(teacher: Teacher) -> None:
    sharp = task("super-resolution", blur=[0, 0], noise=[0, 0], jpeg=None)
    assert sharp.extra_channels(4) == 4
    conditions = sharp.conditions(pictures(), teacher, seeded())
    assert conditions.concat.shape == (3, *teacher.latent_shape)
    assert conditions.noise_level is None
    # Smooth pictures lose little: their latents stay near.
    whole = teacher.encode(pictures())
    assert float((conditions.concat - whole).abs().mean() / whole.std()) < 0.5


def test_face_masks_are_the_ellipse_and_stay_near_it() -> None:
    swap = task("face-swap", centre=[0.4, 0.6], radius=[0.2, 0.25])
    masks = swap.face_masks(200, (64, 80), seeded())
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    rows, columns = masks.mean((0, 1, 3)), masks.mean((0, 1, 2))
    assert float((rows * torch.arange(64)).sum() / rows.sum()) / 64 == pytest.approx(0.6, abs=0.02)
    assert float((columns * torch.arange(80)).sum() / columns.sum()) / 80 == pytest.approx(0.4, abs=0.02)
    assert float(masks.mean()) == pytest.approx(torch.pi * 0.2 * 0.25, rel=0.1)


def test_the_identity_is_the_face_that_was_masked() -> None:
    """A white ellipse on black, masked: its identity picture is mostly white, wherever it was moved."""
    swap = task("face-swap", centre=[0.3, 0.5], radius=[0.2, 0.3])
    y, x = torch.meshgrid((torch.arange(64) + 0.5) / 64, (torch.arange(64) + 0.5) / 64, indexing="ij")
    face = (((x - 0.3) / 0.2) ** 2 + ((y - 0.5) / 0.3) ** 2 <= 1).float() * 1.6 - 1
    pictures = swap.identity_pictures(face.expand(32, 3, -1, -1), seeded())
    assert pictures.shape == (32, 3, 64, 64)
    assert 0.55 < float((pictures.mean(1) > 0).float().mean()) < 0.95
    assert len({float(picture.sum()) for picture in pictures}) == 32


@torch.no_grad()
def test_face_swap_reads_mask_target_and_identity(teacher: Teacher) -> None:
    swap, images = task("face-swap"), pictures()
    assert swap.extra_channels(4) == 9
    concat = swap.conditions(images, teacher, seeded(3)).concat
    generator = seeded(3)
    masks = swap.face_masks(3, (64, 64), generator)
    faces = swap.identity_pictures(images, generator)
    torch.testing.assert_close(concat[:, :1], F.interpolate(masks, (8, 8)))
    torch.testing.assert_close(concat[:, 1:5], teacher.encode(torch.where(masks < 0.5, images, 0.0)))
    torch.testing.assert_close(concat[:, 5:], teacher.encode(faces))
    # Guidance strengthens the identity: without it the target is the same, the face unknown.
    assert not swap.reads_text
    empty = teacher.unconditional(3)
    branch = swap.unconditional(empty.joined(Conditioning(concat=concat)), empty)
    assert torch.equal(branch.concat[:, :5], concat[:, :5])
    assert not branch.concat[:, 5:].any()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("inpainting", {"masks": {"stars": 1}}, ["task.options.masks", "stars"]),
        ("inpainting", {"masks": {}}, ["task.options.masks"]),
        ("super-resolution", {"blur": [1, 0]}, ["blur must be [low, high]"]),
        ("super-resolution", {"jpeg": [0, 50]}, ["task.options.jpeg"]),
        ("face-swap", {"radius": [0, 0.2]}, ["task.options.radius"]),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        task(name, **options)
    for word in words:
        assert word in str(caught.value)


def test_a_small_picture_that_is_no_latent_is_refused(teacher: Teacher) -> None:
    with pytest.raises(UserError, match="16 x 16 pixels and the latent is 8 x 8"):
        task("super-resolution", reads="pixels").conditions(pictures(), teacher, seeded())


@torch.no_grad()
@pytest.mark.parametrize("name", ["inpainting", "super-resolution", "face-swap", "control"])
def test_conditions_are_the_same_under_autocast(teacher: Teacher, name: str) -> None:
    """Recipes train in bfloat16; what users give a model is not drawn in it."""
    images = pictures()
    plain = task(name).conditions(images, teacher, seeded(5))
    with torch.autocast("cpu", torch.bfloat16):
        cast = task(name).conditions(images, teacher, seeded(5))
    for part in ("concat", "hint"):
        values = getattr(plain, part), getattr(cast, part)
        assert (values[0] is None) == (values[1] is None)
        if values[0] is not None:
            assert values[1].dtype == torch.float32
            assert torch.equal(*values)
