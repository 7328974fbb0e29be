"""The published Flash LoRAs are recognised by their keys and shapes, and load at their trained scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flash_diffusion.flash_core.lora import PUBLISHED, describe_base, flat_name, read_lora, report_on

from ..families.published_loras import FACTS, published_shapes, write_published

BASES = {"flash-sd": "sd15", "flash-sdxl": "sdxl", "flash-pixart": "pixart", "flash-sd3": "sd3"}
ENTRIES = {entry.name.removeprefix("jasperai/"): entry for entry in PUBLISHED}


@pytest.mark.parametrize("name", FACTS)
def test_published_table_equals_the_training_scripts(name: str) -> None:
    """Counts of layers and values by diffusers' networks, and the published files' sizes in megabytes."""
    rank, _, alpha, megabytes = FACTS[name]
    shapes = published_shapes(name)
    values = sum(torch.Size(shape).numel() for halves in shapes.values() for shape in halves)
    entry = ENTRIES[name]
    assert (entry.rank, entry.alpha, entry.layers, entry.values) == (rank, alpha, len(shapes), values)
    assert 4 * values / 1e6 == pytest.approx(megabytes, abs=0.7)


@pytest.mark.parametrize("name", ["flash-sd", "flash-pixart", "flash-sd3"])
def test_a_bare_file_is_recognised_and_has_its_true_scale(name: str, tmp_path: Path) -> None:
    rank, _, alpha, _ = FACTS[name]
    write_published(name, tmp_path / "pytorch_lora_weights.safetensors")
    file = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert file.published == f"jasperai/{name}"
    assert file.alpha_source == "published"
    assert not file.unknown
    assert not file.text_encoder
    ordinary = [module for module in file.modules.values() if "resolution_embedder" not in module.path]
    assert {module.scale for module in ordinary} == {alpha / rank}
    metadata = file.metadata
    assert metadata is not None
    assert (metadata.base, metadata.steps, metadata.guidance) == (BASES[name], 4, 1.0)
    flow = name == "flash-sd3"
    # By hand: trailing; for SD3 bent by its shift of 3, s = 3 u / (1 + 2 u).
    assert metadata.timesteps[4] == pytest.approx((1000, 900, 750, 500) if flow else (999, 749, 499, 249))
    assert metadata.process == ("flow" if flow else "vp")
    assert f"it is jasperai/{name} by its layers" in describe_base(file)
    assert "known for this published file" in report_on(file).text()


def test_the_kohya_twin_has_its_alpha_in_the_file(tmp_path: Path) -> None:
    write_published("flash-sdxl", tmp_path / "FlashSDXL.safetensors", kohya=True)
    file = read_lora(tmp_path / "FlashSDXL.safetensors")
    assert (file.published, file.alpha_source, file.scales) == ("jasperai/flash-sdxl", "file", (1.0,))


def test_the_json_beside_the_file_comes_first(tmp_path: Path) -> None:
    write_published("flash-sd", tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 128, "lora_alpha": 32}))
    file = read_lora(tmp_path)
    assert (file.published, file.alpha_source, file.scales) == ("jasperai/flash-sd", "adapter_config", (0.25,))


def test_a_file_with_a_header_is_not_recognised_as_published(tmp_path: Path) -> None:
    write_published("flash-sd", tmp_path / "style.safetensors", metadata={"ss_steps": "100"})
    file = read_lora(tmp_path / "style.safetensors")
    assert (file.published, file.metadata, file.alpha_source) == (None, None, "unknown")


def test_flash_pixarts_own_modules_get_their_stock_names(tmp_path: Path) -> None:
    """Height and width share a module in stock models: they get the mean of the file's two updates."""
    generator = torch.Generator().manual_seed(0)
    tensors, updates = {}, {}
    for path in ("timestep_embedder", "add_embedding.0", "add_embedding.1", "add_embedding.2"):
        down, up = torch.randn(4, 6, generator=generator), torch.randn(8, 4, generator=generator)
        tensors[f"base_model.model.adaln_single.{path}.linear_1.lora_A.weight"] = down
        tensors[f"base_model.model.adaln_single.{path}.linear_1.lora_B.weight"] = up
        updates[path] = up @ down * (2 / 4)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))
    file = read_lora(tmp_path)
    found = {name: module.scale * module.up @ module.down for name, module in file.modules.items()}
    wanted = {
        "timestep_embedder": updates["timestep_embedder"],
        "resolution_embedder": (updates["add_embedding.0"] + updates["add_embedding.1"]) / 2,
        "aspect_ratio_embedder": updates["add_embedding.2"],
    }
    assert set(found) == {flat_name(f"adaln_single.emb.{name}.linear_1") for name in wanted}
    for name, update in wanted.items():
        torch.testing.assert_close(found[flat_name(f"adaln_single.emb.{name}.linear_1")], update)
    assert "their mean is used" in " ".join(file.notes)
