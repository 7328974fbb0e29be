"""A client of ComfyUI's HTTP and websocket API: queue a workflow, follow its run, fetch its outputs."""

from __future__ import annotations

import io
import json
import re
import struct
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import websocket
from PIL import Image
from safetensors.torch import load
from torch import Tensor

# ComfyUI's kinds of binary messages: previews, and text for a node.
PREVIEW_IMAGE, PREVIEW_IMAGE_WITH_METADATA, TEXT = 1, 4, 3

Prompt = dict[str, dict[str, Any]]


@dataclass
class Run:
    """The events and outputs of one queued workflow."""

    prompt_id: str
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    progress: list[tuple[int, int]] = field(default_factory=list)
    previews: list[Image.Image] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)  # of each message with the losses so far
    error: dict[str, Any] | None = None
    interrupted: bool = False

    @property
    def succeeded(self) -> bool:
        """True if the run had no error and no interrupt."""
        return self.error is None and not self.interrupted


class Client:
    """One websocket session with a running ComfyUI."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.client_id = uuid.uuid4().hex
        address = server.address.replace("http", "ws", 1)
        self.socket = websocket.create_connection(f"{address}/ws?clientId={self.client_id}", timeout=120)
        # Previews come to clients that say they understand the newer kind as that kind, to others as plain images.
        self.socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def queue(self, prompt: Prompt) -> str:
        """Queue a workflow in API format and return its prompt id; raise ComfyUI's message for an invalid workflow."""
        body = {"prompt": prompt, "client_id": self.client_id}
        return json.loads(self.server.post("/prompt", body))["prompt_id"]

    def run(self, prompt: Prompt, *, interrupt_at_step: int | None = None, of: int | None = None) -> Run:
        """Run a workflow to its end, or ask ComfyUI to stop it once it reports this step.

        Args:
            of: count only steps of so many.
        """
        run = Run(self.queue(prompt))
        while True:
            message = self.socket.recv()
            if isinstance(message, bytes):
                self._binary(run, message)
                continue
            event = json.loads(message)
            data = event["data"]
            if data.get("prompt_id", run.prompt_id) != run.prompt_id:
                continue
            kind = event["type"]
            if kind == "executing" and data["node"] is not None:
                run.executed.append(data["node"])
            elif kind == "execution_cached":
                run.cached.extend(data["nodes"])
            elif kind == "executed":
                run.outputs[data["node"]] = data["output"]
            elif kind == "progress":
                run.progress.append((data["value"], data["max"]))
                if interrupt_at_step is not None and data["value"] >= interrupt_at_step and of in (None, data["max"]):
                    self.server.post("/interrupt", {})
                    interrupt_at_step = None
            elif kind == "flash_diffusion.losses":
                run.losses.append(data["losses"])
            elif kind == "execution_error":
                run.error = data
                return run
            elif kind == "execution_interrupted":
                run.interrupted = True
                return run
            elif kind == "execution_success":
                return run

    @staticmethod
    def _binary(run: Run, message: bytes) -> None:
        kind = struct.unpack(">I", message[:4])[0]
        if kind == PREVIEW_IMAGE:
            run.previews.append(Image.open(io.BytesIO(message[8:])))
        elif kind == PREVIEW_IMAGE_WITH_METADATA:
            start = 8 + struct.unpack(">I", message[4:8])[0]
            run.previews.append(Image.open(io.BytesIO(message[start:])))
        elif kind == TEXT:
            start = 8 + struct.unpack(">I", message[4:8])[0]
            text = message[start:].decode()
            # The nodes end each line as Markdown's hard breaks, because the page's new renderer joins others.
            assert re.search(r"(?<!  )\n", text) is None, text
            run.texts[message[8:start].decode()] = text.replace("  \n", "\n")

    def view(self, file: dict[str, str]) -> bytes:
        """Fetch a file that a node lists in its output."""
        return self.server.get("/view?" + urlencode(file))

    def images(self, run: Run, node: str) -> list[Image.Image]:
        """Fetch the pictures of a SaveImage or PreviewImage node."""
        return [Image.open(io.BytesIO(self.view(file))) for file in run.outputs[node]["images"]]

    def latent(self, run: Run, node: str) -> Tensor:
        """Fetch the latent of a SaveLatent node, (B, C, H, W)."""
        (file,) = run.outputs[node]["latents"]
        return load(self.view(file))["latent_tensor"]

    def object_info(self) -> dict[str, Any]:
        """Fetch the server's description of its nodes."""
        return json.loads(self.server.get("/object_info"))
