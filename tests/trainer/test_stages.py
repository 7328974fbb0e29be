"""Encoders, VAE and network are on the device one after the other, and nothing but memory changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher
from flash_diffusion.trainer.teachers.in_memory.stages import Stages


def test_parts_of_a_stage_are_on_its_device_and_others_are_not() -> None:
    """The meta device stands for a GPU."""
    groups = {name: [nn.Linear(2, 2)] for name in ("text", "pictures", "network")}
    stages = Stages(torch.device("meta"), groups)

    def here() -> set[str]:
        return {name for name, (module,) in groups.items() if module.weight.is_meta}

    stages.enter("text")
    assert here() == set()  # not begun: all stay where they are
    stages.begin()
    stages.enter("text")
    assert here() == {"text"}
    for module in groups.values():  # a real device would keep the values that meta drops
        module[0] = nn.Linear(2, 2)
    stages = Stages(torch.device("meta"), groups)
    stages.begin()
    with torch.inference_mode():
        stages.enter("network")
    assert here() == {"network"}
    assert not groups["network"][0].weight.is_inference()
    stages.enter("network")
    stages.end()
    assert here() == {"text", "pictures", "network"}


@contextmanager
def called(teacher: Teacher) -> Iterator[list[tuple[str, set[str]]]]:
    """Note each call of an encoder, the VAE or the network with the groups that were on the device."""
    found: list[tuple[str, set[str]]] = []
    stages = teacher.stages
    watched = {
        "text": teacher.pipeline.text_encoder,
        "pictures": teacher.vae.encoder,
        "network": teacher.denoiser.network,
    }

    def note(name: str) -> Any:
        return lambda *_: found.append((name, set(stages._here)))

    handles = [module.register_forward_pre_hook(note(name)) for name, module in watched.items()]
    yield found
    for handle in handles:
        handle.remove()


def test_encoding_in_stages_gives_the_same_bits(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(recipe_content)
    batches = []
    for staged in (True, False):
        teacher = load_teacher(recipe.model, staged=staged)
        data = recipe.data.model_copy(update={"cache": str(tmp_path / str(staged))})
        with called(teacher) as calls:
            examples = prepare_examples(data, teacher, build_task(recipe.task))
        assert {name for name, _ in calls} == {"text", "pictures"}
        assert not staged or all(here == {name} for name, here in calls)
        batches.append(examples.batch(torch.arange(6), "cpu"))
    (first, text), (second, same_text) = batches
    assert torch.equal(first, second)
    assert torch.equal(text.cross_attention, same_text.cross_attention)


def test_prompts_are_solved_with_the_network_alone(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\na green box\n")
    recipe_content["data"] = {"source": "prompts", "path": str(prompts), "cache": str(tmp_path / "cache")}
    recipe = parse_recipe(recipe_content)
    teacher = load_teacher(recipe.model, staged=True)
    with called(teacher) as calls:
        prepare_examples(recipe.data, teacher, build_task(recipe.task), method=recipe.method)
    assert {name for name, _ in calls} == {"text", "network"}
    assert all(here == {name} for name, here in calls)


def read_header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_offloading_changes_no_bit_of_the_lora_and_no_preview(
    recipe_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    move = Stages._move
    monkeypatch.setattr(
        Stages,
        "_move",
        lambda self, name, *, away: (moves.append(f"{name} {'off' if away else 'on'}"), move(self, name, away=away)),
    )
    plain = distil(parse_recipe(recipe_content), tmp_path / "plain")
    before = len(moves)
    offloaded = distil(parse_recipe({**recipe_content, "memory": {"offload": True}}), tmp_path / "offloaded")
    tensors, metadata = ([read(file) for file in (plain, offloaded)] for read in (load_file, read_header))
    assert all(torch.equal(tensors[1][name], value) for name, value in tensors[0].items())
    assert metadata[0] == metadata[1]
    pictures = [sorted((tmp_path / name / "previews").iterdir()) for name in ("plain", "offloaded")]
    assert [file.read_bytes() for file in pictures[0]] == [file.read_bytes() for file in pictures[1]]
    # After the last caption: the network trains alone; teacher's and student's picture each send it away and back.
    trained = moves[before:][len(moves[before:]) - 1 - moves[before:][::-1].index("text off") :]
    drawn = ["network off", "pictures on", "pictures off", "network on"]
    assert trained == ["text off", "network on", *drawn, *drawn]


@pytest.mark.parametrize("fields", [{"data": {"stream": True}}, {"method": {"distillation": "lpips"}}])
def test_offloading_what_every_update_asks_is_refused(recipe_content: dict[str, Any], fields: dict[str, Any]) -> None:
    content = {**recipe_content, "memory": {"offload": True}}
    for section, values in fields.items():
        content[section] = {**content[section], **values}
    with pytest.raises(UserError, match=r"memory\.offload moves the VAE off the device, and .* every batch"):
        parse_recipe(content)


def test_large_pictures_reach_the_vae_one_by_one(tiny_model: Path, recipe_content: dict[str, Any]) -> None:
    teacher = load_teacher(parse_recipe(recipe_content).model)
    sizes: list[tuple[int, ...]] = []
    teacher.vae.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        shown = torch.rand(3, 3, 1024, 768) * 2 - 1
        together = teacher.encode(shown)
        assert sizes == [(1, 3, 1024, 768)] * 3
        torch.testing.assert_close(together[1:2], teacher.encode(shown[1:2]))
        sizes.clear()
        teacher.encode(shown[:, :, :64, :64])
    assert sizes == [(3, 3, 64, 64)]
