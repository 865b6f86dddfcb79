"""The engine: right sums, the same bits whatever stands beside a request, and errors that reach their owner."""

import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2model.compress.recipe import prepare_int8
from k2model.decoder.model import Decoder
from k2model.decoder.step import Step
from k2model.engine.candidates import ROOT, candidate_tree
from k2model.engine.engine import Engine, load
from k2model.engine.request import Candidate, Grammar, Request, Sampling
from k2model.formats.checkpoint import fingerprint
from schemas.errors import K2Error
from tests.checkpoints import pack_experts, write_checkpoint

CANDIDATES = (Candidate((10, 11, 12), 3), Candidate((10, 11, 13, 5), 3), Candidate((20,), 1), Candidate((10, 30), 2))


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Iterator[Engine]:
    opened = Engine.open(checkpoint)
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "kimi_k2 in INT4"])
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a checkpoint of each kind of attention and of experts."""
    family, _, packed = request.param.partition(" in ")
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32} if packed else {}
    root = tmp_path_factory.mktemp(family)
    folder = write_checkpoint(root / "source", family=family, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2BATCH_CACHE", str(root / "cache"))
        yield str(pack_experts(folder) if packed else folder)


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Return prompts of 1 to 60 tokens behind one shared beginning of 9."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(256) for _ in range(9))
    return [shared + tuple(rng.randrange(256) for _ in range(rng.randint(1, 60))) for _ in range(count)]


_OPENED = """
import os, sys, time
import torch
from k2model.engine import engine
load = engine.load
def busy(*args):
    torch.ones(2048, 2048).exp()  # by all threads
    return load(*args)
engine.load = busy
before = len(os.listdir("/proc/self/task"))
opened = engine.Engine.open(sys.argv[1])
late = time.monotonic() + 10  # a thread that was told to end may take a while
while (left := len(os.listdir("/proc/self/task")) - before) > 1 and time.monotonic() < late:
    time.sleep(0.05)
