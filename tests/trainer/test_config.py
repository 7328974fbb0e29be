"""Recipes: valid fields, and the errors for wrong ones."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from flash_diffusion.flash_core.distiller import PUBLISHED_PHASES, DistillerSettings
from flash_diffusion.trainer.config import Recipe, Section, parse_recipe
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.recipes import RECIPES, load_recipe, shipped_recipes


def refusal(content: dict[str, Any]) -> str:
    """Return the error of a wrong recipe."""
    with pytest.raises(UserError) as error:
        parse_recipe(content)
    return str(error.value)


def changed(content: dict[str, Any], section: str, **fields: Any) -> dict[str, Any]:
    """Return the recipe with fields of one section changed."""
    return {**content, section: {**content.get(section, {}), **fields}}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.updates == sum(phase.updates for phase in recipe.phases)


def test_the_published_recipe_has_the_papers_constants() -> None:
    recipe = load_recipe("sd15.yaml")
    assert [phase.phase() for phase in recipe.phases] == list(PUBLISHED_PHASES)
    assert [phase.updates for phase in recipe.phases] == [5000] * 4
    assert recipe.method.settings() == DistillerSettings()
    assert (recipe.lora.rank, recipe.lora.alpha) == (128, 128)
    assert (recipe.optimizer.lr, recipe.optimizer.discriminator_lr) == (1e-5, 1e-5)
    assert recipe.method.guidance == (3, 13)


@pytest.mark.parametrize(("name", "rank", "pixels"), [("sd15", 128, 512), ("sd21", 128, 768), ("sdxl", 64, 1024)])
def test_unet_recipes_differ_in_rank_and_size(name: str, rank: int, pixels: int) -> None:
    """The paper's ranks for SD 1.5 and SDXL; nothing was published for SD 2.1, which has SD 1.5's."""
    recipe, published = load_recipe(name), load_recipe("sd15")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.data.resolution) == (rank, rank, pixels)
    assert recipe.phases == published.phases
    assert recipe.method == published.method
    assert recipe.optimizer == published.optimizer
    assert recipe.precision == "bf16"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_line_of_a_shipped_recipe_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    unexplained = [
        line
        for index, line in enumerate(lines)
        if ":" in line and not line.lstrip().startswith("#") and not line.rstrip().endswith(":") and "#" not in line
        if not (index and lines[index - 1].lstrip().startswith("#"))
    ]
    assert not unexplained


def test_every_field_has_a_description() -> None:
    pending: list[type[Section]] = [Recipe]
    while pending:
        section = pending.pop()
        for name, field in section.model_fields.items():
            plain = typing.get_origin(field.annotation) is None and isinstance(field.annotation, type)
            if plain and issubclass(field.annotation, Section):
                pending.append(field.annotation)
            else:
                assert field.description, f"{section.__name__}.{name}"


def test_unknown_field_error_lists_the_fields(recipe_content: dict[str, Any]) -> None:
    message = refusal(changed(recipe_content, "lora", rnk=3))
    assert "lora.rnk" in message
    assert "rank, alpha, targets" in message


def test_missing_field_error_gives_its_meaning(recipe_content: dict[str, Any]) -> None:
    del recipe_content["model"]["family"]
    message = refusal(recipe_content)
    assert "model.family: is missing" in message
    assert "model family" in message


@pytest.mark.parametrize(
    ("section", "fields", "expected"),
    [
        ("optimizer", {"lr": -1}, ("optimizer.lr", "greater than 0", "-1", "learning rate")),
        ("optimizer", {"lr": "fast"}, ("optimizer.lr", "number", "'fast'")),
        ("optimizer", {"lr": float("nan")}, ("optimizer.lr", "finite", "nan")),
        ("method", {"teacher_steps": 6}, ("method", "multiple of the 4 modes", "6")),
        ("method", {"guidance": [3, 2]}, ("method", "low <= high", "[3.0, 2.0]")),
        ("method", {"solver": "heun"}, ("method.solver", "'dpmpp_2m'", "'heun'")),
        ("method", {"adversarial_timesteps": "250..10"}, ("method.adversarial_timesteps", "10..250", "'250..10'")),
        ("method", {"adversarial_timesteps": [1000]}, ("method.adversarial_timesteps.0", "999", "1000")),
        ("method", {"dmd": {"timesteps": [30, 20]}}, ("method.dmd", "low <= high", "[30, 20]")),
        ("method", {"dmd": {"form": "decoupled", "guidance": 1}}, ("method.dmd", "set form to plain")),
        ("method", {"states": {"student": 0.6, "trajectory": 0.5}}, ("method.states", "0.5 + 0.6", "at most 1")),
        ("method", {"critic": {"updates": 2}}, ("method", "set fake_score to critic")),
        ("data", {"resolution": 100}, ("data", "multiple of 8", "100")),
        ("data", {"path": None}, ("data", "needs data.path", "'folder'")),
    ],
)
def test_wrong_value_error_names_field_value_and_expectation(
    recipe_content: dict[str, Any], section: str, fields: dict[str, Any], expected: tuple[str, ...]
) -> None:
    message = refusal(changed(recipe_content, section, **fields))
    for part in expected:
        assert part in message


def test_recorded_trajectories_take_no_share_of_the_teachers_path(recipe_content: dict[str, Any]) -> None:
    content = changed(recipe_content, "method", states={"trajectory": 0.5})
    assert parse_recipe(content).reads_pictures
    assert "leave the share out" in refusal({**content, "trajectories": {"count": 2}})
    content = changed(recipe_content, "method", states={"trajectory": 0.5, "student": 0.5})
    assert not parse_recipe(content).reads_pictures


def test_gradient_norms_need_a_distillation_loss_to_compare_with(recipe_content: dict[str, Any]) -> None:
    recipe_content["phases"][1]["distillation"] = 0
    message = refusal(changed(recipe_content, "method", adversarial_weighting="gradient_norm"))
    assert "which is off in phase 'all'; give distillation a factor above 0" in message


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_float16_is_refused_for_training(recipe_content: dict[str, Any], precision: str) -> None:
    message = refusal(changed(recipe_content | {"precision": precision}, "model", dtype="float16"))
    assert "set model.dtype to bfloat16 or float32 (both read float16 files too)" in message


def test_style_lora_errors_name_the_list_entry_and_field(recipe_content: dict[str, Any]) -> None:
    message = refusal(changed(recipe_content, "model", style_lora=[{"strenght": 1}]))
    assert "model.style_lora.0.path: is missing; expected the LoRA's .safetensors file" in message
    assert "model.style_lora.0.strenght: there is no such field; expected one of path, strength" in message


def test_list_error_names_the_entry(recipe_content: dict[str, Any]) -> None:
    recipe_content["phases"][1]["modes"] = [0, 0, 0, 0]
    assert "phases.1: all four modes are 0; give at least one mode a weight" in refusal(recipe_content)


def test_overrides_reach_sections_lists_and_absent_sections(recipe_file: Path) -> None:
    recipe = load_recipe(
        str(recipe_file), ["optimizer.lr=2e-4", "phases.0.updates=7", "limits.max_minutes=1.5", "lora.targets=[to_q]"]
    )
    assert recipe.optimizer.lr == 2e-4
    assert recipe.phases[0].updates == 7
    assert recipe.limits.max_minutes == 1.5
    assert recipe.lora.targets == ["to_q"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr", "key=value"),
        ("phases.9.updates=1", "0..1"),
        ("batch_size.x=1", "a value, not a section"),
        ("seed=[1", "not readable YAML"),
    ],
)
def test_wrong_override_is_explained(recipe_file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError, match="--set") as error:
        load_recipe(str(recipe_file), [override])
    assert expected in str(error.value)


def test_unknown_recipe_error_lists_the_shipped_recipes() -> None:
    with pytest.raises(UserError, match="demo.*sd15"):
        load_recipe("nothing-of-that-name")


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "\xff\xfe"])
def test_file_without_a_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_recipe(str(path))


def test_written_recipe_reads_back_equal(recipe: Recipe) -> None:
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.digest() == recipe.digest()


def test_digest_differs_between_recipes(recipe_content: dict[str, Any]) -> None:
    digest = parse_recipe(recipe_content).digest()
    assert digest != parse_recipe({**recipe_content, "seed": 1}).digest()
    for field in ({"dmd": {"form": "decoupled"}}, {"adversarial_timesteps": [10]}, {"discriminator": {"warmup": 1}}):
        assert digest != parse_recipe(changed(recipe_content, "method", **field)).digest()
    defaults = {"dmd": {"form": "plain"}, "critic": {}, "adversarial_timesteps": [10, 250, 500, 750]}
    assert digest == parse_recipe(changed(recipe_content, "method", **defaults)).digest()


def test_digest_of_a_recipe_of_version_0_1_is_the_one_it_had() -> None:
    file = Path(__file__).parents[1] / "files" / "recipe.yaml"
    assert load_recipe(str(file)).digest().startswith("904d0c43d05eb76a")  # as version 0.1 computed it


def test_noise_levels_are_a_list_or_a_range(recipe_content: dict[str, Any]) -> None:
    recipe = parse_recipe(changed(recipe_content, "method", adversarial_timesteps="10..250"))
    assert recipe.method.settings().adversarial_timesteps == tuple(range(10, 251))
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_extending_recipe_overrides_field_by_field(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("extends: sd15\nmethod: {guidance: [4, 5]}\nphases: [{updates: 7, name: a}]\n")
    (tmp_path / "changed.yaml").write_text("extends: own.yaml\nphases: [{updates: 7, name: a, modes: [1, 0, 0, 0]}]\n")
    recipe, base = load_recipe(str(tmp_path / "changed.yaml"), ["lora.rank=3"]), load_recipe("sd15")
    assert recipe.method.guidance == (4, 5)
    assert recipe.method.teacher_steps == base.method.teacher_steps
    assert (recipe.updates, recipe.lora.rank, recipe.lora.targets) == (7, 3, base.lora.targets)
    assert recipe.optimizer == base.optimizer
    assert "extends" not in recipe.to_yaml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: own.yaml", "extends itself"),
        ("extends: missing", "there is no recipe 'missing'"),
        ("extends: ../missing.yaml", "there is no recipe"),
        ("extends: 3", "must be a YAML file or the name of a shipped recipe, not 3"),
    ],
)
def test_extends_refuses_missing_recipes_and_circles(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))


def test_every_path_may_start_at_home(
    recipe_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    model = {
        "path": "~/model",
        "config": "~/config",
        "task_adapter": "~/task.safetensors",
        "control": {"path": "~/control"},
        "image_adapter": {"path": "~/ip", "image_encoder": "~/encoder"},
        "style_lora": [{"path": "~/style.safetensors"}],
    }
    content = changed(changed(recipe_content, "model", **model), "data", path=["~/one", "~/two"], cache="~/cache")
    content["data"]["source"] = "webdataset"
    recipe = parse_recipe(content)
    given = recipe.to_yaml()
    assert "~" not in given
    names = ("model", "config", "task.safetensors", "control", "ip", "encoder", "style.safetensors", "one", "cache")
    for name in (*names, "two"):
        assert f"{tmp_path / name}\n" in given
    assert parse_recipe(changed(content, "data", path="~/one")).data.path == tmp_path / "one"
    assert "model.path" in refusal(changed(content, "model", path="~no-such-user-here/model"))
