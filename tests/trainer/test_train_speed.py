"""The benchmark of training speed runs, and counts what is known of the true sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flash_diffusion.benchmarks import train_speed

ROOT = Path(__file__).resolve().parents[2]


def in_a_clone(arguments: list[str]) -> str:
    """``python -m benchmarks.train_speed``."""
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_speed", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """The same in this process."""
    monkeypatch.syspath_prepend(ROOT)

    def run(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["train_speed", *arguments])
        train_speed.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("family", "alone"), [("sdxl", True), ("sd3", False)])
def test_a_reduced_family_is_measured_on_any_device(
    here: Callable[[list[str]], str], tmp_path: Path, family: str, alone: bool
) -> None:
    output = tmp_path / "results" / "table.md"
    arguments = ["--family", family, "--tiny", "--batch", "1", "--updates", "1", "--output", str(output)]
    text = in_a_clone(arguments) if alone else here(arguments)
    rows = [line.split("|") for line in output.read_text().splitlines() if line.startswith("| 1 |")]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [("1", "off"), ("1", "on")]
    assert all(float(row[3]) > 0 for row in rows)
    assert "threads" in text or "GiB;" in text
    assert output.read_text() == text


def test_full_sizes_equal_the_published_parameter_counts(here: Callable[[list[str]], str]) -> None:
    """The paper's LoRA (arXiv 2406.02347, section 5) on SDXL's published UNet."""
    text = here(["--family", "sdxl", "--estimate"])
    assert "2,567.5 M" in text
    assert "LoRA of rank 64, 92.9 M" in text
