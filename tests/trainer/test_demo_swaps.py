"""The demo's face-swap pairs: a face on another head, with everything outside the mask the head's own."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from flash_diffusion.trainer.config import DataSection
from flash_diffusion.trainer.data.reading import read_samples
from flash_diffusion.trainer.demo.shards import load_pictures
from flash_diffusion.trainer.demo.swaps import Swap, swaps


@pytest.fixture(scope="module")
def some() -> list[Swap]:
    return list(islice(swaps(), 40))


def pictures() -> dict[str, torch.Tensor]:
    loaded = load_pictures()
    names = [caption.name for caption in loaded.captions]
    return dict(zip(names, loaded.images.float() / 127.5 - 1, strict=True))


def test_swap_equals_the_head_outside_the_mask(some: list[Swap]) -> None:
    heads = pictures()
    for swap in some:
        outside = (swap.mask < 0.5).expand_as(swap.image)
        assert torch.equal(swap.image[outside], heads[swap.head][outside])
        assert swap.head != swap.face


def test_swap_is_nearer_to_the_face_inside_the_mask(some: list[Swap]) -> None:
    """Compared without colour, which is the head's: by where it is darker and lighter than its neighbourhood."""
    known = pictures()

    def drawing(picture: torch.Tensor) -> torch.Tensor:
        centre = picture.mean(0)[40:100, 36:92]
        return centre - centre.mean()

    nearer = [
        float((drawing(swap.image) - drawing(known[swap.face])).square().mean())
        < float((drawing(swap.image) - drawing(known[swap.head])).square().mean())
        for swap in some
    ]
    assert sum(nearer) >= 0.95 * len(nearer)


def test_swaps_depend_only_on_the_seed(some: list[Swap]) -> None:
    again, other = list(islice(swaps(), 5)), list(islice(swaps(1), 5))
    assert [swap.name for swap in again] == [swap.name for swap in some[:5]]
    assert all(torch.equal(a.identity, b.identity) for a, b in zip(again, some, strict=False))
    assert [swap.name for swap in other] != [swap.name for swap in again]


def test_recipe_reads_swaps_with_their_companions() -> None:
    (sample,) = read_samples(DataSection(source="demo-swaps", limit=1), ("mask", "identity"))
    assert sample.image.size == (128, 128)
    assert set(sample.companions) == {"mask", "identity"}
    assert sample.companions["mask"].convert("L").getextrema() == (0, 255)
