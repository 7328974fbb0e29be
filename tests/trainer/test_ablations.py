"""The table of ablations: each row is a recipe, its figures are means over the seeds, and the chart names every row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flash_diffusion.benchmarks import ablations
from flash_diffusion.trainer.recipes import load_recipe

ROWS = ablations.read_rows()


def figures(one: float, rest: float = 2.0) -> dict[str, float]:
    """The figures of a made-up run, by the head of their column."""
    return dict(zip(ablations.HEAD[1:-1], [one, *[rest] * 7, 1.25, 80.0, 1.0], strict=True))


def test_every_row_is_a_recipe_of_its_own(tmp_path: Path) -> None:
    """A field with a wrong name or value would stop a row hours after the start."""
    seen = set()
    for row in ROWS:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({"extends": "glyphs", **row.content}))
        seen.add(load_recipe(str(file)).model_dump_json())
    assert len(seen) == len({row.folder for row in ROWS}) == len(ROWS)


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    """Worked: 3 and 5 have mean 4 and deviation 1.41; MSE is a forward pass, and a backward pass that costs two."""
    text = "\n".join(ablations.table(ROWS, {ROWS[0].folder: [figures(3), figures(5)]}, "glyphs"))
    assert text.splitlines()[-1] == f"| MSE | 4.00 ± 1.41 |{' 2.00 |' * 7} 1.25 | 80.0 % | 1.00 | 3.0 |"


def test_a_run_s_figures_are_those_of_its_report(tmp_path: Path) -> None:
    def run(name: str, steps: int, distance: float, diversity: float) -> dict[str, Any]:
        kinds = {
            kind: {"x_floor": {"value": factor * distance}}
            for kind, factor in {"features": 1, "states": 10, "random": 100}.items()
        }
        return {
            "name": name,
            "steps": steps,
            "kinds": kinds,
            "diversity": diversity,
            "prompt_accuracy": 0.5,
            "sharpness": 0.9,
        }

    runs = [run(f"student {n} step{'s' * (n > 1)}", n, float(n), 3) for n in ablations.STEPS] + [
        run("teacher", 32, 1, 4)
    ]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"runs": runs}))
    assert list(ablations.figures(report).values()) == [1, 2, 4, 8, 10, 20, 100, 200, 0.75, 50, 0.9]


def test_the_chart_names_every_row(tmp_path: Path) -> None:
    """Also one that diverged, in the panel of its group; the same figures give the same file."""
    pytest.importorskip("matplotlib")
    made = {row.folder: [figures(400.0 if number == 7 else 3.0 + number)] for number, row in enumerate(ROWS)}
    with_text = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in with_text:
        ablations.chart(ROWS, made, path)
    drawn = with_text[0].read_text(encoding="utf-8")
    for row in ROWS:
        assert row.name in drawn
        assert row.group in drawn
    assert drawn == with_text[1].read_text(encoding="utf-8")