print(left)
opened.close()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists() or torch.get_num_threads() < 2, reason="counts OpenMP threads")
def test_no_thread_but_the_loop_is_left_of_opening(checkpoint: str) -> None:
    """A second team of OpenMP threads in a process costs the loop's a sixth of its rate (kernels/threads.py)."""
    done = subprocess.run(
        [sys.executable, "-c", _OPENED, checkpoint],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "1"


def scoring(prompt: tuple[int, ...]) -> Request:
    return Request(prompt_ids=prompt, num_prefix_tokens=9, candidates=CANDIDATES)


def generating(prompt: tuple[int, ...]) -> Request:
    return Request(prompt_ids=prompt, num_prefix_tokens=9, max_tokens=6, stop_ids=(257,))


@torch.inference_mode()
def written_out(decoder: Decoder, prompt: tuple[int, ...], candidate: Candidate) -> float:
    """Return the log-probability of `candidate` after `prompt` among CANDIDATES, read as one sequence."""
    ids = [*prompt, *candidate.token_ids]
    logits = decoder.logits(decoder.forward_one(ids))
    total = 0.0
    for depth in range(len(candidate.token_ids) - candidate.num_scored, len(candidate.token_ids)):
        rivals = [c for c in CANDIDATES if c.token_ids[:depth] == candidate.token_ids[:depth]]
        scored = [c for c in rivals if depth >= len(c.token_ids) - c.num_scored]
        following = sorted({c.token_ids[depth] for c in scored})
        row = logits[len(prompt) + depth - 1, following].double().log_softmax(dim=0)
        total += row[following.index(candidate.token_ids[depth])].item()
    return total


def test_the_tree_asks_at_forks_alone() -> None:
    tree = candidate_tree(CANDIDATES)
    assert tree.branches.token_ids == (10, 11)
    assert tree.branches.depths == (0, 1)
    assert tree.branches.ancestors == (frozenset({0}), frozenset({0, 1}))
    assert tree.parents == (ROOT, 0, 1)
    assert tree.targets == ((10, 20), (11, 30), (12, 13))
    assert [sum(1 for c, *_ in tree.edges if c == number) for number in range(4)] == [3, 2, 1, 2]
    alone = candidate_tree((Candidate((1, 2, 3), 3), Candidate((1, 2, 4), 3)))
    assert (alone.branches.token_ids, alone.parents, alone.token_ids) == ((1, 2), (1,), (3, 4))
    with pytest.raises(ValueError, match="candidate 0 scores 0 of 1"):
        candidate_tree((Candidate((1,), 0),))
    with pytest.raises(ValueError, match="candidate 1 begins with another"):
        candidate_tree((Candidate((1, 2), 2), Candidate((1, 2, 3), 3)))


def test_logprobs_are_those_of_the_candidates_written_out(engine: Engine) -> None:
    """The tree in one pass against each candidate as a prompt of its own."""
    requests = [scoring(prompt) for prompt in prompts(5)]
    for request, completion in zip(requests, engine.submit(requests).result(), strict=True):
        for candidate, logprob in zip(CANDIDATES, completion.logprobs, strict=True):
            expected = written_out(engine.decoder, request.prompt_ids, candidate)
            assert logprob == pytest.approx(expected, abs=0.15)  # a bfloat16 head against itself, up to three tokens


def test_generation_is_greedy_decoding_one_token_at_a_time(checkpoint: str) -> None:
    decoder, tokenizer = load(checkpoint, "fp32")
    reference = Engine(decoder, tokenizer, "test")
    requests = [generating(prompt) for prompt in prompts(4, seed=3)]
    for request, completion in zip(requests, reference.submit(requests).result(), strict=True):
        ids = list(request.prompt_ids)
        while len(ids) < len(request.prompt_ids) + 6:
            with torch.inference_mode():
                token = int(decoder.logits(decoder.forward_one(ids)[-1:]).argmax())
            if token == 257:
                break
            ids.append(token)
        assert list(completion.token_ids) == ids[len(request.prompt_ids) :]
        assert completion.finish_reason == ("length" if len(completion.token_ids) == 6 else "stop")
    reference.close()


def test_families_score_as_written_out_and_decode_as_read_again(family_folder: str) -> None:
    """Trees, prefixes and caches of every kind of attention, against whole sequences, all in float32."""
    decoder, tokenizer = load(family_folder, "fp32")
    engine = Engine(decoder, tokenizer, "test")
    for prompt in prompts(4):
        scored, generated = engine.submit([scoring(prompt), generating(prompt)]).result()
        for candidate, logprob in zip(CANDIDATES, scored.logprobs, strict=True):
            assert logprob == pytest.approx(written_out(decoder, prompt, candidate), abs=1e-3)
        with torch.inference_mode():
            logits = decoder.logits(decoder.forward_one([*prompt, *generated.token_ids]))
        best = logits[len(prompt) - 1 :].argmax(dim=-1).tolist()
        assert list(generated.token_ids) == best[: len(generated.token_ids)]
    engine.close()


@contextmanager
def on_threads(engine: Engine, count: int) -> Iterator[Engine]:
    """Yield another engine over the same weights that computes on `count` threads: those torch has when it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    other = Engine(engine.decoder, engine.tokenizer, "test")
    try:
        yield other
    finally:
        other.close()
        torch.set_num_threads(before)


def test_same_request_same_bits_in_every_family(family_folder: str) -> None:
    """Scoring and generating in one submission, in others, in another order, on other threads."""
    engine = Engine.open(family_folder)
    requests = [make(prompt) for prompt in prompts(40) for make in (scoring, generating)]
    together = engine.submit(requests).result()
    assert [engine.submit([request]).result()[0] for request in requests[:24]] == together[:24]
    assert [c for i in range(0, 70, 7) for c in engine.submit(requests[i : i + 7]).result()] == together[:70]
    for count in (1, 2, 5):
        with on_threads(engine, count) as other:
            assert other.submit(requests[:30][::-1]).result()[::-1] == together[:30]
    engine.close()


@pytest.mark.parametrize("make", [scoring, generating])
def test_same_request_same_bits(engine: Engine, make: "type[Request]") -> None:
    """Alone, among 7, among 500, in another order, on other threads: identical to the last bit."""
    requests = [make(prompt) for prompt in prompts(500)]  # type: ignore[call-arg]
    among_500 = engine.submit(requests).result()
    among_7 = [c for i in range(0, 70, 7) for c in engine.submit(requests[i : i + 7]).result()]
    assert among_7 == among_500[:70]
    assert [engine.submit([request]).result()[0] for request in requests[:20]] == among_500[:20]
    assert engine.submit(requests[::-1]).result()[::-1] == among_500
    for count in (1, 2, 5):
        with on_threads(engine, count) as other:
            assert other.submit(requests[:40]).result() == among_500[:40]


def drawing(prompt: tuple[int, ...], index: int) -> Request:
    """Return a request of every way to draw and to end."""
    grammars = (None, Grammar("regex", "[a-f]{3,9}"), Grammar("choices", '["yes", "no", "yesterday"]'))
    return Request(
        prompt_ids=prompt,
        num_prefix_tokens=9,
        max_tokens=12,
        sampling=Sampling(temperature=(0.0, 1.3)[index % 2], top_p=0.9, seed=index),
        grammar=grammars[index % 3],
        stop_ids=(257,),
        stop_strings=("e",) if index % 5 == 0 else (),
    )


def test_drawn_and_bound_answers_are_the_same_bits_in_any_company(engine: Engine) -> None:
    requests = [drawing(prompt, index) for index, prompt in enumerate(prompts(40))]
    together = engine.submit(requests).result()
    assert not any(completion.error for completion in together)
    assert [engine.submit([request]).result()[0] for request in requests[:12]] == together[:12]
    assert engine.submit(requests[::-1]).result()[::-1] == together
    for request, completion in zip(requests, together, strict=True):
        text = engine.tokenizer.decode(completion.token_ids)
        if request.stop_strings:
            assert "e" not in text
        elif request.grammar and request.grammar.kind == "regex":
            assert re.fullmatch("[a-f]{3,9}", text)
        elif request.grammar:
            assert text in ("yes", "no", "yesterday")


def test_samples_of_one_prompt_differ_and_share_its_computation(engine: Engine) -> None:
    prompt = prompts(1)[0] + (7,) * 30
    engine.submit([generating(prompts(2)[1])]).result()  # the nine shared tokens are there
    requests = [
        replace(drawing(prompt, 1), grammar=None, sampling=Sampling(temperature=20.0, seed=i)) for i in range(6)
    ]
    completions = engine.submit(requests).result()
    assert len({completion.token_ids for completion in completions}) > 3
    tokens = sum(len(completion.token_ids) for completion in completions)
    assert sum(completion.computed_tokens for completion in completions) <= len(prompt) - 9 + 6 + tokens


def test_submissions_from_several_threads_keep_their_own_answers(engine: Engine) -> None:
    batches = [[scoring(p) for p in prompts(30, seed)] + [generating(p) for p in prompts(5, seed)] for seed in range(4)]
    futures = [engine.submit(batch) for batch in batches]
    for batch, future in zip(batches, futures, strict=True):
        assert future.result() == engine.submit(batch).result()


def test_the_shared_beginning_is_not_computed_again(engine: Engine) -> None:
    request = scoring(prompts(1)[0])
    engine.submit([request]).result()
    completion = engine.submit([request]).result()[0]
    assert completion.computed_tokens == len(request.prompt_ids) - 9 + 2


def alike(count: int) -> list[tuple[int, ...]]:
    """Return prompts in clusters that share 0 to 90 tokens, inside one another, and some of 300."""
    rng = random.Random(5)
    made = [tuple(rng.randrange(256) for _ in range(9))]
    while len(made) < count:
        begin = rng.choice(made)[: rng.randint(9, 90)]
        made.append(begin + tuple(rng.randrange(256) for _ in range(rng.choice([1, 3, 20, 60, 300]))))
    return made


@pytest.mark.parametrize("max_num_batched_tokens", [64, 1000])
def test_sharing_and_cutting_prompts_changes_no_bit(
    engine: Engine, max_num_batched_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tree of shared beginnings, prompts longer than a step, and neither."""
    requests = [make(prompt) for prompt in alike(60) for make in (scoring_all, generating_all)]
    monkeypatch.setattr("k2model.engine.prefix.MIN_SHARED_TOKENS", 10**6)
    plain = engine.submit(requests).result()
    monkeypatch.undo()
    options = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_kv_tokens": 1024}
    other = Engine(engine.decoder, engine.tokenizer, "test", **options)
    shared = other.submit(requests).result()
    other.close()
    assert shared == plain
    if max_num_batched_tokens == 1000:
        assert sum(c.computed_tokens for c in shared) < 0.7 * sum(c.computed_tokens for c in plain)


def scoring_all(prompt: tuple[int, ...]) -> Request:
    return Request(prompt_ids=prompt, candidates=CANDIDATES)


def generating_all(prompt: tuple[int, ...]) -> Request:
    return Request(prompt_ids=prompt, max_tokens=70, stop_ids=(257,))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt_ids=(1,)), "either has candidates"),
        (Request(prompt_ids=(1,), num_prefix_tokens=1, max_tokens=1), "must leave a token"),
        (Request(prompt_ids=(1,) * 1024, max_tokens=1), "max_position_embeddings"),
        (Request(prompt_ids=(1,), candidates=(Candidate((1,), 1), Candidate((1, 2), 2))), "begins with another"),
    ],
)
def test_a_senseless_request_is_refused_at_once(engine: Engine, request_: Request, message: str) -> None:
    good = scoring(prompts(1)[0])
    with pytest.raises(ValueError, match=message):
        engine.submit([good, request_])
    assert engine.submit([good]).result(timeout=30)  # nothing of what was refused is left behind


