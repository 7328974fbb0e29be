"""Hashes of a teacher's networks and tokenizers: equal where two loads give equal values.

A cache of encoded data is valid for one image encoder and one set of text encoders. Paths and names are no part of the
hashes, so a copy of a model has the hashes of the original.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

DIGITS = 16
# Settings that change a text encoder's output and leave no trace in its weights, of CLIP and T5.
ENCODER_SETTINGS = (
    *("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id", "bos_token_id"),
    *("feed_forward_proj", "layer_norm_epsilon", "num_heads", "relative_attention_max_distance"),
)
# The same of an autoencoder's encoder, and the scale and shift of its latents.
AUTOENCODER_SETTINGS = ("scaling_factor", "shift_factor", "act_fn", "norm_num_groups", "down_block_types")
# Shows what a tokenizer does with case, accents, spaces, numbers and special tokens, whatever its settings are called.
TOKENIZER_PROBE = "A  Photo, of it's \u00c9t\u00e9 <extra_id_0> <|endoftext|> 1234\t!"


def weights_hash(network: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters in the order of their names, without LoRA adapters."""
    digest = hashlib.sha256()
    for name, value in sorted(network.named_parameters()):
        if ".lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def short_hash(*facts: object) -> str:
    """Return a hash of facts that JSON can hold: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def image_encoder_hash(vae: Any) -> str:
    """Return the hash of an autoencoder's encoder with the scale and shift of its latents; the decoder may differ."""
    encoders = [vae.encoder, *([] if vae.quant_conv is None else [vae.quant_conv])]
    settings = {name: vae.config.get(name) for name in AUTOENCODER_SETTINGS}
    return short_hash([weights_hash(part) for part in encoders], settings)


def text_encoder_hash(parts: Mapping[str, Any], lengths: Mapping[str, int], family: str) -> str:
    """Return the hash of everything that turns a prompt into conditions.

    Args:
        parts: a pipeline's parts; the text encoders and tokenizers among them count.
        lengths: tokenizer -> the longest prompt in tokens.
        family: the family, which says what is read of the encoders' outputs.
    """
    encoders, tokenizers = {}, {}
    for name, part in parts.items():
        if isinstance(part, nn.Module) and name.startswith("text_encoder"):
            settings = {key: getattr(part.config, key, None) for key in ENCODER_SETTINGS}
            encoders[name] = (weights_hash(part), str(next(part.parameters()).dtype), settings)
        elif part is not None and name.startswith("tokenizer"):
            tokenizers[name] = tokenizer_hash(part)
    return short_hash(family, encoders, tokenizers, dict(lengths))


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the hash of a tokenizer's vocabulary, merges or scores, and of its tokens for a sample text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: object
    if backend is not None:
        content = json.loads(backend.to_str())["model"]  # truncation and padding, beside it, follow the last call
    elif hasattr(tokenizer, "sp_model"):
        content = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
    else:
        ranks = getattr(tokenizer, "bpe_ranks", {})
        content = [" ".join(pair) for pair, _ in sorted(ranks.items(), key=lambda item: item[1])]
    sample = list(tokenizer(TOKENIZER_PROBE, verbose=False).input_ids)
    return short_hash(content, tokenizer.get_vocab(), sample, tokenizer.pad_token_id)
