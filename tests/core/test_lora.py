"""LoRA files: dialects, the true scale, metadata, reports (broken files: ``test_lora_broken.py``)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from flash_diffusion.flash_core.lora import (
    FlashMetadata,
    LoraError,
    LoraModule,
    base_of,
    change_header,
    describe_base,
    flat_name,
    match,
    nearest_stochasticity,
    read_lora,
    report_on,
    write_lora,
)

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
METADATA = FlashMetadata(
    base="sd15",
    prediction="epsilon",
    process="vp",
    timesteps={1: (999.0,), 2: (999.0, 499.0), 4: (999.0, 749.0, 499.0, 249.0)},
    teacher="a teacher",
    training={"updates": "12"},
)


def halves(rank: int = 4, inputs: int = 768, outputs: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


# How each tool spells the down half, the up half and alpha of the layer PATH, and the dialect we call it.
SPELLINGS = {
    "kohya": (f"lora_unet_{flat_name(PATH)}", "lora_down.weight", "lora_up.weight"),
    "peft": (f"base_model.model.{PATH}", "lora_A.weight", "lora_B.weight"),
    "peft with adapter name": (f"base_model.model.{PATH}", "lora_A.default.weight", "lora_B.default.weight"),
    "peft under unet": (f"unet.base_model.model.{PATH}", "lora_A.weight", "lora_B.weight"),
    "diffusers": (f"unet.{PATH}", "lora_A.weight", "lora_B.weight"),
    "diffusers down/up": (f"unet.{PATH}", "lora.down.weight", "lora.up.weight"),
    "bare": (PATH, "lora_A.weight", "lora_B.weight"),
    "lycoris": (f"lycoris_{flat_name(PATH)}", "lora_down.weight", "lora_up.weight"),
    "lora_transformer": (f"lora_transformer_{flat_name(PATH)}", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_every_spelling_reads_as_the_same_layer(spelling: str, alpha: float | None, tmp_path: Path) -> None:
    name, down_key, up_key = SPELLINGS[spelling]
    down, up = halves()
    tensors = {f"{name}.{down_key}": down, f"{name}.{up_key}": up}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    file = read_lora(tmp_path / "lora.safetensors")
    module = file.modules[flat_name(PATH)]
    assert torch.equal(module.down, down)
    assert torch.equal(module.up, up)
    assert module.scale == (1.0 if alpha is None else alpha / 4)
    assert file.alpha_source == ("unknown" if alpha is None else "file")
    assert not file.unknown


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_changes_of_whole_weights_and_biases_are_read_beside_the_layers(spelling: str, tmp_path: Path) -> None:
    """Core's "Extract and Save LoRA" writes diff and diff_b, LyCORIS w_norm and b_norm; readers of layers see keys."""
    name, down_key, up_key = SPELLINGS[spelling]
    down, up = halves()
    norm = name.removesuffix("attn2.to_k").removesuffix("attn2_to_k") + "norm1"
    whole = {f"{name}.diff_b": torch.ones(8), f"{norm}.w_norm": torch.ones(6), f"{norm}.b_norm": torch.zeros(6)}
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b": torch.ones(5)}
    path = tmp_path / "lora.safetensors"
    save_file({f"{name}.{down_key}": down, f"{name}.{up_key}": up, **whole, **text}, path)
    file = read_lora(path)
    found = {(flat_name(one.path), one.part): one.values for one in file.differences}
    flat = flat_name(PATH).removesuffix("attn2_to_k")
    assert set(found) == {(f"{flat}attn2_to_k", "bias"), (f"{flat}norm1", "weight"), (f"{flat}norm1", "bias")}
    assert torch.equal(found[f"{flat}attn2_to_k", "bias"], torch.ones(8))
    assert [one.key for one in file.text_encoder_differences] == list(text)
    assert set(file.unknown) == {*whole, *text}
    assert set(file.without_text_encoder().unknown) == set(whole)
    assert "it also changes whole weights (1) and biases (2)" in report_on(file).text()