POISON = 251


def poisoned(error: type[BaseException]) -> Callable[[Decoder, Step, list[int]], Tensor]:
    """Return a forward pass that cannot bear a certain token."""
    forward = Decoder.forward

    def failing(decoder: Decoder, step: Step, read: list[int]) -> Tensor:
        if POISON in step.token_ids:
            raise error("POISON")
        return forward(decoder, step, read)

    return failing


@pytest.mark.parametrize("shares", [False, True])
def test_a_request_that_fails_a_step_is_found_and_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    """In a prompt, in a beginning that two share, and while decoding."""
    clean = [p for p in prompts(30) if POISON not in p]
    shared = (5,) * 20 + (POISON,) if shares else (POISON,)
    bad = [shared + (i,) * 3 for i in range(2)]
    requests = [make(p) for p in [*clean, *bad] for make in (scoring_all, generating_all)]
    expected = engine.submit(requests).result()
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", poisoned(ValueError))
        got = engine.submit(requests).result(timeout=60)
    for request, completion, good in zip(requests, got, expected, strict=True):
        if POISON in request.prompt_ids or POISON in good.token_ids[:-1]:
            assert completion.error == "ValueError: POISON"
            assert not completion.token_ids
        else:
            assert completion == good
    assert engine.submit(requests).result() == expected


