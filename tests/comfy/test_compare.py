"""Flash Compare in the real ComfyUI: columns equal the ordinary samplers' pictures, and figures are counted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from ..families.networks import tiny_network
from . import prompts
from .client import Client, Run
from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

SIDE, GAP = 128, 4  # pixels: the demo's pictures, and what is between them
COMPARE = "compare"
TEACHER = {"teacher_steps": 3, "teacher_guidance": 3.0, "sampler_name": "euler", "scheduler": "simple"}


def graph(*, pictures: int = 1, negative: bool = True, **settings: Any) -> prompts.Prompt:
    """Make the shipped workflow with Flash Compare; it saves the grid and shows the table."""
    prompt = prompts.latents("flash_demo.safetensors", seed=5, pictures=pictures)
    for unused in (prompts.SAMPLER, prompts.DECODE, prompts.SAVE, "latent"):
        del prompt[unused]
    prompt["negative"] = prompts.node("CLIPTextEncode", clip=[prompts.MODELS, 1], text="")
    inputs = {"seed": 5, **TEACHER, "flash_steps": "1, 2", **settings}
    prompt[COMPARE] = prompts.node(
        "FlashCompare",
        **{
            "model": [prompts.MODELS, 0],
            "flash_model": [prompts.LORA, 0],
            "positive": [prompts.TEXT, 0],
            "vae": [prompts.MODELS, 2],
            "latent_image": [prompts.EMPTY, 0],
            **({"negative": ["negative", 0]} if negative else {}),
            **inputs,
        },
    )
    prompt["grid"] = prompts.node("SaveImage", images=[COMPARE, 0], filename_prefix="grid")
    prompt["table"] = prompts.node("PreviewAny", source=[COMPARE, 1])
    return prompt


def finished(client: Client, prompt: prompts.Prompt) -> Run:
    run = client.run(prompt)
    assert run.succeeded, run.error
    return run


def rows(run: Run) -> list[list[str]]:
    """The table's cells, without its head."""
    (text,) = run.outputs["table"]["text"]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def cells(client: Client, run: Run) -> list[list[np.ndarray]]:
    """The grid's pictures, by column and row."""
    (image,) = client.images(run, "grid")
    sheet = np.asarray(image, dtype=int)
    columns = (sheet.shape[1] - GAP) // (SIDE + GAP)
    top = sheet.shape[0] % (SIDE + GAP)
    while sheet[top - 1].min() < 255:  # a label higher than a row
        top += SIDE + GAP
    found = []
    for left in range(GAP, GAP + columns * (SIDE + GAP), SIDE + GAP):
        tops = range(top, sheet.shape[0], SIDE + GAP)
        found.append([sheet[start : start + SIDE, left : left + SIDE] for start in tops])
    return found


def test_each_column_equals_the_ordinary_samplers_pictures(client: Client, server) -> None:
    prompt = graph(pictures=2)
    prompt["teacher"] = prompts.node(
        "KSampler",
        model=[prompts.MODELS, 0],
        positive=[prompts.TEXT, 0],
        negative=["negative", 0],
        latent_image=[prompts.EMPTY, 0],
        seed=5,
        steps=3,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    for steps in (1, 2):
        prompt[f"flash{steps}"] = prompts.node(
            "FlashSampler",
            model=[prompts.LORA, 0],
            positive=[prompts.TEXT, 0],
            latent_image=[prompts.EMPTY, 0],
            seed=5,
            steps=steps,
            guidance=1.0,
            denoise=1.0,
        )
    for name in ("teacher", "flash1", "flash2"):
        prompt[f"{name} decoded"] = prompts.node("VAEDecode", samples=[name, 0], vae=[prompts.MODELS, 2])
        prompt[f"{name} saved"] = prompts.node("SaveImage", images=[f"{name} decoded", 0], filename_prefix=name)
    run = finished(client, prompt)
    columns = cells(client, run)
    assert [len(column) for column in columns] == [2, 2, 2]
    for name, column in zip(("teacher", "flash1", "flash2"), columns, strict=True):
        for image, cell in zip(client.images(run, f"{name} saved"), column, strict=True):
            assert np.abs(np.asarray(image, dtype=int) - cell).max() <= 1  # both are rounded


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ({"flash_steps": "2, 1"}, ["6", "2", "1"]),
        ({"flash_steps": "1", "teacher_guidance": 1.0, "negative": False}, ["3", "1"]),
        # heun evaluates twice a step, once in the last
        ({"flash_steps": "1", "sampler_name": "heun"}, ["10", "1"]),
    ],
)
def test_evaluations_are_counted(client: Client, server, settings: dict[str, Any], evaluations: list[str]) -> None:
    run = finished(client, graph(**settings))
    table = rows(run)
    assert [row[4] for row in table] == evaluations
    assert [row[1] for row in table] == ["3", *re.findall(r"\d+", settings["flash_steps"])]
    assert [float(row[5]) >= 0 for row in table]
    assert run.texts[COMPARE].splitlines()[0].startswith(f"teacher, 3 steps: {evaluations[0]} NFE, ")


