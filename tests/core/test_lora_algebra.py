"""Round trips through every dialect that is written, and sums and truncations, as properties over random LoRAs."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_diffusion.flash_core.lora import (
    DIALECTS,
    FlashMetadata,
    LoraError,
    LoraModule,
    flat_name,
    merge,
    read_lora,
    resize,
    with_diffusers_names,
    write_lora,
)

UNET_PATHS = (
    "conv_in",
    "time_embedding.linear_1",
    "down_blocks.0.resnets.1.conv_shortcut",
    "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "mid_block.resnets.0.time_emb_proj",
    "up_blocks.1.upsamplers.0.conv",
    "up_blocks.3.attentions.2.proj_in",
)
TRANSFORMER_PATHS = (
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.11.attn.to_out.0",
    "transformer_blocks.11.ff_context.net.2",
    "transformer_blocks.3.norm1_context.linear",
    "time_text_embed.timestep_embedder.linear_2",
    "single_transformer_blocks.7.proj_mlp",
    "adaln_single.emb.resolution_embedder.linear_1",
    "caption_projection.linear_1",
    "pos_embed.proj",
    "norm_out.linear",
    "proj_out",
)
METADATA = FlashMetadata(
    "sd15", "epsilon", "vp", {1: (999.0,), 4: (999.0, 749.0, 499.0, 249.0)}, teacher="a", training={"updates": "3"}
)
RELAXED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def loras(draw: st.DrawFn, transformer: bool | None = None) -> dict[str, LoraModule]:
    """A few layers, each with its own rank, alpha and shape."""
    paths = TRANSFORMER_PATHS if draw(st.booleans()) and transformer is not False else UNET_PATHS
    paths = TRANSFORMER_PATHS if transformer else paths
    modules = {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for path in draw(st.sets(st.sampled_from(paths), min_size=1, max_size=4)):
        rank, inputs, outputs = (draw(st.integers(1, 6)) for _ in range(3))
        kernel = (3, 3) if "conv" in path else ()
        down = torch.randn(rank, inputs, *kernel, generator=generator)
        up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=generator)
        alpha = draw(st.one_of(st.none(), st.floats(0.125, 64, width=32)))
        modules[path] = LoraModule(path, down, up, alpha)
    return modules


def update(module: LoraModule) -> Tensor:
    """Return the change of the layer's weight, in double precision."""
    product = module.up.double().flatten(1) @ module.down.double().flatten(1)
    return module.scale * product.reshape(module.shape)


def close(one: Tensor, other: Tensor) -> None:
    """Equal but for float32's rounding."""
    torch.testing.assert_close(one.float(), other.float(), atol=1e-5, rtol=1e-5)


def is_transformer(modules: dict[str, LoraModule]) -> bool:
    return all(path in TRANSFORMER_PATHS for path in modules)


@pytest.mark.parametrize("dialect", DIALECTS)
@RELAXED
@given(modules=loras())
def test_written_files_read_back(dialect: str, modules: dict[str, LoraModule], tmp_path: Path) -> None:
    transformer = is_transformer(modules)
    if dialect == "kohya" and transformer:
        with pytest.raises(LoraError, match="fused layers"):
            write_lora(tmp_path / "lora", modules, METADATA, transformer=True, dialect="kohya")
        return
    path = tmp_path / f"{dialect}.{transformer}"
    write_lora(path, modules, METADATA, transformer=transformer, dialect=dialect, header={"made": "here"})
    file = read_lora(path)
    assert set(file.modules) == {flat_name(name) for name in modules}
    assert not file.unknown
    assert file.metadata == METADATA
    assert file.header["made"] == "here"
    folded = dialect == "diffusers" or (dialect == "portable" and transformer)
    one_rank = max(module.rank for module in modules.values()) if dialect in ("portable", "diffusers") else None
    scales = {module.scale for module in modules.values()}
    for name, module in with_diffusers_names(file.modules).items():
        given_rank = modules[name].rank
        assert module.rank == (one_rank or given_rank)
        assert torch.equal(module.down[:given_rank], modules[name].down)
        assert not module.down[given_rank:].any()
        close(update(module), update(modules[name]))
        if one_rank is not None and len(scales) > 1:
            assert module.scale == 1
        elif not folded:
            assert torch.equal(module.up[:, :given_rank], modules[name].up)
            assert module.scale == pytest.approx(modules[name].scale)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_written_files_have_the_permissions_of_new_files(dialect: str, tmp_path: Path) -> None:
    modules = {"conv_in": LoraModule("conv_in", torch.ones(2, 3), torch.ones(4, 2), 2.0)}
    path = tmp_path / dialect
    before = os.umask(0o027)
    try:
        write_lora(path, modules, METADATA, transformer=False, dialect=dialect)
    finally:
        os.umask(before)
    files = [path] if path.is_file() else list(path.iterdir())
    assert files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


