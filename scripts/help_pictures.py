"""Draw the example pictures of the help pages with the demo's models, on the CPU.

    python scripts/help_pictures.py [NODE ...]

NODE is a node's id, such as FlashSampler (default: all). Each picture is a row of captioned panels,
``web/docs/NODE.webp``; that of FlashDistillRuns is the node on ComfyUI's page. Needs the runtime
(``comfy_runtime.py fetch``), the trainer's packages, playwright and Chromium. Run it after the demo's models or the
effect of a node has changed. All pictures take about ten minutes, most of them for the two distillations.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_page
import comfy_runtime
import page_proofs
from PIL import Image, ImageDraw, ImageFont, ImageOps

logger = logging.getLogger("help_pictures")

QUEUED = comfy_runtime.ROOT / "tests" / "comfy" / "workflows"  # the shipped workflows in API format
PAGES = comfy_runtime.ROOT / "web" / "docs"
TILE, GAP, CAPTION = 144, 8, 20  # pixels
WEBP_QUALITY = 85

Graph = dict[str, dict[str, Any]]
Panels = dict[str, list]  # a caption: the IMAGE output [node, slot] below it
DISTILLED = "my_flash_demo"
RUNS = "output/flash_distill_headless"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Make a node in API format."""
    return {"class_type": kind, "inputs": inputs}


def shipped(name: str) -> Graph:
    """Return a shipped workflow without the nodes that save or show something."""
    graph = json.loads((QUEUED / f"{name}.json").read_text(encoding="utf-8"))
    return {key: one for key, one in graph.items() if not one["class_type"].startswith(("Save", "Preview"))}


def variants(
    name: str, changed: str, sampler: str, decode: str, values: dict[str, dict[str, Any]]
) -> tuple[Graph, Panels]:
    """Return a workflow with a copy of its last nodes for each caption.

    Args:
        name: of the workflow.
        changed: the node whose inputs change.
        sampler, decode: the nodes after it.
        values: the changed inputs by caption.
    """
    graph, panels = shipped(name), {}
    for caption, inputs in values.items():
        copies = {old: f"{old} {caption}" for old in dict.fromkeys((changed, sampler, decode))}
        for old, new in copies.items():
            linked = {
                key: [copies.get(value[0], value[0]), value[1]] if isinstance(value, list) else value
                for key, value in graph[old]["inputs"].items()
            }
            graph[new] = node(graph[old]["class_type"], **linked)
        graph[copies[changed]]["inputs"].update(inputs)
        panels[caption] = [copies[decode], 0]
    return graph, panels


def flash_sampler() -> tuple[Graph, Panels]:
    graph, panels = variants(
        "flash_demo_text_to_image",
        *("5", "5", "6"),
        {f"Flash Sampler, {steps}": {"steps": int(steps[0])} for steps in ("1 step", "2 steps", "4 steps")},
    )
    graph["4"]["inputs"]["batch_size"] = 1
    graph["negative"] = node("CLIPTextEncode", clip=["1", 1], text="")
    graph["k"] = node(
        "KSampler",
        **{"model": ["1", 0], "positive": ["3", 0], "negative": ["negative", 0], "latent_image": ["4", 0]},
        **{"seed": 7, "steps": 4, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "simple", "denoise": 1.0},
    )
    graph["k decoded"] = node("VAEDecode", samples=["k", 0], vae=["1", 2])
    return graph, {"KSampler, 4 steps": ["k decoded", 0], **panels}


def custom_sampling(graph: Graph, caption: str, sigmas: dict[str, Any], stochasticity: str, latent: list) -> list:
    """Add SamplerCustomAdvanced with Flash Scheduler and Flash Sampler Select; return the picture."""
    graph["noise"] = node("RandomNoise", noise_seed=5)
    graph["guider"] = node("BasicGuider", model=["10", 0], conditioning=["11", 0])
    graph[f"sigmas {caption}"] = node("FlashScheduler", model=["10", 0], **sigmas)
    graph[f"sampler {caption}"] = node("FlashSamplerSelect", stochasticity=stochasticity)
    graph[caption] = node(
        "SamplerCustomAdvanced",
        **{"noise": ["noise", 0], "guider": ["guider", 0], "sampler": [f"sampler {caption}", 0]},
        **{"sigmas": [f"sigmas {caption}", 0], "latent_image": latent},
    )
    graph[f"{caption} decoded"] = node("VAEDecode", samples=[caption, 0], vae=["9", 2])
    return [f"{caption} decoded", 0]


