"""Broken or malicious LoRA files: each raises a readable error, with little memory, and runs no code."""

from __future__ import annotations

import json
import pickle
import resource
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from flash_diffusion.flash_core.lora import FlashMetadata, LoraError, read_lora

LAYER = "lora_unet_mid_block_attentions_0_proj_in"
DIFF, BIAS = f"{LAYER}.diff", f"{LAYER}.diff_b"
DOWN, UP, ALPHA = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", f"{LAYER}.alpha"
SECONDS = 300  # a scan of quadratic time, or a regular expression that backtracks, takes hours
MEGABYTES = 200.0


def halves(rank: int = 4) -> dict[str, Tensor]:
    return {DOWN: torch.randn(rank, 6), UP: torch.randn(8, rank)}


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file by hand: the header's length, the header, the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_value(dtype: torch.dtype, value: float) -> bytes:
    """One bad number in a half."""
    tensors = {key: half.to(dtype) for key, half in halves().items()}
    tensors[UP].view(-1)[17:18] = torch.tensor([value]).to(dtype)
    return save(tensors)


class Bomb:
    """Unpickling this would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def torch_pickle(folder: Path) -> bytes:
    torch.save({"lora": Bomb(folder / "executed")}, folder / "pickle.pt")
    return (folder / "pickle.pt").read_bytes()


TWO = {"a": entry([2], 0, 8), "b": entry([2], 8, 16)}
MANY = b"{" + b",".join(b'"k%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]}' % n for n in range(120_000)) + b"}"
STRINGS = b'{"__metadata__":{' + b",".join(b'"%06x":""' % n for n in range(600_000)) + b"}}"

# {the fault: (the file's bytes or tensors, a word of the error)}
BROKEN: dict[str, tuple[Callable[[Path], bytes | dict[str, Tensor]], str]] = {
    # the container
    "empty": (lambda _: b"", "it is empty"),
    "three bytes": (lambda _: b"abc", "shorter than its header"),
    "truncated": (lambda _: save(halves())[:-40], "truncated"),
    "truncated in the header": (lambda _: save(halves())[:60], "truncated"),
    "more than the header tells": (lambda _: save(halves()) + b"\0" * 8, "but it holds"),
    "random bytes": (lambda _: b"\x12\x34" * 500, "not a readable safetensors"),
    "a web page": (lambda _: b"<!DOCTYPE html><html>Not found</html>", "not a readable safetensors"),
    "header of 2^62 bytes": (lambda _: container(b"{}", length=2**62), "shorter than its header"),
    "header of 2^64 - 1 bytes": (lambda _: container(b"{}", length=2**64 - 1), "shorter than its header"),
    "header of 60 MB": (lambda _: container(b"{" + b" " * 60_000_000 + b"}"), "the limit is"),
    "header is no JSON": (lambda _: container(b"{nonsense"), "not a readable safetensors"),
    "header is not UTF-8": (lambda _: container(b'{"\xff\xfe": 1}'), "not a readable safetensors"),
    "header is a list": (lambda _: container(b"[]"), "not JSON"),
    "header nested deeply": (lambda _: container(b'{"a":' + b"[" * 70_000 + b"]" * 70_000 + b"}"), "too deeply"),
    "header nested in objects": (lambda _: container(b'{"a":' * 70_000 + b"1" + b"}" * 70_000), "too deeply"),
    "header of a million lists": (lambda _: container(b'{"a":[' + b"[],[]," * 500_000 + b"1]}"), "more than"),
    "120,000 tensors": (lambda _: container(MANY), "more than"),
    "600,000 strings": (lambda _: container(STRINGS), "strings"),
    "a tensor without a place": (lambda _: container({DOWN: {"dtype": "F32", "shape": [1]}}), "lacks its type"),
    "a tensor that is a number": (lambda _: container({DOWN: 3}), "lacks its type"),
    "negative place": (lambda _: container({DOWN: entry([2], -8, 0)}, b"\0" * 8), "list of whole numbers"),
    "huge place": (lambda _: container({DOWN: entry([2], 2**60, 2**60 + 8)}, b"\0" * 8), "list of whole numbers"),
    "place beyond the file": (lambda _: container({DOWN: entry([2**20], 0, 2**22)}, b"\0" * 8), "but it holds"),
    "overlapping": (lambda _: container({**TWO, "b": entry([2], 4, 12)}, b"\0" * 16), "overlap"),
    "gap": (lambda _: container({**TWO, "b": entry([2], 12, 20)}, b"\0" * 20), "gaps"),
    "huge shape": (lambda _: container({DOWN: entry([2**40, 2**40], 0, 8)}, b"\0" * 8), "does not fill"),
    "negative shape": (lambda _: container({DOWN: entry([-1, -2], 0, 8)}, b"\0" * 8), "list of whole numbers"),
    "shape of booleans": (lambda _: container({DOWN: entry([True, 2], 0, 8)}, b"\0" * 8), "list of whole numbers"),
    "40 dimensions": (lambda _: container({DOWN: entry([1] * 40, 0, 4)}, b"\0" * 4), "list of whole numbers"),
    "unknown type": (lambda _: container({DOWN: entry([2], 0, 2, "F4")}, b"\0" * 2), "PyTorch can't hold"),
    "type is a list": (lambda _: container({DOWN: {**entry([2], 0, 8), "dtype": []}}, b"\0" * 8), "PyTorch can't hold"),
    "metadata of numbers": (lambda _: container({"__metadata__": {"a": 1}}), "table of strings"),
    "the same key twice": (
        lambda _: container(b'{"a":%b,"a":%b}' % ((json.dumps(entry([2], 0, 8)).encode(),) * 2), b"\0" * 8),
        "twice",
    ),
    # pickles
    "pickle": (lambda folder: pickle.dumps(Bomb(folder / "executed")), "pickle"),
    "torch.save": (torch_pickle, "pickle"),
    # not LoRA
    "no LoRA": (lambda _: {"conv_in.weight": torch.ones(3, 3)}, "no LoRA layers"),
    "keys like paths": (
        lambda _: {f"../../etc/{half}": torch.ones(2, 2) for half in ("x.lora_down.weight", "x.lora_up.weight")},
        "no LoRA layers",
    ),
    "a key of a megabyte": (
        lambda _: {f"{'x' * 1_000_000}.{half}.weight": torch.ones(2, 2) for half in ("lora_A", "lora_B")},
        "no LoRA layers",
    ),
    "a key of a million dots": (
        lambda _: {f"lora_unet_{'.' * 1_000_000}.{half}.weight": torch.ones(2, 2) for half in ("lora_A", "lora_B")},
        "no LoRA layers",
    ),
    "a long key on one half": (
        lambda _: {f"lora_unet_{'x.' * 120}x.lora_A.weight": torch.ones(2, 2)},
        "both halves",
    ),
    "keys of nothing but a suffix": (lambda _: {".lora_down.weight": torch.ones(2, 2)}, "no LoRA layers"),
    # layers
    "half a layer": (lambda _: {DOWN: torch.ones(2, 2)}, "both halves"),
    "alpha alone": (lambda _: {ALPHA: torch.tensor(1.0)}, "both halves"),
    "halves do not fit": (lambda _: {DOWN: torch.ones(4, 6), UP: torch.ones(8, 3)}, "do not fit"),
    "halves of 1 dimension": (lambda _: {DOWN: torch.ones(4), UP: torch.ones(4)}, "do not fit"),
    "halves of 3 dimensions": (lambda _: {DOWN: torch.ones(4, 6, 1), UP: torch.ones(8, 4, 1)}, "do not fit"),
    "kernel in the up half": (lambda _: {DOWN: torch.ones(4, 6, 3, 3), UP: torch.ones(8, 4, 3, 3)}, "do not fit"),
    "rank 0": (lambda _: {DOWN: torch.ones(0, 6), UP: torch.ones(8, 0)}, "do not fit"),
    "no inputs": (lambda _: {DOWN: torch.ones(4, 0), UP: torch.ones(8, 4)}, "do not fit"),
    "rank 10,000": (lambda _: {DOWN: torch.ones(10_000, 1), UP: torch.ones(1, 10_000)}, "above any LoRA"),
    "middle that does not fit": (lambda _: {**halves(), f"{LAYER}.lora_mid.weight": torch.ones(4, 4)}, "do not fit"),
    "the same layer twice": (
        lambda _: {**halves(), **{key.replace("lora_unet_", "lycoris_"): half for key, half in halves().items()}},
        "ambiguous",
    ),
    # numbers
    "integers": (lambda _: {key: half.int() for key, half in halves().items()}, "int32"),
    "booleans": (lambda _: {key: half > 0 for key, half in halves().items()}, "bool"),
    "NaN": (lambda _: with_value(torch.float32, float("nan")), "finite"),
    "infinity": (lambda _: with_value(torch.float32, float("inf")), "finite"),
    "minus infinity in float16": (lambda _: with_value(torch.float16, float("-inf")), "finite"),
    "NaN in bfloat16": (lambda _: with_value(torch.bfloat16, float("nan")), "finite"),
    "NaN in float64": (lambda _: with_value(torch.float64, float("nan")), "finite"),
    "NaN in 8 bits": (lambda _: with_value(torch.float8_e4m3fn, float("nan")), "finite"),
    "infinity in 8 bits": (lambda _: with_value(torch.float8_e5m2, float("inf")), "finite"),
    "alpha is infinite": (lambda _: {**halves(), ALPHA: torch.tensor(float("inf"))}, "one finite number"),
    "alpha is NaN in bfloat16": (
        lambda _: {**halves(), ALPHA: torch.tensor(float("nan"), dtype=torch.bfloat16)},
        "one finite number",
    ),
    "alpha is NaN in 8 bits": (
        lambda _: {**halves(), ALPHA: torch.tensor(float("nan")).to(torch.float8_e4m3fn)},
        "one finite number",
    ),
    "changes of whole weights alone": (lambda _: {DIFF: torch.ones(4, 4), BIAS: torch.ones(4)}, "Load LoRA"),
    "a LoRA and a change of the whole weight": (lambda _: {**halves(), DIFF: torch.ones(4, 4)}, "ambiguous"),
    "NaN in a change of a bias": (lambda _: {**halves(), BIAS: torch.full((4,), float("nan"))}, "finite"),
    "integers in a change of a bias": (lambda _: {**halves(), BIAS: torch.ones(4).int()}, "int32"),
    "alpha is true": (lambda _: {**halves(), ALPHA: torch.tensor(True)}, "one finite number"),
    "alpha of two numbers": (lambda _: {**halves(), ALPHA: torch.ones(2)}, "one finite number"),
    "alpha of none": (lambda _: {**halves(), ALPHA: torch.ones(0)}, "one finite number"),
}


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_raise_a_readable_error(kind: str, tmp_path: Path) -> None:
    make, word = BROKEN[kind]
    content = make(tmp_path)
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    del content
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoraError, match=word) as caught:
        read_lora(path)
    if sys.platform == "linux":  # elsewhere in other units
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES
    assert "bad.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["120,000 tensors", "600,000 strings", "header of 60 MB", "header of a million lists"])
def test_memory_for_broken_headers_is_bounded(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    content = BROKEN[kind][0](tmp_path)
    assert isinstance(content, bytes)
    path.write_bytes(content)
    del content
    tracemalloc.start()
    try:
        with pytest.raises(LoraError):
            read_lora(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / 2**20 < MEGABYTES


@pytest.mark.parametrize(
    ("tensor", "algorithm"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("hada_t2", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_b", "LoKr"),
        ("oft_blocks", "OFT"),
        ("oft_R.weight", "OFT"),
        ("boft_R", "BOFT"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA3"),
        ("vera_lambda_b", "VeRA"),
        ("lora_E", "AdaLoRA"),
    ],
)
@pytest.mark.parametrize("prefix", ["lycoris_mid_block", "base_model.model.mid_block", "diffusion_model.middle_block"])
def test_other_algorithms_raise_an_error(tensor: str, algorithm: str, prefix: str, tmp_path: Path) -> None:
    save_file({**halves(), f"{prefix}.{tensor}": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(LoraError, match=f"other.safetensors is a {algorithm} file"):
        read_lora(tmp_path / "other.safetensors")


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("{", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[]", "JSON object"),
        (b"\xff\xfe\xff", "can't be read"),
        (" " * 1_100_000, "more than 1,048,576 bytes"),
        ('{"lora_alpha": "8"}', "finite number"),
        ('{"lora_alpha": true}', "finite number"),
        ('{"lora_alpha": null}', "finite number"),
        ('{"lora_alpha": NaN}', "finite number"),
        ('{"lora_alpha": 8, "alpha_pattern": [1]}', "should be a table"),
        ('{"lora_alpha": 8, "alpha_pattern": {"proj_in": "x"}}', "finite number"),
        ('{"lora_alpha": 8, "alpha_pattern": {"(a+)+$": 1}}', "regular expression"),
        ('{"lora_alpha": 8, "use_dora": true}', "DoRA"),
        ('{"peft_type": "LOHA", "alpha": 8}', "LOHA"),
    ],
)
def test_broken_settings_raise_a_readable_error(config: str | bytes, word: str, tmp_path: Path) -> None:
    save_file(halves(), tmp_path / "adapter_model.safetensors")
    path = tmp_path / "adapter_config.json"
    path.write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(LoraError, match=word):
        read_lora(tmp_path)


def test_broken_settings_in_the_header_raise_a_readable_error(tmp_path: Path) -> None:
    save_file(halves(), tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(LoraError, match="header of x.safetensors is not readable JSON"):
        read_lora(tmp_path / "x.safetensors")


def test_missing_files_and_folders_raise_a_readable_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.safetensors", tmp_path, Path("/dev/null")):
        with pytest.raises(LoraError, match="no LoRA file"):
            read_lora(path)


FLASH = FlashMetadata("sd15", "epsilon", "vp", {4: (999.0, 749.0, 499.0, 249.0)}).to_header()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flash.timesteps", None),
        ("flash.timesteps", "{"),
        ("flash.timesteps", "[" * 70_000),
        ("flash.timesteps", "[4]"),
        ("flash.timesteps", '{"4": [NaN]}'),
        ("flash.timesteps", '{"4": [2000]}'),
        ("flash.timesteps", json.dumps({str(steps): [999.0] for steps in range(1, 200)})),
        ("flash.steps", "four"),
        ("flash.guidance", "inf"),
        ("flash.base", None),
    ],
)
def test_a_bad_flash_header(field: str, value: str | None, tmp_path: Path) -> None:
    header = {name: text for name, text in {**FLASH, field: value}.items() if text is not None}
    save_file(halves(), tmp_path / "lora.safetensors", metadata=header)
    with pytest.raises(LoraError, match="lora.safetensors: the Flash LoRA header"):
        read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_every_floating_type_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {**halves(), ALPHA: torch.tensor(3.5)}  # a number of every type
    save_file({key: value.to(dtype) for key, value in tensors.items()}, tmp_path / "lora.safetensors")
    (module,) = read_lora(tmp_path / "lora.safetensors").modules.values()
    assert module.down.dtype == dtype
    assert module.alpha == 3.5


def test_large_numbers_are_numbers(tmp_path: Path) -> None:
    """The sum overflows, although every number is finite."""
    tensors = {key: torch.full_like(half, 60_000, dtype=torch.float16) for key, half in halves().items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert len(read_lora(tmp_path / "lora.safetensors").modules) == 1


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_without_alignment_is_read(mapped: bool, tmp_path: Path) -> None:
    """Writers pad the header to multiples of 8 bytes; the format does not ask for it."""
    tensors = halves()
    header, data = {}, b""
    for key, half in tensors.items():
        raw = half.numpy().tobytes()
        header[key] = entry(list(half.shape), len(data), len(data) + len(raw))
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (1 + -len(text) % 8)
    (tmp_path / "lora.safetensors").write_bytes(container(text, data))
    (module,) = read_lora(tmp_path / "lora.safetensors", mapped=mapped).modules.values()
    assert torch.equal(module.down, tensors[DOWN])
    assert torch.equal(module.up, tensors[UP])


def test_a_file_need_not_be_mapped(tmp_path: Path) -> None:
    save_file({**halves(), ALPHA: torch.tensor(2.0, dtype=torch.bfloat16)}, tmp_path / "lora.safetensors")
    (one,) = read_lora(tmp_path / "lora.safetensors").modules.values()
    (other,) = read_lora(tmp_path / "lora.safetensors", mapped=False).modules.values()
    assert one.alpha == other.alpha == 2.0
    assert torch.equal(one.down, other.down)
    assert torch.equal(one.up, other.up)


def test_tensors_stay_valid_after_the_file_is_replaced(tmp_path: Path) -> None:
    """Training replaces a file that a model in ComfyUI still has loaded."""
    first, second = halves(), halves()
    save_file(first, tmp_path / "lora.safetensors")
    (module,) = read_lora(tmp_path / "lora.safetensors").modules.values()
    save_file(second, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "lora.safetensors")
    assert torch.equal(module.down, first[DOWN])


def test_a_text_encoders_numbers_are_left_unread(tmp_path: Path) -> None:
    """They do not go into the denoiser: a bad one is no reason to refuse the file."""
    text = {key.replace("lora_unet_", "lora_te_"): half for key, half in halves().items()}
    text[UP.replace("lora_unet_", "lora_te_")][0, 0] = float("nan")
    save_file(halves() | text, tmp_path / "lora.safetensors")
    assert len(read_lora(tmp_path / "lora.safetensors").text_encoder) == 1
