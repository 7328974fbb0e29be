"""Translations: complete, in step with the nodes' own strings, and served by ComfyUI."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from .client import Client
from .runtime import load_script

pytestmark = pytest.mark.comfy

LANGUAGES = ["de", "es", "fr", "ja", "ko", "ru", "zh", "zh-TW"]


@pytest.fixture(scope="module")
def locales(runtime: ModuleType) -> ModuleType:
    """Import ``scripts/locales.py``."""
    return load_script("locales")


def test_every_language_has_every_string_with_its_numbers_and_names(locales: ModuleType, client: Client) -> None:
    assert locales.languages() == LANGUAGES
    assert locales.problems(client.object_info()) == []


def test_comfyui_serves_each_language_and_we_change_no_name_of_its_own(locales: ModuleType, server) -> None:
    served = json.loads(server.get("/i18n"))
    for language in [*LANGUAGES, "en"]:
        assert set(served[language]) == {"nodeDefs"}  # a shared name, such as a category's, would change for all nodes
        ours = {node: strings for node, strings in served[language]["nodeDefs"].items() if node.startswith("Flash")}
        assert ours == locales.read(language)


def without_tooltip(said: dict[str, Any]) -> None:
    del said["FlashSampler"]["inputs"]["seed"]["tooltip"]


def of_no_node(said: dict[str, Any]) -> None:
    said["FlashSampler"]["inputs"]["cfg"] = {"name": "cfg"}


def one_name_for_two(said: dict[str, Any]) -> None:
    said["FlashSampler"]["inputs"]["steps"]["name"] = said["FlashSampler"]["inputs"]["seed"]["name"]


def another_number(said: dict[str, Any]) -> None:
    strings = said["FlashSampler"]["inputs"]["timesteps"]
    strings["tooltip"] = strings["tooltip"].replace("249", "259")


def another_name_of_an_input(said: dict[str, Any]) -> None:
    said["FlashSampler"]["inputs"]["timesteps"]["name"] = "Zeiten"


def another_name_of_a_node(said: dict[str, Any]) -> None:
    said["FlashSaveLora"]["display_name"] = "Flash LoRA behalten"


def the_pages_own_syntax(said: dict[str, Any]) -> None:
    said["FlashSampler"]["description"] += " {Flash | LCM}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_tooltip, "FlashSampler.inputs.seed.tooltip is missing; English: The same seed gives"),
        (of_no_node, "FlashSampler.inputs.cfg.name belongs to no node"),
        (one_name_for_two, "FlashSampler has two inputs of the name 'Seed'"),
        (another_number, "FlashSampler.inputs.timesteps.tooltip has the numbers"),
        (another_name_of_an_input, "FlashSampler.inputs.grid.tooltip does not name timesteps (Zeiten)"),
        (another_name_of_a_node, "FlashDistill.outputs.1.tooltip does not name Flash Save LoRA (Flash LoRA behalten)"),
        (the_pages_own_syntax, "FlashSampler.description is empty or holds one of"),
    ],
)
def test_a_fault_is_named(
    locales: ModuleType, client: Client, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    wanted = locales.english(client.object_info())
    said = copy.deepcopy(locales.read("de"))
    change(said)
    found = [*locales.name_problems("de", said, wanted)] or [*locales.text_problems("de", said, wanted)]
    assert any(words in line for line in found), found


def test_a_changed_english_text_makes_its_translations_stale(locales: ModuleType, client: Client) -> None:
    wanted = locales.english(client.object_info())
    wanted["FlashSampler"]["description"] = "Sample."
    (line,) = locales.stale("ja", wanted)
    assert "ja: the English text of FlashSampler is not the one that was translated" in line
