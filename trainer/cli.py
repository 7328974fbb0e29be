"""The command line: ``flash-diffusion`` when installed, ``python -m trainer`` in a clone.

Sub-commands live beside what they run, as ``add_arguments(parser)`` and ``run(args)``, and are imported when asked for.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import UserError

# name -> (module with add_arguments and run, what it does)
COMMANDS = {
    "distill": (".distill.command", "distil a teacher into a few-step LoRA"),
    "export": (".distill.export_command", "write the LoRA of a run's checkpoint"),
    "evaluate": (".evaluate.command", "compare a student's few steps with its teacher's many"),
    "report": (".report.build", "make the report of an evaluation again"),
    "lora": (".lora_command", "look into LoRA files, convert, merge and shrink them"),
    "demo-data": (".demo.making.pictures", "rebuild the demo's pictures from their packages"),
    "demo-autoencoder": (".demo.making.autoencoder", "train the demo's autoencoder"),
    "demo-teacher": (".demo.making.teacher.teacher", "train the demo's teacher"),
    "demo-task-teacher": (".demo.making.adapters.task_teacher", "train a teacher of a further task from the demo's"),
    "demo-control": (".demo.making.adapters.control", "train a T2I-adapter or a ControlNet for the demo's teacher"),
    "demo-style": (".demo.making.adapters.style", "train a style LoRA for the demo's teacher"),
    "demo-features": (".demo.making.features", "train the demo's evaluation network"),
    "demo-card": (".demo.making.card", "measure the demo's teacher and write its model card"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="flash-diffusion", description="Distil any conditional diffusion model into a few-step LoRA."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(command, help=summary, description=summary[:1].upper() + summary[1:] + ".")
        if command == name:  # the others' modules are heavy: a name and a line are enough for them
            import_module(module, __package__).add_arguments(sub)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Libraries chat at this level about every file they open and every request they make.
    for library in ("httpx", "huggingface_hub", "PIL", "torch", "diffusers", "transformers", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        return int(import_module(COMMANDS[args.command][0], __package__).run(args))
    except (UserError, FileNotFoundError) as error:
        return complain(error)
    except ValueError as error:
        from ..flash_core.lora import LoraError  # brings torch, which the command that raised it has loaded

        if isinstance(error, LoraError):
            return complain(error)
        raise
    except KeyboardInterrupt:
        return 130


def complain(error: Exception) -> int:
    """Say what the user can put right, without a traceback."""
    sys.stderr.write(f"flash-diffusion: {error}\n")
    return 2
