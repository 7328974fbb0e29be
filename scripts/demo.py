"""``make demo``: the whole product on the embedded teacher, as a newcomer would use it.

    1. distil     flash-diffusion distill demo        -> out/demo/lora.safetensors
    2. evaluate   flash-diffusion evaluate            -> out/demo/report.html, report.json
    3. use        the same LoRA in a headless ComfyUI -> out/demo/comfyui/*.png

Each step is the ordinary command; this script only runs them one after the other and says where the results are.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "out" / "demo"
SAMPLES = "192"  # pictures a run: 3/4 of the default, since decoding them is most of the time
WORKFLOW = ROOT / "tests" / "comfy" / "workflows" / "flash_demo_text_to_image.json"

INTERRUPTED = 130  # exit code after Ctrl-C

console = Console()


def step(title: str, *arguments: str) -> None:
    """Run one command of the project, its output visible; end here with its exit code if it fails."""
    console.rule(f"[bold]{title}")
    command = [sys.executable, *arguments]
    begin = time.perf_counter()
    code = run(command)
    if code == INTERRUPTED:
        console.print("stopped; run `make demo` again to go on")
        sys.exit(code)
    if code:
        console.print(f"[red]`{' '.join(command)}` failed (exit {code}); its output above says why.")
        sys.exit(code)
    console.print(f"[dim]{time.perf_counter() - begin:.0f} s")


def run(command: list[str]) -> int:
    """Run a command to its end and return its exit code. Ctrl-C reaches the command too, which saves what it has."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def results() -> None:
    """Where everything lies; the figures stand above, as evaluate printed them."""
    found = [("report", "report.html"), ("figures", "report.json"), ("LoRA", "lora.safetensors")]
    for name, file in found:
        console.print(f"{name:10}{OUTPUT / file}", soft_wrap=True, highlight=False)
    for picture in sorted((OUTPUT / "comfyui").glob("*.png")):
        console.print(f"{'ComfyUI':10}{picture}", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the three steps."""
    lora = str(OUTPUT / "lora.safetensors")
    # --resume: a run that was interrupted goes on, one that is complete is kept (`make clean` begins anew).
    step("1. Distil the demo teacher", "-m", "trainer", "distill", "demo", "--output", str(OUTPUT), "--resume")
    step(
        "2. Compare teacher and student",
        *("-m", "trainer", "evaluate", "--lora", lora, "--samples", SAMPLES, "--output", str(OUTPUT)),
        *("--targets", "make-demo"),
    )
    step(
        "3. Use the LoRA in ComfyUI",
        *("scripts/comfy_runtime.py", "run", str(WORKFLOW), "--lora", lora, "--output", str(OUTPUT / "comfyui")),
    )
    console.rule("[bold]Results")
    results()


if __name__ == "__main__":
    main()
