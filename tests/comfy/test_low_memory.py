"""Flash Distill on bases that save memory: float8, packed weights (GGUF), --lowvram; --novram is refused."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest

from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

# Of the latents, in their deviation, between the new LoRA as Flash Distill gives it and as the loader patches it. A
# loader rounds patched float8 weights to 8 bits; packed weights keep the patch beside them.
LOADED = {"float8": 1.0, "packed": 1e-4}


@pytest.fixture(scope="module")
def facts(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the script in ComfyUI's process and return its facts."""
    return json.loads(run_inside(runtime, "low_memory.py", tmp_path_factory.mktemp("low")).splitlines()[-1])


def falls(losses: list[float]) -> bool:
    """Return whether the last third of the losses is below the first."""
    third = len(losses) // 3
    return sum(losses[-third:]) < 0.95 * sum(losses[:third])


@pytest.mark.parametrize("kind", LOADED)
def test_a_compact_base_trains_and_keeps_its_bits(facts: dict[str, Any], kind: str) -> None:
    found = facts[kind]
    assert falls(found["losses"])
    assert found["unchanged"]
    assert f"matched: {found['layers']}/{found['layers']}" in found["report"]
    assert found["changed"] > 1e-2
    assert found["loaded"] < LOADED[kind]


@pytest.mark.parametrize("kind", LOADED)
def test_a_compact_base_is_known_again_and_its_patches_make_another_run(facts: dict[str, Any], kind: str) -> None:
    assert facts[kind]["resumed"]
    assert facts[kind]["runs"] == 2


def test_lowvram_loads_the_whole_model(facts: dict[str, Any]) -> None:
    assert falls(facts["flags"]["lowvram"])
    assert facts["flags"]["unchanged"]


def test_novram_is_refused_with_what_to_do(facts: dict[str, Any]) -> None:
    said = facts["flags"]["novram"]
    assert "ComfyUI keeps weights of this model outside the GPU's memory" in said
    assert "Start ComfyUI without --novram" in said
