"""The model that is trained is the engine's: the same answers, and gradients that are those of differences."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2model.compress.examples import Batch, Example, Forks, path_to, whole_tree
from k2model.compress.student import Student
from k2model.compress.student_attention import Packed
from k2model.compress.student_layers import Product, bfloat16_product, float32_product, int8_product
from k2model.config import AttentionConfig
from k2model.decoder.model import Decoder
from k2model.decoder.precision import PRECISIONS
from k2model.engine.candidates import candidate_tree
from k2model.engine.engine import Engine
from k2model.engine.request import Candidate, Request
from k2model.formats.checkpoint import open_checkpoint
from k2model.tokenizer import Tokenizer
from schemas.errors import SpecError
from tests.checkpoints import write_checkpoint
from tests.training import CANDIDATES, batch

DENSE = ["llama", "qwen2", "qwen3"]
LABELS = tuple(Candidate(tuple(f"label {n}".encode()), 6) for n in range(10, 40))


def engine_logprobs(folder: Path, asked: Batch, precision: str) -> Tensor:
    """Return what the engine says of the batch's candidates [examples, candidates], from the weights as stored."""
    source = open_checkpoint(str(folder))
    decoder = Decoder.from_weights(source.config(), source.weights(), PRECISIONS[precision])
    engine = Engine(decoder, Tokenizer.open(folder), "test")
    try:
        requests = [
            Request(prompt_ids=e.prompt_ids, num_prefix_tokens=e.num_prefix_tokens, candidates=e.candidates)
            for e in asked.examples
        ]
        completions = engine.submit(requests).result(60)
    finally:
        engine.close()
    return torch.tensor([completion.logprobs for completion in completions], dtype=torch.float64)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("num_prefix", [0, 9, 64])
def test_a_student_says_what_the_engine_says(family: str, num_prefix: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", family=family)
    asked = batch(9, prefix=range(100, 100 + num_prefix))
    found = Student.open(str(folder))(asked)
    # A sum of 96 products is off by about 96**0.5 * 2**-24 of its size; logits of up to 20 come of ten such in a row.
    assert (found - engine_logprobs(folder, asked, "fp32")).abs().max() < 10 * 20 * 96**0.5 * 2**-24
    assert found.std(dim=0).max() > 0.2, "answers are of the tickets"


def test_a_window_and_biases_are_the_engines_too(tmp_path: Path) -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1, "attention_bias": True}
    folder = write_checkpoint(tmp_path / "source", family="qwen3", **windowed)
    asked = batch(5)
    student = Student.open(str(folder))
    assert set(student.config.sliding_windows) == {None, 11}
    assert "model.layers.0.self_attn.o_proj.bias" in student.state_dict()
    assert (student(asked) - engine_logprobs(folder, asked, "fp32")).abs().max() < 1e-5


@pytest.mark.parametrize("labels", [CANDIDATES, LABELS[:1], LABELS], ids=["four", "one", "thirty"])
def test_the_way_to_one_answer_is_as_likely_as_that_answer_of_the_whole_tree(
    labels: tuple[Candidate, ...], tmp_path: Path
) -> None:
    student = Student.open(str(write_checkpoint(tmp_path / "source")))
    rng = random.Random(3)
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randint(5, 60))) for _ in labels]
    asked = Batch(tuple(Example(ids, 0, labels, (truth,)) for truth, ids in enumerate(prompts)))
    whole = student(asked)
    if len(labels) == 1:
        assert whole.tolist() == [[0.0]]
        return
    forks = [path_to(asked.tree, (truth,)) for truth in range(len(labels))]
    found = student.fork_logits(asked, forks)
    logprobs = torch.log_softmax(found.logits, dim=-1).gather(1, found.truths[:, None]).squeeze(1)
    sums = torch.zeros(len(labels), dtype=torch.float64).index_add(0, found.rows, logprobs)
    assert (sums - whole.diagonal()).abs().max() < 1e-5
    assert {len(asked.branches.token_ids) for asked in forks} == ({0, 1, 2} if labels is CANDIDATES else {7})
    assert len(asked.tree.branches.token_ids) == (2 if labels is CANDIDATES else 9)