def test_the_old_attention_processor_spelling(tmp_path: Path) -> None:
    down, up = halves()
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor"
    save_file(
        {f"{block}.to_out_lora.down.weight": down, f"{block}.to_out_lora.up.weight": up}, tmp_path / "lora.safetensors"
    )
    assert list(read_lora(tmp_path / "lora.safetensors").modules) == [
        "mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    ]


def test_alpha_comes_from_the_adapter_config_of_a_peft_folder(tmp_path: Path) -> None:
    # The published flash-sd3 and flash-pixart files: r = 64, alpha = 8 only in the JSON, so 1/8 and not 1.
    down, up = halves(rank=64)
    save_file(
        {f"base_model.model.{PATH}.lora_A.weight": down, f"base_model.model.{PATH}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 8}))
    file = read_lora(tmp_path)
    assert file.modules[flat_name(PATH)].scale == 8 / 64
    assert file.alpha_source == "adapter_config"


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 64**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {PATH: 32}}, 32 / 64),
    ],
)
def test_rslora_and_alpha_patterns(settings: dict, scale: float, tmp_path: Path) -> None:
    down, up = halves(rank=64)
    save_file(
        {f"base_model.model.{PATH}.lora_A.weight": down, f"base_model.model.{PATH}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert read_lora(tmp_path).modules[flat_name(PATH)].scale == pytest.approx(scale)


@pytest.mark.parametrize(
    "settings", [{"r": 32, "lora_alpha": 8}, {"r": 64, "lora_alpha": 8, "target_modules": ["to_q", "proj_in"]}]
)
def test_another_adapters_config_beside_the_file_is_not_used(settings: dict, tmp_path: Path) -> None:
    """A folder of LoRAs may hold one adapter_config.json: its alpha would be a wrong scale for the others."""
    down, up = halves(rank=64)
    save_file({f"unet.{PATH}.lora_A.weight": down, f"unet.{PATH}.lora_B.weight": up}, tmp_path / "style.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    file = read_lora(tmp_path / "style.safetensors")
    assert (file.alpha_source, file.scales) == ("unknown", (1.0,))
    assert file.notes == ("adapter_config.json beside the file belongs to another adapter and is not used",)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 64, "lora_alpha": 8, "target_modules": ["to_k"]},
        {"r": 64, "lora_alpha": 8, "target_modules": ".*attn2.*"},
        {"r": 4, "rank_pattern": {"to_k": 64}, "lora_alpha": 8, "target_modules": [PATH]},
        {"r": 64, "target_modules": ["to_k"]},  # PEFT's default alpha is 8
    ],
)
def test_the_adapters_own_config_is_used(settings: dict, tmp_path: Path) -> None:
    down, up = halves(rank=64)
    save_file(
        {
            f"base_model.model.{PATH}.{half}.weight": value
            for half, value in zip(("lora_A", "lora_B"), (down, up), strict=True)
        },
        tmp_path / "x.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert read_lora(tmp_path / "x.safetensors").scales == (8 / 64,)


class Attention(nn.Module):
    """Two layers to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(12, 12)
        self.to_k = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_k(self.to_q(x))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_equals_pefts(rslora: bool, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_k": 5}}
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=False, use_rslora=rslora, **patterns
    )
    model = get_peft_model(Attention(), config)
    model.save_pretrained(tmp_path)
    file = read_lora(tmp_path)
    assert set(file.modules) == {"to_q", "to_k"}
    for name, module in file.modules.items():
        wanted = getattr(model.base_model.model, name).get_delta_weight("default")
        torch.testing.assert_close(module.scale * module.up @ module.down, wanted)


@pytest.mark.parametrize(
    ("config", "algorithm"),
    [
        (LoraConfig(r=2, use_dora=True), "DoRA"),
        (LoHaConfig(r=2), "LoHa"),
        (LoKrConfig(r=2), "LoKr"),
        (OFTConfig(r=0, oft_block_size=4), "OFT"),
        (IA3Config(feedforward_modules=[]), "IA3"),
        (VeraConfig(r=2), "VeRA"),
        (AdaLoraConfig(init_r=2, total_step=10), "AdaLoRA"),
    ],
)
def test_pefts_other_adapters_raise_an_error(config: PeftConfig, algorithm: str, tmp_path: Path) -> None:
    config.target_modules = {"to_q", "to_k"}
    get_peft_model(Attention(), config).save_pretrained(tmp_path)
    with pytest.raises(LoraError, match=f"adapter_model.safetensors is a {algorithm} file"):
        read_lora(tmp_path)


def test_alpha_in_the_header_that_diffusers_writes(tmp_path: Path) -> None:
    down, up = halves()
    save_file(
        {f"unet.{PATH}.lora_A.weight": down, f"unet.{PATH}.lora_B.weight": up},
        tmp_path / "lora.safetensors",
        metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 16, "unet.r": 4})},
    )
    file = read_lora(tmp_path / "lora.safetensors")
    assert (file.modules[flat_name(PATH)].scale, file.alpha_source) == (4.0, "header")


def test_report_names_layers_with_alpha_0_and_without_alpha(tmp_path: Path) -> None:
    down, up = halves()
    tensors = {}
    for layer in ("idle", "untold", "usual"):
        tensors[f"lora_unet_{layer}.lora_down.weight"], tensors[f"lora_unet_{layer}.lora_up.weight"] = down.clone(), up
        up = up.clone()
    tensors["lora_unet_idle.alpha"], tensors["lora_unet_usual.alpha"] = torch.tensor(0.0), torch.tensor(2.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    file = read_lora(tmp_path / "lora.safetensors")
    assert file.alpha_source == "file"
    assert file.scales == (0.0, 0.5, 1.0)
    assert file.notes == (
        "1 layers have no alpha: scale 1 is used for them",
        "alpha is 0 on 1 layers: these layers change nothing",
    )


def test_text_encoder_layers_are_kept_apart(tmp_path: Path) -> None:
    down, up = halves()
    names = [f"lora_unet_{flat_name(PATH)}", "lora_te1_text_model_q_proj", "lora_te2_text_model_q_proj"]
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down.clone(), up.clone()
    save_file(tensors, tmp_path / "lora.safetensors")
    file = read_lora(tmp_path / "lora.safetensors")
    assert list(file.modules) == [flat_name(PATH)]
    assert sorted(file.text_encoder) == names[1:]


@given(
    rank=st.integers(1, 5),
    alpha=st.floats(0.125, 64, width=32),
    convolution=st.booleans(),
    transformer=st.booleans(),
)
def test_written_loras_read_back_with_the_same_update(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: float, convolution: bool, transformer: bool
) -> None:
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    shape = (3, 3) if convolution else ()
    down, up = torch.randn(rank, 6, *shape), torch.randn(5, rank, *(1 for _ in shape))
    write_lora(path, {"x": LoraModule(PATH, down, up, alpha)}, METADATA, transformer=transformer)
    file = read_lora(path)
    (module,) = file.modules.values()
    wanted = alpha / rank * torch.einsum("or...,ri...->oi...", up, down)
    torch.testing.assert_close(module.scale * torch.einsum("or...,ri...->oi...", module.up, module.down), wanted)
    assert file.metadata == METADATA


def test_the_portable_forms(tmp_path: Path) -> None:
    module = {"x": LoraModule(PATH, *halves(), alpha=8.0)}
    write_lora(tmp_path / "unet.safetensors", module, METADATA)
    write_lora(tmp_path / "transformer.safetensors", module, METADATA, transformer=True)
    assert set(load_file(tmp_path / "unet.safetensors")) == {
        f"lora_unet_{flat_name(PATH)}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    # ComfyUI and diffusers disagree about alpha in this dialect, so it is folded and left out.
    folded = load_file(tmp_path / "transformer.safetensors")
    assert set(folded) == {f"transformer.{PATH}.lora_A.weight", f"transformer.{PATH}.lora_B.weight"}
    torch.testing.assert_close(folded[f"transformer.{PATH}.lora_B.weight"], halves()[1] * 2)
    assert list(tmp_path.glob(".*")) == []


def test_matching_counts_and_names_both_sides(tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.safetensors", {"x": LoraModule(PATH, *halves(), alpha=4.0)}, METADATA)
    file = read_lora(tmp_path / "lora.safetensors")
    assert match(file, {flat_name(PATH): (8, 768)}).complete
    assert match(file, {flat_name(PATH): (8, 2048)}).mismatched == (flat_name(PATH),)
    assert match(file, ["other"]).missing == (flat_name(PATH),)
    assert match(file, ["other"]).total == 1


@pytest.mark.parametrize(("outputs", "base"), [(512, "sd_x4"), (1024, "sd_x4"), (320, "sd21"), (1280, "sd21")])
def test_x4_upscaler_and_sd_2_are_recognised_by_their_widths(outputs: int, base: str, tmp_path: Path) -> None:
    """Both read 1024 channels of text; the levels are those of the published models' configurations."""
    tensors = {"lora_down.weight": torch.zeros(4, 1024), "lora_up.weight": torch.zeros(outputs, 4)}
    save_file(
        {f"lora_unet_{flat_name(PATH)}.{name}": value for name, value in tensors.items()}, tmp_path / "x.safetensors"
    )
    file = read_lora(tmp_path / "x.safetensors")
    assert base_of(file) == base
    assert describe_base(file).startswith("the SD x4 upscaler" if base == "sd_x4" else "SD 2 ")


def test_stochasticity_is_written_read_and_reported(tmp_path: Path) -> None:
    down, up = halves()
    path = tmp_path / "lora.safetensors"
    module = LoraModule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", down, up, 4.0)
    write_lora(path, {module.path: module}, replace(METADATA, stochasticity={2: 0.7, 4: 0.5}))
    file = read_lora(path)
    assert file.metadata is not None
    assert file.metadata.stochasticity == {2: 0.7, 4: 0.5}
    assert "stochasticity: 0.7 at 2 steps, 0.5 at 4 steps; Flash Sampler's 'auto'" in report_on(file).text()
    write_lora(path, {module.path: module}, METADATA)
    plain = read_lora(path)
    assert plain.metadata is not None
    assert plain.metadata.stochasticity == {}
    assert "stochasticity" not in report_on(plain).text()
    same = dict.fromkeys(range(1, 9), 0.5)
    write_lora(path, {module.path: module}, replace(METADATA, stochasticity=same))
    assert "stochasticity: 0.5 at 2 to 8 steps;" in report_on(read_lora(path)).text()


def test_a_changed_header_keeps_every_bit_of_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_lora(path, {"x": LoraModule(PATH, *halves(), alpha=4.0)}, METADATA, dtype=torch.bfloat16)
    before, old, size = load_file(path), read_lora(path).metadata, 2 * sum(half.numel() for half in halves())
    assert old is not None
    data = path.read_bytes()[-size:]
    change_header(path, {"flash.stochasticity": '{"4": 0.3}', "note": "für später"})
    after, new = load_file(path), read_lora(path).metadata
    assert new == replace(old, stochasticity={4: 0.3})
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert path.read_bytes()[-size:] == data
    with safe_open(path, "pt") as file:
        assert file.metadata()["note"] == "für später"
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(LoraError, match="truncated"):
        change_header(path, {"note": "x"})


@pytest.mark.parametrize(
    ("shares", "steps", "expected"),
    [
        ({2: 0.7, 4: 0.5}, 4, (0.5, 4)),
        ({2: 0.7, 4: 0.5}, 3, (0.5, 4)),  # 4 / 3 < 3 / 2
        ({2: 0.7, 4: 0.5}, 8, (0.5, 4)),
        ({1: 0.1, 2: 0.7}, 3, (0.7, 2)),
        ({2: 0.7, 8: 0.5}, 4, (0.5, 8)),  # equally near
        ({}, 4, (1.0, None)),
    ],
)
def test_a_step_count_that_is_not_listed_takes_the_nearest(
    shares: dict[int, float], steps: int, expected: tuple[float, int | None]
) -> None:
    assert nearest_stochasticity(shares, steps) == expected


@pytest.mark.parametrize("wrong", ['{"4": 1.5}', '{"0": 0.5}', '{"4": -0.1}', '{"four": 1}', "[]", "{"])
def test_a_wrong_stochasticity_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="the Flash LoRA header can't be read"):
        FlashMetadata.from_header({**METADATA.to_header(), "flash.stochasticity": wrong})


