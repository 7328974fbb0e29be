"""The shipped workflows: valid, the same in both formats, listed as templates with their downloads, and they run.

The demo's workflows run unchanged, but for the length of a distillation. The published models' workflows run on tiny
stand-ins with the same file names and architectures (see ``stand_ins``), and make smaller pictures.
"""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from . import prompts
from .client import Client, Run
from .stand_ins.files import LORAS, lora_layers, stand_in_network, write_stand_ins

pytestmark = pytest.mark.comfy

NAMES = sorted(path.stem for path in (prompts.ROOT / "workflows").glob("*.json"))
PUBLISHED = [
    "flash_pixart",
    "flash_sd15",
    "flash_sd15_controlnet",
    "flash_sd15_inpaint",
    "flash_sd3",
    "flash_sdxl",
    "flash_sdxl_style",
    "flash_sdxl_t2i_adapter",
]
DEMOS = [name for name in NAMES if name not in PUBLISHED]
# Queued again it asks its process again, so nothing is cached; test_flash_distill_headless_server.py runs it.
HEADLESS = "flash_distill_headless_demo"
# LoRAs of the demo that were trained with an adapter.
ADAPTERS = {
    "flash_demo_t2i_adapter.safetensors": "canny_t2i_adapter.safetensors",
    "flash_demo_controlnet.safetensors": "canny_control_lora.safetensors",
}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
FRONT_END_NODES = {"MarkdownNote", "Note"}
# What ComfyUI's page lets a workflow download (its dialog of missing models).
SOURCES = "https://huggingface.co/"
SUFFIX = ".safetensors"


