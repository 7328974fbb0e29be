"""Compare the translations in ``locales/`` with the nodes. Needs only Python's standard library and ComfyUI.

    python scripts/locales.py                    print what is missing, wrong or stale, by language
    python scripts/locales.py --write-english    write the nodes' own strings into locales/en
    python scripts/locales.py --checked zh ja    note that these languages say what the English says now

ComfyUI serves ``locales/LANGUAGE/nodeDefs.json`` to its page; English is what the nodes say in their code. The other
languages are written by hand. ``locales/checked.json`` holds, for each language and node, a hash of the English text
that was translated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy_runtime

LOCALES = comfy_runtime.ROOT / "locales"
CHECKED = LOCALES / "checked.json"
NODES = "nodeDefs.json"
ENGLISH = "en"

NUMBER = re.compile(r"\d*\.?\d+")
QUOTED = re.compile(r"(?<!\w)'([\w, ]+)'")
OPTION = re.compile(r"(?:^|\. )([a-z][a-z ]*):")  # "trained: those of the LoRA's metadata"
IDENTIFIER = re.compile(r"[a-z]+_[a-z_]+")
# Names of models, formats and nodes, which no language translates: two capitals, or a capital and a digit.
PROPER = re.compile(r"\b(\w*[A-Z]\w*[A-Z0-9]\w*?)s?\b")
SYNTAX = set("{}@|")  # what the page's translator (vue-i18n) takes for its own syntax

Text = dict[tuple[str, ...], str]


def english(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the strings of our nodes in the form of ``nodeDefs.json``, from ComfyUI's ``/object_info``."""
    strings = {}
    for node, info in object_info.items():
        if not node.startswith("Flash"):
            continue
        inputs = {
            name: {"name": name, "tooltip": field[1]["tooltip"]}
            for kind, section in info["input"].items()
            if kind != "hidden"
            for name, field in section.items()
        }
        outputs = {
            str(place): {"name": name, "tooltip": tooltip}
            for place, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
        }
        strings[node] = {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": inputs,
            "outputs": outputs,
        }
    return strings


def languages() -> list[str]:
    """Return the languages that are there, English left out."""
    return sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir() and folder.name != ENGLISH)


def read(language: str) -> dict[str, Any]:
    """Return a language's ``nodeDefs.json``."""
    return json.loads((LOCALES / language / NODES).read_text(encoding="utf-8"))


def write(path: Path, value: object) -> None:
    """Write JSON as all files of ``locales/`` are written."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def flat(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Text:
    """Return all strings of nested dictionaries by their paths."""
    strings: Text = {}
    for key, below in value.items():
        strings |= {(*path, key): below} if isinstance(below, str) else flat(below, (*path, key))
    return strings


def name_problems(language: str, said: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key that is missing or belongs to no node, and for inputs with one name in common."""
    there, expected = flat(said), flat(wanted)
    for key in expected.keys() - there.keys():
        yield f"{language}: {'.'.join(key)} is missing; English: {expected[key]}"
    for key in there.keys() - expected.keys():
        yield f"{language}: {'.'.join(key)} belongs to no node, input or output. Remove it."
    for node, strings in said.items():
        names = [field["name"] for field in strings.get("inputs", {}).values() if "name" in field]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{language}: {node} has two inputs of the name {name!r}"


def names_in(
    text: str, node: str, wanted: Mapping[str, Any], said: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each name in an English text, with the names of which a translation must hold one.

    A node is named as the language shows it. An input may also keep its English name, which a user types into some
    widgets. Options and proper names stay as they are.
    """
    nodes = {strings["display_name"]: name for name, strings in wanted.items()}
    for name in sorted(nodes, key=len, reverse=True):  # "Flash Sampler Select" before "Flash Sampler"
        if name in text:
            text = text.replace(name, "N")
            yield name, (said[nodes[name]]["display_name"],)
    inputs = {name: field["name"] for name, field in said[node]["inputs"].items()}
    for word in QUOTED.findall(text) + IDENTIFIER.findall(text):
        yield word, (inputs.get(word, word), word)
    for word in OPTION.findall(text) + PROPER.findall(text):
        yield word, (word,)


def text_problems(language: str, said: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each text whose numbers, names or signs do not fit the English one."""
    there = flat(said)
    for key, text in flat(wanted).items():
        if key not in there or key[-1] == "name":
            continue
        translated, where = there[key], f"{language}: {'.'.join(key)}"
        if key[-1] != "display_name":
            numbers, expected = sorted(NUMBER.findall(translated)), sorted(NUMBER.findall(text))
            if numbers != expected:
                yield f"{where} has the numbers {numbers}; expected {expected}"
            for name, accepted in names_in(text, key[0], wanted, said):
                if not any(word in translated for word in accepted):
                    yield f"{where} does not name {name} ({accepted[0]}); English: {text}"
        if not translated.strip() or set(translated) & SYNTAX:
            yield f"{where} is empty or holds one of {' '.join(sorted(SYNTAX))}, which the page reads as its own syntax"


def fingerprint(strings: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits that change with any string of a node."""
    return hashlib.sha256(json.dumps(strings, sort_keys=True).encode()).hexdigest()[:8]


def stale(language: str, wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each node whose English text changed since it was translated."""
    checked = json.loads(CHECKED.read_text(encoding="utf-8")).get(language, {})
    for node, strings in wanted.items():
        if checked.get(node) != fingerprint(strings):
            yield (
                f"{language}: the English text of {node} is not the one that was translated. Correct the translation "
                f"(git log -p locales/en shows the change), then: python scripts/locales.py --checked {language}"
            )


def problems(object_info: Mapping[str, Any]) -> list[str]:
    """Return a line for everything that is missing, wrong or stale."""
    wanted = english(object_info)
    there, expected = flat(read(ENGLISH)), flat(wanted)
    found = [
        f"en: {'.'.join(key)} is {there.get(key)!r}, but the node says {expected.get(key)!r}. Run: python "
        "scripts/locales.py --write-english"
        for key in sorted(there.keys() | expected.keys())
        if there.get(key) != expected.get(key)
    ]
    for language in languages():
        said = read(language)
        missing = sorted(name_problems(language, said, wanted))
        # Names are looked up in the translation: without all keys its texts cannot be judged.
        found += missing or [*text_problems(language, said, wanted), *stale(language, wanted)]
    return found


def mark(chosen: list[str], wanted: Mapping[str, Any]) -> None:
    """Note in :data:`CHECKED` that these languages say what the English says now."""
    checked = json.loads(CHECKED.read_text(encoding="utf-8")) if CHECKED.exists() else {}
    for language in chosen:
        checked[language] = {node: fingerprint(strings) for node, strings in wanted.items()}
    write(CHECKED, dict(sorted(checked.items())))


def main() -> int:
    """Run the command line; return 1 if there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-english", action="store_true", help="write the nodes' own strings into locales/en")
    parser.add_argument("--checked", nargs="+", choices=languages(), metavar="LANGUAGE", default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base, comfy_runtime.serve(Path(base)) as server:
        object_info = json.loads(server.get("/object_info", timeout=120.0))
    if arguments.write_english:
        write(LOCALES / ENGLISH / NODES, english(object_info))
    mark(arguments.checked, english(object_info))
    found = problems(object_info)
    sys.stdout.write("".join(f"{line}\n" for line in found) or "All languages are complete.\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
