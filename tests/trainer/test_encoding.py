"""Encoding into the cache: what is encoded and how often, what is refused, and the values are the encoders' own."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.trainer.config import DataSection, MethodSection, ModelSection, TaskSection
from flash_diffusion.trainer.data.batches.order import Order
from flash_diffusion.trainer.data.encoding import prepare
from flash_diffusion.trainer.data.encoding.examples import NO_CAPTION, CachedExamples
from flash_diffusion.trainer.data.encoding.pictures import PictureEncoder
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from ..families.pipelines import save_pipeline
from .models import CAPTIONS

INPAINTING = TaskSection(name="inpainting")
EVERYTHING = Counter(pictures=6, captions=5, conditions=6)  # of `pictures`: two of its captions are equal
NOTHING: Counter[str] = Counter()


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Teacher:
    return load_teacher(ModelSection(family="sd15", path=str(tiny_model)))


@pytest.fixture
def data(pictures: Path, tmp_path: Path) -> DataSection:
    """A copy of the pictures that a test may change, and an empty cache."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    return DataSection(source="folder", path=folder, cache=tmp_path / "cache", encode_batch=4)


Encode = Callable[..., tuple[CachedExamples, Counter[str]]]


@pytest.fixture
def encode(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> Encode:
    """Prepare the examples; also return how many rows each encoder has made."""

    def encode(
        data: DataSection, section: TaskSection = INPAINTING, by: Teacher = teacher, **options: Any
    ) -> tuple[CachedExamples, Counter[str]]:
        counts: Counter[str] = Counter()
        task = build_task(section)

        def counted(owner: Any, name: str, what: str, size: Callable[..., int]) -> None:
            original = getattr(owner, name)

            def count(*arguments: Any, **options: Any) -> Any:
                counts[what] += size(*arguments)
                return original(*arguments, **options)

            patch.setattr(owner, name, count)

        with monkeypatch.context() as patch:
            counted(by, "encode_prompts", "captions", len)
            counted(by, "encode", "encoded", len)
            counted(task, "encode", "conditions", lambda drawn, teacher: len(next(iter(drawn.values()))))
            examples = prepare.prepare_examples(data, by, task, section.variants, **options)
        counts["pictures"] = counts.pop("encoded", 0) - counts["conditions"]  # inpainting encodes masked pictures too
        return examples, +counts

    return encode


def everything(examples: CachedExamples) -> tuple[torch.Tensor, Conditioning]:
    return examples.batch(torch.arange(len(examples)), "cpu")


def assert_same(one: CachedExamples, other: CachedExamples) -> None:
    (z_one, first), (z_other, second) = everything(one), everything(other)
    assert torch.equal(z_one, z_other)
    for name in ("cross_attention", "concat"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def files(folder: Path) -> dict[str, bytes]:
    """Path -> content of the encoded files."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.safetensors")}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("manifests")}


# -- how often -----------------------------------------------------------------------------------------------------


def test_the_same_data_is_encoded_once(data: DataSection, encode: Encode, tmp_path: Path, tiny_model: Path) -> None:
    assert data.path is not None
    first, counts = encode(data)
    assert counts == EVERYTHING
    before = files(tmp_path / "cache")
    copy = shutil.copytree(data.path, tmp_path / "a copy")
    model = load_teacher(ModelSection(family="sd15", path=str(shutil.copytree(tiny_model, tmp_path / "model"))))
    for changes, by in (
        ({}, {}),
        ({"path": copy}, {}),
        ({"encode_batch": 3, "on_error": "skip"}, {}),
        ({}, {"by": model}),
    ):
        again, counts = encode(data.model_copy(update=changes), **by)
        assert counts == NOTHING, changes
        assert_same(again, first)
    # Other names: another order of the same samples, with the same rows.
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in data.path.iterdir():
        shutil.copy(path, renamed / f"{'abcdef'[-1 - int(path.stem)]}{path.suffix}")
    again, counts = encode(data.model_copy(update={"path": renamed}))
    assert counts == NOTHING
    assert torch.equal(everything(again)[0], everything(first)[0].flip(0))
    assert torch.equal(everything(again)[1].concat, everything(first)[1].concat.flip(0))  # type: ignore[union-attr]
    assert again.fingerprint != first.fingerprint  # the order is another
    assert files(tmp_path / "cache") == before


def _picture(folder: Path) -> dict[str, Any]:
    Image.new("RGB", (64, 64), "red").save(folder / "003.png")
    return {}


def _caption(folder: Path) -> dict[str, Any]:
    (folder / "003.txt").write_text("a new caption")
    return {}


def _copies(folder: Path) -> dict[str, Any]:
    for name in ("7", "8"):
        shutil.copy(folder / "003.png", folder / f"{name}.png")
        shutil.copy(folder / "000.txt", folder / f"{name}.txt")
    return {}


def _mask(folder: Path) -> dict[str, Any]:
    for number in range(6):
        Image.new("L", (64, 64), 255 * (number % 2)).save(folder / f"{number:03d}.mask.png")
    return {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_picture, Counter(pictures=1, conditions=1)),
        (_caption, Counter(captions=1)),
        (_copies, NOTHING),
        (_mask, Counter(conditions=6)),
        ({"resolution": 32}, Counter(pictures=6, conditions=6)),
        ({"cache_dtype": "bfloat16"}, EVERYTHING),
        ({"caption_prefix": "photo, "}, Counter(captions=5)),
        ({"limit": 3}, NOTHING),
        ({"options": {"masks": {"box": 1.0}}}, Counter(conditions=6)),
        ({"variants": 3}, Counter(conditions=12)),  # the first variant is there
        ({"part": "vae"}, Counter(pictures=6, conditions=6)),
        ({"part": "text_encoder"}, Counter(captions=5)),
        ({"part": "unet"}, NOTHING),
    ],
)
def test_only_what_changed_is_encoded(
    data: DataSection, encode: Encode, tiny_model: Path, change: Any, expected: Counter[str]
) -> None:
    assert data.path is not None
    first, _ = encode(data)
    fields = change(data.path) if callable(change) else change
    section = INPAINTING.model_copy(update={name: fields[name] for name in ("options", "variants") if name in fields})
    resolution = fields.get("resolution")
    by = load_teacher(ModelSection(family="sd15", path=str(tiny_model)), resolution=resolution)
    if "part" in fields:
        network = by.vae.encoder if fields["part"] == "vae" else getattr(by.pipeline, fields["part"])
        with torch.no_grad():
            next(network.parameters()).add_(0.5)
    data = data.model_copy(update={name: value for name, value in fields.items() if name in DataSection.model_fields})
    again, counts = encode(data, section, by)
    assert counts == expected
    assert (again.fingerprint == first.fingerprint) == (fields == {"part": "unet"})
    assert encode(data, section, by)[1] == NOTHING


# -- values --------------------------------------------------------------------------------------------------------


def test_conditions_do_not_depend_on_batch_and_order(data: DataSection, encode: Encode, tmp_path: Path) -> None:
    section = INPAINTING.model_copy(update={"variants": 2})
    one, _ = encode(data, section)
    two, counts = encode(data.model_copy(update={"cache": tmp_path / "other", "encode_batch": 1, "limit": 4}), section)
    assert counts["conditions"] == 8
    wanted = everything(one)[1].rows(torch.arange(8)).concat
    found = everything(two)[1].concat
    assert found is not None
    assert wanted is not None
    assert torch.equal(found[:, :1], wanted[:, :1])  # the masks
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_bfloat16_takes_half_the_space(data: DataSection, encode: Encode, tmp_path: Path) -> None:
    exact, _ = encode(data)
    small, _ = encode(data.model_copy(update={"cache": tmp_path / "small", "cache_dtype": "bfloat16"}))
    (z_exact, first), (z_small, second) = everything(exact), everything(small)
    pairs = [(z_exact, z_small), (first.cross_attention, second.cross_attention), (first.concat, second.concat)]
    for wanted, found in pairs:
        assert found.dtype == torch.float32  # type: ignore[union-attr]
        assert torch.equal(found, wanted.bfloat16().float())  # type: ignore[union-attr, arg-type]
    sizes = [sum(map(len, files(tmp_path / name).values())) for name in ("cache", "small")]
    assert sizes[1] < 0.6 * sizes[0]  # keys, checksums and headers stay


def test_grey_and_coloured_hints_share_a_batch(data: DataSection, teacher: Teacher, tmp_path: Path) -> None:
    """Hints are kept with one channel where a whole batch of them is grey."""
    assert data.path is not None
    random = np.random.default_rng(1)
    hints = []
    for number in range(6):
        grey = random.integers(0, 256, (64, 64, 1), dtype=np.uint8).repeat(3, 2)
        hints.append(random.integers(0, 256, (64, 64, 3), dtype=np.uint8) if number == 5 else grey)
        Image.fromarray(hints[-1]).save(data.path / f"{number:03d}.hint.png")
    task = build_task(TaskSection(name="control"))
    wanted = torch.from_numpy(np.stack(hints)).permute(0, 3, 1, 2) / 255
    for limit in (4, 6):  # the coloured hint comes into another file of the cache
        examples = prepare.prepare_examples(data.model_copy(update={"limit": limit}), teacher, task)
        conditioning = everything(examples)[1]
        torch.testing.assert_close(conditioning.hint, wanted[:limit])


@pytest.mark.parametrize("family", ["sdxl", "pixart_alpha"])
def test_bucketed_examples_are_what_the_stock_pipeline_makes(family: str, tmp_path: Path) -> None:
    """Latents, prompts and size conditions of wide, square and tall pictures, against diffusers' own calls."""
    model, folder = save_pipeline(family, tmp_path / "model"), tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    shapes = {"a": (1600, 900), "b": (700, 700), "c": (500, 900)}
    for name, (width, height) in shapes.items():
        pixels = random.integers(0, 256, (height // 100, width // 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("red ball")
    data = DataSection(source="folder", path=folder, cache=tmp_path / "cache", buckets=True)
    teacher = load_teacher(ModelSection(family=family, path=str(model)), resolution=128)
    examples = prepare.prepare_examples(data, teacher, build_task(TaskSection()))
    pipeline: Any = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.transformer if teacher.transformer else pipeline.unet
    given: list[dict[str, Any]] = []
    network.register_forward_pre_hook(lambda _module, _args, kwargs: given.append(kwargs), with_kwargs=True)
    more = {"use_resolution_binning": False, "clean_caption": False} if teacher.transformer else {}
    for number, (name, (width, height)) in enumerate(shapes.items()):
        z0, conditioning = examples.batch(torch.tensor([number]), "cpu")
        sides = z0.shape[-2] * teacher.scale_factor, z0.shape[-1] * teacher.scale_factor
        assert (sides[0] < sides[1], sides[0] == sides[1]) == (height < width, height == width)
        # Scaled until it covers the frame, and cut at the centre.
        scale = max(sides[0] / height, sides[1] / width)
        image = Image.open(folder / f"{name}.png")
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        left, top = (image.width - sides[1]) // 2, (image.height - sides[0]) // 2
        pixels = np.asarray(image.crop((left, top, left + sides[1], top + sides[0])))
        with torch.no_grad():
            pixel_values = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
            wanted = pipeline.vae.encode(pixel_values).latent_dist.mode() * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(z0, wanted, atol=1e-4, rtol=1e-4)
        given.clear()
        pipeline("red ball", height=sides[0], width=sides[1], num_inference_steps=2, output_type="latent", **more)
        added, text = given[0]["added_cond_kwargs"], given[0]["encoder_hidden_states"][-1:]
        expected = (
            added["time_ids"][-1]
            if family == "sdxl"
            else torch.cat([added["resolution"][-1], added["aspect_ratio"][-1]])
        )
        torch.testing.assert_close(conditioning.size_ids, expected[None].float())
        torch.testing.assert_close(conditioning.cross_attention, text, atol=1e-5, rtol=1e-5)


def test_captions_are_drawn_dropped_and_encoded_once_each(data: DataSection, encode: Encode, teacher: Teacher) -> None:
    assert data.path is not None
    for path in data.path.glob("*.txt"):
        path.unlink()
        path.with_suffix(".json").write_text(json.dumps({"caption": ["first", f"second {path.stem}", "third"]}))
    examples, counts = encode(data, TaskSection())
    assert counts == Counter(pictures=6, captions=8)
    assert examples.caption_counts(torch.arange(6)).tolist() == [3] * 6
    chosen = torch.tensor([1, NO_CAPTION, 2, 1, 0, NO_CAPTION])
    found = examples.batch(torch.arange(6), "cpu", chosen)[1].cross_attention
    texts = ["second 000", "", "third", "second 003", "first", ""]
    torch.testing.assert_close(found, teacher.encode_prompts(texts).cross_attention, atol=1e-5, rtol=1e-5)
    order = Order(6, seed=0)
    epochs = [order.captions(6 * epoch, torch.full((6,), 3), 0.2) for epoch in range(8)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 8
    assert {int(number) for epoch in epochs for number in epoch} == {NO_CAPTION, 0, 1, 2}


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["latents", "captions", "conditions"])
def test_a_damaged_file_is_named_and_only_its_rows_are_encoded_again(
    data: DataSection, encode: Encode, tmp_path: Path, kind: str
) -> None:
    first, _ = encode(data)
    wanted, before = everything(first), files(tmp_path / "cache")
    (path,) = (tmp_path / "cache" / kind).rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path} of the cache .* is damaged .* removed now. Run again"):
        everything(first)
    again, counts = encode(data)
    assert counts == {"latents": Counter(pictures=6), "captions": Counter(captions=5)}.get(kind, Counter(conditions=6))
    assert torch.equal(everything(again)[0], wanted[0])
    assert files(tmp_path / "cache") == before


def _removed(folder: Path) -> None:
    (folder / "002.png").unlink()


def _other_mask(folder: Path) -> None:
    Image.new("L", (64, 64), 127).save(folder / "003.mask.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_picture, r"003\.png has changed"),
        (_removed, r"has (changed|fewer samples)"),
        (_other_mask, r"the mask of .*003\.png has changed"),
        (_caption, r"a caption of .*pictures has changed"),
    ],
)
def test_files_that_change_after_they_were_listed_are_refused(
    data: DataSection, encode: Encode, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any], words: str
) -> None:
    assert data.path is not None
    _mask(data.path)
    original = prepare.Preparation._tell

    def tell(self: prepare.Preparation, *arguments: Any) -> None:
        original(self, *arguments)
        change(data.path)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(prepare.Preparation, "_tell", tell)
        with pytest.raises(UserError, match=rf"{words}.* since the data were listed; run again"):
            encode(data)
    if change is _removed:
        (data.path / "002.txt").unlink()
        (data.path / "002.mask.png").unlink()
    examples, _ = encode(data)
    assert_same(examples, encode(data.model_copy(update={"cache": data.path.parent / "fresh"}))[0])


def test_long_captions_are_counted_in_one_sentence_and_told_of_once(
    data: DataSection, encode: Encode, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor do the previews tell of them again, which draw some of these captions."""
    assert data.path is not None
    for number in (1, 4, 5):
        (data.path / f"00{number}.txt").write_text(f"caption {number}" + " and many more words" * 20)
    by = load_teacher(ModelSection(family="sd15", path=str(tiny_model)))  # a teacher tells once in its life
    with caplog.at_level(logging.WARNING):
        encode(data, by=by)
        by.encode_prompts(["a red ball" * 40])
    [message] = [record.getMessage() for record in caplog.records]
    assert "3 prompts are longer than the 16 tokens that the text encoder reads" in message
    assert "'caption " in message


def test_pictures_that_can_not_be_decoded_are_left_out_with_their_copies(
    data: DataSection, encode: Encode, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Their headers are sound, so that they are listed; their pixels are cut off."""
    assert data.path is not None
    whole, _ = encode(data)
    broken = (data.path / "001.png").read_bytes()[:-40]
    (data.path / "001.png").write_bytes(broken)
    (data.path / "004.png").write_bytes(broken)
    with pytest.raises(UserError, match=r"001\.png is not a readable image"):
        encode(data)
    with pytest.raises(UserError, match=r"(?s)2 of 6 samples .* more than data\.skip_limit allows"):
        encode(data.model_copy(update={"on_error": "skip"}))
    skipping = data.model_copy(update={"on_error": "skip", "skip_limit": 2.0})
    with caplog.at_level(logging.WARNING):
        examples, counts = encode(skipping)
    assert counts == NOTHING
    assert "2 of 6 samples" in caplog.text
    assert "001.png is not a readable image" in caplog.text
    assert "a copy of one of these" in caplog.text
    rest = torch.tensor([0, 2, 3, 5])
    assert torch.equal(everything(examples)[0], everything(whole)[0][rest])
    assert [captions[0] for captions in examples.table.head] == [CAPTIONS[number] for number in rest]
    # An empty cache: the chunk is written without them.
    fresh, counts = encode(skipping.model_copy(update={"cache": tmp_path / "fresh"}))
    assert counts == Counter(pictures=4, captions=5, conditions=4)
    torch.testing.assert_close(everything(fresh)[0], everything(examples)[0], atol=1e-5, rtol=1e-5)
    assert fresh.fingerprint == examples.fingerprint


def test_a_disk_too_small_is_refused_before_anything_is_encoded(
    data: DataSection, encode: Encode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    calls: list[str] = []
    monkeypatch.setattr(PictureEncoder, "encode", lambda *_: calls.append("pictures"))
    monkeypatch.setattr(prepare, "encode_captions", lambda *_: calls.append("captions"))
    with pytest.raises(UserError, match=r"the encoded data take about .* has 1 kB free; set data\.cache to .*prune"):
        encode(data)
    assert not calls
    assert not files(tmp_path / "cache")


def test_nan_latents_are_refused_and_not_kept(
    data: DataSection, encode: Encode, teacher: Teacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A VAE of SDXL in float16 gives such latents."""
    original = teacher.encode
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "encode", lambda images: original(images) / 0)
        with pytest.raises(UserError, match=r"NaN or infinite values \(latents\) for pictures.*model\.dtype: float32"):
            encode(data, TaskSection())
    assert not list((tmp_path / "cache" / "latents").rglob("*.safetensors"))


# -- prompts without pictures --------------------------------------------------------------------------------------


def test_the_teacher_draws_each_prompt_once(encode: Encode, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("red ball\ngreen box\nred ball\n")
    data = DataSection(source="prompts", path=path, cache=tmp_path / "cache", pictures_per_prompt=2)
    method = MethodSection(teacher_steps=4, guidance=(2.0, 4.0))
    examples, counts = encode(data, TaskSection(), method=method)
    assert counts == Counter(captions=2)
    z0, conditioning = everything(examples)
    assert len(z0) == 6
    assert len({tuple(value.flatten().tolist()) for value in z0}) == 4  # two pictures each of two prompts
    assert z0.isfinite().all()
    assert conditioning.cross_attention is not None
    assert torch.equal(conditioning.cross_attention[0], conditioning.cross_attention[1])
    before = files(tmp_path / "cache")
    again, counts = encode(data.model_copy(update={"encode_batch": 1}), TaskSection(), method=method)
    assert counts == NOTHING
    assert files(tmp_path / "cache") == before
    assert not list((tmp_path / "cache" / "manifests").rglob("*.safetensors"))  # they would be of no use to later runs
    assert torch.equal(everything(again)[0], z0)
    # One at a time draws the same pictures, from noise of their own.
    alone, _ = encode(
        data.model_copy(update={"cache": tmp_path / "b", "encode_batch": 1}), TaskSection(), method=method
    )
    torch.testing.assert_close(everything(alone)[0], z0, atol=1e-4, rtol=1e-4)
    # Another method, or a model with another noise schedule, draws others.
    other, _ = encode(data, TaskSection(), method=method.model_copy(update={"teacher_steps": 8}))
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    shutil.copytree(tiny_model, tmp_path / "model")
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    by = load_teacher(ModelSection(family="sd15", path=str(tmp_path / "model")))
    v, _ = encode(data, TaskSection(), by, method=method)
    for different in (other, v):
        assert not torch.allclose(everything(different)[0], z0, atol=1e-2)
    # Trajectories stand for the pictures: nothing is drawn.
    undrawn, _ = encode(data, TaskSection(), method=method, solves=False)
    assert not undrawn.has_latents
    assert everything(undrawn)[0].shape == z0.shape
    with pytest.raises(UserError, match="prompts have no pictures, and the task inpainting"):
        encode(data)