@RELAXED
@given(modules=loras(), order=st.permutations([dialect for dialect in DIALECTS if dialect != "kohya"]))
def test_every_dialect_round_trips(modules: dict[str, LoraModule], order: list[str], tmp_path: Path) -> None:
    current = modules
    for dialect in order:
        write_lora(tmp_path / dialect, current, None, transformer=is_transformer(modules), dialect=dialect)
        current = with_diffusers_names(read_lora(tmp_path / dialect).modules)
    assert set(current) == set(modules)
    for name, module in current.items():
        close(update(module), update(modules[name]))


@RELAXED
@given(modules=loras(), rank=st.integers(1, 8))
def test_resizing_is_the_nearest_of_its_rank(modules: dict[str, LoraModule], rank: int) -> None:
    """Against the singular values of the full updates (Eckart-Young)."""
    cut = resize(modules, rank)
    lost = total = 0.0
    for name, module in modules.items():
        new = cut.modules[name]
        assert new.rank <= max(rank, 1)
        assert new.shape == module.shape
        singular = torch.linalg.svdvals(update(module).flatten(1))
        difference = float((update(new) - update(module)).norm())
        assert difference == pytest.approx(float(singular[rank:].norm()), abs=1e-4 * float(singular.norm()))
        if module.rank <= rank:
            assert new is module
        lost, total = lost + difference**2, total + float(singular.norm()) ** 2
    assert cut.error == pytest.approx(math.sqrt(lost / total), abs=1e-4)
    assert cut.worst_error >= cut.error - 1e-4


@RELAXED
@given(modules=loras(), weights=st.lists(st.floats(-2, 2), min_size=1, max_size=3))
def test_merging_is_the_weighted_sum(modules: dict[str, LoraModule], weights: list[float]) -> None:
    merged = merge([(modules, weight) for weight in weights])
    for name, module in modules.items():
        torch.testing.assert_close(update(merged[name]), sum(weights) * update(module), atol=1e-4, rtol=1e-4)
        assert merged[name].rank == len(weights) * module.rank


def test_merging_files_of_different_layers_keeps_both() -> None:
    one = LoraModule("proj_out", torch.randn(2, 6), torch.randn(8, 2), 4.0)
    other = LoraModule("pos_embed.proj", torch.randn(3, 6, 2, 2), torch.randn(8, 3, 1, 1), None)
    merged = merge([({"a": one}, 0.5), ({"b": other}, 1.0)])
    close(update(merged["a"]), 0.5 * update(one))
    close(update(merged["b"]), update(other))
    assert merged["b"].down.shape == (3, 6, 2, 2)


def test_a_linear_layer_and_a_1x1_convolution_are_merged() -> None:
    """SD 1.5 projects by convolutions in one implementation and by linear layers in another."""
    linear = LoraModule("proj_in", torch.randn(2, 6), torch.randn(8, 2), 2.0)
    convolution = LoraModule("proj_in", torch.randn(2, 6, 1, 1), torch.randn(8, 2, 1, 1), 2.0)
    merged = merge([({"a": linear}, 1.0), ({"a": convolution}, 1.0)])["a"]
    close(update(merged), update(linear) + update(convolution).flatten(1))


def test_other_shapes_and_ranks_below_1_raise_an_error() -> None:
    one = LoraModule("proj_out", torch.randn(2, 6), torch.randn(8, 2))
    other = LoraModule("proj_out", torch.randn(2, 7), torch.randn(8, 2))
    with pytest.raises(ValueError, match="made for different models"):
        merge([({"a": one}, 1.0), ({"a": other}, 1.0)])
    with pytest.raises(ValueError, match="at least 1"):
        resize({"a": one}, 0)


