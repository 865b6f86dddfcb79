"""Dense models cut into experts: the same computation with all of them, and the nearest one found with fewer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2model.compress.convert import convert
from k2model.compress.experts import Cut, cut_experts
from k2model.compress.neurons import Dense, balanced_clusters, fit_down, foretelling, kept, share_out
from k2model.formats.checkpoint import open_checkpoint
from k2model.formats.finished import finished_folder
from k2model.formats.inspect import inspect
from k2model.parameters import parameters
from k2model.tokenizer import Tokenizer
from schemas.errors import CheckpointError, SpecError
from tests.checkpoints import write_checkpoint
from tests.forward import float_decoder, packed_logits, stored_decoder
from tests.training import Rows

PROMPTS = [list(range(30, 75)), [7, 8], list(range(200, 240, 3))]
DATA = Rows(rows=4, per_epoch=3)


def quiet(line: dict[str, Any]) -> None:
    pass


def cut(source: Path, target: Path, active: int = 2, data: Rows = DATA) -> dict[str, Any]:
    """Cut 96 neurons into two shared and six routed experts of 12."""
    options = Cut(n_shared_experts=2, n_routed_experts=6, num_experts_per_tok=active, rows=12)
    return cut_experts(str(source), target, data, options, quiet)


def logits(folder: Path) -> Tensor:
    return packed_logits(float_decoder(folder), PROMPTS)


def change(folder: Path, part: str, value: float) -> None:
    """Fill the tensors whose name ends with `part`."""
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t.fill_(value) if k.endswith(part) else t for k, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_with_all_experts_active_it_computes_what_the_dense_model_did(family: str, tmp_path: Path) -> None:
    """Once to within the router's gain; with its logits at 0, where every weight is exactly 1, but for rounding."""
    extra: dict[str, Any] = {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rms_norm_eps": None,
        "rope_theta": None,
    }
    source = write_checkpoint(tmp_path / "dense", family=family, **(extra if family == "llama" else {}))
    cut(source, tmp_path / "cut", active=6)
    before, after = (open_checkpoint(str(folder)).config() for folder in (source, tmp_path / "cut"))
    assert replace(after, family=family, moe=None, is_moe=(False, False)) == before
    dense = logits(source)
    assert (logits(tmp_path / "cut") - dense).abs().max() < 2e-3 * dense.std()
    change(tmp_path / "cut", "mlp.gate.weight", 0.0)
    assert (logits(tmp_path / "cut") - dense).abs().max() < 2e-5


