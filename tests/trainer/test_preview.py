"""Sample grids need no more memory than training, for any number of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.distill.assembly import assemble
from flash_diffusion.trainer.distill.preview import Preview, preview_rows
from flash_diffusion.trainer.teachers.in_memory import tiles

PROMPTS = ["red ball", "green box", "blue cone"]


def test_grid_is_drawn_in_batches_of_the_training_size(
    recipe_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = assemble(parse_recipe(recipe_content), Accelerator())
    rows = preview_rows(parts, PROMPTS)
    asked: list[int] = []
    decoded: list[int] = []
    predict, decode = parts.teacher.denoiser.predict, parts.teacher.decode

    def predicted(z: torch.Tensor, *arguments: Any) -> torch.Tensor:
        asked.append(len(z))
        return predict(z, *arguments)

    def drawn(z: torch.Tensor) -> torch.Tensor:
        decoded.append(len(z))
        return decode(z)

    monkeypatch.setattr(parts.teacher.denoiser, "predict", predicted)
    monkeypatch.setattr(parts.teacher, "decode", drawn)
    grids = {}
    for size in (8, 2):
        recipe = parse_recipe({**recipe_content, "batch_size": size})
        asked.clear()
        grids[size] = np.asarray(Preview(recipe, rows).draw().grid, dtype=float)
        assert max(asked) == 2 * min(size, len(PROMPTS))  # with guidance both branches are in one batch
        assert set(decoded) == {1}
    assert grids[8].shape[0] > 3 * 64
    assert np.abs(grids[8] - grids[2]).max() <= 1


def test_tiles_are_decoded_one_at_a_time(recipe_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of half a picture's side. No other tile is blended into the corner of the first one."""
    monkeypatch.setattr(tiles, "SIDE", 32)
    recipe = parse_recipe({**recipe_content, "memory": {"preview_tiles": True}})
    parts = assemble(recipe, Accelerator())
    seen: list[tuple[int, ...]] = []
    parts.teacher.vae.decoder.register_forward_pre_hook(lambda _module, given: seen.append(tuple(given[0].shape[2:])))
    columns = Preview(recipe, preview_rows(parts, PROMPTS[:1])).columns()
    assert max(seen) == (4, 4)
    assert all(pictures.shape == (1, 3, 64, 64) for pictures in columns.values())
    seen.clear()
    z = torch.randn(1, *parts.teacher.latent_shape)
    with tiles.decoding_in_tiles(parts.teacher.vae), torch.no_grad():
        made = parts.teacher.decode(z)
    with torch.no_grad():
        corner = parts.teacher.decode(z[..., :4, :4])
    assert seen[-1] == (4, 4)
    torch.testing.assert_close(made[..., :24, :24], corner[..., :24, :24])  # a quarter of 32 pixels is blended
    parts.teacher.decode(z)
    assert seen[-1] == (8, 8)  # as ever outside of the block
