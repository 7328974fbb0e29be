"""The benchmark of training speed runs, and counts what is known of the true sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path) -> str:
    """``python -m benchmarks.train_speed`` in a clone."""
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_speed", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_reduced_family_is_measured_on_any_device(tmp_path: Path, family: str) -> None:
    output = tmp_path / "results" / "table.md"
    text = run("--family", family, "--tiny", "--batch", "1", "--updates", "1", "--output", output)
    rows = [line.split("|") for line in output.read_text().splitlines() if line.startswith("| 1 |")]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [("1", "off"), ("1", "on")]
    assert all(float(row[3]) > 0 for row in rows)
    assert "threads" in text or "GiB;" in text
    assert output.read_text() == text


def test_full_sizes_equal_the_published_parameter_counts() -> None:
    """The paper's LoRA (arXiv 2406.02347, section 5) on SDXL's published UNet."""
    text = run("--family", "sdxl", "--estimate")
    assert "2,567.5 M" in text
    assert "LoRA of rank 64, 92.9 M" in text
