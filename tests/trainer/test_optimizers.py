"""AdamW with moments in 8 bits: a readable error without bitsandbytes, and a run that resumes with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.distill.assembly import adamw
from flash_diffusion.trainer.distill.checkpoint import last_intact, remove_folder
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.rehearse.pretend.optimizer import PretendAdamW8bit


def test_a_missing_library_is_named(recipe_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    recipe_content["optimizer"]["bits"] = 8
    section = parse_recipe(recipe_content).optimizer
    with pytest.raises(UserError, match=r"optimizer\.bits: 8 needs bitsandbytes.*set optimizer\.bits to 32"):
        adamw({"weight": nn.Parameter(torch.zeros(2))}, 1e-3, (0.9, 0.999), section)


def test_the_rehearsed_state_has_the_librarys_bytes(recipe_content: dict[str, Any]) -> None:
    """bitsandbytes keeps tensors below 4096 values in 32 bits; its tables of 256 values are shared by all tensors."""
    pytest.importorskip("bitsandbytes")
    recipe_content["optimizer"]["bits"] = 8
    section = parse_recipe(recipe_content).optimizer
    values = {"large": nn.Parameter(torch.randn(64, 100)), "small": nn.Parameter(torch.randn(4, 100))}
    real = adamw(values, 1e-3, (0.9, 0.999), section)
    pretended = PretendAdamW8bit(values.values(), {"lr": 1e-3})
    for optimizer in (real, pretended):
        for value in values.values():
            value.grad = torch.ones_like(value)
        optimizer.step()
    for value in values.values():
        sizes = [
            {name: kept.nbytes for name, kept in optimizer.state[value].items() if torch.is_tensor(kept)}
            for optimizer in (real, pretended)
        ]
        assert {name: size for name, size in sizes[0].items() if not name.startswith("qmap")} == sizes[1]


def test_a_run_with_8_bits_resumes_exactly(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe_content["optimizer"]["bits"] = 8
    recipe_content["lora"]["rank"] = 64  # above 4096 values
    recipe = parse_recipe(recipe_content)
    whole = load_file(distil(recipe, tmp_path / "run"))
    last = last_intact(tmp_path / "run")
    assert last is not None
    remove_folder(last)
    resumed = load_file(distil(recipe, tmp_path / "run", resume=True))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
