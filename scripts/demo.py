"""``make demo``: the whole product on the embedded teacher, as a newcomer would use it.

    1. distil     flash-diffusion distill demo        -> out/demo/lora.safetensors
    2. evaluate   flash-diffusion evaluate            -> out/demo/report.html, report.json
    3. use        the same LoRA in a headless ComfyUI -> out/demo/comfyui/*.png

Each step is the ordinary command; this script only runs them one after the other and says where the results are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "out" / "demo"
WORKFLOW = ROOT / "tests" / "comfy" / "workflows" / "flash_demo_text_to_image.json"

console = Console()


def step(title: str, *arguments: str) -> None:
    """Run one command of the project, its output visible; end here with its exit code if it fails."""
    console.rule(f"[bold]{title}")
    command = [sys.executable, *arguments]
    begin = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        console.print(f"[red]`{' '.join(command)}` failed (exit {code}); its output above says why.")
        sys.exit(code)
    console.print(f"[dim]{time.perf_counter() - begin:.0f} s")


def results() -> None:
    """The report's figures as a table, and where everything lies."""
    report = json.loads((OUTPUT / "report.json").read_text(encoding="utf-8"))
    columns = ("name", "steps", "guidance", "nfe", "fd", "kid", "paired", "prompt_accuracy", "diversity")
    table = Table(title=f"Quality on the demo (floor: FD {report['floor']['fd']:.4f})")
    for column in (*columns, "seconds_per_image"):
        table.add_column(column.replace("_", " "), justify="left" if column == "name" else "right")
    for run in report["runs"]:
        cells = [run[column] for column in (*columns, "seconds_per_image")]
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)
    console.print(f"report    {OUTPUT / 'report.html'}")
    console.print(f"LoRA      {OUTPUT / 'lora.safetensors'}")
    for picture in sorted((OUTPUT / "comfyui").glob("*.png")):
        console.print(f"ComfyUI   {picture}")


def main() -> None:
    """Run the three steps."""
    lora = str(OUTPUT / "lora.safetensors")
    step("1. Distil the demo teacher", "-m", "trainer", "distill", "demo", "--output", str(OUTPUT))
    step("2. Compare teacher and student", "-m", "trainer", "evaluate", "--lora", lora, "--output", str(OUTPUT))
    step(
        "3. Use the LoRA in ComfyUI",
        *("scripts/comfy_runtime.py", "run", str(WORKFLOW), "--lora", lora, "--output", str(OUTPUT / "comfyui")),
    )
    console.rule("[bold]Results")
    results()


if __name__ == "__main__":
    main()