def test_the_table_states_the_conditions_of_its_figures(client: Client, server) -> None:
    run = finished(client, graph(flash_steps="2"))
    (text,) = run.outputs["table"]["text"]
    assert "| teacher | 3 | euler, simple | 3 | 6 | " in text
    assert "| Flash | 2 | t = 999, 499, stochasticity 0.5 | 1 | 2 | " in text
    for part in ("1 picture of 128 x 128 pixels", "the Flash demo", "warm-up", "float32", "cpu", "seed 5"):
        assert part in text
    assert "NOTE" not in text


def test_one_progress_bar_covers_all_runs(client: Client, server) -> None:
    run = finished(client, graph())
    steps = [value for value, total in run.progress if total == 8]  # 3 + 1 + 2, and an evaluation to warm up each
    assert steps == list(range(1, 9))
    assert len(run.previews) == 8


def test_an_interrupt_stops_the_comparison(client: Client, server) -> None:
    run = client.run(graph(teacher_steps=40, pictures=2), interrupt_at_step=3)
    assert run.interrupted
    assert run.progress[-1][0] < 20
    finished(client, graph(flash_steps="1", teacher_steps=1))


def with_the_same_model_twice(prompt: prompts.Prompt) -> None:
    prompt[COMPARE]["inputs"]["flash_model"] = [prompts.MODELS, 0]


def with_the_models_exchanged(prompt: prompts.Prompt) -> None:
    prompt[COMPARE]["inputs"] |= {"model": [prompts.LORA, 0], "flash_model": [prompts.MODELS, 0]}


def test_every_size_and_mask_works(client: Client, server) -> None:
    """KSampler accepts the smallest latent, and a mask of another size; so must Flash Compare."""
    prompt = graph(teacher_steps=1, flash_steps="1")
    prompt[prompts.EMPTY]["inputs"] |= {"width": 16, "height": 16}
    prompt["mask"] = prompts.node("SolidMask", value=1.0, width=33, height=60)
    prompt["masked"] = prompts.node("SetLatentNoiseMask", samples=[prompts.EMPTY, 0], mask=["mask", 0])
    prompt[COMPARE]["inputs"]["latent_image"] = ["masked", 0]
    run = finished(client, prompt)
    assert [row[4] for row in rows(run)] == ["2", "1"]
    assert client.images(run, "grid")[0].width == GAP + 2 * (120 + GAP)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_the_same_model_twice, "'model' and 'flash_model' are the same"),
        (with_the_models_exchanged, "so it is not the teacher"),
    ],
)
def test_a_comparison_of_wrong_models_is_noted(
    client: Client, server, change: Callable[[prompts.Prompt], None], words: str
) -> None:
    prompt = graph(flash_steps="1", teacher_steps=1)
    change(prompt)
    (text,) = finished(client, prompt).outputs["table"]["text"]
    assert words in text


def with_another_vae(prompt: prompts.Prompt) -> None:
    prompt["pixels"] = prompts.node("VAELoader", vae_name="pixel_space")
    prompt[COMPARE]["inputs"]["vae"] = ["pixels", 0]


def without_a_negative(prompt: prompts.Prompt) -> None:
    del prompt[COMPARE]["inputs"]["negative"]


