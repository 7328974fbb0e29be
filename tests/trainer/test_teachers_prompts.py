"""Prompts that are longer than text encoders read: each is found and warned of once, in a readable sentence."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.tokens import load_tokenizers

from ..families.pipelines import PROMPT_LENGTH, save_pipeline

# Family, options, and the longest prompt in tokens: the stand-ins' CLIP reads 16 in place of 77, T5 its true lengths.
LENGTHS = [
    ("sd15", {}, PROMPT_LENGTH),
    ("sdxl", {}, PROMPT_LENGTH),
    ("pixart_alpha", {}, 120),
    ("pixart_sigma", {}, 300),
    ("sd3", {}, 256),
    ("sd3", {"t5": False}, PROMPT_LENGTH),
]


@pytest.mark.parametrize(("family", "options", "length"), LENGTHS)
def test_long_prompts_are_found_and_warned_of_once(
    family: str,
    options: dict[str, bool],
    length: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A prompt is cut if and only if one more word at its end changes none of its conditions."""
    model = ModelSection.model_validate({"family": family, "path": str(save_pipeline(family, tmp_path / "model"))})
    teacher = load_teacher(model.model_copy(update=options), resolution=64)
    reader = teacher.pipeline.tokenizer_3 if length == 256 else teacher.pipeline.tokenizer
    word = next(text for text in "abcdefgh" if len(reader(text).input_ids) - len(reader("").input_ids) <= 2)
    counted = [len(reader(" ".join([word] * count)).input_ids) for count in range(1, length + 2)]
    fits = max(count for count, tokens in enumerate(counted, start=1) if tokens <= length)
    prompts = ["", " ".join([word] * fits), " ".join([word] * (fits + 1)), " ".join([word] * 3 * length)]
    caplog.clear()
    capfd.readouterr()
    assert teacher.cut_prompts(prompts) == [False, False, True, True]
    assert teacher.cut_prompts([]) == []
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            conditioning = teacher.encode_prompts(prompts).cross_attention
    assert conditioning is not None
    assert torch.equal(conditioning[2], conditioning[3])
    assert not torch.equal(conditioning[0], conditioning[1])
    printed = "".join(capfd.readouterr())
    assert "indexing errors" not in printed
    assert "endoftext" not in printed
    [message] = [record.getMessage() for record in caplog.records]
    assert f"longer than the {length} tokens that the text encoder reads" in message
    assert repr(f"{prompts[2][:60]}...") in message or repr(prompts[2]) in message


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_tokenizer_reads_no_more_tokens_than_its_encoder_has_positions(family: str, tmp_path: Path) -> None:
    """Some tokenizers name a length that no CLIP has, such as 8192."""
    folder = save_pipeline(family, tmp_path / "model")
    model = ModelSection.model_validate({"family": family, "path": str(folder)})
    prompts = [" ".join(["a"] * 3 * PROMPT_LENGTH), "a"]
    expected = load_teacher(model, resolution=64).encode_prompts(prompts)
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        if path.parent.name != "tokenizer_3":  # T5's
            path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 8192}))
    found = load_teacher(model, resolution=64).encode_prompts(prompts)
    assert found.cross_attention is not None
    assert expected.cross_attention is not None
    assert torch.equal(found.cross_attention, expected.cross_attention)
    assert {one.length for one in load_tokenizers(folder)} <= {PROMPT_LENGTH, 512}
