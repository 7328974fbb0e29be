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
