"""A base that waits in the computer's memory: the same bits, fewer bytes on the device, and nothing left behind."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from flash_diffusion.trainer.config import ModelSection, Recipe, parse_recipe
from flash_diffusion.trainer.distill.assembly import assemble
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.distill.plan import print_plan
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.rehearse.cost import cost_of
from flash_diffusion.trainer.rehearse.gpus import BUS, GPUS
from flash_diffusion.trainer.rehearse.meter import FETCHED
from flash_diffusion.trainer.rehearse.pretend.fakes import PRETEND_DEVICE
from flash_diffusion.trainer.rehearse.walk import rehearse
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.in_memory.compact import Stored, store_compactly
from flash_diffusion.trainer.teachers.in_memory.courier import Courier
from flash_diffusion.trainer.teachers.in_memory.waiting import keep_off_device, waiting_weights

CPU = torch.device("cpu")


def waiting(content: dict[str, Any], **fields: Any) -> Recipe:
    """The recipe with a base that waits."""
    memory = {**content.get("memory", {}), "base": "cpu"}
    return parse_recipe({**content, "memory": memory, **fields})


class Counting(Courier):
    """Notes the bytes of each copy."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.copies: list[int] = []

    def _copy(self, here: Tensor | None, waiting: Tensor | None) -> None:
        super()._copy(here, waiting)
        if waiting is not None:
            self.copies.append(waiting.nbytes)


def test_a_run_has_the_same_bits(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    """LoRA and previews, with a critic, and with blocks that are computed again; a preview between two updates."""
    recipe_content["method"]["fake_score"] = "critic"
    recipe_content["phases"] = [{**recipe_content["phases"][1], "updates": 2}]
    recipe_content["gradient_checkpointing"] = True
    recipe_content["preview"]["every"] = 1
    plain, away = parse_recipe(recipe_content), waiting(recipe_content)
    assert plain.digest() == away.digest()
    files = [distil(recipe, tmp_path / name) for name, recipe in (("plain", plain), ("away", away))]
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())
    previews = [sorted((tmp_path / name / "previews").iterdir()) for name in ("plain", "away")]
    assert len(previews[0]) == 2
    assert [file.read_bytes() for file in previews[0]] == [file.read_bytes() for file in previews[1]]


@pytest.mark.parametrize(("family", "storage"), [("sdxl", "int8"), ("pixart_alpha", None), ("sd35", "nf4")])
def test_outputs_and_gradients_of_every_kind_of_network(
    models: Callable[[str], Path], family: str, storage: str | None
) -> None:
    section = ModelSection(family=family, path=str(models(family)), storage=storage)
    results, hashes = [], []
    for away in (False, True):
        teacher = load_teacher(section)
        if away:
            keep_off_device(teacher.denoiser.network, Courier(CPU))
        teacher.denoiser.add_adapter("student", 4, 4, teacher.default_targets)
        adapter = teacher.denoiser.adapter_parameters("student")
        for name, value in adapter.items():
            nn.init.normal_(value, generator=torch.Generator().manual_seed(len(name)))
        z = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        with teacher.denoiser.role("student"):
            out = teacher.denoiser.predict(z, torch.full((2,), 500), teacher.unconditional(2))
            gradients = torch.autograd.grad(out.square().sum(), list(adapter.values()))
        results.append([out, *gradients])
        hashes.append(teacher.weights_hash())
    assert hashes[0] == hashes[1]  # the same teacher
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def blocks(storage: str | None = None) -> tuple[nn.Module, Counting]:
    """Four layers whose weights wait, and the courier that counts what it copies."""
    network, courier = nn.Module(), Counting()
    network.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    if storage is not None:
        store_compactly(network, storage)
    keep_off_device(network, courier)
    return network, courier


def test_the_next_weight_is_sent_for_once_and_a_wrong_guess_changes_no_value() -> None:
    network, courier = blocks()
    plain = [nn.functional.linear for _ in network.blocks]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

    def walk(order: list[int]) -> None:
        found = expected = x
        for index in order:
            layer = network.blocks[index]
            found, expected = layer(found), plain[index](expected, layer.weight, layer.bias)
        assert torch.equal(found, expected)

    walk([0, 1, 2, 3])
    assert len(courier.copies) == 4  # nothing is known yet
    walk([0, 1, 2, 3])
    assert len(courier.copies) == 9  # each once, and the first again, for the pass that may come
    walk([0, 1, 2, 3])
    assert len(courier.copies) == 13
    walk([3, 1, 0])
    assert len(courier.copies) == 13 + 6  # three that were not sent for, and three guesses: 0, 2 and 1


