"""GGUF files of the llama architecture, opened as Hugging Face config, tensors and tokenizer.

Source: the GGUF specification (ggml-org/ggml docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py, whose permutation of
q and k rows is undone here.
"""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from schemas.errors import CheckpointError

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""Pre-tokenizers that split digits one by one before the byte-level regex. Source: llama.cpp llama-vocab.cpp."""

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of the GGUF specification."""


def _reader(path: Path) -> gguf.GGUFReader:
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file: {error}", remedy="download it again") from error
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(f'{path}: GGUF architecture is "{architecture}", and this version opens "llama"')
    return reader


def _field(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def read_config(path: Path) -> dict[str, Any]:
    """Return a config.json of the file's sizes. Raises: CheckpointError if it is no llama GGUF, or scales its rope."""
    reader = _reader(path)
    if _field(reader, "llama.rope.scaling.type", "none") != "none" or any(
        t.name == "rope_freqs.weight" for t in reader.tensors
    ):
        raise CheckpointError(
            f"{path}: rope scaling in GGUF is not read by this version", remedy="use the safetensors checkpoint"
        )
    heads = int(_field(reader, "llama.attention.head_count"))
    hidden_size = int(_field(reader, "llama.embedding_length"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": int(_field(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(_field(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv", heads)),
        "head_dim": int(_field(reader, "llama.attention.key_length", hidden_size // heads)),
        "vocab_size": next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"),
        "max_position_embeddings": int(_field(reader, "llama.context_length")),
        "rms_norm_eps": float(np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon"))),
        "rope_theta": float(_field(reader, "llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "torch_dtype": "float32",
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the weights as float32 under their Hugging Face names, q and k rows back in half-split order."""
    reader = _reader(path)
    heads = int(_field(reader, "llama.attention.head_count"))
    kv_heads = int(_field(reader, "llama.attention.head_count_kv", heads))
    tensors = {}
    for tensor in reader.tensors:
        name = _hugging_face_name(tensor.name, path)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = torch.from_numpy(np.ascontiguousarray(values))
        if name.endswith("q_proj.weight"):
            weight = _unpermute(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = _unpermute(weight, kv_heads)
        tensors[name] = weight
    return tensors


def _hugging_face_name(name: str, path: Path) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in _NAMES:
        raise CheckpointError(f"{path}: tensor {name} is not part of a llama model")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.weight"


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Return rows [heads * head_dim, K] as halves; llama.cpp stores them as interleaved pairs."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_tokenizer(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (tokenizer.json, tokenizer_config.json) of the file's byte-level BPE.

    Raises: CheckpointError for another tokenizer model, or a pre-tokenizer this version does not know.
    """
    reader = _reader(path)
    model, pre = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in (*_SPLIT_DIGITS, "gpt-2", "default"):
        raise CheckpointError(
            f'{path}: tokenizer model "{model}" with pre-tokenizer "{pre}" is not read from GGUF by this version',
            remedy="use the safetensors checkpoint, which has a tokenizer.json",
        )
    tokens, kinds = _field(reader, "tokenizer.ggml.tokens"), _field(reader, "tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    added = [
        {
            "id": i, "content": tokens[i], "special": kind == _CONTROL, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False,
        }
        for i, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}
        if pre in _SPLIT_DIGITS
        else byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _field(reader, "tokenizer.ggml.merges"),
        },
    }
    settings: dict[str, Any] = {"chat_template": _field(reader, "tokenizer.chat_template")}
    for name in ("bos", "eos"):
        token_id = _field(reader, f"tokenizer.ggml.{name}_token_id")
        settings[f"{name}_token"] = tokens[token_id] if token_id is not None else None
    return tokenizer, settings