def test_8_bit_numbers_are_computed_with(tmp_path: Path) -> None:
    """Exact in float16; the results are kept in it, since 8 bits would round them off."""
    small = {"proj_out": LoraModule("proj_out", torch.ones(4, 6).to(torch.float8_e5m2), torch.randn(8, 4), 3.0)}
    assert resize(small, 2).modules["proj_out"].down.dtype == torch.float16
    small["proj_out"] = replace(small["proj_out"], up=torch.randn(8, 4).to(torch.float8_e4m3fn))
    write_lora(tmp_path / "lora", small, None, transformer=True, dtype=None)
    (module,) = read_lora(tmp_path / "lora").modules.values()
    assert (module.down.dtype, module.up.dtype) == (torch.float8_e5m2, torch.float16)
    torch.testing.assert_close(module.up.float(), small["proj_out"].up.float() * 0.75)


def test_a_layer_of_zeros_can_be_cut() -> None:
    zero = LoraModule("proj_out", torch.zeros(4, 6), torch.zeros(8, 4), 4.0)
    cut = resize({"a": zero}, 2)
    assert cut.error == 0
    assert cut.modules["a"].rank == 2
    assert not update(cut.modules["a"]).any()


@given(rank=st.integers(1, 4), kernel=st.sampled_from([1, 3]))
@RELAXED
def test_a_convolution_in_three_parts_is_one_update(rank: int, kernel: int, tmp_path: Path) -> None:
    """LyCORIS' Tucker form: a 1x1, the kernel, a 1x1; composed here as convolutions of an image."""
    from safetensors.torch import save_file

    down, up = torch.randn(rank, 5, 1, 1), torch.randn(7, rank, 1, 1)
    mid = torch.randn(rank, rank, kernel, kernel)
    name = "lora_unet_conv_in"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    save_file(tensors | {f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors")
    (module,) = read_lora(tmp_path / "lora.safetensors").modules.values()
    image = torch.randn(1, 5, 6, 6)
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(image, down), mid), up) * (2.0 / rank)
    torch.testing.assert_close(conv(image, update(module).float()), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("native", "path"),
    [
        (
            "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("middle_block.2.emb_layers.1", "mid_block.resnets.1.time_emb_proj"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("out.2", "conv_out"),
    ],
)
def test_native_unet_names(native: str, path: str) -> None:
    """SD 1.5's and SDXL's, by hand; all of them against ComfyUI's table in test_lora_matrix.py."""
    for spelling in (native, flat_name(native)):
        module = LoraModule(spelling, torch.ones(1, 2), torch.ones(2, 1))
        assert list(with_diffusers_names({flat_name(native): module})) == [path]


def test_text_encoders_layers_are_written_in_both_spellings(tmp_path: Path) -> None:
    """In kohya's files one encoder has no number; several encoders have numbers."""
    denoiser = {"conv_in": LoraModule("conv_in", torch.randn(2, 4, 3, 3), torch.randn(8, 2, 1, 1), 2.0)}
    kohya = {
        f"lora_te{number}_text_model_encoder_layers_3_self_attn_q_proj": LoraModule(
            f"lora_te{number}_text_model_encoder_layers_3_self_attn_q_proj", torch.randn(2, 4), torch.randn(4, 2), 1.0
        )
        for number in (1, 2)
    }
    write_lora(tmp_path / "a", denoiser, None, dialect="diffusers", text_encoder=kohya)
    text = read_lora(tmp_path / "a").text_encoder
    assert sorted(module.path for module in text.values()) == [
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj",
    ]
    write_lora(tmp_path / "b", denoiser, None, dialect="kohya", text_encoder=text)
    back = read_lora(tmp_path / "b").text_encoder
    assert set(back) == set(kohya)
    for name, module in back.items():
        close(update(module), update(kohya[name]))
    first = {name: module for name, module in text.items() if module.path.startswith("text_encoder.")}
    write_lora(tmp_path / "c", denoiser, None, dialect="kohya", text_encoder=first)
    assert list(read_lora(tmp_path / "c").text_encoder) == ["lora_te_text_model_encoder_layers_3_self_attn_q_proj"]
    with pytest.raises(LoraError, match="PEFT folder holds one network"):
        write_lora(tmp_path / "d", denoiser, None, dialect="peft", text_encoder=text)
