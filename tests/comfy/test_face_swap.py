"""Face-swap in the real ComfyUI: channels equal the trainer's, wrong input raises errors, pictures have the mark."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash_diffusion.flash_core.lora import LoraModule
from flash_diffusion.flash_core.task_adapter import TaskAdapter, write_task_adapter
from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.tasks import face_swap
from flash_diffusion.trainer.tasks.face_swap import FaceSwap, FaceSwapOptions
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from . import prompts
from .client import Client, Run
from .inside_comfyui import relative, run_inside

pytestmark = pytest.mark.comfy

SIDE, CHANNELS = 128, 16
EXTRA = 1 + 2 * CHANNELS
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TOLERANCE = 1e-3  # of the latents' standard deviation
CENTRE, RADIUS = (0.5, 0.5), (0.3, 0.35)  # of the face, as shares of the picture


def face_ellipse() -> Tensor:
    """Return an ellipse (1, SIDE, SIDE): 1 inside, 0 outside."""
    places = (torch.arange(SIDE) + 0.5) / SIDE
    across = ((places[None, :] - CENTRE[0]) / RADIUS[0]) ** 2
    down = ((places[:, None] - CENTRE[1]) / RADIUS[1]) ** 2
    return (across + down <= 1).float()[None]


def make_given() -> dict[str, Tensor]:
    """Smooth pictures (B, H, W, 3) in [0, 1], and masks."""
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(4, 3, 8, 8, generator=generator)
    pictures = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear").movedim(1, -1).contiguous()
    box = torch.zeros(1, SIDE, SIDE)
    box[:, 20:70, 30:101] = 1
    return {
        "target": pictures[:1].clone(),
        "targets": pictures[:2].clone(),
        "source": pictures[2:3].clone(),
        "sources": pictures[2:].clone(),
        "ellipse": face_ellipse(),
        "masks": torch.cat([face_ellipse(), box]),
    }


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random face-swap adapter, run the script in ComfyUI's process, and return the folder with its results."""
    folder = tmp_path_factory.mktemp("face_swap")
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    module = LoraModule(LAYER, draw(4, 128) * 0.1, draw(128, 4) * 0.1)
    adapter = TaskAdapter("face-swap", draw(64, EXTRA, 3, 3) * 0.05, {"q": module})
    write_task_adapter(folder / "face-swap.safetensors", adapter)
    save_file(make_given(), folder / "given.safetensors")
    run_inside(runtime, "face_swap.py", folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "results")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    return json.loads((folder / "said.json").read_text())


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return load_teacher(ModelSection(family="demo", task_adapter=str(folder / "face-swap.safetensors")))


# -- what training does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "targets", "sources"),
    [
        ("plain", "target", "source"),
        ("feathered", "target", "source"),
        ("two", "targets", "sources"),
        ("one source for two", "targets", "source"),
    ],
)
@torch.no_grad()
def test_channels_equal_the_trainers(
    results: dict[str, Tensor], teacher: Teacher, case: str, targets: str, sources: str
) -> None:
    """The trainer's task gives the same channels for the same pictures and masks, in both branches of guidance."""
    given = make_given()
    images, faces = (given[name].movedim(-1, 1) * 2 - 1 for name in (targets, sources))
    companions = {"mask": results[f"{case}.noise_mask"], "identity": faces.expand_as(images)}
    task = FaceSwap(FaceSwapOptions())
    full = task.encode(task.draw(images, companions, torch.Generator()), teacher)
    assert relative(results[f"{case}.positive"], full.concat) < TOLERANCE
    against = task.unconditional(full, teacher.unconditional(len(images))).concat
    assert relative(results[f"{case}.negative"], against) < TOLERANCE
    assert float(results[f"{case}.negative"][:, -CHANNELS:].abs().max()) == 0


