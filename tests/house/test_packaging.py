"""The lives of the package outside ComfyUI: a clone, an editable install, a wheel. (ComfyUI's is in tests/comfy.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command apart from the clone's own import path; its output."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_python_m_trainer_runs_in_a_clone(tmp_path: Path) -> None:
    # A link under another name: a clone may have any folder name, and an installed copy must not take its place.
    clone = tmp_path / "some-folder"
    clone.symlink_to(ROOT)
    assert "distill" in run(sys.executable, "-m", "trainer", "--help", cwd=clone)


def test_the_command_is_installed(tmp_path: Path) -> None:
    assert "distill" in run(str(Path(sys.executable).with_name("flash-diffusion")), "--help", cwd=tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the files that git tracks, so that leftovers of the clone can't make it work."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(folder), str(source)),
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_runs_without_the_clone(wheel: Path, tmp_path: Path) -> None:
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
        cwd=tmp_path,
    )
    code = (
        "import sys, flash_diffusion; print(flash_diffusion.__file__); "
        "from flash_diffusion.trainer.cli import main; sys.exit(main(['--help']))"
    )
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert output.splitlines()[0].startswith(str(tmp_path / "site"))
    assert "distill" in output


def test_the_wheel_holds_every_module_and_every_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    rooms = ("flash_core", "nodes", "trainer", "workflows", "web")
    wanted = [
        path.relative_to(ROOT)
        for room in rooms
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    missing = [str(path) for path in wanted if f"flash_diffusion/{path.as_posix()}" not in names]
    assert not missing