def test_transformers_opens_it_and_says_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    scaling = {"type": "linear", "factor": 2.0}
    source = write_checkpoint(tmp_path / "dense", rms_norm_eps=1e-3, rope_theta=500.0, rope_scaling=scaling)
    cut(source, tmp_path / "cut")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    assert not any(info.values()), info
    with torch.inference_mode():
        theirs = torch.cat([model.eval()(torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS])
    assert (theirs - logits(tmp_path / "cut")).abs().max() < 2e-4


def test_the_files_are_those_of_a_whole_checkpoint(tmp_path: Path) -> None:
    facts = cut(write_checkpoint(tmp_path / "dense"), tmp_path / "cut")
    opened = open_checkpoint(str(tmp_path / "cut"))
    config = opened.config()
    opened.weights().check(parameters(config), tied=True)
    assert Tokenizer.open(tmp_path / "cut").encode("hate") == Tokenizer.open(tmp_path / "dense").encode("hate")
    assert (config.family, config.is_moe, config.tie_word_embeddings) == ("glm4_moe", (True, True), True)
    raw = opened.config_json()  # transformers 4 reads the one, its version 5 and vLLM the other; absent, it is 0.5
    assert raw["partial_rotary_factor"] == raw["rope_parameters"]["partial_rotary_factor"] == 1
    assert config.moe is not None
    assert (config.moe.moe_intermediate_size, config.moe.shared_intermediate_size) == (12, 24)
    found = inspect(str(tmp_path / "cut"))
    assert (found.n_routed_experts, found.num_experts_per_tok, found.problems) == (6, 2, [])
    saved = 2 * 2 * (3 * 48 * 12 * 4 - 6 * 48)  # two layers: four experts of 12 neurons less, a router more
    assert facts["flops_per_token"]["before"] - facts["flops_per_token"]["after"] == saved
    assert len(facts["layers"]) == 2
    assert all(0 < layer["kept"] < 1 and 2 / 6 <= layer["load"] <= 1 for layer in facts["layers"])
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("active", "is_fitted"), [(6, False), (2, True)])
def test_neurons_move_whole_and_only_their_output_is_fitted_again(active: int, is_fitted: bool, tmp_path: Path) -> None:
    cut(write_checkpoint(tmp_path / "dense"), tmp_path / "cut", active)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "cut"))
    mlp = "model.layers.1.mlp"
    gate, up, down = (before[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    moved = []
    for part in ("shared_experts", *(f"experts.{number}" for number in range(6))):
        own = (after[f"{mlp}.{part}.gate_proj.weight"][:, None] == gate).all(dim=2).nonzero()[:, 1]
        assert torch.equal(after[f"{mlp}.{part}.up_proj.weight"], up[own])
        assert torch.equal(after[f"{mlp}.{part}.down_proj.weight"], down[:, own]) != is_fitted
        moved += own.tolist()
    assert sorted(moved) == list(range(96))


def test_the_router_ranks_experts_by_what_they_are_foretold_to_give() -> None:
    """Whatever they give to every token, too."""
    generator = torch.Generator().manual_seed(2)
    x, slope = torch.randn(900, 8, generator=generator), torch.randn(5, 8, generator=generator)
    sizes = 20 + x @ slope.t() + torch.tensor([0.0, 3.0, -3.0, 1.0, -1.0]) + 1.5 * slope.sum(dim=1)
    router, bias = foretelling(x + 1.5, sizes)
    scores = torch.sigmoid((x + 1.5) @ router.t()) + bias
    assert (scores.argmax(dim=1) == sizes.argmax(dim=1)).float().mean() > 0.97


def test_it_is_quantized_like_any_checkpoint_and_stays_near(tmp_path: Path) -> None:
    cut(write_checkpoint(tmp_path / "dense"), tmp_path / "cut")
    (tmp_path / "int8").mkdir()
    convert(open_checkpoint(str(tmp_path / "cut")), tmp_path / "int8", Tokenizer.open(tmp_path / "cut"))
    weights = open_checkpoint(str(tmp_path / "int8")).weights()
    assert weights.storage("model.layers.0.mlp.experts.5.down_proj") == "int8"
    assert weights.infos["model.layers.0.mlp.experts.5.down_proj.weight_scale"].shape == (48, 1)
    before, after = logits(tmp_path / "cut"), packed_logits(stored_decoder(tmp_path / "int8"), PROMPTS)
    assert (after - before).abs().mean() < 0.08 * before.std()


def by_topic(topics: int = 4, width: int = 6, seed: int = 0) -> tuple[Tensor, Dense]:
    """Return tokens of `topics`, and a layer with `width` neurons for each of them and as many for all."""
    generator = torch.Generator().manual_seed(seed)
    d = 16
    directions = torch.eye(d)[: topics + 1]
    topic = torch.randint(0, topics, (600,), generator=generator)
    x = 3 * directions[topic] + 3 * directions[topics] + 0.05 * torch.randn(600, d, generator=generator)
    owner = torch.arange(topics + 1).repeat(width)  # neighbours belong to different topics
    return x, Dense(
        gate=4 * directions[owner] - 2 * (owner < topics)[:, None] * directions[topics],
        up=directions[owner] + 0.01 * torch.randn(len(owner), d, generator=generator),
        down=torch.randn(d, len(owner), generator=generator) * (1 + 9 * (owner == topics)),
    )


def test_neurons_that_are_strong_together_become_an_expert_and_tokens_find_it() -> None:
    x, dense = by_topic()
    parts = share_out(x[:500], dense, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=1)
    assert sorted([*parts.shared.tolist(), *parts.routed.flatten().tolist()]) == list(range(30))
    assert set((parts.shared % 5).tolist()) == {4}  # what every token needs
    assert sorted(tuple(set((own % 5).tolist())) for own in parts.routed) == [(0,), (1,), (2,), (3,)]
    share, load = kept(x[500:], dense, parts, dense.down)
    assert share > 0.999
    assert load < 0.4
    energy = dense.neurons(x[:500]).square().mean(dim=0) * dense.down.square().sum(dim=0)
    sums = [float(energy[own].sum()) for own in parts.routed]
    assert sums == sorted(sums, reverse=True)


def test_what_is_left_out_is_made_good_by_what_is_active() -> None:
    """Neurons whose output the shared ones know: with half of them gone, the others give the whole."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3000, 8, generator=generator)
    half, out = torch.randn(12, 8, generator=generator), torch.randn(8, 12, generator=generator)
    dense = Dense(gate=torch.cat([half, half]), up=torch.cat([half, half]), down=torch.cat([2 * out, out], dim=1))
    sizes = {"n_shared_experts": 2, "n_routed_experts": 2}
    fewer = share_out(x[:2500], dense, **sizes, num_experts_per_tok=1)
    down = fit_down(x[:2500], dense, fewer)
    before, after = kept(x[2500:], dense, fewer, dense.down)[0], kept(x[2500:], dense, fewer, down)[0]
    assert 1 - after < (1 - before) / 2
    whole = share_out(x[:2500], dense, **sizes, num_experts_per_tok=2)
    assert torch.equal(fit_down(x[:2500], dense, whole), dense.down)


def test_clusters_are_of_equal_size_and_of_near_points() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(3)
    points = (centres.repeat(20, 1) + torch.randn(60, 3, generator=generator))[torch.randperm(60, generator=generator)]
    clusters = balanced_clusters(points, 3)
    assert [len(places) for places in clusters] == [20, 20, 20]
    assert sorted(torch.cat(clusters).tolist()) == list(range(60))
    assert all(len(set(points[places].argmax(dim=1).tolist())) == 1 for places in clusters)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_shared_experts": 2, "n_routed_experts": 5}, "intermediate_size 96 is not 7 equal experts"),
        ({"n_shared_experts": 0, "n_routed_experts": 8}, "0 shared"),
        ({"n_shared_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 3}, "3 of 2 routed"),
        ({"n_shared_experts": 7, "n_routed_experts": 1, "num_experts_per_tok": 1}, "1 of 1 routed"),
        ({"n_shared_experts": 2, "n_routed_experts": 6, "rows": 4}, "of 4 prompts"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, int], said: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense")
    with pytest.raises(SpecError, match=said):
        cut_experts(str(source), tmp_path / "cut", DATA, Cut(**options), quiet)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    ("family", "options"),
    [("mixtral", {}), ("kimi_k2", {}), ("llama", {"mlp_bias": True}), ("llama", {"attention_bias": True}),
     ("qwen2", {"use_sliding_window": True, "max_window_layers": 0})],
)  # fmt: skip
def test_models_that_no_such_family_holds_are_refused(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", family=family, **options)
    with pytest.raises(SpecError, match="cannot be cut into experts"):
        cut(source, tmp_path / "cut")


def test_nothing_appears_before_it_is_whole(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense")

    def fail(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        cut_experts(str(source), tmp_path / "cut", DATA, Cut(n_shared_experts=2, n_routed_experts=6, rows=12), fail)
    assert not any((tmp_path / "cut").iterdir())
    cut(source, tmp_path / "cut")
    with pytest.raises(CheckpointError, match="not empty"), finished_folder(tmp_path / "cut"):
        raise AssertionError
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["model_type"] == "glm4_moe"
