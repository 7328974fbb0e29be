"""What a student's curve says, in sentences: does the distance fall with every step, and is it the training's doing?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import Finding, Findings
from .numbers import capital, counted, listed

Report = Mapping[str, Any]
Curve = Mapping[str, Any]  # one of the ``curve`` of report.json


def findings(report: Report) -> tuple[Findings, ...]:
    """Return two sentences for each kind of features; empty where the report has no curve, as without a student."""
    found = []
    for curve in report.get("curve", []):
        where = f"In {report['kinds'][curve['kind']]}"
        found.append(Finding(f"{where}: {falls_words(curve)}.", curve["falls"]))
        rivals = curve["rivals"]
        found.append(Finding(f"{where}: {rival_words(rivals)}.", not any(_is(line, "farther") for line in rivals)))
    return (Findings(tuple(found)),) if found else ()


def falls_words(curve: Curve) -> str:
    """Return ``distance falls with every step: no, 4 -> 8 rises by 3 %, within the noise; 1 -> 2 falls by 20 %``."""
    told = [_step_words(step) for step in sorted(curve["steps"], key=lambda step: step["value"] < 0)]
    return f"distance falls with every step: {'yes' if curve['falls'] else 'no'}, {'; '.join(told)}"


def _step_words(step: Mapping[str, Any]) -> str:
    way = "falls" if step["value"] < 0 else "rises"
    noise = ", within the noise" if step["verdict"] == "within the noise" else ""
    return f"{step['from']} -> {step['to']} {way} by {abs(100 * step['value']):.0f} %{noise}"


def rival_words(rivals: Sequence[Mapping[str, Any]]) -> str:
    """Return at which step counts the student is beyond chance nearer or farther than the undistilled teacher."""
    told = []
    for verdict, words in (
        ("nearer", "nearer to the teacher than the undistilled teacher with as many passes, beyond chance"),
        ("farther", "farther from the teacher than the undistilled teacher, beyond chance"),
        ("within the noise", "as far as the undistilled teacher, within the noise"),
    ):
        if counts := [line["steps"] for line in rivals if _is(line, verdict)]:
            told.append(f"at {_steps(counts)} {words}")
    return f"the student is {'; '.join(told)}"


def _steps(counts: Sequence[int]) -> str:
    return counted(counts[0], "step") if len(counts) == 1 else f"{listed(counts).replace(' or ', ' and ')} steps"


def _is(line: Mapping[str, Any], verdict: str) -> bool:
    return bool(line["verdict"] == verdict)


def kind_titles(report: Report) -> dict[str, str]:
    """Return the kinds of features with their titles; reports of 0.1 have the feature network alone."""
    return {kind: capital(title) for kind, title in report.get("kinds", {"features": "the feature network"}).items()}
