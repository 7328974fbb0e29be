"""Flash Distill, Save LoRA and Evaluate through the server: previews, an interrupt, and the same bits after it."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from . import prompts
from .client import Client, Run

pytestmark = pytest.mark.comfy

UPDATES = 8


def workflow(name: str) -> prompts.Prompt:
    """Return a short distillation, its LoRA saved, and a picture of the new model."""
    node = prompts.node
    return {
        "models": node("FlashDemoModels"),
        "distil": node(
            "FlashDistill",
            **{"model": ["models", 0], "clip": ["models", 1], "vae": ["models", 2], "prompts": "red apple\nunicorn"},
            **{"name": name, "preset": "quick try", "width": 64, "height": 64, "guidance": 0.0, "seed": 0},
            **{"updates": UPDATES, "trajectories": 4, "samples": 2, "teacher_steps": 4, "preview_every": 2},
        ),
        "save": node("FlashSaveLora", lora=["distil", 1], name=name),
        "graph": node("LossGraphNode", loss=["distil", 4], filename_prefix=name),
        "report": node("SaveImage", images=["distil", 2], filename_prefix=name),
        "text": node("PreviewAny", source=["distil", 3]),
        "positive": node("CLIPTextEncode", clip=["models", 1], text="red apple"),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": node(
            "FlashSampler",
            **{"model": ["distil", 0], "positive": ["positive", 0], "latent_image": ["empty", 0]},
            **{"seed": 1, "steps": 2, "guidance": 1.0, "denoise": 1.0},
        ),
        "latent": node("SaveLatent", samples=["sampler", 0], filename_prefix=name),
        "evaluate": node(
            "FlashEvaluate",
            **{"model": ["models", 0], "flash_model": ["distil", 0], "vae": ["models", 2], "clip": ["models", 1]},
            **{"prompts": "red apple\nunicorn\nfox\nheart", "per_prompt": 2, "flash_steps": "1, 2", "seed": 3},
            **{"width": 64, "height": 64, "teacher_steps": 3},
        ),
        "grid": node("SaveImage", images=["evaluate", 0], filename_prefix=name),
        "figures": node("PreviewAny", source=["evaluate", 1]),
    }


def test_interrupted_and_queued_again_it_gives_the_bits_of_a_whole_run(client: Client, server) -> None:
    other = workflow("whole")
    other["distil"]["inputs"]["seed"] = 9
    assert client.run(other, interrupt_at_step=1, of=UPDATES).interrupted
    whole = client.run(workflow("whole"))
    assert whole.succeeded, whole.error
    (text,) = whole.outputs["text"]["text"]
    assert "NOTE: an unfinished run of this name lies in" in text
    assert "It had other inputs, so this run began anew." in text
    assert "stochasticity 0.5: the LoRA's metadata for 2 steps" in whole.texts["sampler"]
    assert (UPDATES, UPDATES) in whole.progress
    losses = whole.outputs["distil"]["flash_losses"]  # what the page draws as a curve
    assert len(losses) == UPDATES
    assert all(loss > 0 for loss in losses)
    assert len(whole.previews) >= UPDATES // 2
    assert len({picture.tobytes() for picture in whole.previews}) > 1
    assert "saved as whole.safetensors" in whole.texts["save"]

    check_evaluation(client, whole)

    stopped = client.run(workflow("stopped"), interrupt_at_step=3, of=UPDATES)
    assert stopped.interrupted
    assert "sampler" not in stopped.executed
    assert re.search(r"stopped at update [3-7] of 8; what is learnt is kept", stopped.texts["distil"])
    resumed = client.run(workflow("stopped"))
    assert resumed.succeeded, resumed.error
    (text,) = resumed.outputs["text"]["text"]
    assert re.search(r"resumed at update [3-7]\n", text)
    assert "unfinished run" not in text
    loras = server.base / "models" / "loras"
    before, after = (load_file(loras / f"{name}.safetensors") for name in ("whole", "stopped"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(client.latent(whole, "latent"), client.latent(resumed, "latent"))
    listed = client.object_info()["FlashLoraLoader"]["input"]["required"]["lora_name"]
    assert "stopped.safetensors" in str(listed)

    (loras / "taken").write_text("a file where the folder would be")
    blocked = workflow("stopped")
    blocked["save"]["inputs"]["name"] = "taken/my_flash"
    error = client.run(blocked).error
    assert error is not None
    message = error["exception_message"]
    assert f"The LoRA cannot be saved as {loras / 'taken' / 'my_flash.safetensors'}: File exists." in message
    assert "choose another name. Then queue again: the distillation is kept" in message


def test_it_trains_once_on_the_lists_of_cores_dataset_nodes(client: Client, server) -> None:
    """Pictures and captions of a folder: ComfyUI would run an ordinary node once for each entry of a list."""
    folder = server.base / "input" / "squares"
    folder.mkdir(parents=True)
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"{colour} heart")
    prompt = {name: one for name, one in workflow("dataset").items() if name in ("models", "distil", "text")}
    prompt["folder"] = prompts.node("LoadImageTextDataSetFromFolder", folder="squares")
    prompt["dataset"] = prompts.node(
        "MakeTrainingDataset", images=["folder", 0], texts=["folder", 1], vae=["models", 2], clip=["models", 1]
    )
    inputs = prompt["distil"]["inputs"]
    inputs |= {"latents": ["dataset", 0], "positive": ["dataset", 1], "updates": 2}
    run = client.run(prompt)
    assert run.succeeded, run.error
    (text,) = run.outputs["text"]["text"]
    assert "from your latents, 3 prompts, latents of 8 x 8" in text
    assert len(list((server.base / "output" / "flash_distill").glob("dataset-*"))) == 1

    del inputs["positive"]  # the captions themselves as prompts
    captions = client.run(prompt | {"distil": prompts.node("FlashDistill", **inputs | {"prompts": ["folder", 1]})})
    assert captions.succeeded, captions.error
    assert "from your latents, 3 prompts" in captions.outputs["text"]["text"][0]
    assert captions.outputs["distil"]["flash_losses"] == run.outputs["distil"]["flash_losses"]

    mixed = server.base / "input" / "mixed"
    mixed.mkdir()
    for width in (64, 96):
        Image.new("RGB", (width, 64), "red").save(mixed / f"{width}.png")
    prompt["mixed"] = prompts.node("LoadImageDataSetFromFolder", folder="mixed")
    prompt["encoded"] = prompts.node("VAEEncode", pixels=["mixed", 0], vae=["models", 2])
    inputs["latents"] = ["encoded", 0]
    error = client.run(prompt).error
    assert error is not None
    assert "latents must all have one size; got 16 x 8 x 8, 16 x 8 x 12" in error["exception_message"]


def test_runs_are_listed_and_removed_by_their_names(client: Client, server) -> None:
    prompt = {name: one for name, one in workflow("listed").items() if name in ("models", "distil", "save")}
    prompt["distil"]["inputs"] |= {"updates": 1, "trajectories": 2}
    assert client.run(prompt).succeeded
    (folder,) = (server.base / "output" / "flash_distill").glob("listed-*")

    def runs(remove: str) -> Run:
        node = prompts.node
        return client.run(
            {"runs": node("FlashDistillRuns", remove=remove), "text": node("PreviewAny", source=["runs", 0])}
        )

    (text,) = runs("").outputs["text"]["text"]
    assert re.search(rf"^{folder.name}: update 1, done \([\d.]+ MB\)$", text, re.MULTILINE)
    for name in (f"../flash_distill/{folder.name}", "listed", str(folder)):
        error = runs(name).error
        assert error is not None
        assert f"There is no run '{name}'. Copy the name from the list" in error["exception_message"]
    assert folder.is_dir()
    (text,) = runs(folder.name).outputs["text"]["text"]
    assert f"{folder.name} is removed: " in text
    assert f"{folder.name}: update" not in text
    assert not folder.exists()
    assert (server.base / "models" / "loras" / "listed.safetensors").is_file()


def test_after_an_update_without_memory_comfyui_works_and_the_run_goes_on(client: Client, server) -> None:
    prompt = workflow("memory")
    prompt["fails"] = prompts.node("OutOfMemoryOnce", model=["models", 0])
    prompt["distil"]["inputs"]["model"] = ["fails", 0]
    del prompt["evaluate"], prompt["grid"], prompt["figures"]
    error = client.run(prompt).error
    assert error is not None
    assert error["node_type"] == "FlashDistill"
    for words in ("Out of memory with 2 samples at once", "set 'at_once' to 1", "learnt so far is kept", "20.00 MiB"):
        assert words in error["exception_message"]
    assert "unloading all loaded models" in server.log.read_text()
    again = client.run(prompt)
    assert again.succeeded, again.error
    assert "resumed at update 2" in again.outputs["text"]["text"][0]
    assert client.latent(again, "latent").isfinite().all()


def check_evaluation(client: Client, run: Run) -> None:
    """Check what Flash Evaluate says of the LoRA, and that its progress has an end."""
    (text,) = run.outputs["figures"]["text"]
    assert "4 prompts, 2 pictures of 64 x 64 pixels of each prompt in every run" in text
    assert "teacher: 3 steps of dpmpp_2m, simple, at guidance 3" in text  # as the LoRA was trained
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert [row[:4] for row in rows[2:]] == [
        ["teacher", "3", "3", "6"],
        ["Flash", "1", "1", "1"],
        ["Flash", "2", "1", "2"],
        ["model", "1", "1", "1"],
        ["model", "2", "1", "2"],
        ["model", "1", "3", "2"],
    ]
    assert "At 1 step Flash is" in run.texts["evaluate"]
    assert "At 2 steps Flash is" in run.texts["evaluate"]
    assert "NOTE: 8 pictures a run are few" in text
    passes = 4 * (2 * 3 + 2 * (1 + 2) + 1)  # of 4 prompts: the teacher twice, Flash and the model, once with guidance
    assert (passes, passes) in run.progress
    (grid,) = client.images(run, "grid")
    assert grid.width == 4 + 6 * (120 + 4)
