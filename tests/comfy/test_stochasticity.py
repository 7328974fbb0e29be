"""Stochasticity in a running ComfyUI: ``auto`` takes the LoRA's value, and numbers of older workflows still work."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch

from . import prompts
from .client import Client
from .loras import save_random_lora
from .test_nodes import custom_sampling, latent_of

pytestmark = pytest.mark.comfy

MEASURED = {2: 0.7, 4: 0.5}


@pytest.fixture(scope="module")
def lora(server) -> str:
    """Save a Flash LoRA whose metadata has :data:`MEASURED`, and return its name in ComfyUI."""
    path: Path = server.base / "models" / "loras" / "random_measured.safetensors"
    save_random_lora(path, prompts.TEACHER, stochasticity=MEASURED)
    return path.name


@pytest.mark.parametrize(
    ("settings", "value", "told"),
    [
        ({"steps": 4}, 0.5, "stochasticity 0.5: the LoRA's metadata for 4 steps"),
        ({"steps": 3}, 0.5, "stochasticity 0.5: the LoRA's metadata for 4 steps, the nearest to 3"),
        ({"steps": 2}, 0.7, "stochasticity 0.7: the LoRA's metadata for 2 steps"),
        # Two of the 4 steps' timesteps: the value of 4 steps, not of 2.
        ({"steps": 4, "denoise": 0.5}, 0.5, "stochasticity 0.5: the LoRA's metadata for 4 steps"),
    ],
)
def test_auto_takes_the_loras_value_in_both_nodes(
    client: Client, lora: str, settings: dict[str, Any], value: float, told: str
) -> None:
    run = client.run(prompts.latents(lora, seed=31, stochasticity="auto", **settings))
    assert run.succeeded, run.error
    assert run.texts[prompts.SAMPLER].splitlines()[1] == told
    auto = client.latent(run, "latent")
    # A number as text counts as the number; it is another input for ComfyUI, so nothing comes from its cache.
    assert torch.equal(auto, latent_of(client, prompts.latents(lora, seed=31, stochasticity=str(value), **settings)))
    assert not torch.equal(auto, latent_of(client, prompts.latents(lora, seed=31, stochasticity=1.0, **settings)))
    custom = custom_sampling(lora, 31, ["flash", 0], **settings)
    custom["flash"]["inputs"]["stochasticity"] = "auto"
    run = client.run(custom)
    assert run.succeeded, run.error
    assert run.texts["flash"] == told
    assert torch.equal(auto, client.latent(run, "latent"))


def test_auto_says_why_it_takes_the_papers_value(client: Client, server) -> None:
    save_random_lora(server.base / "models" / "loras" / "random_plain.safetensors", prompts.TEACHER)
    for name, why in (
        ("random_plain.safetensors", "the LoRA's metadata has no value"),
        (None, "the model has no Flash metadata"),
    ):
        run = client.run(prompts.latents(name, seed=32, stochasticity="auto"))
        assert run.succeeded, run.error
        assert run.texts[prompts.SAMPLER].splitlines()[1] == f"stochasticity 1: the paper's, since {why}"
        assert torch.equal(client.latent(run, "latent"), latent_of(client, prompts.latents(name, seed=32)))


def test_one_evaluation_needs_no_stochasticity(client: Client, lora: str) -> None:
    run = client.run(prompts.latents(lora, seed=33, steps=1, stochasticity="auto"))
    assert run.texts == {prompts.SAMPLER: "t = 999\n(1 evaluation, predicts v)"}


@pytest.mark.parametrize("value", [0, 0.5, 1.0, "0.5", "0,5", ["number", 0]])
def test_a_number_of_an_older_workflow_is_taken(client: Client, lora: str, value: Any) -> None:
    """Version 0.1 saved a number, or a link from a node that gives a FLOAT."""
    prompt = prompts.latents(lora, seed=34, pictures=1, stochasticity=value)
    prompt["number"] = prompts.node("PrimitiveFloat", value=0.5)
    number = 0.5 if isinstance(value, (str, list)) else value
    run = client.run(prompt)
    assert run.succeeded, run.error
    expected = f"stochasticity {number:g}"
    if number != MEASURED[4]:
        expected += " (auto: 0.5, the LoRA's metadata for 4 steps)"
    assert run.texts[prompts.SAMPLER].splitlines()[1] == expected
    exact = prompts.latents(lora, seed=34, pictures=1, stochasticity=f"{number:.3f}")
    assert torch.equal(client.latent(run, "latent"), latent_of(client, exact))


@pytest.mark.parametrize("value", ["atuo", "", "nan", 1.5])
def test_another_text_or_number_raises_a_readable_error(client: Client, lora: str, value: Any) -> None:
    run = client.run(prompts.latents(lora, seed=35, stochasticity=value))
    assert run.error is not None
    message = run.error["exception_message"]
    assert "stochasticity is" in message
    assert "expected auto (the LoRA's own value), or a number from 0" in message


def test_a_link_of_another_type_is_refused_by_the_server(client: Client, lora: str) -> None:
    prompt = prompts.latents(lora, seed=36, stochasticity=[prompts.EMPTY, 0])
    with pytest.raises((urllib.error.HTTPError, RuntimeError), match="mismatch|400"):
        client.queue(prompt)
