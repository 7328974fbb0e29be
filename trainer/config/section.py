"""The base of every part of a recipe, and the numbers that many parts have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def at_home(given: Any) -> Any:
    """Return a path that starts with ~ as a path in the user's home folder, and other values unchanged.

    Raises:
        ValueError: there is no such user.
    """
    if isinstance(given, str | Path) and str(given).startswith("~"):
        try:
            return type(given)(Path(given).expanduser())
        except RuntimeError as error:
            raise ValueError(f"~ names no home folder here ({error}); write the whole path") from error
    return given


Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
FilePath = Annotated[Path, BeforeValidator(at_home)]
Location = Annotated[str, BeforeValidator(at_home)]  # a path or a name, such as a Hub name


class Section(BaseModel):
    """A part of a recipe. Unknown fields are errors, and values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
