"""Flash Distill Headless through the server: a run outlives its ComfyUI, is followed, stopped and resumed exactly."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from . import prompts
from .client import Client

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

WAIT, BACKGROUND = "run and wait", "run in the background"
PARTS = 1000  # of the node's progress bar
UPDATES = 30
DISTIL, DRAWN, PREVIEW, TEXT = "2", "9", "10", "11"  # nodes of the shipped workflow


def workflow(name: str, action: str) -> prompts.Prompt:
    """Return the shipped workflow with a short distillation."""
    prompt = json.loads((prompts.SHIPPED.parent / "flash_distill_headless_demo.json").read_text(encoding="utf-8"))
    prompt[DISTIL]["inputs"] |= {
        **{"prompts": "red apple\nunicorn", "name": name, "resolution": 64, "action": action, "updates": UPDATES},
        **{"trajectories": 4, "at_once": 2, "preview_every": 10},
    }
    return prompt


def test_a_run_outlives_its_comfyui_and_resumes_to_the_bits_of_a_run_without_a_stop(
    runtime: ModuleType, server, client: Client
) -> None:
    with runtime.serve(server.base) as first:
        with Client(first) as connected:
            started = connected.run(workflow("paused", BACKGROUND))
            assert started.succeeded, started.error
            assert not {DRAWN, PREVIEW} & set(started.outputs)  # there is neither LoRA nor preview yet
        first.process.kill()  # at once: the run is still at its beginning
        first.process.wait()
    # The ComfyUI that started it has ended, and this one has never seen it.
    queued = client.run(workflow("unpaused", BACKGROUND))
    assert queued.succeeded, queued.error
    (text,) = queued.outputs[TEXT]["text"]
    assert "unpaused: waiting: 1 run before it" in text

    (waiting,) = (server.base / "output" / "flash_distill_headless").glob("unpaused-*")
    error = client.run({"runs": prompts.node("FlashDistillRuns", remove=waiting.name)}).error
    assert error is not None
    assert f"{waiting.name} is in the queue: waiting: 1 run before it. Stop it first" in error["exception_message"]

    client.run(workflow("unwanted", BACKGROUND))
    unwanted = client.run(workflow("unwanted", "stop"))
    assert "unwanted: stopped: it was taken out of the queue" in unwanted.outputs[TEXT]["text"][0]

    stopped = client.run(workflow("paused", WAIT), interrupt_at_step=1, of=PARTS)
    assert stopped.interrupted
    assert "saves a checkpoint" in stopped.texts[DISTIL]

    resumed = client.run(workflow("paused", WAIT))
    assert resumed.succeeded, resumed.error
    assert len({picture.tobytes() for picture in resumed.previews}) > 1
    assert (PARTS, PARTS) in resumed.progress
    losses = resumed.outputs[DISTIL]["flash_losses"]
    assert len(losses) > 2
    assert resumed.losses[-1] == losses  # the chart while it runs, and the one that stays
    (text,) = resumed.outputs[TEXT]["text"]
    assert "paused: done: models/loras/paused.safetensors" in text
    runs = server.base / "output" / "flash_distill_headless"
    (folder,) = runs.glob("paused-*")
    (picture,) = client.images(resumed, PREVIEW)
    with Image.open(max((folder / "previews").iterdir())) as drawn:
        assert picture.convert("RGB").tobytes() == drawn.convert("RGB").tobytes()
    assert len(client.images(resumed, DRAWN)) == 4
    assert "the last checkpoint is" in (folder / "trainer.log").read_text(encoding="utf-8")

    whole = client.run(workflow("unpaused", WAIT))  # it ran while the other one waited
    assert whole.succeeded, whole.error
    loras = server.base / "models" / "loras"
    before, after = (load_file(loras / f"{name}.safetensors") for name in ("unpaused", "paused"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "paused.safetensors" in str(client.object_info()["FlashLoraLoader"]["input"]["required"]["lora_name"])

    listed = client.run(
        {"runs": prompts.node("FlashDistillRuns"), "text": prompts.node("PreviewAny", source=["runs", 0])}
    )
    lines = listed.outputs["text"]["text"][0].partition("\n\nFlash Distill:")[0].splitlines()
    assert [line.split("-")[0] for line in lines] == ["unpaused", "unwanted", "paused"]
    assert ["done: models/loras/" in line for line in lines] == [True, False, True]