def test_the_identity_is_framed_as_in_training(results: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is training's framing of a face, without its random changes."""
    for name, value in {"IDENTITY_ZOOM": (1.0, 1.0), "IDENTITY_SHIFT": 0.0, "IDENTITY_COLOUR": 0.0}.items():
        monkeypatch.setattr(face_swap, name, value)
    task = FaceSwap(FaceSwapOptions(centre=CENTRE, radius=RADIUS))
    source = make_given()["source"].movedim(-1, 1) * 2 - 1
    trained = (task.identity_pictures(source, torch.Generator().manual_seed(0)) + 1).movedim(1, -1) / 2
    for case in ("framed", "a source's box"):
        ours = results[f"{case}.identity"]
        error = min(float((ours - picture).abs().mean()) for picture in (trained, trained.flip(2)))
        assert error < 0.01, case
        assert float((ours - make_given()["source"]).abs().mean()) > 5 * error  # it does zoom


def test_only_the_face_changes(results: dict[str, Tensor]) -> None:
    target = make_given()["target"]
    changed = (results["picture"] != target).any(-1)
    reach = F.max_pool2d(face_ellipse(), 13, 1, 6)[0] > 0  # the feather is 6 pixels
    assert not changed[0][~reach].any()
    assert changed[0][face_ellipse()[0] > 0].float().mean() > 0.95
    inside = face_ellipse()[0] > 0
    for other in ("guided", "another source"):
        assert float((results[other] - results["picture"])[0][inside].abs().mean()) > 1e-3, other


# -- what users give -------------------------------------------------------------------------------------------------


def same_channels(results: dict[str, Tensor], case: str, other: str) -> bool:
    return relative(results[f"{case}.positive"], results[f"{other}.positive"]) < 1e-4


def test_unusual_inputs_give_the_right_result(results: dict[str, Tensor]) -> None:
    for case in ("a transparent target", "a transparent source", "an empty source mask"):
        assert same_channels(results, case, "plain"), case
    # Boxes give the ellipse in the largest one; here that is the mask, up to the box's whole pixels.
    for case in ("a box", "faces in a list", "an empty mask and a box"):
        assert float((results[f"{case}.noise_mask"] - face_ellipse()).abs().mean()) < 0.02, case
    assert float((results["a small mask.noise_mask"] - face_ellipse()).abs().mean()) < 0.02
    for case in ("one pixel", "a source of one pixel"):
        assert bool(results[f"{case}.positive"].isfinite().all()), case
    assert results["transparent picture"].shape == (1, SIDE, SIDE, 4)
    assert torch.equal(results["transparent picture"][..., 3], make_given()["target"][..., 0])


def test_a_large_picture_keeps_its_size_and_its_bits(results: dict[str, Tensor]) -> None:
    changed = (results["large"] != results["large target"]).any(-1)[0]
    assert results["large"].shape == (1, 2400, 3200, 3)
    assert changed[1000:1400, 900:1200].float().mean() > 0.95
    changed[1000:1400, 900:1200] = False
    assert not changed.any()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no mask", ["no mask is connected", "target_mask", "target_face"]),
        ("an empty mask", ["the mask is empty", "Invert Mask"]),
        ("a nearly empty mask", ["the mask is empty"]),
        ("a mask of another shape", ["target_mask does not belong to target", "128 x 64"]),
        ("a source mask of another shape", ["source_mask does not belong to source", "128 x 64"]),
        ("three masks for two", ["3 masks for 2 pictures", "Choose one mask with Convert Mask to Image"]),
        ("three sources for two", ["3 sources for 2 targets"]),
        ("two sources for one", ["2 sources for 1 target;", "repeat the target with RepeatImageBatch (amount 2)"]),
        ("no face found", ["no face in picture 1 of target", "target_mask"]),
        ("faces of three pictures", ["faces for 3 pictures", "target has 2"]),
        ("a face outside", ["outside target"]),
        ("a model of text alone", ["reads 33 channels", "this one reads 0", "Flash Demo Models"]),
        ("an inpainting model", ["reads 33 channels", "this one reads 17"]),
        ("a transformer", ["reads 33 channels", "this one reads 0"]),
        ("no prompt", ["'positive'", "holds no prompt"]),
        ("a prompt of another model", ["'positive'", "768 wide"]),
        ("a broken target", ["target holds NaN or infinite values"]),
        ("a broken source", ["source holds NaN or infinite values"]),
        ("a broken mask", ["target_mask holds NaN or infinite values"]),
        ("a grey source", ["source has the shape (1, 128, 128, 1)", "RGB"]),
        ("another notice", ["notice", "mark"]),
        ("another VAE", ["latents of 4 channels", "works on 16"]),
    ],
)
def test_wrong_input_raises_a_readable_error(said: dict[str, str], case: str, words: list[str]) -> None:
    assert case in said, f"{case}: no error was raised"
    for word in words:
        assert word in said[case]


