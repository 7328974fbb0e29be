"""The Hub that can't be reached: our sentence at once, in place of the libraries' retries; the cache is still read."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.loading.hub import why_offline

from ..families.pipelines import save_pipeline

CALLS = (load_teacher, outline_teacher)


@pytest.fixture
def closed_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub on a port that nobody listens to; collects the requests that huggingface_hub makes in spite of it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    requests: list[str] = []

    def request(*arguments: object, **_: object) -> None:
        requests.append(str(arguments))
        raise OSError("no request is expected")

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", request)
    why_offline.cache_clear()
    yield requests
    why_offline.cache_clear()


@pytest.mark.parametrize("call", CALLS)
def test_a_closed_hub_raises_a_readable_error_at_once(
    call: object, closed_hub: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as caught:
        call(ModelSection(family="sd15", path="owner/model"))  # type: ignore[operator]
    message = str(caught.value)
    assert message.startswith("model.path: owner/model is a Hub name, the Hub can't be reached (http://127.0.0.1:")
    assert "set model.path to a diffusers folder" in message
    assert not closed_hub
    assert not caplog.records


def test_a_cached_model_loads_without_the_hub(
    closed_hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--model" / "snapshots" / ("0" * 40)
    save_pipeline("sd15", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.constants.HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(name, str(cache))
    for module in ("diffusers.configuration_utils", "diffusers.pipelines.pipeline_utils", "diffusers.utils.hub_utils"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache), raising=False)
    assert huggingface_hub.try_to_load_from_cache("owner/model", "model_index.json", cache_dir=cache)
    teacher = load_teacher(ModelSection(family="sd15", path="owner/model"))
    assert teacher.name == "model"
    assert not closed_hub


def test_a_control_on_a_closed_hub_raises_a_readable_error_at_once(closed_hub: list[str], tmp_path: Path) -> None:
    folder = save_pipeline("sd15", tmp_path / "model")
    model = {"family": "sd15", "path": str(folder), "control": {"path": "owner/control"}}
    for call in CALLS:
        with pytest.raises(
            UserError, match=r"model\.control\.path: owner/control is a Hub name, the Hub can't be reached"
        ):
            call(ModelSection.model_validate(model))
    adapter = {"path": "owner/ip", "weight_name": "ip.safetensors", "image_encoder": "owner/encoder"}
    model = {"family": "sd15", "path": str(folder), "image_adapter": adapter}
    for call in CALLS:
        with pytest.raises(
            UserError, match=r"model\.image_adapter: owner/ip is no folder, and ip\.safetensors can't be"
        ):
            call(ModelSection.model_validate(model))
    assert not closed_hub
