"""The extension inside ComfyUI: it imports little, and explains every node, input and output."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from .client import Client
from .inside_comfyui import SCRIPTS

pytestmark = pytest.mark.comfy

NODES = {
    "FlashAdapterApply",
    "FlashCompare",
    "FlashConcatConditioning",
    "FlashDemoModels",
    "FlashDistill",
    "FlashDistillHeadless",
    "FlashDistillRuns",
    "FlashEvaluate",
    "FlashFaceSwapPrepare",
    "FlashInpaintPrepare",
    "FlashInpaintStitch",
    "FlashLoraLoader",
    "FlashLoraStack",
    "FlashSampler",
    "FlashSamplerSelect",
    "FlashSaveLora",
    "FlashScheduler",
    "FlashUpscale",
}
BRANCHES = {"loaders", "sampling", "image", "conditioning", "training"}  # names of ComfyUI's own: it translates them
MOST_IN_A_BRANCH = 5
LARGEST_PICTURE = 80_000  # bytes: ComfyUI's registry and every user download it
MOST_MODULES = 90  # of ours; 83 in November 2026
# Parts of the project that no node needs: ComfyUI must not import them at start.
NOT_AT_START = (
    "trainer",
    "flash_core.distiller",
    "flash_core.discriminator",
    "nodes.distil.denoiser",
    "nodes.distil.run",
)


def flash_nodes(client: Client) -> dict[str, dict]:
    return {name: info for name, info in client.object_info().items() if name.startswith("Flash")}


def visible_inputs(info: dict) -> dict[str, list]:
    """Return the inputs that a user sees, by name."""
    return {
        name: field for kind, section in info["input"].items() for name, field in section.items() if kind != "hidden"
    }


def test_every_node_is_in_a_branch_of_our_menu(client: Client) -> None:
    nodes = flash_nodes(client)
    assert set(nodes) == NODES
    branches = Counter(info["category"] for info in nodes.values())
    assert set(branches) == {f"Flash Diffusion/{name}" for name in BRANCHES}
    assert max(branches.values()) <= MOST_IN_A_BRANCH
    assert all(info["description"] for info in nodes.values())


def test_the_face_of_flash_sampler_shows_only_what_most_need(client: Client) -> None:
    widgets = {
        name: field[1]
        for name, field in visible_inputs(flash_nodes(client)["FlashSampler"]).items()
        if "default" in field[1]
    }
    shown = [name for name, options in widgets.items() if not options.get("advanced")]
    assert shown == ["seed", "steps", "guidance", "denoise", "preset"]
    assert set(widgets) - set(shown) == {"grid", "timesteps", "stochasticity"}


def test_every_input_and_output_has_a_tooltip(client: Client) -> None:
    for name, info in flash_nodes(client).items():
        for input_name, (_, *options) in visible_inputs(info).items():
            assert options, f"{name}.{input_name} has no options"
            assert options[0].get("tooltip"), f"{name}.{input_name} has no tooltip"
        assert all(info["output_tooltips"]), f"{name} has an output without a tooltip"


def test_every_node_has_a_help_page_with_its_inputs_and_outputs(client: Client, server) -> None:
    for name, info in flash_nodes(client).items():
        page = server.get(f"/extensions/flash-diffusion/docs/{name}.md").decode()
        assert page.startswith(f"# {info['display_name']}\n")
        rows = page.split("## Input")[1].split("## ")[0].splitlines()
        explained = [
            name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])
        ]
        assert explained == list(visible_inputs(info)), f"the help of {name} lists other inputs than the node"
        for output_name in info["output_name"]:
            assert f"`{output_name}`" in page, f"the help of {name} does not explain its output {output_name}"


def test_every_help_page_shows_a_small_picture(client: Client, server) -> None:
    for name in sorted(flash_nodes(client)):
        page = server.get(f"/extensions/flash-diffusion/docs/{name}.md").decode()
        assert re.search(rf"!\[[^]]+\]\({name}\.webp\)", page), f"the help of {name} shows no picture"
        content = server.get(f"/extensions/flash-diffusion/docs/{name}.webp")
        assert len(content) <= LARGEST_PICTURE
        assert Image.open(io.BytesIO(content)).width >= 280


def test_loading_imports_only_our_modules_and_few_of_them(runtime: ModuleType, root: Path, tmp_path: Path) -> None:
    dropped_in = tmp_path / "some-folder-with.dots"
    dropped_in.symlink_to(root, target_is_directory=True)
    folder = runtime.comfyui_folder()
    command = [sys.executable, SCRIPTS / "load_extension.py", folder, dropped_in]
    done = subprocess.run(command, cwd=folder, env=runtime.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loaded"], done.stderr
    package = str(dropped_in).replace(".", "_x_")
    ours = [name.removeprefix(package).lstrip(".") for name in result["modules"] if name.startswith(package)]
    others = {name.split(".")[0] for name in result["modules"] if not name.startswith(package)}
    assert ours
    assert others <= set(sys.stdlib_module_names)
    assert not [name for name in ours if name.startswith(NOT_AT_START)]
    assert len(ours) <= MOST_MODULES


def test_comfyui_reports_no_import_problem(server) -> None:
    log = server.log.read_text(errors="replace")
    assert not re.search(r"(IMPORT FAILED|Cannot import).*flash-diffusion", log)


def test_core_loaders_list_the_shipped_loras(client: Client) -> None:
    nodes = client.object_info()
    ours = nodes["FlashLoraLoader"]["input"]["required"]["lora_name"]
    options = ours[1].get("options") or ours[0]
    assert options == nodes["LoraLoaderModelOnly"]["input"]["required"]["lora_name"][0]
