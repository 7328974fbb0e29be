"""Workflows in API format for the tests, made from the shipped workflow."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from .runtime import ROOT

SHIPPED = Path(__file__).resolve().parent / "workflows" / "flash_demo_text_to_image.json"
TEACHER = ROOT / "trainer" / "demo" / "teacher"
PROMPT = "red apple"

MODELS, LORA, TEXT, EMPTY, SAMPLER, DECODE, SAVE = "1", "2", "3", "4", "5", "6", "7"
Prompt = dict[str, dict[str, Any]]


def shipped() -> Prompt:
    """Return the API twin of the shipped workflow."""
    return json.loads(SHIPPED.read_text())


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Make a node in API format; an input is a value or ``[node, slot]``."""
    return {"class_type": kind, "inputs": inputs}


def latents(
    lora: str | None, *, seed: int, steps: int = 4, pictures: int = 2, text: str = PROMPT, **sampler: Any
) -> Prompt:
    """Make the shipped workflow with another LoRA (None: without) and, by default, the paper's fresh noise.

    Node "latent" saves its latent.
    """
    prompt = copy.deepcopy(shipped())
    prompt[TEXT]["inputs"]["text"] = text
    prompt[EMPTY]["inputs"]["batch_size"] = pictures
    prompt[SAMPLER]["inputs"].update({"seed": seed, "steps": steps, "stochasticity": 1.0, **sampler})
    if lora is None:
        del prompt[LORA]
        prompt[SAMPLER]["inputs"]["model"] = [MODELS, 0]
    else:
        prompt[LORA]["inputs"]["lora_name"] = lora
    prompt["latent"] = node("SaveLatent", samples=[SAMPLER, 0], filename_prefix="test")
    return prompt