def test_forks_of_a_path_name_the_tokens_on_it() -> None:
    tree = candidate_tree(CANDIDATES)
    path = path_to(tree, (1,))
    assert (path.branches.token_ids, path.parents) == ((10, 11), (0, 1))
    followed = [path.targets[fork][slot] for fork, slot in enumerate(path.truths)]
    assert followed == [11, 13]  # the first token is given
    whole = whole_tree(tree, (1,))
    assert [whole.targets[fork][slot] for fork, slot in enumerate(whole.truths) if slot >= 0] == followed


@pytest.mark.parametrize("family", DENSE)
def test_int8_gradients_pass_the_rounding_and_reach_every_weight(family: str, tmp_path: Path) -> None:
    student = Student.open(str(write_checkpoint(tmp_path / "source", family=family)))
    asked = batch(9)
    grads: dict[Product, dict[str, Tensor]] = {}
    for product in (float32_product, bfloat16_product, int8_product):
        student.product = product
        student.zero_grad()
        loss = -student(asked)[:, 0].sum()
        loss.backward()
        grads[product] = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        assert len(grads[product]) == len(list(student.parameters()))
    for name, exact in grads[float32_product].items():
        for rounded in (bfloat16_product, int8_product):
            cosine = torch.cosine_similarity(exact.flatten(), grads[rounded][name].flatten(), dim=0)
            assert cosine > 0.97, (name, rounded, cosine)


def test_gradients_are_those_of_differences(tmp_path: Path) -> None:
    """Every kind of parameter: a step along the gradient changes the answer as the gradient says."""
    student = Student.open(str(write_checkpoint(tmp_path / "source", family="qwen3", attention_bias=True)))
    asked = batch(4)
    forks = [path_to(asked.tree, example.truths or (0,)) for example in asked.examples]

    def loss() -> Tensor:
        found = student.fork_logits(asked, forks)
        return -torch.log_softmax(found.logits, dim=-1).gather(1, found.truths[:, None]).mean()

    loss().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        step = 3e-4 * parameter.grad / parameter.grad.norm().clamp_min(1e-9)
        expected = 2 * float((step * parameter.grad).sum())
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                parameter.add_(step, alpha=sign)
                values.append(float(loss()))
        assert values[0] - values[1] == pytest.approx(expected, rel=0.02, abs=2e-6), name


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_layers_have_no_gradient(frozen: int, tmp_path: Path) -> None:
    student = Student.open(str(write_checkpoint(tmp_path / "source", family="qwen3")))
    student.freeze(frozen)
    student(batch(3))[:, 0].sum().backward()
    learned = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert ("model.embed_tokens.weight" in learned) == (frozen == 0)
    assert {index for index in range(2) if f"model.layers.{index}.mlp.up_proj.weight" in learned} == set(
        range(frozen, 2)
    )
    assert {"model.norm.weight", "lm_head.weight"} <= learned
    with pytest.raises(SpecError, match="freeze_layers is 3, and the model has 2 layers"):
        student.freeze(3)


@pytest.mark.parametrize("family", DENSE)
def test_a_saved_student_opens_here_and_in_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_checkpoint(tmp_path / "source", family=family)
    student = Student.open(str(folder))
    with torch.no_grad():
        student.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.25)
    saved = tmp_path / "saved"
    student.save(saved)
    asked = batch(5)
    again = Student.open(str(saved))
    assert torch.equal(again(asked), student(asked))
    assert (saved / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    theirs, info = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    prompt = asked.examples[0].prompt_ids
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt]), use_cache=False).logits[0, -1, [10, 20]]
    alone = Batch((Example(prompt, 0, (Candidate((10,), 1), Candidate((20,), 1)), (0,)),))
    assert (torch.log_softmax(logits, dim=0) - student(alone)[0]).abs().max() < 1e-4


