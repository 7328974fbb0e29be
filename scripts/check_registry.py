"""Check the package for the Comfy registry with public tools. Their Python environment is .runtime/checkers.

python scripts/check_registry.py

comfy node validate   the registry's own check of pyproject.toml and of dangerous code (comfy-cli)
comfy node pack       the same tool's archive: must hold help pages and translations, and no tests
comfy-test lint       no text that a Windows console cannot print
comfy-lint --strict   the demo's workflows against the nodes of a running ComfyUI
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import comfy_runtime

ROOT = comfy_runtime.ROOT
CHECKERS = comfy_runtime.RUNTIME / "checkers"
PROGRAMS = "Scripts" if os.name == "nt" else "bin"
TOOLS = ("comfy-cli==1.23.0", "comfy-lint==0.1.0")
WORKFLOWS = ROOT / "tests" / "comfy" / "workflows"
IN_PACKAGE = (
    "pyproject.toml",
    "nodes/__init__.py",
    "locales/zh/nodeDefs.json",
    "web/docs/FlashSampler.md",
    "workflows/flash_demo_compare.json",
)
NOT_IN_PACKAGE = ("tests/", "benchmarks/", "scripts/", ".github/", "docs/")


def install() -> None:
    """Make the tools' environment, if it is not complete."""
    stamp = CHECKERS / "installed.txt"
    if stamp.is_file() and stamp.read_text() == "\n".join(TOOLS):
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(CHECKERS)], check=True)
    command = [str(program("python")), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS]
    subprocess.run(command, check=True)
    stamp.write_text("\n".join(TOOLS))


def program(name: str) -> Path:
    """Return the path of a program in the tools' environment."""
    return CHECKERS / PROGRAMS / name


def check(title: str, *command: str | Path, cwd: Path) -> bool:
    """Run a tool, its output visible; return True if it is content."""
    print(f"== {title}", flush=True)  # noqa: T201
    environment = os.environ | {
        "PYTHONUTF8": "1",
        "PATH": f"{program('python').parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=False).returncode == 0


def clone(folder: Path) -> None:
    """Copy the files that git knows, as they are now, into a new repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for command in (("init", "--quiet"), ("add", "--all")):
        subprocess.run(["git", *command], cwd=folder, check=True)


def wrong_files(archive: Path) -> list[str]:
    """Return a line for every file that the package lacks or should not hold."""
    with zipfile.ZipFile(archive) as package:
        names = package.namelist()
    lines = [f"{name} is missing. See .comfyignore." for name in IN_PACKAGE if name not in names]
    return lines + [f"{name} does not belong. See .comfyignore." for name in names if name.startswith(NOT_IN_PACKAGE)]


def main() -> int:
    """Run all checks; return the exit code."""
    install()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "clone"
        folder.mkdir()
        clone(folder)
        comfy = (program("comfy"), "--skip-prompt", "--no-enable-telemetry", "node")
        passed = [check("comfy node validate", *comfy, "validate", cwd=folder)]
        passed.append(check("comfy node pack", *comfy, "pack", cwd=folder))
        wrong = wrong_files(folder / "node.zip")
        for line in wrong:
            print(line)  # noqa: T201
        passed.append(not wrong)
        schema = Path(scratch) / "object_info.json"
        with comfy_runtime.serve(Path(scratch) / "base") as server:
            schema.write_bytes(server.get("/object_info", timeout=120.0))
        workflows = sorted(WORKFLOWS.glob("flash_demo_*.json"))
        lint = (program("comfy-lint"), "--strict", "--schema-cache", schema, *workflows)
        passed.append(check("comfy-lint --strict", *lint, cwd=folder))
    print("All checks passed." if all(passed) else "A check failed; see above.")  # noqa: T201
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
