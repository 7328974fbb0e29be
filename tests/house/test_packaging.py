"""Check the package outside ComfyUI: in a clone, installed, as a wheel, for the Comfy registry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

import flash_diffusion
from flash_diffusion.trainer.needs import NEEDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command without PYTHONPATH and return its output."""
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
    """Build a wheel from the files that git knows. Other files of the clone can't make it work."""
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
    rooms = ("flash_core", "nodes", "trainer", "workflows", "subgraphs", "web", "locales")
    wanted = [
        path.relative_to(ROOT)
        for room in rooms
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    missing = [str(path) for path in wanted if f"flash_diffusion/{path.as_posix()}" not in names]
    assert not missing


def registry_files() -> set[str]:
    """Return the files of the Comfy registry's package: git's files without those that .comfyignore names."""
    known = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    ignored = ("git", "ls-files", "-z", "--cached", "--others", "--ignored", "--exclude-from=.comfyignore")
    files = [set(filter(None, run(*command, cwd=ROOT).split("\0"))) for command in (known, ignored)]
    return {name for name in files[0] - files[1] if (ROOT / name).is_file()}


def test_the_registry_package_holds_the_rooms_and_nothing_else() -> None:
    files = registry_files()
    top = {name.split("/")[0] for name in files}
    assert {
        "nodes",
        "flash_core",
        "trainer",
        "workflows",
        "web",
        "locales",
        "__init__.py",
        "pyproject.toml",
        "LICENSE",
    } <= top
    assert not top & {"tests", "benchmarks", "scripts", "docs", ".github", ".ci", "Makefile"}
    rooms = ("flash_core", "nodes", "trainer", "workflows", "subgraphs", "web", "locales")
    for room in rooms:
        inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / room).rglob("*") if path.is_file()}
        assert not {name for name in inside - files if "__pycache__" not in name}


def test_the_registry_images_are_in_the_repository() -> None:
    project = read_toml()
    address = project["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    for key, size in (("Icon", (400, 400)), ("Banner", (1400, 600))):
        link = project["tool"]["comfy"][key]
        assert link.startswith(address)
        file = ROOT / link.removeprefix(address)
        assert file.stat().st_size < 150_000
        with Image.open(file) as picture:
            assert picture.size == size


def read_toml() -> dict[str, Any]:
    """Return pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = read_toml()["project"]
    oldest: dict[str, Version] = {}
    assert sorted(NEEDS.values()) == sorted(project["optional-dependencies"]["trainer"])
    for line in project["dependencies"] + project["optional-dependencies"]["trainer"]:
        requirement = Requirement(line)
        (bound,) = (Version(one.version) for one in requirement.specifier if one.operator == ">=")
        oldest[requirement.name] = max(bound, oldest.get(requirement.name, bound))
    pinned = {}
    for line in (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pinned[name] = Version(version)
    assert pinned == oldest


def test_the_tested_versions_are_in_the_ranges() -> None:
    ranges = {one.name: one for one in map(Requirement, read_toml()["project"]["optional-dependencies"]["trainer"])}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert ranges[name].specifier.contains(version)


def test_the_version_is_said_the_same_everywhere() -> None:
    version = read_toml()["project"]["version"]
    assert flash_diffusion.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_python_versions_are_said_the_same_everywhere() -> None:
    classifiers = read_toml()["project"]["classifiers"]
    minors = [text.rsplit(".", 1)[1] for text in classifiers if text.startswith("Programming Language :: Python :: 3.")]
    assert read_toml()["project"]["requires-python"] == f">=3.{minors[0]}"
    words = f"Python 3.{minors[0]}-3.{minors[-1]}"
    for name in ("README.md", "CONTRIBUTING.md", "Makefile"):
        said = re.findall(r"Python 3\.\d+-3\.\d+", (ROOT / name).read_text(encoding="utf-8"))
        assert said
        assert set(said) == {words}, name
    matrix = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert all(f'python: "3.{minor}"' in matrix for minor in minors)
