"""The command line: ``flash-diffusion`` when installed, ``python -m trainer`` in a clone.

A command's module has ``add_arguments(parser)`` and ``run(args)``. The module is imported only when its command is
used, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from .errors import UserError

PROGRAM = "flash-diffusion"
# Libraries that log every file they open and every request they make at level INFO.
CHATTY_LIBRARIES = ("httpx", "huggingface_hub", "PIL", "torch", "diffusers", "transformers", "accelerate")


@dataclass(frozen=True)
class Command:
    """A command: the module that runs it, or the commands below it.

    Attributes:
        summary: one line of help.
        module: relative name of the module with ``add_arguments`` and ``run``.
        commands: name -> command below this one.
    """

    summary: str
    module: str = ""
    commands: Mapping[str, Command] | None = None


DEMO_COMMANDS = {
    "data": Command("build the picture shards from the published emoji packages", ".demo.making.emoji_packages"),
    "autoencoder": Command("train the autoencoder", ".demo.making.autoencoder"),
    "teacher": Command("train the teacher (text encoder and UNet)", ".demo.making.teacher.command"),
    "features": Command("train the network that measures pictures", ".demo.making.features"),
    "card": Command("measure the teacher and write its model card", ".demo.making.teacher.card"),
    "glyphs": Command("make the second teacher, letters and digits in many typefaces", ".demo.making.glyphs.command"),
    "task-teacher": Command(
        "train a task adapter, with which the teacher does another task", ".demo.making.adapters.task_teacher"
    ),
    "control": Command("train a T2I-adapter or a ControlNet for the teacher", ".demo.making.adapters.control"),
    "style": Command("train a style LoRA for the teacher", ".demo.making.adapters.style"),
}
DATA_COMMANDS = {"check": Command("find everything that is wrong with a data set", ".data.checking.command")}
COMMANDS = {
    "distill": Command("distil a teacher into a few-step LoRA", ".distill.command"),
    "export": Command("write the LoRA of a run's checkpoint", ".distill.export_command"),
    "evaluate": Command("compare the student's few steps with the teacher's many", ".evaluate.command"),
    "report": Command("write the HTML report of an evaluation again", ".report.build"),
    "cache": Command("list, check and prune the encoded data on disk", ".data.cache.command"),
    "lora": Command("inspect, convert, merge and shrink LoRA files", ".lora_command"),
    "data": Command("look at training data", commands=DATA_COMMANDS),
    "needs": Command("say which of the trainer's packages are missing", ".needs"),
    "demo": Command("make the files of the embedded demo again", commands=DEMO_COMMANDS),
}
RENAMED = {
    f"demo-{name}": ("demo", name) for name in DEMO_COMMANDS if name != "glyphs"
}  # names of version 0.1; to be removed after 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for an error that the user can correct, 130 when interrupted."""
    # On a CPU, OpenMP's threads spin while they wait for each other. Beside another busy process they then wait for a
    # core that their own spinning holds: 5 times slower. OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = _with_new_names(list(sys.argv[1:] if argv is None else argv))
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Distil a conditional diffusion model into a LoRA that draws in 1 to 4 steps."
    )
    try:
        _add_commands(parser, COMMANDS, arguments)  # imports the command's module
        args = parser.parse_args(arguments)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for library in CHATTY_LIBRARIES:
            logging.getLogger(library).setLevel(logging.WARNING)
        return int(import_module(args.module, __package__).run(args))
    except ModuleNotFoundError as error:
        from .needs import NEEDS, missing_packages

        if (sentence := missing_packages()) and (error.name or "").split(".")[0] in NEEDS:
            return complain(UserError(sentence))
        raise
    except (UserError, FileNotFoundError) as error:
        return complain(error)
    except ValueError as error:
        from ..flash_core.lora import LoraError  # imports torch, which the command that raised it has loaded

        if isinstance(error, LoraError):
            return complain(error)
        raise
    except KeyboardInterrupt:
        return 130


def _with_new_names(arguments: list[str]) -> list[str]:
    """Replace a command's old name by its new name, and tell the user."""
    if not arguments or arguments[0] not in RENAMED:
        return arguments
    old, new = arguments[0], RENAMED[arguments[0]]
    sys.stderr.write(
        f"{PROGRAM}: `{PROGRAM} {old}` is now `{PROGRAM} {' '.join(new)}`; the old name stops working in the next "
        "version\n"
    )
    return [*new, *arguments[1:]]


def _add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, Command], arguments: Sequence[str]) -> None:
    """Add sub-commands. Only the command that ``arguments`` name gets its options, because its module is imported."""
    position = next((index for index, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    chosen = next(iter(arguments[position:]), None)
    added = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in commands.items():
        description = command.summary[:1].upper() + command.summary[1:] + "."
        sub = added.add_parser(name, help=command.summary, description=description)
        if name != chosen:
            continue
        if command.commands is not None:
            _add_commands(sub, command.commands, arguments[position + 1 :])
            continue
        sub.set_defaults(module=command.module)
        import_module(command.module, __package__).add_arguments(sub)


def complain(error: Exception) -> int:
    """Print an error that the user can correct, without a traceback."""
    sys.stderr.write(f"{PROGRAM}: {error}\n")
    return 2