# -- the mark in saved files, on the page's server -------------------------------------------------------------------

MARK = "A face is swapped here by Flash Diffusion. Only for pictures that one has the right to change."


def graph(server: Any, seed: int = 3, **settings: Any) -> prompts.Prompt:
    """Make the graph: load, prepare, sample, stitch, save the whole picture and the crop."""
    picture = (make_given()["target"][0].numpy() * 255).astype(np.uint8)
    alpha = 255 - (face_ellipse()[0].numpy() * 255).astype(np.uint8)  # Load Image: transparent is masked
    Image.fromarray(np.dstack([picture, alpha])).save(server.base / "input" / "head.png")
    Image.fromarray(picture[::-1].copy()).save(server.base / "input" / "face.png")
    prompt = prompts.latents(None, seed=seed, steps=1, text="")
    for unused in (prompts.EMPTY, prompts.DECODE, prompts.SAVE, "latent"):
        del prompt[unused]
    prompt[prompts.MODELS]["inputs"]["task"] = "face-swap"
    prompt["target"] = prompts.node("LoadImage", image="head.png")
    prompt["source"] = prompts.node("LoadImage", image="face.png")
    inputs = {"size": 0, "context": 2.0, "feather": 8, "notice": MARK, **settings}
    prompt["prepare"] = prompts.node(
        "FlashFaceSwapPrepare",
        model=[prompts.MODELS, 0],
        vae=[prompts.MODELS, 2],
        positive=[prompts.TEXT, 0],
        target=["target", 0],
        target_mask=["target", 1],
        source=["source", 0],
        **inputs,
    )
    prompt[prompts.SAMPLER]["inputs"].update(positive=["prepare", 0], latent_image=["prepare", 2])
    prompt["decode"] = prompts.node("VAEDecode", samples=[prompts.SAMPLER, 0], vae=[prompts.MODELS, 2])
    prompt["stitch"] = prompts.node("FlashInpaintStitch", stitch=["prepare", 3], image=["decode", 0])
    prompt["whole"] = prompts.node("SaveImage", images=["stitch", 0], filename_prefix="whole")
    prompt["crop"] = prompts.node("SaveImage", images=["decode", 0], filename_prefix="crop")
    return prompt


def marks(client: Client, run: Run, node: str) -> list[str]:
    """Return the notices in a save node's files."""
    assert run.succeeded, run.error
    return [
        step["inputs"]["notice"]
        for image in client.images(run, node)
        for step in json.loads(image.info["prompt"]).values()
        if step["class_type"] == "FlashFaceSwapPrepare"
    ]


def test_every_saved_picture_carries_the_mark(client: Client, server: Any) -> None:
    """A cached node's pictures have the mark too: the second run has another seed, the third another file name."""
    first = client.run(graph(server))
    second = client.run(graph(server, seed=4))
    renamed = graph(server, seed=4)
    renamed["whole"]["inputs"]["filename_prefix"] = "again"
    third = client.run(renamed)
    assert "prepare" in first.executed
    assert "prepare" in second.cached
    assert "stitch" in second.executed
    assert {"prepare", "stitch"} <= set(third.cached)
    assert "whole" in third.executed
    for run in (first, second):
        assert marks(client, run, "whole") == marks(client, run, "crop") == [MARK]
    assert marks(client, third, "whole") == [MARK]


def test_a_graph_without_the_mark_raises_an_error(client: Client, server: Any) -> None:
    without = graph(server)
    del without["prepare"]["inputs"]["notice"]
    with pytest.raises(RuntimeError, match="notice"):
        client.run(without)
    # Newer ComfyUI does not queue another value, 0.3.75 leaves it to the node.
    try:
        said = client.run(graph(server, notice="")).error["exception_message"]
    except RuntimeError as error:
        said = str(error)
    assert "notice" in said
