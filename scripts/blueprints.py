"""Make the blueprints: ``subgraphs/*.json``, parts of the demo's templates as nodes that ComfyUI's page offers.

    python scripts/blueprints.py

A blueprint is a subgraph. Its nodes are those of a template; where a link enters from outside, it has an input: first
model, clip and vae. Its widgets are those that the template shows in app mode (``extra.linearData``), and those named
here; widgets of one node stay together. Run it after a template has changed. Needs only Python's standard library.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("blueprints")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows"
QUEUED = ROOT / "tests" / "comfy" / "workflows"  # the same templates in API format
BLUEPRINTS = ROOT / "subgraphs"
NAMESPACE = uuid.UUID("8f7a3f5e-2f0b-4f0e-9d3c-6a54f0e1b7c2")  # of the ids, so that a blueprint keeps its own
INPUT_NODE, OUTPUT_NODE = -10, -20  # ComfyUI's ids of a subgraph's two ends
ONE_OF_EACH = ("MODEL", "CLIP", "VAE")  # a template may load several models; a blueprint takes one
NAMES = {
    "MODEL": "model",
    "CLIP": "clip",
    "VAE": "vae",
    "pixels": "image",
}  # of inputs, where the node's name is not it
TYPES = {
    "batch_size": "INT",
    "context": "FLOAT",
    "denoise": "FLOAT",
    "feather": "INT",
    "grow": "INT",
    "guidance": "FLOAT",
    "height": "INT",
    "lora_name": "COMBO",
    "adapter_name": "COMBO",
    "name": "STRING",
    "notice": "STRING",
    "pad_bottom": "INT",
    "pad_left": "INT",
    "pad_right": "INT",
    "pad_top": "INT",
    "preset": "COMBO",
    "prompts": "STRING",
    "scale": "FLOAT",
    "seed": "INT",
    "size": "INT",
    "steps": "INT",
    "strength": "FLOAT",
    "text": "STRING",
    "width": "INT",
}
YOUR_MODEL = (
    "Connect a checkpoint's model, clip and vae and choose the LoRA made for it, or try it with Flash Demo Models."
)


@dataclass(frozen=True)
class Blueprint:
    """A part of a template.

    Attributes:
        template: its name.
        nodes: ids of the nodes that belong to the blueprint.
        outputs: (node, output's number) that it gives.
        widgets: (node, widget) to show beside those of app mode. Widgets of one name are shown as one.
        text: what it does.
        aliases: search words.
        category: below "Subgraph Blueprints".
    """

    template: str
    nodes: tuple[int, ...]
    outputs: tuple[tuple[int, int], ...]
    widgets: tuple[tuple[int, str], ...]
    text: str
    aliases: tuple[str, ...]
    category: str = "Flash Diffusion"


TABLE = {
    "Flash Text to Image": Blueprint(
        "flash_demo_text_to_image",
        (2, 3, 4, 5, 6),
        ((6, 0),),
        ((2, "lora_name"), (4, "width"), (4, "height")),
        f"Text to a picture in 4 steps. {YOUR_MODEL}",
        ("txt2img", "t2i", "few-step", "lcm", "turbo", "lightning"),
    ),
    "Flash Image to Image": Blueprint(
        "flash_demo_image_to_image",
        (10, 11, 12, 13, 14),
        ((14, 0),),
        ((10, "lora_name"),),
        f"A picture drawn anew after a text, in few steps; less denoise keeps more of it. {YOUR_MODEL}",
        ("img2img", "i2i", "few-step"),
    ),
    "Flash Inpaint": Blueprint(
        "flash_demo_inpaint",
        (9, 10, 14, 15, 16, 17),
        ((17, 0),),
        ((9, "lora_name"),),
        f"The masked part of a picture made anew, cropped and stitched, in 4 steps. {YOUR_MODEL} The demo's task is "
        "inpainting.",
        ("inpaint", "crop and stitch", "mask", "few-step"),
    ),
    "Flash Outpaint": Blueprint(
        "flash_demo_outpaint",
        (4, 9, 11, 12, 13, 14),
        ((14, 0),),
        ((9, "lora_name"), (11, "pad_left"), (11, "pad_top"), (11, "pad_bottom")),
        f"A picture extended over its edges in 4 steps. {YOUR_MODEL} The demo's task is inpainting.",
        ("outpaint", "extend", "uncrop", "few-step"),
    ),
    "Flash Upscale Image": Blueprint(  # Flash Upscale is a node
        "flash_demo_upscale",
        (2, 8, 9),
        ((9, 0),),
        ((2, "lora_name"), (8, "text")),
        f"A picture enlarged tile by tile, a few steps each. {YOUR_MODEL}",
        ("upscale", "tiled", "super-resolution", "few-step"),
    ),
    "Flash ControlNet": Blueprint(
        "flash_demo_controlnet",
        (3, 9, 10, 11, 16, 17, 18),
        ((18, 0),),
        ((16, "steps"), (3, "lora_name"), (16, "adapter_name"), (11, "width"), (11, "height"), (11, "batch_size")),
        f"A picture along the edges of another, in 4 steps. {YOUR_MODEL} Choose a Canny ControlNet of the same family.",
        ("controlnet", "canny", "edges", "t2i-adapter", "few-step"),
    ),
    "Flash Face Swap": Blueprint(
        "flash_demo_face_swap",
        (14, 15, 20, 22, 23, 24),
        ((24, 0),),
        ((14, "lora_name"),),
        "A face put into another picture, in 4 steps, with a model trained for it: Flash Demo Models with task "
        "face-swap, or yours. Only for pictures that you have the right to change.",
        ("face swap", "faceswap", "few-step"),
    ),
    "Flash Distill and Save": Blueprint(
        "flash_distill_demo",
        (3, 11),
        ((3, 0), (3, 2), (3, 3)),
        ((11, "name"), (3, "width"), (3, "height"), (3, "seed")),
        "A few-step LoRA of the model that you connect, saved in models/loras.",
        ("distill", "train lora", "few-step", "make turbo"),
    ),
}


def made_blueprint(title: str) -> dict[str, Any]:
    """Return a blueprint in ComfyUI's format.

    Raises:
        ValueError: the table names a node or a widget that is not there.
    """
    wanted = TABLE[title]
    template = json.loads((WORKFLOWS / f"{wanted.template}.json").read_text(encoding="utf-8"))
    found = {node["id"]: node for node in template["nodes"]}
    if missing := set(wanted.nodes) - set(found):
        raise ValueError(
            f"{title}: {wanted.template} has no node {missing}. Correct its nodes in scripts/blueprints.py."
        )
    nodes = {identity: copy.deepcopy(found[identity]) for identity in wanted.nodes}
    for node in nodes.values():
        for slot in node["inputs"]:
            slot["link"] = None
        for slot in node["outputs"]:
            slot["links"] = []
    subgraph = Subgraph(title, nodes)
    links = sorted(template["links"], key=lambda link: [*ONE_OF_EACH, link[-1]].index(link[-1]))
    for _, origin, origin_slot, target, target_slot, kind in links:
        if origin in nodes and target in nodes:
            subgraph.connect(origin, origin_slot, target, target_slot, kind)
        elif target in nodes:
            name = nodes[target]["inputs"][target_slot]["name"]
            source = kind if kind in ONE_OF_EACH else (origin, origin_slot)
            subgraph.enter(source, NAMES.get(kind, NAMES.get(name, name)), target, target_slot, kind)
    for origin, origin_slot in wanted.outputs:
        subgraph.leave(origin, origin_slot, nodes[origin]["outputs"][origin_slot]["type"])
    shown: list[tuple[int, str]] = [
        (node, widget) for node, widget, *_ in template["extra"]["linearData"]["inputs"] if node in nodes
    ]
    shown += wanted.widgets
    queued = json.loads((QUEUED / f"{wanted.template}.json").read_text(encoding="utf-8"))
    for node in dict.fromkeys(node for node, _ in shown):
        wanted_here = [widget for one, widget in shown if one == node]
        for widget in up_to_last(queued[str(node)]["inputs"], wanted_here):
            subgraph.list_widget(node, widget)
            if widget in wanted_here:
                subgraph.show(node, widget)
    return subgraph.file(wanted)


def up_to_last(inputs: dict[str, Any], wanted: list[str]) -> list[str]:
    """Return a node's widgets up to the last wanted one: older pages give the first listed widget the first value.

    Args:
        inputs: of the node in API format; a list is a link, and no widget.
    """
    widgets = [name for name, value in inputs.items() if not isinstance(value, list)]
    return widgets[: 1 + max(widgets.index(widget) for widget in wanted)]


class Subgraph:
    """A subgraph that is being built."""

    def __init__(self, title: str, nodes: dict[int, dict[str, Any]]) -> None:
        self.title = title
        self.nodes = nodes
        self.links: list[dict[str, Any]] = []
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []
        self.sources: list[object] = []
        self.identity = str(uuid.uuid5(NAMESPACE, title))

    def connect(self, origin: int, origin_slot: int, target: int, target_slot: int, kind: str) -> int:
        """Add a link and return its id."""
        identity = len(self.links) + 1
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        self.links.append(dict(zip(keys, (identity, origin, origin_slot, target, target_slot, kind), strict=True)))
        if target in self.nodes:
            self.nodes[target]["inputs"][target_slot]["link"] = identity
        if origin in self.nodes:
            self.nodes[origin]["outputs"][origin_slot]["links"].append(identity)
        return identity

    def enter(self, source: object, name: str, target: int, target_slot: int, kind: str) -> dict[str, Any]:
        """Lead an input into a node; the same source has one input."""
        if source not in self.sources:
            names = [slot["name"] for slot in self.inputs]
            while name in names:
                name += "_2"
            self.sources.append(source)
            slot = {
                "id": str(uuid.uuid5(NAMESPACE, f"{self.title} in {name}")),
                "name": name,
                "type": kind,
                "linkIds": [],
            }
            self.inputs.append(slot)
        slot = self.inputs[self.sources.index(source)]
        slot["linkIds"].append(self.connect(INPUT_NODE, self.sources.index(source), target, target_slot, kind))
        return slot

    def leave(self, origin: int, origin_slot: int, kind: str) -> None:
        """Lead a node's output out."""
        name = self.nodes[origin]["outputs"][origin_slot]["name"].lower()
        link = self.connect(origin, origin_slot, OUTPUT_NODE, len(self.outputs), kind)
        identity = str(uuid.uuid5(NAMESPACE, f"{self.title} out {name}"))
        self.outputs.append({"id": identity, "name": name, "type": kind, "linkIds": [link]})

    def list_widget(self, node: int, widget: str) -> None:
        """Give a node an input for a widget of its own."""
        slot = {"name": widget, "type": TYPES[widget], "widget": {"name": widget}, "link": None}
        self.nodes[node]["inputs"].append(slot)

    def show(self, node: int, widget: str) -> None:
        """Show a node's listed widget on the blueprint."""
        names = [slot["name"] for slot in self.nodes[node]["inputs"]]
        self.enter(widget, widget, node, names.index(widget), TYPES[widget])["widget"] = True

    def file(self, wanted: Blueprint) -> dict[str, Any]:
        """Return the file: one node, and the subgraph that it stands for."""
        left = min(node["pos"][0] for node in self.nodes.values())
        right = max(node["pos"][0] + node["size"][0] for node in self.nodes.values())
        top = min(node["pos"][1] for node in self.nodes.values())
        face = []
        for slot in self.inputs:
            on_node = {"name": slot["name"], "type": slot["type"], "link": None}
            if slot.pop("widget", False):
                on_node["widget"] = {"name": slot["name"]}
            face.append(on_node)
        node = {
            "id": 1,
            "type": self.identity,
            "pos": [0, 0],
            "size": [320, 60 + 26 * len(self.inputs)],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": face,
            "outputs": [{"name": slot["name"], "type": slot["type"], "links": []} for slot in self.outputs],
            "properties": {},
            "widgets_values": [],
            "title": self.title,
        }
        state = {"lastNodeId": max(self.nodes), "lastLinkId": len(self.links), "lastGroupId": 0, "lastRerouteId": 0}
        definition = {
            "id": self.identity,
            "version": 1,
            "state": state,
            "revision": 0,
            "config": {},
            "name": self.title,
            "category": wanted.category,
            "description": wanted.text,
            "inputNode": {"id": INPUT_NODE, "bounding": [left - 240, top, 160, 40 + 20 * len(self.inputs)]},
            "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 80, top, 160, 40 + 20 * len(self.outputs)]},
            "inputs": self.inputs,
            "outputs": self.outputs,
            "widgets": [],
            "nodes": list(self.nodes.values()),
            "groups": [],
            "links": self.links,
            "extra": {},
        }
        return {
            "revision": 0,
            "last_node_id": max(self.nodes),
            "last_link_id": 0,
            "nodes": [node],
            "links": [],
            "version": 0.4,
            "definitions": {"subgraphs": [definition]},
            "extra": {"BlueprintDescription": wanted.text, "BlueprintSearchAliases": list(wanted.aliases)},
        }


def text_of(title: str) -> str:
    """Return a blueprint as its file's text."""
    return json.dumps(made_blueprint(title), indent=2) + "\n"


def main() -> int:
    """Write all blueprints; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    BLUEPRINTS.mkdir(exist_ok=True)
    for title in TABLE:
        (BLUEPRINTS / f"{title}.json").write_text(text_of(title), encoding="utf-8")
        logger.info("%s", title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
