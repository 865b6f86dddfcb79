"""A tiny random Llama checkpoint in the Hugging Face layout, with a byte tokenizer: real files, made in a second."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 257,
}

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(folder: Path, seed: int = 0, outlier: float = 1.0) -> Path:
    """Write a checkpoint into `folder` and return it; `outlier` scales one channel of every norm."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return values

    d, ff, heads, kv_heads = 48, 96, 6, 2
    head_dim = d // heads
    tensors = {"model.embed_tokens.weight": random(272, d) * 4, "model.norm.weight": torch.ones(d)}
    for index in range(2):
        layer = f"model.layers.{index}."
        norm = torch.ones(d)
        norm[5] = outlier
        tensors |= {
            f"{layer}input_layernorm.weight": norm.clone(),
            f"{layer}post_attention_layernorm.weight": norm.clone(),
            f"{layer}self_attn.q_proj.weight": random(d, d),
            f"{layer}self_attn.k_proj.weight": random(kv_heads * head_dim, d),
            f"{layer}self_attn.v_proj.weight": random(kv_heads * head_dim, d),
            f"{layer}self_attn.o_proj.weight": random(d, d),
            f"{layer}mlp.gate_proj.weight": random(ff, d),
            f"{layer}mlp.up_proj.weight": random(ff, d),
            f"{layer}mlp.down_proj.weight": random(d, ff),
        }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges: ids 0-255 are bytes, 256 to 258 control tokens."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {"id": 256 + i, "content": text, "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for i, text in enumerate(control)
    ]  # fmt: skip
    model = {
        "type": "BPE",
        "vocab": {c: i for i, c in enumerate(alphabet)} | {t["content"]: t["id"] for t in added},
        "merges": [],
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