def flash_scheduler() -> tuple[Graph, Panels]:
    graph = shipped("flash_demo_image_to_image")
    panels: Panels = {"input": ["7", 0]}
    for denoise in (0.25, 0.5, 1.0):
        caption = f"denoise {denoise:g}"
        panels[caption] = custom_sampling(graph, caption, {"steps": 4, "denoise": denoise}, "auto", ["12", 0])
    return graph, panels


def flash_sampler_select() -> tuple[Graph, Panels]:
    graph = shipped("flash_demo_image_to_image")
    graph["11"]["inputs"]["text"] = "animal face"
    graph["empty"] = node("EmptyLatentImage", width=128, height=128, batch_size=1)
    panels: Panels = {}
    for value in ("0", "0.5", "1"):
        caption = f"stochasticity {value}"
        panels[caption] = custom_sampling(graph, caption, {"steps": 4, "denoise": 1.0}, value, ["empty", 0])
    return graph, panels


def flash_lora_loader() -> tuple[Graph, Panels]:
    graph, panels = variants(
        "flash_demo_text_to_image",
        *("5", "5", "6"),
        {"1 step, without LoRA": {"model": ["1", 0], "steps": 1}, "1 step, Flash LoRA": {"steps": 1}},
    )
    graph["4"]["inputs"]["batch_size"] = 1
    return graph, panels


def flash_lora_stack() -> tuple[Graph, Panels]:
    strengths = {f"style strength {value:g}": {"style_1_strength": value} for value in (0.0, 0.5, 1.0)}
    return variants("flash_demo_style", "9", "11", "12", strengths)


def flash_inpaint_prepare() -> tuple[Graph, Panels]:
    graph = shipped("flash_demo_inpaint")
    graph["mask"] = node("MaskToImage", mask=["14", 5])
    return graph, {"image": ["7", 0], "crop_mask": ["mask", 0], "result": ["17", 0]}


def flash_inpaint_stitch() -> tuple[Graph, Panels]:
    graph = shipped("flash_demo_outpaint")
    return graph, {"before": ["10", 0], "drawn crop": ["13", 0], "stitched": ["14", 0]}


def flash_face_swap() -> tuple[Graph, Panels]:
    graph = shipped("flash_demo_face_swap")
    return graph, {"target": ["9", 0], "source": ["10", 0], "identity": ["20", 4], "result": ["24", 0]}


def flash_concat() -> tuple[Graph, Panels]:
    graph = shipped("flash_demo_super_resolution")
    del graph["13"]
    graph["large"] = node(
        "ImageScale", upscale_method="bicubic", width=128, height=128, crop="disabled", image=["8", 0]
    )
    graph["concat"] = node(
        "FlashConcatConditioning",
        **{"model": ["11", 0], "positive": ["12", 0], "latent_image": ["5", 0], "vae": ["10", 2]},
        **{"order": "image", "images_as": "latent", "image": ["large", 0]},
    )
    graph["sampled"] = node(
        "FlashSampler",
        **{"model": ["11", 0], "positive": ["concat", 0], "latent_image": ["5", 0]},
        **{"seed": 1, "steps": 4, "guidance": 1.0, "denoise": 1.0},
    )
    graph["decoded"] = node("VAEDecode", samples=["sampled", 0], vae=["10", 2])
    return graph, {"image (4 channels)": ["large", 0], "result": ["decoded", 0]}


def flash_upscale() -> tuple[Graph, Panels]:
    return shipped("flash_demo_super_resolution"), {"image, 32 x 32": ["8", 0], "scale 4, 128 x 128": ["13", 0]}