def with_words_for_steps(prompt: prompts.Prompt) -> None:
    prompt[COMPARE]["inputs"]["flash_steps"] = "1, many"


def with_a_full_latent_of_another_model(prompt: prompts.Prompt) -> None:
    prompt["picture"] = prompts.node("EmptyImage", width=32, height=32, batch_size=1, color=0xFF8800)
    prompt["pixels"] = prompts.node("VAELoader", vae_name="pixel_space")
    prompt["encoded"] = prompts.node("VAEEncode", pixels=["picture", 0], vae=["pixels", 0])
    prompt[COMPARE]["inputs"]["latent_image"] = ["encoded", 0]


def with_a_videos_latent(prompt: prompts.Prompt) -> None:
    prompt["video"] = prompts.node("EmptyHunyuanLatentVideo", width=128, height=128, length=1, batch_size=1)
    prompt[COMPARE]["inputs"]["latent_image"] = ["video", 0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_a_videos_latent, ["has 5 dimensions", "expected 4"]),
        (without_a_negative, ["teacher_guidance is 3", "'negative'"]),
        (with_words_for_steps, ["'many'", "1 to 8", "such as 1, 2, 4"]),
        (with_another_vae, ["latents of 3 channels", "Connect the VAE"]),
        (with_a_full_latent_of_another_model, ["latent has 3 channels", "the model works on 16"]),
    ],
)
def test_wrong_input_raises_a_readable_error(
    client: Client, server, spoil: Callable[[prompts.Prompt], None], words: list[str]
) -> None:
    prompt = graph()
    spoil(prompt)
    run = client.run(prompt)
    assert run.error is not None
    assert run.error["node_type"] == "FlashCompare"
    for word in words:
        assert word in run.error["exception_message"]


@pytest.fixture(scope="module")
def inside(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the script in ComfyUI's process and return its results."""
    folder = tmp_path_factory.mktemp("compare")
    weights, configs = {}, {}
    for family in ("sd15", "sdxl"):
        network = tiny_network(family, 0)
        weights |= {f"{family}.{name}": value.contiguous() for name, value in network.state_dict().items()}
        configs[family] = dict(network.config)
    save_file(weights, folder / "given.safetensors", metadata={"configs": json.dumps(configs)})
    run_inside(runtime, "compare.py", folder / "given.safetensors", folder / "results.json")
    return json.loads((folder / "results.json").read_text())


def test_models_of_different_families_raise_an_error(inside: dict[str, Any]) -> None:
    assert "'model' is SD 1.5" in inside["families"]
    assert "'flash_model' is SDXL" in inside["families"]
    assert inside["clone"] is None


def test_timing_waits_for_the_device_before_and_after(inside: dict[str, Any]) -> None:
    assert inside["events"] == ["wait", "work", "wait", "work"]  # a CPU has nothing to wait for


def test_step_counts_are_read_from_a_list(inside: dict[str, Any]) -> None:
    assert inside["steps"] == {"1, 2, 4": [1, 2, 4], "4;1 ,": [4, 1], "2,2,2": [2], "8": [8]}
    assert "is empty" in inside["bad_steps"].pop("")
    for text, words in inside["bad_steps"].items():
        assert "expected whole numbers of 1 to 8" in words, text


@pytest.mark.parametrize(("name", "batch", "height", "column"), [("pixel", 1, 1, 120), ("black", 2, 64, 200)])
def test_labels_are_readable_on_any_picture(
    inside: dict[str, Any], name: str, batch: int, height: int, column: int
) -> None:
    """Labels are black on white and stay inside their columns."""
    grid = inside["grids"][name]
    assert grid["shape"] == [1, grid["top"] + batch * (height + GAP), GAP + 3 * (column + GAP), 3]
    assert max(grid["darkest"]) < 0.2
    assert all(0.005 < ink < 0.3 for ink in grid["ink"])
    assert grid["gaps"] == 1.0  # no letter leaves its column
    assert grid["last_row"] == pytest.approx(0.5 if name == "pixel" else 0.0, abs=0.01)


def test_larger_pictures_have_larger_labels(inside: dict[str, Any]) -> None:
    assert inside["grids"]["white"]["top"] > 1.5 * inside["grids"]["black"]["top"]
