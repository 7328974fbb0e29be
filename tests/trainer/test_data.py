"""Sources, order and encoded examples."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.trainer.config import DataSection, ModelSection, TaskSection
from flash_diffusion.trainer.data.batches.order import Order
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.data.framing import to_tensor
from flash_diffusion.trainer.data.reading import read_samples
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.tasks.base import NoOptions, Task
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from .models import CAPTIONS


def png(color: str = "red", size: tuple[int, int] = (16, 16), mode: str = "RGB") -> bytes:
    """A picture's bytes."""
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """A tar file of members in order."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def section(source: str, path: Path | None = None, **fields: Any) -> DataSection:
    """A data section."""
    return DataSection.model_validate({"source": source, "path": path, **fields})


# -- the order ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(0, 2**31 - 1), st.integers(0, 300), st.integers(1, 70))
def test_order_depends_only_on_seed_and_position(length: int, seed: int, position: int, count: int) -> None:
    whole = Order(length, seed).indices(0, position + count)
    assert torch.equal(Order(length, seed).indices(position, count), whole[position:])


@given(st.integers(1, 50), st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_every_epoch_visits_every_sample_once(length: int, seed: int, epoch: int) -> None:
    visited = Order(length, seed).indices(epoch * length, length)
    assert sorted(visited.tolist()) == list(range(length))


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = {tuple(Order(40, seed).indices(40 * epoch, 40).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


# -- the sources -------------------------------------------------------------------------------------------------------


def test_folder_is_read_in_order_of_names(pictures: Path) -> None:
    samples = list(read_samples(section("folder", pictures)))
    assert [Path(sample.name).name for sample in samples] == [f"{index:03d}.png" for index in range(6)]
    assert tuple(sample.caption for sample in samples) == CAPTIONS


def test_limit_takes_the_first_samples(pictures: Path) -> None:
    assert [sample.caption for sample in read_samples(section("folder", pictures, limit=2))] == list(CAPTIONS[:2])


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_shards_and_folder_give_the_same_samples(pictures: Path, tmp_path: Path, suffix: str, mode: str) -> None:
    files = sorted(pictures.iterdir())
    for number, part in enumerate((files[:4], files[4:])):
        shard(tmp_path / f"part-{number}{suffix}", {file.name: file.read_bytes() for file in part}, mode)
    folder, shards = (
        list(read_samples(section("folder", pictures))),
        list(read_samples(section("webdataset", tmp_path))),
    )
    assert [sample.caption for sample in shards] == [sample.caption for sample in folder]
    for one, other in zip(folder, shards, strict=True):
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_the_demo_has_pictures_and_captions() -> None:
    samples = list(read_samples(section("demo")))
    assert len(samples) > 50
    assert all(sample.caption for sample in samples)
    assert {sample.image.size for sample in samples} == {(128, 128)}


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "clear.txt").write_text("nothing")
    (sample,) = read_samples(section("folder", tmp_path))
    assert sample.image.getpixel((0, 0)) == (255, 255, 255)


def test_paths_in_a_shard_never_reach_the_disk(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = shard(
        inner / "evil.tar",
        {"../outside.png": png(), "../outside.txt": b"up", "/tmp/absolute.png": png(), "/tmp/absolute.txt": b"root"},
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = set(tmp_path.rglob("*"))
    assert [sample.caption for sample in read_samples(section("webdataset", path))] == ["up", "root"]
    assert set(tmp_path.rglob("*")) == before


def test_shard_name_is_only_ever_a_file(tmp_path: Path) -> None:
    """Shard names are not commands, addresses or patterns, as WebDataset would otherwise take them."""
    for name in ("pipe:echo x > made.tar", "http://localhost/x.tar", "a-{0..3}.tar"):
        with pytest.raises(UserError, match=r"data\.path: no shards"):
            list(read_samples(section("webdataset", tmp_path / name)))
        with pytest.raises(UserError, match=r"data\.path: no shards"):
            list(read_samples(section("webdataset", Path(name))))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, "no images"),
        ({"a.txt": b"only text"}, "no images"),
        ({"a.png": png()}, "a in bad.tar has no caption"),
        ({"a.png": b"not a picture", "a.txt": b"x"}, "a in bad.tar is not a readable image"),
        ({"a.png": png()[:45], "a.txt": b"x"}, "a in bad.tar is not a readable image"),
        ({"a.png": png(), "a.txt": b"\xff\xfe\xff"}, "caption of a in bad.tar is not UTF-8"),
    ],
)
def test_a_bad_shard_is_explained(tmp_path: Path, members: dict[str, bytes], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        list(read_samples(section("webdataset", shard(tmp_path / "bad.tar", members))))


def test_shard_with_two_members_of_one_name_is_explained(tmp_path: Path) -> None:
    path = shard(tmp_path / "twice.tar", {"a.png": png(), "a.txt": b"x"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(UserError, match=r"a\.txt comes twice in twice\.tar"):
        list(read_samples(section("webdataset", path)))


def test_a_truncated_shard_is_named(pictures: Path, tmp_path: Path) -> None:
    path = shard(tmp_path / "cut.tar.gz", {file.name: file.read_bytes() for file in sorted(pictures.iterdir())}, "w:gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cut\.tar\.gz can't be read"):
        list(read_samples(section("webdataset", path)))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no images"),
        ({"a.png": png()}, r"a\.png has no caption; write one into a\.txt"),
        ({"a.png": b"x", "a.txt": b"x"}, r"a\.png is not a readable image"),
    ],
)
def test_a_bad_folder_is_explained(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        list(read_samples(section("folder", tmp_path)))


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(UserError, match="no folder /nowhere"):
        list(read_samples(section("folder", Path("/nowhere"))))


# -- pixels and latents ------------------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([(16, 16), (24, 8), (64, 64)]))
def test_pictures_of_any_size_get_the_wanted_size(width: int, height: int, size: tuple[int, int]) -> None:
    tensor = to_tensor(Image.new("RGB", (width, height), (255, 0, 127)), size)
    assert tensor.shape == (3, *size)
    assert torch.allclose(tensor.amin((1, 2)), torch.tensor([1.0, -1.0, 127 / 127.5 - 1]), atol=1e-5)


def test_a_wide_picture_keeps_its_middle() -> None:
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert to_tensor(image, (10, 10)).min() == 1


def test_examples_hold_the_outputs_of_the_teachers_encoders(tiny_model: Path, pictures: Path) -> None:
    teacher = load_teacher(ModelSection(family="sd15", path=str(tiny_model)))
    examples = prepare_examples(section("folder", pictures, encode_batch=4), teacher, build_task(TaskSection()))
    samples = list(read_samples(section("folder", pictures)))
    images = torch.stack([to_tensor(sample.image, (64, 64)) for sample in samples])
    z0, conditioning = examples.batch(torch.tensor([5, 1]), "cpu")
    torch.testing.assert_close(z0, teacher.encode(images)[[5, 1]], atol=1e-5, rtol=1e-5)
    assert conditioning.cross_attention is not None
    wanted = teacher.encode_prompts([CAPTIONS[5], CAPTIONS[1]]).cross_attention
    torch.testing.assert_close(conditioning.cross_attention, wanted, atol=1e-5, rtol=1e-5)
    assert examples.distinct_captions == 5  # six captions, two of them equal


class Brightness(Task):
    """The picture's mean and a random number as two channels."""

    name = "brightness"

    def extra_channels(self, latent_channels: int) -> int:
        return 2

    def draw(
        self, images: torch.Tensor, companions: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {"both": torch.stack([images.mean((1, 2, 3)), torch.rand(len(images), generator=generator)], 1)}

    def encode(self, drawn: Mapping[str, torch.Tensor], teacher: Teacher) -> Conditioning:
        return Conditioning(concat=drawn["both"][:, :, None, None].expand(-1, -1, 8, 8))


def test_each_picture_keeps_its_variants_of_the_tasks_conditions(tiny_model: Path, pictures: Path) -> None:
    teacher = load_teacher(ModelSection(family="sd15", path=str(tiny_model)))
    data, task = section("folder", pictures, encode_batch=4), Brightness(NoOptions())
    examples = prepare_examples(data, teacher, task, variants=3)
    assert len(examples) == 18
    z0, conditioning = examples.batch(torch.arange(18), "cpu")
    means = torch.stack([to_tensor(sample.image, (64, 64)).mean() for sample in read_samples(data)])
    assert conditioning.concat is not None
    torch.testing.assert_close(conditioning.concat[:, 0, 0, 0], means.repeat_interleave(3))
    assert len(conditioning.concat[:, 1, 0, 0].unique()) == 18
    assert torch.equal(z0[3], z0[5])
    assert not torch.equal(z0[2], z0[3])
    _, again = prepare_examples(data, teacher, task, variants=3).batch(torch.arange(18), "cpu")
    assert again.concat is not None
    assert torch.equal(again.concat, conditioning.concat)
    first = examples.first_samples(3)
    assert [caption for caption, _ in first] == list(dict.fromkeys(CAPTIONS))[:3]
    assert len(examples.first_samples(9)) == 6  # five captions, and the sixth picture for its conditions
    for caption, index in first:
        wanted = teacher.encode_prompts([caption]).cross_attention
        torch.testing.assert_close(conditioning.rows(torch.tensor([index])).cross_attention, wanted)


def test_a_task_without_text_gives_every_picture_the_empty_caption(tiny_model: Path, pictures: Path) -> None:
    class Silent(Brightness):
        reads_text = False

    teacher = load_teacher(ModelSection(family="sd15", path=str(tiny_model)))
    examples = prepare_examples(section("folder", pictures, encode_batch=4), teacher, Silent(NoOptions()))
    assert set(examples.table.head) == {("",)}
    assert [index for _, index in examples.first_samples(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"name": "painting"}, ["task.name", "'painting'", "text-to-image"]),
        ({"options": {"strength": 2}}, ["task.options.strength", "text-to-image"]),
    ],
)
def test_unknown_tasks_and_options_are_named(content: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_task(TaskSection.model_validate(content))
    for word in words:
        assert word in str(caught.value)
