"""The extension inside ComfyUI: it loads fast, imports nothing heavy, and says what every input and output is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .client import Client

pytestmark = pytest.mark.comfy

NODES = {
    "FlashAdapterApply",
    "FlashCompare",
    "FlashConcatConditioning",
    "FlashDemoModels",
    "FlashFaceSwapPrepare",
    "FlashInpaintPrepare",
    "FlashInpaintStitch",
    "FlashLoraLoader",
    "FlashLoraStack",
    "FlashSampler",
    "FlashSamplerSelect",
    "FlashScheduler",
    "FlashUpscale",
}
HEAVY = ("diffusers", "peft", "accelerate", "transformers")

# ComfyUI's own loader, in a process that has what a running ComfyUI has imported, and nothing else.
LOAD_AS_COMFYUI_DOES = """
import asyncio, json, sys, time
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import utils.extra_config  # first, as main.py does: ComfyUI has several modules called utils
import execution, latent_preview, nodes, server
before = set(sys.modules)
start = time.process_time()  # of this process: the machine may be busy with others
loaded = asyncio.run(nodes.load_custom_node(sys.argv[2], module_parent="custom_nodes"))
seconds = time.process_time() - start
print(json.dumps({"loaded": loaded, "seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def flash_nodes(client: Client) -> dict[str, dict]:
    return {name: info for name, info in client.object_info().items() if name.startswith("Flash")}


def visible_inputs(info: dict) -> dict[str, list]:
    """The inputs a user sees, by name."""
    return {
        name: field for kind, section in info["input"].items() for name, field in section.items() if kind != "hidden"
    }


def test_every_node_is_registered_in_our_category(client: Client) -> None:
    nodes = flash_nodes(client)
    assert set(nodes) == NODES
    assert {info["category"] for info in nodes.values()} == {"Flash Diffusion"}
    assert all(info["description"] for info in nodes.values())


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
        for input_name in visible_inputs(info):
            assert f"`{input_name}`" in page, f"the help of {name} does not explain {input_name}"
        for output_name in info["output_name"]:
            assert f"`{output_name}`" in page, f"the help of {name} does not explain its output {output_name}"


def test_loading_it_is_quick_and_imports_nothing_heavy(runtime: ModuleType, root: Path, tmp_path: Path) -> None:
    dropped_in = tmp_path / "some-folder-with.dots"
    dropped_in.symlink_to(root, target_is_directory=True)
    folder = runtime.comfyui_folder()
    command = [sys.executable, "-c", LOAD_AS_COMFYUI_DOES, str(folder), str(dropped_in)]
    done = subprocess.run(command, cwd=folder, env=runtime.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loaded"], done.stderr
    heavy = [name for name in result["modules"] if name.split(".")[0] in HEAVY]
    assert not heavy
    assert result["seconds"] < 0.3


def test_comfyui_reports_no_problem_with_it(server) -> None:
    log = server.log.read_text(errors="replace")
    assert not re.search(r"(IMPORT FAILED|Cannot import).*flash-diffusion", log)


def test_core_offers_the_shipped_lora_folder_too(client: Client) -> None:
    nodes = client.object_info()
    ours = nodes["FlashLoraLoader"]["input"]["required"]["lora_name"]
    options = ours[1].get("options") or ours[0]
    assert options == nodes["LoraLoaderModelOnly"]["input"]["required"]["lora_name"][0]
