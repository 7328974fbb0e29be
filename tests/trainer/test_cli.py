"""The command line: quick help, plain errors, and a plan without weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

from flash_diffusion.flash_core.grid import timestep_mixture
from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.trainer.cli import COMMANDS, DEMO_COMMANDS, RENAMED, Command, main
from flash_diffusion.trainer.config import Recipe, parse_recipe
from flash_diffusion.trainer.distill.passes import solution_passes

from .conftest import ROOT


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Return a command's exit code and its output."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_missing_packages_are_told_with_pips_command(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty")
    python = tmp_path / "empty" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    for command in ("needs", "distill"):
        done = subprocess.run(
            [python, "-I", ROOT / "trainer" / "__main__.py", command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("flash-diffusion: The trainer needs more packages than ComfyUI")
        assert f'"{python}" -m pip install "torch>=2.4"' in done.stderr
        assert '"peft>=0.17,<1"' in done.stderr


@pytest.mark.parametrize(("arguments", "commands"), [([], COMMANDS), (["demo"], DEMO_COMMANDS)])
def test_help_lists_the_commands_and_imports_nothing_heavy(arguments: list[str], commands: dict[str, Command]) -> None:
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trainer", *arguments, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(f"\n    {command}" in process.stdout for command in commands)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in process.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "PIL", "diffusers", "transformers", "pydantic", "rich", "yaml"}


@pytest.mark.parametrize("command", [*((name,) for name in COMMANDS), *(("demo", name) for name in DEMO_COMMANDS)])
def test_every_command_explains_its_options(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert len(text) > 200
    text.encode("cp1252")  # the terminals of Windows


def test_an_old_command_name_works_and_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["demo-data", "--help"])
    assert end.value.code == 0
    output = capsys.readouterr()
    assert "usage: flash-diffusion demo data" in output.out
    assert output.err.count("\n") == 1
    assert "`flash-diffusion demo-data` is now `flash-diffusion demo data`" in output.err
    assert len(RENAMED) == 8  # the commands that had names of their own


def test_user_error_prints_one_message_and_exits_with_2(capsys: pytest.CaptureFixture[str], recipe_file: Path) -> None:
    code, text = said(capsys, "distill", recipe_file, "--set", "optimizer.lr=-1")
    assert code == 2
    assert text.startswith("flash-diffusion: ")
    assert "optimizer.lr" in text
    assert "Traceback" not in text


def test_lora_error_prints_one_message_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_args: object) -> int:
        read_lora(tmp_path / "absent.safetensors")
        return 0

    monkeypatch.setattr("flash_diffusion.trainer.distill.export_command.run", refuse)
    code, text = said(capsys, "export", tmp_path)
    assert code == 2
    assert "there is no LoRA file" in text


def test_plan_needs_no_weights(
    capsys: pytest.CaptureFixture[str], recipe_content: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    recipe_content["model"]["path"] = str(bare)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_content))
    code, text = said(capsys, "distill", file, "--dry-run", "--output", tmp_path / "run")
    assert code == 0
    for part in (
        "warm-up",
        "off",
        "  all: solutions 11, student 6, adversarial 6, discriminator 2, dmd 6",
        "the whole run: ",
        "LoRA rank 4",
        "discriminator heads",
        "GiB",
        "4 x 8 x 8",
    ):
        assert part in text, part
    assert not (tmp_path / "run").exists()


def test_plan_names_the_task_and_refuses_a_wrong_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "distill", "demo_inpainting", "--dry-run")
    assert code == 0
    assert "task: inpainting, 6 variants of each picture; data: demo" in text
    code, text = said(capsys, "distill", "demo_inpainting", "--dry-run", "--set", "task.name=super-resolution")
    assert code == 2
    assert "super-resolution needs a model that reads 32 channels" in text


@pytest.mark.parametrize(
    ("teacher_steps", "modes", "wanted"),
    # By hand: from index k a trailing grid of K has K - k evaluations left, two passes each with guidance.
    [(4, (1, 0, 0, 0), 2 * (4 * 0.8808 + 3 * 0.1192)), (32, (0, 0, 0, 1), 2 * 8), (32, (1, 1, 1, 1), 2 * 19.644)],
)
def test_expected_passes_by_hand(teacher_steps: int, modes: tuple[float, ...], wanted: float) -> None:
    start = timestep_mixture(teacher_steps, modes).tolist()
    assert solution_passes(start) == pytest.approx(wanted, abs=0.02)


def test_command_line_distils_and_exports(
    capsys: pytest.CaptureFixture[str], recipe_file: Path, tmp_path: Path
) -> None:
    code, text = said(capsys, "distill", recipe_file, "--output", tmp_path / "run", "--set", "phases.1.updates=1")
    assert code == 0
    assert (tmp_path / "run" / "lora.safetensors").is_file()
    written = parse_recipe(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert isinstance(written, Recipe)
    assert written.updates == 3
    code, text = said(capsys, "distill", recipe_file, "--output", tmp_path / "run")
    assert code == 2
    assert "--resume" in text
    code, text = said(capsys, "export", tmp_path / "run", "--checkpoint", "2")
    assert code == 0