def flash_compare() -> tuple[Graph, Panels]:
    return shipped("flash_demo_compare"), {"": ["7", 0]}


def flash_adapter() -> tuple[Graph, Panels]:
    graph = shipped("flash_demo_controlnet")
    for name in ("13", "18"):  # the second of the batch: another animal without the adapter
        graph[f"{name} second"] = node("ImageFromBatch", image=[name, 0], batch_index=1, length=1)
    return graph, {
        "picture": ["7", 0],
        "image (edges)": ["9", 0],
        "without": ["13 second", 0],
        "with adapter": ["18 second", 0],
    }


def flash_demo_models() -> tuple[Graph, Panels]:
    texts = {text: {"text": text} for text in ("red apple", "unicorn", "tiger face", "butterfly")}
    graph, panels = variants("flash_demo_text_to_image", "3", "5", "6", texts)
    graph["4"]["inputs"]["batch_size"] = 1
    return graph, panels


def flash_distill() -> tuple[Graph, Panels]:
    graph = shipped("flash_distill_demo")
    graph["save"] = node("FlashSaveLora", lora=["3", 1], name=DISTILLED)
    return graph, {"": ["3", 2]}


def flash_save_lora() -> tuple[Graph, Panels]:
    """The LoRA that :func:`flash_distill` has saved, loaded again."""
    graph, panels = variants(
        "flash_demo_text_to_image",
        *("5", "5", "6"),
        {"1 step, before": {"model": ["1", 0], "steps": 1}, "1 step, saved LoRA": {"steps": 1}},
    )
    graph["4"]["inputs"]["batch_size"] = 1
    graph["3"]["inputs"]["text"] = "red apple"
    graph["2"]["inputs"]["lora_name"] = f"{DISTILLED}.safetensors"
    return graph, panels


def flash_distill_headless() -> tuple[Graph, Panels]:
    return shipped("flash_distill_headless_demo"), {"": ["2", 1]}


def queue_headless(server: comfy_runtime.Server, name: str, action: str) -> None:
    """Queue the shipped headless distillation under another name."""
    distil = shipped("flash_distill_headless_demo")["2"]
    distil["inputs"] |= {"name": name, "action": action, "seed": 1}
    server.post("/prompt", {"prompt": {"2": distil}})


def wait_for_state(server: comfy_runtime.Server, name: str, states: tuple[str, ...]) -> None:
    """Wait until the newest run of this name is in one of the states, and has told how far it is if it is at work."""
    while True:
        for job in (server.base / RUNS).glob(f"{name}-*/job.json"):
            told = json.loads(job.read_text(encoding="utf-8"))
            state = told["state"]
            if state == "failed":
                raise comfy_runtime.RuntimeProblem(f"{name}: {told['reason']}")
            if state in states and (state != "running" or job.with_name("progress.json").is_file()):
                return
        time.sleep(0.5)


