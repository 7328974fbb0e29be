"""The captions that an evaluation draws, and the words that say in the report where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:
    from ...config import DataSection

RUN_CAPTIONS = 256  # of a run's data, the first different ones; a fixed number, so that --samples changes no prompt


@dataclass(frozen=True)
class Captions:
    """Captions to draw.

    Attributes:
        texts: a caption that is listed n times is drawn n times as often.
        origin: a description for the report.
    """

    texts: tuple[str, ...]
    origin: str


def choose_captions(
    prompts: Path | None, data: DataSection | None, known: Sequence[str], *, demo: bool, network: str
) -> Captions:
    """Return the captions of an evaluation: the prompts file's, else the run's, else those that the network knows.

    Args:
        prompts: text file with one prompt a line; None = not given.
        data: the data section of the run's recipe; None without a run.
        known: the general captions that the feature network knows.
        demo: whether ``known`` are the demo's captions.
        network: title of the feature network.

    Raises:
        UserError: there are no captions to draw.
    """
    if prompts is not None:
        texts = read_prompts(prompts)
        return Captions(tuple(texts), f"the {len(texts)} prompts of {prompts}")
    if data is not None and not data.source.startswith("demo"):
        return captions_of_run(data)
    if not known:
        raise UserError(
            f"no captions are known for this model ({network} does not know its pictures); give --prompts FILE, a text "
            "file with one prompt a line, or --run FOLDER, the folder of the distillation, whose captions are drawn"
        )
    return Captions(tuple(known), "the demo’s general captions" if demo else f"the captions that {network} knows")


def captions_of_run(data: DataSection) -> Captions:
    """Return the first captions of a run's data, each once.

    Raises:
        UserError: the data can't be read, or holds no captions.
    """
    try:
        texts = tuple(read_captions(data, RUN_CAPTIONS))
    except UserError as error:
        raise UserError(
            f"the captions of the run's data can't be read: {error}; or give --prompts FILE, a text file with one "
            "prompt a line"
        ) from error
    where = data.path or data.source
    if not any(texts):
        raise UserError(
            f"the run's data, {where}, have only empty captions; give --prompts FILE, a text file with one prompt a "
            "line"
        )
    return Captions(texts, f"{len(texts)} captions of the run’s data, {where}")


def read_captions(data: DataSection, count: int) -> list[str]:
    """Read the first ``count`` different captions of a recipe's data, from at most ``4 * count`` samples.

    Pictures are not decoded, and samples that can't be used are passed over: their captions are not needed.

    Raises:
        UserError: there is no data.
    """
    from ...data.reading import open_source
    from ...data.reading.samples import BadSample

    source = open_source(data)
    found: dict[str, None] = {}
    raw = (sample for unit in range(len(source)) for sample in source.read(unit))
    for sample in islice(raw, min(4 * count, data.limit or 4 * count)):
        if not isinstance(sample, BadSample):
            found.update(dict.fromkeys(sample.captions))
        if len(found) >= count:
            break
    return list(found)[:count]


def read_prompts(path: Path) -> list[str]:
    """Read the lines of a text file, without the empty ones.

    Raises:
        UserError: the file can't be read, or holds no prompts.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts: {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"--prompts: {path} can't be read ({error.strerror or error}); expected a text file with one prompt a line"
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompts: {path} holds no prompts; expected one prompt a line")
    return prompts