def test_a_quantized_checkpoint_is_expanded_and_written_without_its_quantization(tmp_path: Path) -> None:
    from tests.test_k2model_export import converted

    folder = converted(write_checkpoint(tmp_path / "source"), alpha=0.0)
    student = Student.open(str(folder))
    student.save(tmp_path / "saved")
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in raw
    assert raw["torch_dtype"] == "float32"
    weights = open_checkpoint(str(tmp_path / "saved")).weights()
    assert {info.dtype for info in weights.infos.values()} == {"F32"}


def test_experts_of_another_kind_and_latents_are_refused(tmp_path: Path) -> None:
    for family, what in (("mixtral", "other routed experts"), ("deepseek_v3", "latent attention")):
        folder = write_checkpoint(tmp_path / family, family=family)
        with pytest.raises(SpecError, match=f"a {family} model has {what}"):
            Student.open(str(folder))


def test_a_batch_of_what_does_not_belong_together_is_refused() -> None:
    one = Example((1, 2, 3), 2, CANDIDATES, (0,))
    for other, message in (
        (Example((1, 4, 3), 2, CANDIDATES, (0,)), "begin with the same"),
        (Example((1, 2), 2, CANDIDATES, (0,)), "must leave a token"),
        (Example((1, 2, 3), 2, CANDIDATES[:2], (0,)), "the same candidates"),
    ):
        with pytest.raises(ValueError, match=message):
            Batch((one, other))


def test_forks_are_known_by_identity_so_that_they_are_made_once() -> None:
    tree = candidate_tree(CANDIDATES)
    assert path_to(tree, (1,)) is path_to(tree, (1,))
    assert isinstance(whole_tree(tree), Forks)


@pytest.mark.parametrize("window", [None, 7, 50])
@pytest.mark.parametrize("prefix_tokens", [0, 40, 64, 70])
def test_the_engines_attention_is_torchs_and_so_is_its_gradient(
    prefix_tokens: int, window: int | None, tmp_path: Path
) -> None:
    """Near in float32, with and without a window; in bfloat16 by the roundings of values and weights."""
    student = Student.open(str(write_checkpoint(tmp_path / "source")))
    prefix, rng = tuple(range(prefix_tokens)), random.Random(5)
    bodies = [tuple(rng.randrange(256) for _ in range(n)) for n in (1, 3, 30, 31, 64, 100)]
    asked = Batch(tuple(Example((*prefix, *b), prefix_tokens, LABELS, (n,)) for n, b in enumerate(bodies)))
    packed = Packed(asked, [whole_tree(asked.tree)] * len(bodies), torch.device("cpu"))
    config = student.config.attention
    assert isinstance(config, AttentionConfig)
    generator = torch.Generator().manual_seed(0)
    tokens, width = len(packed.token_ids), config.head_dim
    q = torch.randn(tokens, config.num_attention_heads, width, generator=generator).requires_grad_()
    kv = torch.randn(tokens, config.num_key_value_heads, 2 * width, generator=generator).requires_grad_()
    right, largest = packed.attend_in_torch(q, kv, config, window), kv.detach().abs().max()
    found = packed.attend(q, kv, config, window, torch.float32)
    # A mean of at most 180 values, whose roundings grow as their root, with weights off by those of scores: some 10, of
    # 8 products.
    torch.testing.assert_close(found, right, rtol=0, atol=float(largest) * (180**0.5 + 10 * 8**0.5) * 2**-24)
    grad = torch.randn(found.shape, generator=generator)
    gradients = (torch.autograd.grad(y, (q, kv), grad) for y in (found, right))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    in_torch = packed.attend_in_torch(q.bfloat16(), kv.bfloat16(), config, window)
    for rounded in (in_torch.float(), packed.attend(q, kv, config, window, torch.bfloat16)):
        assert 0 < (rounded - right).abs().max() < 5 * 2**-8 * largest  # queries, keys, weights, values and the result