def list_of_runs(server: comfy_runtime.Server, profile: Path) -> Image.Image:
    """Return Flash Distill Runs as the page shows it: one run is done, one at work, one waits. Stop both at the end."""
    workflow = {
        **{"last_node_id": 1, "last_link_id": 0, "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4},
        "nodes": [
            {
                **{"id": 1, "type": "FlashDistillRuns", "pos": [0, 0], "size": [560, 120], "flags": {}, "order": 0},
                **{"mode": 0, "inputs": [], "properties": {}, "widgets_values": []},
                "outputs": [{"name": "text", "type": "STRING", "links": []}],
            }
        ],
    }
    others = ("night_run", "next_run")
    for name in others:
        queue_headless(server, name, "run in the background")
        wait_for_state(server, name, ("waiting", "running"))
    wait_for_state(server, others[0], ("running",))
    with comfy_page.open_page(server, profile) as page:
        comfy_page.open_workflow(page, workflow)
        page_proofs.queue(page)
        page.get_by_text("waiting: ").first.wait_for()
        picture = comfy_page.graph_picture(page, workflow)
    for name in reversed(others):
        queue_headless(server, name, "stop")
        wait_for_state(server, name, ("stopped",))
    return picture


PICTURES: dict[str, Callable[[], tuple[Graph, Panels]]] = {
    "FlashDemoModels": flash_demo_models,
    "FlashLoraLoader": flash_lora_loader,
    "FlashLoraStack": flash_lora_stack,
    "FlashSampler": flash_sampler,
    "FlashScheduler": flash_scheduler,
    "FlashSamplerSelect": flash_sampler_select,
    "FlashInpaintPrepare": flash_inpaint_prepare,
    "FlashInpaintStitch": flash_inpaint_stitch,
    "FlashFaceSwapPrepare": flash_face_swap,
    "FlashConcatConditioning": flash_concat,
    "FlashUpscale": flash_upscale,
    "FlashCompare": flash_compare,
    "FlashAdapterApply": flash_adapter,
    "FlashDistill": flash_distill,
    "FlashSaveLora": flash_save_lora,
    "FlashDistillHeadless": flash_distill_headless,
}
# Their panel has captions of its own, and keeps its shape.
WHOLE = {"FlashCompare": 480, "FlashDistill": 480, "FlashDistillHeadless": 480}  # pixels wide
ON_THE_PAGE = {"FlashDistillRuns": list_of_runs}
# A node's picture shows what another node has made.
AFTER = {"FlashSaveLora": "FlashDistill", "FlashDistillRuns": "FlashDistillHeadless"}


def row(panels: dict[str, Image.Image]) -> Image.Image:
    """Return the pictures side by side, each whole on a white tile under its caption."""
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (len(panels) * (TILE + GAP) - GAP, CAPTION + TILE), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (caption, picture) in enumerate(panels.items()):
        left = place * (TILE + GAP)
        pen.text((left + TILE // 2, 2), caption, "black", font, anchor="ma")
        tile = ImageOps.pad(picture, (TILE, TILE), Image.Resampling.LANCZOS, "white")
        sheet.paste(tile, (left, CAPTION))
    return sheet


def draw(server: comfy_runtime.Server, name: str, output: Path) -> Image.Image:
    """Run a node's graph and return its picture; of a batch, the first of each panel."""
    graph, panels = PICTURES[name]()
    prefixes = {caption: f"{name}-{place}" for place, caption in enumerate(panels)}
    for caption, image in panels.items():
        graph[prefixes[caption]] = node("SaveImage", images=image, filename_prefix=prefixes[caption])
    files = comfy_runtime.run_workflow(server, graph, output)
    first = {
        caption: next(path for path in files if path.name.startswith(f"{prefix}_"))
        for caption, prefix in prefixes.items()
    }
    pictures = {caption: Image.open(path).convert("RGB") for caption, path in first.items()}
    if name not in WHOLE:
        return row(pictures)
    (picture,) = pictures.values()
    return ImageOps.contain(picture, (WHOLE[name], picture.height), Image.Resampling.LANCZOS)


def main() -> int:
    """Write ``web/docs/*.webp``; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description="Draw the help pages' example pictures.")
    known = [*PICTURES, *ON_THE_PAGE]
    parser.add_argument("nodes", nargs="*", choices=[[], *known], metavar="NODE", help="node ids (default: all)")
    names = parser.parse_args().nodes or known
    for name, before in AFTER.items():
        if name in names and before not in names:
            parser.error(f"{name} shows what {before} has made. Name both.")
    with tempfile.TemporaryDirectory() as scratch, comfy_runtime.serve(Path(scratch) / "base") as server:
        for name in names:
            path, folder = PAGES / f"{name}.webp", Path(scratch) / name
            picture = ON_THE_PAGE[name](server, folder) if name in ON_THE_PAGE else draw(server, name, folder)
            picture.save(path, quality=WEBP_QUALITY, method=6)
            logger.info("%s: %.0f kB", path, path.stat().st_size / 1000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
