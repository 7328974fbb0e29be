"""Compare LPIPS with torchmetrics', and distil with LPIPS from the recipe to the LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.metrics.lpips import GROUPS, URL, Lpips, lpips

from ..comfy.runtime import load_runtime


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VGG-16 in torchvision's names, its classifier left out."""
    torch.manual_seed(0)
    tensors, index, channels = {}, 0, 3
    for group in GROUPS:
        for out in group:
            layer = nn.Conv2d(channels, out, 3)
            tensors |= {f"features.{index}.weight": layer.weight.data, f"features.{index}.bias": layer.bias.data}
            channels, index = out, index + 2  # a ReLU follows each, a pooling each group
        index += 1
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(tensors, path)
    return path


THEIRS = """
import sys, torch, torchvision
from torchmetrics.functional.image.lpips import _LPIPS

folder = sys.argv[1]
network = _LPIPS(net="vgg", pnet_rand=True)  # LPIPS' own weights, and VGG's from the file
vgg = torchvision.models.vgg16(weights=None).features
vgg.load_state_dict({name[9:]: value for name, value in torch.load(sys.argv[2], weights_only=True).items()})
parts = [part for slice in (1, 2, 3, 4, 5) for part in getattr(network.net, f"slice{slice}")]
for part, layer in zip(parts, vgg):
    part.load_state_dict(layer.state_dict())
pictures = torch.load(f"{folder}/pictures.pt", weights_only=True).requires_grad_()
distance = network(pictures[:2], pictures[2:]).flatten()
(gradient,) = torch.autograd.grad(distance.sum(), pictures)
torch.save({"distance": distance.detach(), "gradient": gradient}, f"{folder}/theirs.pt")
"""


def test_lpips_equals_torchmetrics_lpips(vgg: Path, tmp_path: Path) -> None:
    # Theirs needs torchvision, which is not in the trainer's environment: in a process that has ComfyUI's.
    runtime = load_runtime()
    environment = {**runtime.environment(), "OMP_NUM_THREADS": "1"}
    pictures = torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.save(pictures, tmp_path / "pictures.pt")
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, str(tmp_path), str(vgg)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named 'torchvision'" in done.stderr:
        pytest.skip("torchvision is not there; `make runtime` fetches it")
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    distance = lpips(torch.device("cpu"), vgg)
    pictures.requires_grad_()
    ours = distance(pictures[:2], pictures[2:])
    torch.testing.assert_close(ours, theirs["distance"], rtol=1e-4, atol=1e-7)
    (gradient,) = torch.autograd.grad(ours.sum(), pictures)
    torch.testing.assert_close(gradient, theirs["gradient"], rtol=1e-3, atol=1e-8)


def test_lpips_is_zero_for_equal_pictures_symmetric_and_grows(vgg: Path) -> None:
    distance = lpips(torch.device("cpu"), vgg)
    source = torch.Generator().manual_seed(2)
    pictures = torch.rand(2, 3, 32, 32, generator=source) - 0.5
    noise = torch.randn(pictures.shape, generator=source)
    assert distance(pictures, pictures).tolist() == [0, 0]
    near, far = distance(pictures, pictures + 0.02 * noise), distance(pictures, pictures + 0.3 * noise)
    assert bool((near > 0).all())
    assert bool((near < far).all())
    torch.testing.assert_close(distance(pictures + 0.3 * noise, pictures), far)
    torch.testing.assert_close(distance(5 * pictures, pictures), distance((5 * pictures).clamp(-1, 1), pictures))
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(flat, pictures[:1]).sum().backward()
    assert bool(flat.grad.isfinite().all())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "alexnet.pth")
    with pytest.raises(UserError, match="does not hold VGG-16's weights"):
        lpips(torch.device("cpu"), tmp_path / "alexnet.pth")


def test_recipe_distils_with_lpips(
    recipe_content: dict[str, Any], vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "home" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / URL.rsplit("/", 1)[1]).symlink_to(vgg)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    seen = []
    forward = Lpips.forward

    def watch(self: Lpips, images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        value = forward(self, images, reference)
        seen.append((tuple(images.shape), float(value.detach().mean())))
        return value

    monkeypatch.setattr(Lpips, "forward", watch)
    recipe_content["method"] |= {"distillation": "lpips", "perceptual_crop": 4}
    recipe_content["phases"] = recipe_content["phases"][:1]
    path = distil(parse_recipe(recipe_content), tmp_path / "run")
    assert path.is_file()
    assert [shape for shape, _ in seen] == [(2, 3, 32, 32)] * 2  # 4 latent pixels are 32
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [line["distillation"] for line in lines if "distillation" in line]
    assert logged == pytest.approx([value for _, value in seen], rel=1e-4)
