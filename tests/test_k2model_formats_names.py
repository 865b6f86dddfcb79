"""Names of files to names of the model, and layers' fused experts to single ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from k2model.formats.folder import local_folder
from k2model.formats.mxfp4 import expand_mxfp4
from k2model.formats.names import Readable, canonical, readables
from k2model.formats.shards import read_headers
from schemas.errors import CheckpointError

E, D, F = 3, 64, 32


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.experts.0.up_proj.weight_packed", "model.layers.1.mlp.experts.0.up_proj.weight_packed"),
        ("language_model.model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
        ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "model.layers.0.mlp.experts.7.gate_proj.weight"),
        (
            "model.layers.0.block_sparse_moe.experts.7.w3.weight_scale",
            "model.layers.0.mlp.experts.7.up_proj.weight_scale",
        ),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", "model.layers.0.mlp.experts.7.down_proj.weight"),
        ("model.layers.0.mlp.router.bias", "model.layers.0.mlp.gate.bias"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.2.eh_proj.weight", None),
        ("language_model.model.layers.2.mlp.gate.weight", None),
        ("vision_tower.encoder.blocks.0.wqkv.weight", None),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("mm_projector.proj.0.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
    ],
)
def test_a_files_name_is_the_models(name: str, expected: str | None) -> None:
    assert canonical(name, num_hidden_layers=2) == expected


def written(folder: Path, tensors: dict[str, Tensor], family: str) -> dict[str, Readable]:
    save_file(tensors, folder / "model.safetensors")
    opened = local_folder(folder, "here")
    return readables(opened, read_headers(opened), family, 2)


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(2), "language_model.model.norm.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"two tensors are both model\.norm\.weight"):
        written(tmp_path, tensors, "llama")


def test_gpt_oss_experts_alternate_gate_and_up(tmp_path: Path) -> None:
    experts = "model.layers.1.mlp.experts"
    fused = {
        f"{experts}.gate_up_proj": torch.randn(E, D, 2 * F, dtype=torch.bfloat16),
        f"{experts}.gate_up_proj_bias": torch.randn(E, 2 * F),
        f"{experts}.down_proj": torch.randn(E, F, D),
        f"{experts}.down_proj_bias": torch.randn(E, D),
    }
    found = written(tmp_path, fused, "gpt_oss")
    assert len(found) == 6 * E
    for expert in range(E):
        gate_up = fused[f"{experts}.gate_up_proj"][expert]
        expected = {
            "gate_proj.weight": gate_up[:, 0::2].T,
            "up_proj.weight": gate_up[:, 1::2].T,
            "gate_proj.bias": fused[f"{experts}.gate_up_proj_bias"][expert, 0::2],
            "up_proj.bias": fused[f"{experts}.gate_up_proj_bias"][expert, 1::2],
            "down_proj.weight": fused[f"{experts}.down_proj"][expert].T,
            "down_proj.bias": fused[f"{experts}.down_proj_bias"][expert],
        }
        for name, tensor in expected.items():
            readable = found[f"{experts}.{expert}.{name}"]
            assert readable.read().equal(tensor)
            assert readable.info.shape == tuple(tensor.shape)


def test_other_families_fuse_gate_before_up(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    fused = {f"{experts}.gate_up_proj": torch.randn(E, 2 * F, D), f"{experts}.down_proj": torch.randn(E, D, F)}
    found = written(tmp_path, fused, "qwen3_moe")
    assert found[f"{experts}.1.gate_proj.weight"].read().equal(fused[f"{experts}.gate_up_proj"][1, :F])
    assert found[f"{experts}.1.up_proj.weight"].read().equal(fused[f"{experts}.gate_up_proj"][1, F:])
    assert found[f"{experts}.2.down_proj.weight"].read().equal(fused[f"{experts}.down_proj"][2])


def test_mxfp4_has_the_low_nibble_first_and_powers_of_two() -> None:
    blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x7F  # 15 is -6, below 7, which is 6
    blocks[0, 1, 15] = 0x19  # 9 is -0.5 and comes first, 1 is 0.5
    values = expand_mxfp4(blocks, torch.tensor([[127, 130]], dtype=torch.uint8))
    assert values.shape == (1, 64)
    assert values[0, :2].tolist() == [-6.0, 6.0]
    assert values[0, -2:].tolist() == [-4.0, 4.0]
    every = expand_mxfp4(torch.arange(16, dtype=torch.uint8).view(1, 1, 16), torch.tensor([[126]], dtype=torch.uint8))
    positive = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    assert every[0, 0::2].tolist() == positive + [-value for value in positive]
    extremes = expand_mxfp4(torch.full((1, 1, 16), 2, dtype=torch.uint8), torch.tensor([[0]], dtype=torch.uint8))
    assert extremes[0, 0].item() == 2.0**-127


def test_mxfp4_experts_are_rows_of_out_features(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    blocks = torch.randint(0, 256, (E, 2 * F, D // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (E, 2 * F, D // 32), dtype=torch.uint8)
    fused = {f"{experts}.gate_up_proj_blocks": blocks, f"{experts}.gate_up_proj_scales": scales}
    found = written(tmp_path, fused, "gpt_oss")
    whole = expand_mxfp4(blocks, scales)
    assert found[f"{experts}.2.gate_proj.weight"].read().equal(whole[2, 0::2])
    assert found[f"{experts}.2.up_proj.weight"].read().equal(whole[2, 1::2])
    info = found[f"{experts}.0.up_proj.weight"].info
    assert (info.dtype, info.shape) == ("MXFP4", (F, D))
    with pytest.raises(CheckpointError, match="gate_up_proj_blocks is U8"):
        written(tmp_path, {f"{experts}.gate_up_proj_blocks": blocks}, "gpt_oss")
