"""Measure how long ComfyUI needs to import this extension, beside its own core nodes.

    COMFYUI_PATH=... python benchmarks/import_time.py [--rounds 5]

Each round is a process of its own. The figures are CPU seconds of this process, and the best round counts: other
programs on the machine only add time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOADER = ROOT / "tests" / "comfy" / "inside" / "load_extension.py"
sys.path.append(str(ROOT / "scripts"))


def main() -> None:
    """Print the best seconds of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes to start (default: 5)")
    rounds = parser.parse_args().rounds
    import comfy_runtime

    folder = comfy_runtime.comfyui_folder()
    results = []
    with tempfile.TemporaryDirectory() as base:
        extension = Path(base) / "flash-diffusion"
        extension.symlink_to(ROOT, target_is_directory=True)
        command = [sys.executable, LOADER, folder, extension]
        for _ in range(rounds):
            done = subprocess.run(
                command, cwd=folder, env=comfy_runtime.environment(), stdout=subprocess.PIPE, text=True, check=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {name: min(result["seconds"][name] for result in results) for name in ("comfyui", "extension")}
    print(  # noqa: T201
        f"ComfyUI's core nodes {seconds['comfyui']:.2f} s, the extension {seconds['extension']:.3f} s "
        f"({seconds['extension'] / seconds['comfyui']:.1%}), {len(results[0]['modules'])} modules"
    )


if __name__ == "__main__":
    main()
