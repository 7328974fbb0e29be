"""Hashes of a teacher's encoders: equal between loads and copies, different where encoding gives other values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

FAMILIES = ("sd15", "sdxl", "pixart_alpha", "sd3")


def load(family: str, path: Path, **fields: object) -> Teacher:
    return load_teacher(ModelSection.model_validate({"family": family, "path": str(path), **fields}), resolution=64)


def change_weight(file: Path, end: str) -> None:
    """Add to the first weight whose name ends so."""
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(end))
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def change_setting(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("family", FAMILIES)
def test_hashes_are_those_of_a_copy_and_stay_after_release(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    first = load(family, models(family))
    first.encode_prompts(["red ball", "a much longer prompt than the encoders can read, " * 40])
    copy = load(family, shutil.copytree(models(family), tmp_path / "another name"))
    hashes = first.image_encoder_hash(), first.text_encoder_hash()
    assert hashes == (copy.image_encoder_hash(), copy.text_encoder_hash())
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in hashes)
    first.release_encoders()
    assert hashes == (first.image_encoder_hash(), first.text_encoder_hash())
    untold = load(family, models(family))
    untold.release_encoders()
    for function in (untold.image_encoder_hash, untold.text_encoder_hash):
        with pytest.raises(RuntimeError, match="before release_encoders"):
            function()


def _vae_weight(folder: Path) -> None:
    change_weight(folder / "vae" / "diffusion_pytorch_model.safetensors", "encoder.conv_in.bias")


def _decoder_weight(folder: Path) -> None:
    change_weight(folder / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias")


def _vae_scale(folder: Path) -> None:
    change_setting(folder / "vae" / "config.json", scaling_factor=0.5)


def _vae_shift(folder: Path) -> None:
    change_setting(folder / "vae" / "config.json", shift_factor=0.5)


def _second_encoder(folder: Path) -> None:
    change_weight(folder / "text_encoder_2" / "model.safetensors", "mlp.fc1.bias")


def _third_encoder(folder: Path) -> None:
    change_weight(folder / "text_encoder_3" / "model.safetensors", "final_layer_norm.weight")


def _activation(folder: Path) -> None:
    change_setting(folder / "text_encoder" / "config.json", hidden_act="gelu")


def _vocabulary(folder: Path) -> None:
    file = folder / "tokenizer" / "vocab.json"
    words = json.loads(file.read_text())
    change_setting(file, a=words["b"], b=words["a"])


def _merges(folder: Path) -> None:
    file = folder / "tokenizer" / "vocab.json"
    words = json.loads(file.read_text())
    file.write_text(json.dumps({"re" if word == "~" else word: index for word, index in words.items()}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nr e\n")


def _length(folder: Path) -> None:
    change_setting(folder / "tokenizer" / "tokenizer_config.json", model_max_length=12)


def _network(folder: Path) -> None:
    change_weight(folder / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.bias")


@pytest.mark.parametrize(
    ("family", "change", "images", "texts"),
    [
        ("sd15", _vae_weight, True, False),
        ("sd15", _vae_scale, True, False),
        ("sd3", _vae_shift, True, False),
        ("sdxl", _second_encoder, False, True),
        ("sd3", _third_encoder, False, True),
        ("sd15", _activation, False, True),
        ("sd15", _vocabulary, False, True),
        ("sd15", _merges, False, True),
        ("sd15", _length, False, True),
        ("sd15", _decoder_weight, False, False),
        ("sd15", _network, False, False),
    ],
)
def test_hashes_change_where_encoding_changes(
    family: str,
    change: Callable[[Path], None],
    images: bool,
    texts: bool,
    models: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    other = shutil.copytree(models(family), tmp_path / "model")
    change(other)
    before, after = load(family, models(family)), load(family, other)
    assert (before.image_encoder_hash() != after.image_encoder_hash()) is images
    assert (before.text_encoder_hash() != after.text_encoder_hash()) is texts
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(before.encode(pictures), after.encode(pictures)) is not images
    prompt = ["a red ball beside a blue box"]
    first, second = (teacher.encode_prompts(prompt).cross_attention for teacher in (before, after))
    assert first is not None
    assert second is not None
    assert (first.shape == second.shape and torch.equal(first, second)) is not texts


def test_text_encoder_hash_knows_dtype_and_t5(models: Callable[[str], Path]) -> None:
    plain = load("sd3", models("sd3"))
    without = load("sd3", models("sd3"), t5=False)
    half = load("sd3", models("sd3"), dtype="bfloat16")
    assert len({teacher.text_encoder_hash() for teacher in (plain, without, half)}) == 3
    assert len({teacher.image_encoder_hash() for teacher in (plain, without, half)}) == 1  # VAEs are float32