def test_forward_and_backward_passes_are_foreseen_apart() -> None:
    network, courier = blocks()
    for _ in range(3):
        courier.copies.clear()
        found = torch.ones(1, 8, requires_grad=True)
        for layer in network.blocks:
            found = layer(found)
        found.sum().backward()
    assert len(courier.copies) == 2 * 4  # nothing was copied in vain


def test_the_device_waits_for_a_weight_that_was_sent_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its memory would be given to others while it is still being filled. Stand-ins for CUDA's streams."""
    told: list[str] = []
    main = SimpleNamespace(wait_event=lambda event: told.append(f"main waits for {event}"))
    side = SimpleNamespace(wait_stream=lambda _: told.append("side waits for main"), record_event=lambda: "the copy")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    network, courier = blocks()
    courier._stream = side
    for index in (0, 1, 0, 2):  # after the second 0 layer 1 is sent for, and layer 2 asked
        network.blocks[index](torch.randn(1, 8))
    assert told == ["side waits for main", "main waits for the copy"]


def test_bytes_in_few_bits_are_what_is_copied() -> None:
    network, courier = blocks("int8")
    network.blocks[0](torch.randn(1, 8))
    assert courier.copies == [64, 8 * 4]  # a byte for each value, a factor for each row
    assert [value.nbytes for value in waiting_weights(network)] == courier.copies * 4


def test_moving_a_network_leaves_its_waiting_weights_and_adapters_follow_the_device(
    models: Callable[[str], Path],
) -> None:
    """The meta device stands for a GPU."""
    teacher = load_teacher(ModelSection(family="sdxl", path=str(models("sdxl")), storage="int8"))
    network = teacher.denoiser.network
    keep_off_device(network, Courier(CPU))
    away = {id(value) for value in waiting_weights(network)}
    nn.Module.to(network, "meta")
    teacher.denoiser.add_adapter("student", 4, 4, teacher.default_targets)
    here = {name: value.is_meta for name, value in network.named_parameters() if id(value) not in away}
    assert all(here.values())
    assert any(".lora_" in name for name in here)
    waits = [value for value in network.parameters() if id(value) in away]
    assert len(waits) == len(away) > 10
    assert not any(value.is_meta for value in waits)


def test_a_run_keeps_the_blocks_away(recipe_content: dict[str, Any]) -> None:
    parts = assemble(waiting(recipe_content), Accelerator())
    layers = [layer for layer in parts.teacher.denoiser.network.modules() if isinstance(layer, Stored)]
    assert layers
    assert all(layer.courier is not None for layer in layers)


def test_a_rehearsal_counts_what_stays_and_what_crosses_the_bus(recipe_content: dict[str, Any]) -> None:
    recipe_content["phases"] = [{"name": "one", "updates": 10, "modes": [1, 0, 0, 0]}]
    recipe_content["method"] |= {"guidance": [2.0, 2.0]}
    away = waiting(recipe_content)
    made = rehearse(away, PRETEND_DEVICE)
    assert made.waits == {}
    network = load_teacher(away.model).denoiser.network
    whole = sum(value.nbytes for value in [*network.parameters(), *network.buffers()])
    assert made.waiting + made.parts["base"] == whole
    assert made.parts["base"] < 0.2 * whole
    assert 0 < made.moments["student"].parts[FETCHED] < 0.2 * made.waiting  # two layers of many
    # A guided call for each step of the teacher, mostly 4; the student's forward pass and most of its backward pass.
    assert 4.5 < made.phases[0].crossed / made.waiting < 6.2
    cost = cost_of(made, GPUS["4090"], 1.0)
    assert cost.bound == "bus"
    assert cost.hours == pytest.approx(10 * made.phases[0].crossed / (BUS * 1e9) / 3600)


def test_a_rehearsal_finds_a_weight_that_is_not_fetched(
    recipe_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Courier, "fetch", lambda self, who, backward, *tensors: list(tensors))
    with pytest.raises(UserError, match=r"tensors of two devices, cpu and meta"):
        rehearse(waiting(recipe_content), PRETEND_DEVICE)


def test_the_plan_tells_what_waits(recipe_content: dict[str, Any]) -> None:
    text = io.StringIO()
    print_plan(waiting(recipe_content), Console(file=text, width=200))
    assert "what stays of the base in float32" in text.getvalue()
    assert "of the base wait in the computer's memory" in text.getvalue()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sharding": "base"}, r"nor moved off the device; leave out .* memory\.base, or set sharding to none"),
        ({"speed": {"compile": "blocks"}}, r"memory\.base cpu: .* leave out speed\.compile"),
    ],
)
def test_what_does_not_go_together_is_refused(
    recipe_content: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        waiting(recipe_content, **fields)
