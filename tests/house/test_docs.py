"""The docs: links lead somewhere, named files and functions exist, shown commands parse, tables are whole."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from flash_diffusion.trainer import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "benchmarks/*.md",
    "docs/**/*.md",
    "trainer/demo/*/README.md",
    "web/docs/*.md",
)
LINK = re.compile(r"\[(?P<text>(?:!\[[^\]]*\]\([^)]*\))|[^\[\]]*)\]\((?P<target>[^()\s]+)\)")
NAMED = re.compile(
    r"\[`(?P<linked>[\w.]+)`\]\((?P<target>[^()\s]+\.py)\)"
    r"|`(?P<named>[\w.]+)`\s+in\s+\[[^\]]*\]\((?P<other>[^()\s]+\.py)\)"
)
INDENTED = re.compile(r"^ {4}(.*)$", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
# A file of the repository: a path below one of its folders. Placeholders are in capitals, outputs are made by commands.
NAMED_FILE = re.compile(
    r"^(?:flash_core|nodes|trainer|tests|scripts|benchmarks|docs|web|workflows)/[\w./*-]*\.(?:py|md|yaml|json|html|webp|jpg)$"
)
PLACEHOLDER = re.compile(r"(?<![A-Z])(?!README)[A-Z]{3,}")
COMMAND = re.compile(r"(?:^|&& )(?:accelerate launch .*?-m flash_diffusion\.trainer|flash-diffusion)\s+(.*)$")


def pages(root: Path) -> list[Path]:
    """Return the pages of a repository that are checked."""
    return sorted({page for pattern in PAGES for page in root.glob(pattern)})


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(root: Path) -> Iterator[str]:
    """Yield every relative link that leads to no file or to no heading."""
    for page in pages(root):
        for match in LINK.finditer(prose(page)):
            target, _, anchor = match["target"].partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            file = (page.parent / target).resolve() if target else page
            where = f"{page.relative_to(root)}: {match['target']}"
            if not file.exists():
                yield f"{where}: there is no such file"
            elif anchor and anchor not in anchors(file):
                yield f"{where}: there is no such heading"


def missing_names(root: Path) -> Iterator[str]:
    """Yield every link ``[`name`](file.py)``, and every "`name` in [...](file.py)", whose file lacks the name."""
    for page in pages(root):
        for match in NAMED.finditer(prose(page)):
            name, target = match["linked"] or match["named"], match["target"] or match["other"]
            file = (page.parent / target).resolve()
            last = name.split(".")[-1]
            if file.is_file() and not re.search(
                rf"(?:def|class) {last}\b|^ *{last}\b.*=", file.read_text(encoding="utf-8"), re.MULTILINE
            ):
                yield f"{page.relative_to(root)}: {target} does not define {name}"


def missing_files(root: Path) -> Iterator[str]:
    """Yield every file of the repository that a page names in code marks and that does not exist."""
    for page in pages(root):
        for name in CODE.findall(prose(page)):
            if NAMED_FILE.match(name) and not PLACEHOLDER.search(name) and not any(root.glob(name)):
                yield f"{page.relative_to(root)}: there is no {name}"


def shown_commands(page: Path) -> Iterator[str]:
    """Yield every command of ours that a page shows in a code block or in a table, without its program.

    A line that ends in a backslash, or inside quotes, goes on in the next line.
    """
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [match[1] for match in INDENTED.finditer(text)] + CODE.findall(prose(page))
    for index, line in enumerate(lines):
        if (match := COMMAND.search(line.strip())) is None:
            continue
        shown = match[1]
        for further in lines[index + 1 :]:
            if shown.count("'") % 2 == 0:
                break
            shown += " " + further.strip()
        yield re.sub(r"\s{2,}", " ", shown)


class Parser(argparse.ArgumentParser):
    """Raise a refusal instead of ending the process; parsers of sub-commands do the same."""

    def error(self, message: str) -> Any:
        """Raise ``message``."""
        raise ValueError(message)


def parse(arguments: list[str]) -> None:
    """Parse a command as the command line does, and run nothing."""
    commands = cli.COMMANDS
    for position, name in enumerate(arguments):
        if name not in commands:
            raise ValueError(f"there is no command {name!r}")
        command = commands[name]
        rest = arguments[position + 1 :]
        if command.commands is None:
            parser = Parser()
            import_module(command.module, cli.__package__).add_arguments(parser)
            parser.parse_args(rest)
            return
        commands = command.commands
        if not rest or rest[0].startswith("-"):
            return


def complete(command: str) -> list[str] | None:
    """Return a shown command as a list of arguments; None for a command that is shown in part.

    "..." and "[--option]" stand for further arguments, "|" for alternatives, N for a number.
    """
    command = command.split(" #")[0].split(" && ")[0].strip()
    if re.search(r"\.\.\.|\[|\s\|\s", command):
        return None
    return [re.sub("^N$", "1", argument) for argument in shlex.split(command)]


def unparsed_commands(root: Path) -> Iterator[str]:
    """Yield every complete command that the command line would refuse."""
    for page in pages(root):
        for command in shown_commands(page):
            arguments = complete(command)
            if arguments is None:
                continue
            try:
                parse(arguments)
            except ValueError as error:
                # `flash-diffusion lora info` in a sentence is the name of a command.
                is_name = "are required" in str(error) and not any(word.startswith("-") for word in arguments)
                if not is_name:
                    yield f"{page.relative_to(root)}: flash-diffusion {command}: {error}"


def ragged_rows(root: Path) -> Iterator[str]:
    """Yield every table row that has more or fewer cells than the table's first row."""
    for page in pages(root):
        expected = 0
        for line in prose(page).splitlines():
            # A bar inside a cell is written with a backslash.
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1 if line.startswith("|") else 0
            if expected and cells and cells != expected:
                yield f"{page.relative_to(root)}: {cells} cells, expected {expected}: {line[:60]}"
            expected = (expected or cells) if cells else 0


CHECKS = (broken_links, missing_names, missing_files, unparsed_commands, ragged_rows)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_docs_have_no(check: Any) -> None:
    assert pages(ROOT)
    assert list(check(ROOT)) == []


def test_commands_are_found_in_the_docs() -> None:
    shown = [arguments for page in pages(ROOT) for line in shown_commands(page) if (arguments := complete(line))]
    assert len({arguments[0] for arguments in shown}) >= 5
    assert len(shown) >= 20


@pytest.mark.parametrize(
    ("text", "check", "problem"),
    [
        ("[a](docs/nothing.md)", broken_links, "no such file"),
        ("[a](#nothing)\n\n# Something", broken_links, "no such heading"),
        ("[`nothing`](flash_core/grid.py)", missing_names, "does not define nothing"),
        ("`nothing` in [the grid](flash_core/grid.py)", missing_names, "does not define nothing"),
        ("`trainer/nothing.py`", missing_files, "no trainer/nothing.py"),
        ("    flash-diffusion distill demo --nothing", unparsed_commands, "--nothing"),
        ("`flash-diffusion nothing demo`", unparsed_commands, "no command 'nothing'"),
        ("| a | b |\n|---|---|\n| 1 |", ragged_rows, "1 cells, expected 2"),
    ],
)
def test_check_finds_a_mistake(tmp_path: Path, text: str, check: Any, problem: str) -> None:
    (tmp_path / "flash_core").mkdir()
    (tmp_path / "flash_core" / "grid.py").write_text("def something() -> None: ...\n", encoding="utf-8")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    found = list(check(tmp_path))
    assert len(found) == 1
    assert problem in found[0]
