"""Compare FID's Inception with torch-fidelity's; check that nothing is unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.metrics.inception import URL, load_inception
from flash_diffusion.trainer.metrics.published_weights import hub_file, read_tensors

from .stand_ins import inception_file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up weights of the true shapes."""
    return inception_file(tmp_path_factory.mktemp("inception") / "inception.pth")


def waves() -> torch.Tensor:
    """Two pictures (2, 3, 299, 299), whole numbers 0..255."""
    y, x = torch.meshgrid(torch.arange(299.0), torch.arange(299.0), indexing="ij")
    picture = torch.stack([128 + 100 * torch.sin(x / (5 + channel) + y * channel / 11) for channel in range(3)])
    return torch.stack([picture, 255 - picture.flip(1)]).round().clamp(0, 255)


def test_features_equal_torch_fidelitys_features(file: Path) -> None:
    # What torch-fidelity 0.4.0's network (as torchmetrics 1.9.0 runs it, NoTrainInceptionV3) makes of the same weights
    # and pictures on torch 2.13.0; every 300th feature, mean and standard deviation.
    network, _ = load_inception(file, "cpu")
    features = network(waves())
    assert features.shape == (2, 2048)
    expected = torch.tensor(
        [
            [4.976157, 0.0, 8.222361, 0.0, 2.465869, 5.565604, 9.685124],
            [4.861207, 0.0, 8.141464, 0.0, 2.595331, 5.162302, 8.938857],
        ]
    )
    torch.testing.assert_close(features[:, ::300], expected, rtol=1e-4, atol=1e-4)
    assert features.mean().item() == pytest.approx(3.8817801, rel=1e-4)
    assert features.std().item() == pytest.approx(5.3386536, rel=1e-4)
    assert not any(value.requires_grad for value in network.parameters())
    assert not network.training


def test_safetensors_file_gives_the_same_network(file: Path, tmp_path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in read_tensors(file).items() if not name.startswith("fc.")}
    save_file(tensors, tmp_path / "inception.safetensors")
    network, digest = load_inception(tmp_path / "inception.safetensors", "cpu")
    other, other_digest = load_inception(file, "cpu")
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert digest != other_digest


def test_weights_of_another_network_are_refused(file: Path, tmp_path: Path) -> None:
    tensors = dict(read_tensors(file))
    path = tmp_path / "torchvision.pth"
    torch.save({**tensors, "AuxLogits.conv0.conv.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="1 tensors differ, such as AuxLogits.conv0.conv.weight"):
        load_inception(path, "cpu")
    torch.save({**tensors, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(UserError, match="torchvision's Inception v3 is another network"):
        load_inception(path, "cpu")


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    went_off = tmp_path / "went-off"
    torch.save({"a": Bomb(went_off)}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(went_off), protocol=2))
    for name in ("torch.pth", "plain.pth"):
        with pytest.raises(UserError, match=f"{name} can't be read as tensors by name"):
            read_tensors(tmp_path / name)
    assert not went_off.exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x00" * 100])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_file_error_names_the_file(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"weights{suffix} can't be read"):
        read_tensors(path)


def test_file_without_named_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    for name in ("list.pth", "numbers.pth"):
        with pytest.raises(UserError, match="does not hold tensors by name"):
            read_tensors(tmp_path / name)


def test_published_files_are_found_in_the_hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def refuse(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match="can't be downloaded .no network.; download it on another machine"):
        hub_file(URL)
    assert asked == [(URL, "6726825d")]
    there = tmp_path / "hub" / "checkpoints" / URL.rsplit("/", 1)[1]
    there.write_bytes(b"x")
    assert hub_file(URL) == there
    assert len(asked) == 1