@pytest.mark.parametrize(
    ("path", "width", "words"),
    [
        (PATH, 768, "SD 1.5"),
        (PATH, 1024, "SD 2"),
        (PATH, 2048, "SDXL"),
        (PATH, 333, "unknown"),
        ("transformer_blocks.0.attn.add_k_proj", 8, "a transformer like SD3"),
        ("transformer_blocks.0.attn.to_k", 1536, "SD3 medium or SD3.5 medium (1536 channels wide)"),
        ("transformer_blocks.0.attn.to_k", 2432, "SD3.5 large"),
        ("joint_blocks.0.x_block.attn.qkv", 1536, "SD3 medium"),
        ("transformer_blocks.0.attn2.to_q", 1152, "PixArt"),
        ("blocks.0.attn.qkv", 1152, "PixArt"),
        ("blocks.0.cross_attn.kv_linear", 1152, "PixArt"),
        ("adaln_single.emb.resolution_embedder.linear_1", 256, "unknown"),
        ("double_blocks.0.img_attn.qkv", 3072, "Flux"),
        ("input_blocks.4.1.transformer_blocks.0.attn2.to_k", 2048, "SDXL"),
        ("down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_k", 1280, "SDXL"),
        ("transformer_blocks.0.attn.to_q", 8, "SD3"),
        ("transformer_blocks.0.attn2.to_k", 8, "PixArt"),
        ("single_transformer_blocks.0.attn.to_q", 8, "Flux"),
    ],
)
def test_a_file_without_metadata_is_named_by_its_layers(path: str, width: int, words: str, tmp_path: Path) -> None:
    down, up = halves(inputs=width)
    name = f"lora_unet_{flat_name(path)}"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    assert words in describe_base(read_lora(tmp_path / "lora.safetensors"))