def interface(name: str) -> dict[str, Any]:
    return json.loads((prompts.ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict[str, Any]:
    return json.loads((prompts.SHIPPED.parent / f"{name}.json").read_text(encoding="utf-8"))


def nodes_of(prompt: dict[str, Any], kind: str) -> list[str]:
    """Return the ids of the workflow's nodes whose class ends with this."""
    return [identity for identity, node in prompt.items() if node["class_type"].endswith(kind)]


def node_of(prompt: dict[str, Any], kind: str) -> str:
    """Return the id of the only such node."""
    (identity,) = nodes_of(prompt, kind)
    return identity


def widgets(info: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a node's widgets in the page's order, from the server's description."""
    found = []
    for section in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(section, {}).items():
            limits = options[0] if options else {}
            if isinstance(kind, list) or limits.get("widgetType", kind) in WIDGET_TYPES:
                found.append((name, limits))
    return found


def to_api(workflow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """Convert a saved workflow to the prompt that the page would queue."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in FRONT_END_NODES:
            continue
        values = iter(node["widgets_values"])
        inputs = {}
        # A newer ComfyUI's node may have more widgets than were saved; the page leaves them at their defaults.
        for (name, options), value in zip(widgets(nodes[node["type"]]), values, strict=False):
            inputs[name] = value
            if options.get("control_after_generate"):
                assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert not list(values), f"node {node['id']} has more widget values than widgets"
        for slot in node["inputs"]:
            if slot["link"] is not None:
                _, origin, origin_slot, *_ = links[slot["link"]]
                inputs[slot["name"]] = [str(origin), origin_slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_describe_the_same_graph(client: Client, name: str) -> None:
    assert to_api(interface(name), client.object_info()) == api(name)


@pytest.mark.parametrize("name", NAMES)
def test_links_connect_sockets_of_the_same_type(client: Client, name: str) -> None:
    workflow, nodes = interface(name), client.object_info()
    by_id = {node["id"]: node for node in workflow["nodes"]}
    assert len(by_id) == len(workflow["nodes"])
    for identity, origin, origin_slot, target, target_slot, kind in workflow["links"]:
        assert nodes[by_id[origin]["type"]]["output"][origin_slot] == kind
        source, sink = by_id[origin]["outputs"][origin_slot], by_id[target]["inputs"][target_slot]
        assert identity in source["links"]
        assert (sink["link"], source["type"]) == (identity, kind)
        assert sink["type"] in (kind, "*")


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_overlap(name: str) -> None:
    title = 30  # the title bar lies above a node's position
    boxes = [(*node["pos"], *node["size"], node["type"]) for node in interface(name)["nodes"]]
    for index, (x, y, width, height, kind) in enumerate(boxes):
        for other_x, other_y, other_width, other_height, other in boxes[index + 1 :]:
            apart = x + width <= other_x or other_x + other_width <= x
            apart = apart or y + height <= other_y - title or other_y + other_height <= y - title
            assert apart, f"{kind} and {other} overlap"


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_is_a_template_with_a_thumbnail(server, name: str) -> None:
    assert name in json.loads(server.get("/api/workflow_templates"))["flash-diffusion"]
    served = json.loads(server.get(f"/api/workflow_templates/flash-diffusion/{name}.json"))
    assert served == interface(name)
    thumbnail = Image.open(io.BytesIO(server.get(f"/api/workflow_templates/flash-diffusion/{name}.jpg")))
    assert min(thumbnail.size) >= 256


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_file_of_a_workflow_has_a_download(server, name: str) -> None:
    workflow = interface(name)
    (note,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    folders = json.loads(server.get("/models"))
    for node in workflow["nodes"]:
        files = [value for value in node["widgets_values"] if str(value).endswith(SUFFIX)]
        models = node["properties"].get("models", []) if node["type"] not in FRONT_END_NODES else []
        if node["type"] not in FRONT_END_NODES:
            assert [model["name"] for model in models] == files
        for model in models:
            assert model["directory"] in folders
            assert model["url"].startswith(SOURCES)
            assert model["url"].endswith(SUFFIX)
            # The note tells where the file goes, where it comes from, and what it is called there.
            assert f"**{model['directory']}/{model['name']}**" in note
            repository, path = re.fullmatch(rf"{SOURCES}([^/]+/[^/]+)/resolve/main/(.+)", model["url"]).groups()
            assert repository in note
            assert path.rpartition("/")[2] in note
    assert note.count("licen") + note.count("Licen") >= 2


def test_every_workflow_has_its_twin() -> None:
    assert set(PUBLISHED) < set(NAMES)
    assert sorted(path.stem for path in prompts.SHIPPED.parent.glob("*.json")) == NAMES
    assert sorted(path.stem for path in Path(prompts.ROOT / "workflows").glob("*.jpg")) == NAMES


def assert_the_second_run_is_cached(client: Client, prompt: dict[str, Any]) -> Run:
    """Run a workflow twice, check that the second run is cached, and return the first run."""
    first = client.run(prompt)
    assert first.succeeded, first.error
    assert set(first.executed) | set(first.cached) == set(prompt)
    assert set(nodes_of(prompt, "SaveImage")) <= set(first.executed)
    again = client.run(prompt)
    assert again.succeeded, again.error
    assert not again.executed
    assert set(again.cached) == set(prompt)
    return first


def shortened(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return the workflow with a short distillation and evaluation, if it has them."""
    for node in nodes_of(prompt, "FlashDistill"):
        prompt[node]["inputs"] |= {"updates": 2, "trajectories": 2, "samples": 2, "teacher_steps": 4}
    for node in nodes_of(prompt, "FlashEvaluate"):
        prompt[node]["inputs"] |= {"per_prompt": 2, "flash_steps": "1", "teacher_steps": 2}
    return prompt


@pytest.mark.parametrize("name", [name for name in DEMOS if name != HEADLESS])
def test_workflows_run_and_the_second_run_is_cached(client: Client, name: str) -> None:
    prompt = shortened(api(name))
    run = assert_the_second_run_is_cached(client, prompt)
    assert all(client.images(run, node) for node in nodes_of(prompt, "SaveImage"))


def test_demo_workflows_make_the_stated_number_of_pictures(client: Client) -> None:
    prompt = prompts.shipped()
    prompt[prompts.SAMPLER]["inputs"]["seed"] = 8  # else it is cached, and reports nothing
    pictures = client.images(client.run(prompt), prompts.SAVE)
    assert len(pictures) == prompt[prompts.EMPTY]["inputs"]["batch_size"]
    assert all(picture.size == (128, 128) for picture in pictures)


@pytest.mark.parametrize("name", ["flash_demo_controlnet", "flash_demo_t2i_adapter"])
def test_controlled_pictures_follow_the_edges(client: Client, name: str) -> None:
    prompt = api(name)
    for sampler in nodes_of(prompt, "FlashSampler"):
        prompt[sampler]["inputs"]["seed"] += 1  # else it is cached, and reports nothing
    run = client.run(prompt)
    assert run.succeeded, run.error

    def pictures(node: str) -> np.ndarray:
        return np.stack([np.asarray(picture, float) for picture in client.images(run, node)])

    canny = node_of(prompt, "Canny")
    previews = {prompt[node]["inputs"]["images"][0]: node for node in nodes_of(prompt, "PreviewImage")}
    del previews[canny]
    original = pictures(previews.pop(prompt[canny]["inputs"]["image"][0]))
    (without,) = previews.values()
    along = node_of(prompt, "SaveImage")
    assert abs(pictures(along) - original).mean() < 0.8 * abs(pictures(without) - original).mean()


@pytest.fixture(scope="module")
def stand_in_server(runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a ComfyUI whose model folders hold the stand-ins."""
    base = tmp_path_factory.mktemp("stand_ins")
    write_stand_ins(base, runtime)
    with runtime.serve(base) as running:
        yield running


@pytest.fixture
def stand_in_client(stand_in_server) -> Iterator[Client]:
    """Open a new connection to this server."""
    with Client(stand_in_server) as connected:
        yield connected


def small_size(name: str) -> tuple[dict[str, Any], int]:
    """Make a workflow with half the width and height (SDXL: a quarter) that also saves its last latent.

    Returns:
        ``(workflow, width)``.
    """
    prompt = copy.deepcopy(api(name))
    for node in prompt.values():
        for side in ("width", "height"):
            if side in node["inputs"]:
                node["inputs"][side] //= 4 if "sdxl" in name else 2
        if "size" in node["inputs"]:  # 0: as the published model was trained
            node["inputs"]["size"] = 256
    sampler = nodes_of(prompt, "FlashSampler")[-1]
    prompt["latent"] = prompts.node("SaveLatent", samples=[sampler, 0], filename_prefix="test")
    return prompt, max(node["inputs"].get("width", 0) for node in prompt.values())


def loras_of(prompt: dict[str, Any]) -> list[str]:
    """The LoRA files that a workflow loads, in order."""
    (loader,) = nodes_of(prompt, "FlashLoraLoader") + nodes_of(prompt, "FlashLoraStack")
    return [value for value in prompt[loader]["inputs"].values() if str(value).endswith(SUFFIX)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_workflows_run_on_stand_ins(stand_in_client: Client, name: str) -> None:
    prompt, side = small_size(name)
    log = stand_in_client.server.log
    before = len(log.read_text())
    run = assert_the_second_run_is_cached(stand_in_client, prompt)
    assert run.progress[-1] == (4, 4)
    # ComfyUI's loaders took every file whole. Only PixArt's training drops captions, and has a weight for it.
    gaps = re.findall(r"(?:unet|clip) (?:missing|unexpected).*|(?:Missing|Leftover) VAE.*", log.read_text()[before:])
    assert gaps == (["unet missing: ['y_embedder.y_embedding']"] if name == "flash_pixart" else [])

    (report,) = run.outputs[node_of(prompt, "PreviewAny")]["text"]
    found = [(int(matched), int(total)) for matched, total in re.findall(r"matched: (\d+)/(\d+)", report)]
    loaded = [LORAS[file] for file in loras_of(prompt)]
    layers = [len(lora_layers(stand_in_network(family), targets)) for family, targets, _ in loaded]
    assert found == [(count, count) for count in layers]

    latent = stand_in_client.latent(run, "latent")
    assert latent.shape[:2] == (1, 16 if name == "flash_sd3" else 4)
    if not nodes_of(prompt, "InpaintPrepare"):  # else it is that of a crop
        assert latent.shape[2:] == (side // 8, side // 8)
    assert latent.isfinite().all()
    assert latent.std() > 0.1
    (picture,) = stand_in_client.images(run, node_of(prompt, "SaveImage"))
    assert picture.size == (side, side)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash_sd15_controlnet", "flash_sdxl_t2i_adapter"])
def test_the_published_adapter_changes_the_picture(stand_in_client: Client, name: str) -> None:
    prompt, _ = small_size(name)
    prompt[nodes_of(prompt, "FlashSampler")[-1]]["inputs"]["seed"] = 1  # with the shipped one it may be cached
    latents = []
    for strength in (0.0, 1.0):
        prompt[node_of(prompt, "FlashAdapterApply")]["inputs"]["strength"] = strength
        run = stand_in_client.run(prompt)
        assert run.succeeded, run.error
        latents.append(stand_in_client.latent(run, "latent"))
    assert (latents[1] - latents[0]).std() > 0.01 * latents[0].std()


@pytest.mark.slow
def test_a_lora_of_another_family_raises_a_readable_error(stand_in_client: Client) -> None:
    prompt, _ = small_size("flash_sd15")
    prompt[node_of(prompt, "FlashLoraLoader")]["inputs"]["lora_name"] = "FlashSDXL.safetensors"
    run = stand_in_client.run(prompt)
    assert run.error is not None
    assert run.error["node_type"] == "FlashLoraLoader"
    assert "does not fit" in run.error["exception_message"]


@pytest.mark.parametrize("name", DEMOS)
def test_each_tasks_lora_is_on_the_model_of_its_task(name: str) -> None:
    """Follow the graph from the loader of a LoRA back to the demo's model, or on to the adapter that it goes with."""
    prompt = api(name)
    for identity, node in prompt.items():
        file = node["inputs"].get("lora_name", "")
        if node["class_type"] != "FlashLoraLoader" or not file.startswith("flash_demo_"):
            continue
        model = prompt[node["inputs"]["model"][0]]
        assert model["class_type"] == "FlashDemoModels"
        task = model["inputs"]["task"]
        if file in ADAPTERS:
            applied = [prompt[other]["inputs"] for other in nodes_of(prompt, "FlashAdapterApply")]
            assert [one["adapter_name"] for one in applied if one["model"] == [identity, 0]] == [ADAPTERS[file]]
            assert task == "text-to-image"
        else:
            assert file == f"flash_demo_{task.replace('-', '_')}.safetensors"
