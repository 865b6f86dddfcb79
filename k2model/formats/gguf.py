"""GGUF files opened like any other checkpoint: config.json, weights by the model's names, and tokenizer.

Source: llama.cpp's converters, whose permutation of q and k rows (architecture llama) and split of kv_b_proj into k_b
and v_b (deepseek2) are undone here.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2model.config import LatentAttentionConfig, ModelConfig
from k2model.formats.folder import local_folder
from k2model.formats.gguf_config import config_of
from k2model.formats.gguf_file import GgufFile, read_gguf
from k2model.formats.names import Readable
from k2model.formats.weights import TensorInfo, Weights
from k2model.pretokenizers import BYTE_LEVEL, pre_tokenizer
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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_WHOLE = {"attn_sinks.weight": "self_attn.sinks", "exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
_STACKED = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of the GGUF specification."""


def read_config(path: Path) -> dict[str, Any]:
    """Return a config.json of the file at `path`. Raises: CheckpointError if it is not read."""
    return config_of(_open(path))


def weights(file: GgufFile) -> Weights:
    """Return the weights of `file` under the model's names, each expanded to float32 when asked for."""
    where = file.folder.where
    config = ModelConfig.from_dict(config_of(file), where)
    found: dict[str, Readable] = {}
    for name in file.tensors:
        for made, readable in _readables(file, config, name):
            if made in found:
                raise CheckpointError(f"{where}: two tensors are both {made}; one of them is {name}")
            found[made] = readable
    infos = {name: readable.info for name, readable in found.items()}
    return Weights(where, infos, lambda name: found[name].read())


def _open(path: Path) -> GgufFile:
    return read_gguf(local_folder(path.parent, str(path)), path.name)


def _readables(file: GgufFile, config: ModelConfig, name: str) -> Iterator[tuple[str, Readable]]:
    """Yield what tensor `name` of the file holds, under the model's names."""
    if name == "rope_freqs.weight":
        return  # read with the config
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        raise _unknown(file, name)
    number, kind, ending = found.groups()
    layer = f"model.layers.{number}." if number is not None else ""
    info = TensorInfo(file.tensors[name].dtype, file.tensors[name].shape)
    if kind in _STACKED:
        for expert in range(info.shape[0]):
            one = TensorInfo(info.dtype, info.shape[1:])
            made = f"{layer}mlp.experts.{expert}.{_STACKED[kind]}.{ending}"
            yield made, Readable(one, partial(file.read, name, expert))
    elif kind in ("attn_k_b", "attn_v_b"):
        if kind == "attn_k_b" and f"blk.{number}.attn_kv_b.weight" not in file.tensors:
            yield f"{layer}self_attn.kv_b_proj.weight", _joined(file, config, f"blk.{number}.")
    elif f"{kind}.{ending}" in _WHOLE:
        yield layer + _WHOLE[f"{kind}.{ending}"], Readable(info, partial(file.read, name))
    elif kind in _NAMES:
        heads = _permuted_heads(file, config, kind)
        read = partial(_unpermuted, file, name, heads) if heads else partial(file.read, name)
        yield f"{layer}{_NAMES[kind]}.{ending}", Readable(info, read)
    else:
        raise _unknown(file, name)


def _unknown(file: GgufFile, name: str) -> CheckpointError:
    arch = file.fields["general.architecture"]
    return CheckpointError(f"{file.folder.where}: tensor {name} is not known for architecture {arch}")


def _permuted_heads(file: GgufFile, config: ModelConfig, kind: str) -> int:
    """Return how many heads' rows of a tensor are permuted; 0 for none."""
    if file.fields["general.architecture"] != "llama" or isinstance(config.attention, LatentAttentionConfig):
        return 0
    attention = config.attention
    return {"attn_q": attention.num_attention_heads, "attn_k": attention.num_key_value_heads}.get(kind, 0)


def _unpermuted(file: GgufFile, name: str, heads: int) -> Tensor:
    """Return rows [heads * head_dim, ...] as halves; llama.cpp stores them as interleaved pairs."""
    values = file.read(name)
    rows = values.shape[0] // heads
    return values.view(heads, rows // 2, 2, -1).transpose(1, 2).reshape(values.shape)


def _joined(file: GgufFile, config: ModelConfig, block: str) -> Readable:
    """Return kv_b_proj [H (nope + v), R], from k_b [H, R, nope] and v_b [H, v, R]."""
    attention = config.attention
    assert isinstance(attention, LatentAttentionConfig)
    heads, rank = attention.num_attention_heads, attention.kv_lora_rank
    key, value = f"{block}attn_k_b.weight", f"{block}attn_v_b.weight"
    shapes = {key: (heads, rank, attention.qk_nope_head_dim), value: (heads, attention.v_head_dim, rank)}
    for name, shape in shapes.items():
        tensor = file.tensors.get(name)
        if tensor is None or tensor.shape != shape:
            raise CheckpointError(
                f"{file.folder.where}: tensor {name} is {tensor.shape if tensor else 'missing'}, expected {shape}"
            )

    def read() -> Tensor:
        return torch.cat((file.read(key).transpose(1, 2), file.read(value)), dim=1).flatten(0, 1)

    rows = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return Readable(TensorInfo(file.tensors[value].dtype, (rows, rank)), read)


def read_tokenizer(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (tokenizer.json, tokenizer_config.json) of the file's byte-level BPE.

    Raises: CheckpointError for another tokenizer model, or a pre-tokenizer this version does not know.
    """
    fields = _open(path).fields
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f'{path}: the tokenizer model "{model}" is not read from GGUF, only byte-level BPE ("gpt2")',
            remedy="use the safetensors checkpoint, which has a tokenizer.json",
        )
    splits, whole_pieces_first = pre_tokenizer(fields.get("tokenizer.ggml.pre", "default"), str(path))
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
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
        "pre_tokenizer": splits,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_pieces_first,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    settings: dict[str, Any] = {"chat_template": fields.get("tokenizer.chat_template")}
    for name in ("bos", "eos"):
        token_id = fields.get(f"tokenizer.ggml.{name}_token_id")
        settings[f"{name}_token"] = tokens[token_id] if token_id is not None else None
    return tokenizer, settings
