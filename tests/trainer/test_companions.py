"""Pictures beside pictures: masks, identities and hints, from a folder and from shards to the task."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.trainer.config import DataSection, ModelSection, TaskSection
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.data.framing import to_mask, to_tensor
from flash_diffusion.trainer.data.reading import read_samples
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.tasks.base import NoOptions, Task
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

SIZE = (96, 64)  # (width, height): what is cut at the sides must be cut alike


class Looks(Task):
    """Keeps what it was given."""

    name = "looks"
    companions = ("mask", "identity", "hint")

    def __init__(self) -> None:
        super().__init__(NoOptions())
        self.seen: list[tuple[Tensor, dict[str, Tensor]]] = []

    def extra_channels(self, latent_channels: int) -> int:
        return 0

    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        self.seen.append((images, dict(companions)))
        return {"images": images}

    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        return Conditioning(noise_level=torch.zeros(len(drawn["images"])))


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Teacher:
    return load_teacher(ModelSection(family="sd15", path=str(tiny_model)))


def noise(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(folder: Path, count: int = 3, beside: tuple[str, ...] = ("mask", "identity", "hint")) -> Path:
    """Random pictures; the mask and the hint of each hold the picture itself, so that framing can be seen."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture = noise(index)
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"number {index}")
        for name in beside:
            other = {"mask": picture.convert("L"), "hint": picture, "identity": noise(50 + index, (40, 80))}[name]
            other.save(folder / f"{index}.{name}.png")
    return folder


def shard(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            info = tarfile.TarInfo(file.name)
            info.size = file.stat().st_size
            tar.addfile(info, io.BytesIO(file.read_bytes()))
    return path


def section(path: Path, **fields: Any) -> DataSection:
    source = "folder" if path.is_dir() else "webdataset"
    return DataSection.model_validate({"source": source, "path": path, **fields})


@pytest.fixture(params=["folder", "shard"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> DataSection:
    folder = write(tmp_path / "pictures")
    return section(folder if request.param == "folder" else shard(tmp_path / "a.tar", folder))


def test_companions_are_not_samples_and_are_read_on_request(data: DataSection) -> None:
    assert [sample.caption for sample in read_samples(data)] == ["number 0", "number 1", "number 2"]
    assert all(not sample.companions for sample in read_samples(data))
    for index, sample in enumerate(read_samples(data, ("mask", "identity"))):
        assert set(sample.companions) == {"mask", "identity"}
        assert np.array_equal(np.asarray(sample.companions["identity"]), np.asarray(noise(50 + index, (40, 80))))


@torch.no_grad()
def test_companions_are_scaled_and_cut_as_their_picture(data: DataSection, teacher: Teacher, tmp_path: Path) -> None:
    looks = Looks()
    data = data.model_copy(update={"encode_batch": 2, "cache": tmp_path / "a cache of its own"})
    examples = prepare_examples(data, teacher, looks, variants=2)
    assert len(examples) == 6
    images = torch.cat([images for images, _ in looks.seen])
    beside = {name: torch.cat([other[name] for _, other in looks.seen]) for name in looks.companions}
    assert images.shape == beside["identity"].shape == (6, 3, 64, 64)
    assert beside["mask"].shape == (6, 1, 64, 64)
    assert torch.equal(beside["hint"], images)
    # ITU-R 601-2's luma, which is what Pillow's grey is.
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True) / 2 + 0.5
    torch.testing.assert_close(beside["mask"], grey, atol=2 / 255, rtol=0)
    assert torch.equal(beside["identity"][2], to_tensor(noise(51, (40, 80)), (64, 64)))
    assert torch.equal(beside["identity"][2], beside["identity"][3])


def test_white_in_a_mask_is_1() -> None:
    half = Image.new("RGB", (32, 16), "black")
    half.paste("white", (16, 0, 32, 16))
    mask = to_mask(half, (16, 32))
    assert torch.equal(mask[..., :15], torch.zeros(1, 16, 15))
    assert torch.equal(mask[..., 17:], torch.ones(1, 16, 15))


def test_companions_of_half_the_pictures_are_refused(data: DataSection) -> None:
    assert data.path is not None
    folder = data.path if data.source == "folder" else data.path.parent / "pictures"
    (folder / "1.mask.png").unlink()
    if data.source == "webdataset":
        shard(data.path, folder)
    with pytest.raises(UserError, match=r"1(\.png)?( in a\.tar)? has no mask picture beside it, and .*0"):
        list(read_samples(data, ("mask",)))
    assert len(list(read_samples(data, ("identity",)))) == 3
    (folder / "0.mask.png").unlink()
    if data.source == "webdataset":
        shard(data.path, folder)
    with pytest.raises(UserError, match=r"0(\.png)?( in a\.tar)? has no mask picture beside it, and .*2"):
        list(read_samples(data, ("mask",)))


@pytest.mark.parametrize("name", ["mask", "hint"])
def test_companion_of_another_size_is_refused_with_both_sizes(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "pictures")
    noise(9, (20, 10)).save(folder / f"2.{name}.png")
    with pytest.raises(UserError, match=rf"the {name} beside .*2\.png has 20 x 10 pixels, and the picture has 96 x 64"):
        list(read_samples(section(folder), ("mask", "hint")))


def test_companions_without_picture_or_broken_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures")
    (folder / "1.identity.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"the identity of .*1\.png is not a readable image"):
        list(read_samples(section(folder), ("identity",)))
    noise(0).save(folder / "9.mask.png")
    with pytest.raises(UserError, match=r"9\.mask\.png .* there is no picture 9\.\*"):
        list(read_samples(section(folder)))
    with pytest.raises(UserError, match=r"9 in a\.tar has a mask picture, but no picture that the mask belongs to"):
        list(read_samples(section(shard(tmp_path / "a.tar", folder))))


@torch.no_grad()
def test_inpainting_and_face_swap_use_companions(teacher: Teacher) -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mask, identity = torch.rand(2, 1, 64, 64), torch.rand(2, 3, 64, 64) * 2 - 1
    drawn = build_task(TaskSection(name="inpainting")).draw(images, {"mask": mask}, torch.Generator())
    assert torch.equal(drawn["mask"], (mask >= 0.5).float())
    assert torch.equal(drawn["masked"], torch.where(mask >= 0.5, 0.0, images))
    swap = build_task(TaskSection(name="face-swap"))
    drawn = swap.draw(images, {"mask": mask, "identity": identity}, torch.Generator())
    assert torch.equal(drawn["mask"], (mask >= 0.5).float())
    assert torch.equal(drawn["identity"], identity)