def test_out_of_memory_halves_the_step_from_then_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [scoring_all(p) for p in prompts(60)]
    expected, sizes = engine.submit(requests).result(), []
    forward = Decoder.forward

    def small(decoder: Decoder, step: Step, read: list[int]) -> Tensor:
        sizes.append(len(step.token_ids))
        if sizes[-1] > 300:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return forward(decoder, step, read)

    other = Engine(engine.decoder, engine.tokenizer, "test", max_num_batched_tokens=1000)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", small)
        assert other.submit(requests).result(timeout=60) == expected
        assert max(sizes) > 500
        sizes.clear()
        assert other.submit(requests).result(timeout=60) == expected
        assert max(sizes) <= 300
    other.close()


def test_a_defect_of_the_engine_leaves_nobody_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Engine(engine.decoder, engine.tokenizer, "test")
    both_wait = threading.Event()

    def die(*_: object) -> None:
        both_wait.wait(10)
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("k2model.engine.runner.Runner.settle", die)
    futures = [other.submit([generating(p) for p in prompts(3, seed)]) for seed in range(2)]
    both_wait.set()
    for future in futures:
        with pytest.raises(ZeroDivisionError, match="a defect"):
            future.result(timeout=10)
    with pytest.raises(K2Error, match="closed"):
        other.submit([scoring(prompts(1)[0])])


def test_a_closed_engine_says_so(checkpoint: str) -> None:
    opened = Engine.open(checkpoint)
    pending = opened.submit([generating(p) for p in prompts(3)])
    opened.close()
    assert len(pending.result(timeout=0)) == 3
    with pytest.raises(K2Error, match="closed"):
        opened.submit([scoring(prompts(1)[0])])


def test_the_conversion_is_made_once_and_opens_as_w8a8(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = prepare_int8(checkpoint)
    assert {info.dtype for n, info in converted.weights().infos.items() if n.endswith("_proj.weight")} == {"I8"}
    monkeypatch.setattr("k2model.compress.recipe.convert", lambda *_: pytest.fail("converted twice"))
    assert prepare_int8(checkpoint) == converted
    assert prepare_int8(str(converted.path)).path == converted.path
    assert fingerprint(checkpoint, "int8") in str(converted.path)
