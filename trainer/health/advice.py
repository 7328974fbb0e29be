"""What to do about a broken rule, in the recipe's own fields and with their present values."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import Recipe
from .figures import SHARE
from .rules import CAUSE, Rule

STRONG = 0.4  # of the pull on the student: from there on a term beside distillation is taken for the cause


def advice(rule: Rule, recipe: Recipe, phase: str | None, shares: Mapping[str, float]) -> str:
    """Return what to do, without a full stop.

    Args:
        phase: the present one's name.
        shares: ``share_TERM`` of the last line that had them; empty where one term pulls alone.
    """
    if rule.advice != CAUSE:
        return rule.advice.format(**dict(recipe))
    others = {name.removeprefix(SHARE): value for name, value in shares.items() if name != f"{SHARE}distillation"}
    cause = max(others, key=lambda name: others[name], default="")
    rate = f"lower optimizer.lr ({recipe.optimizer.lr:g})"
    # A resumed run's recipe may have lost the phase that an old line names.
    found = next(((at, section) for at, section in enumerate(recipe.phases) if section.name == phase), None)
    if not cause or others[cause] < STRONG or found is None:
        return rate[0].upper() + rate[1:]
    index, section = found
    factor = f"phases.{index}.{cause} ({getattr(section, cause):g}), which is {others[cause]:.0%} of the pull"
    anchor = f"raise phases.{index}.distillation ({section.distillation:g})" if section.distillation else rate
    return f"Lower {factor}, or {anchor}"
