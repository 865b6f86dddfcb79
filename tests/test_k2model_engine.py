"""The engine: right sums, the same bits whatever stands beside a request, and errors that reach their owner."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from k2model.compress.recipe import prepare_int8
from k2model.decoder.model import Decoder
from k2model.engine.candidates import ROOT, candidate_tree
from k2model.engine.engine import Engine, load
from k2model.engine.request import Candidate, Completion, Request
from k2model.engine.scheduler import Scheduler, Sequence, Submission
from k2model.formats.checkpoint import fingerprint
from schemas.errors import K2Error
from tests.checkpoints import pack_experts, write_checkpoint

CANDIDATES = (Candidate((10, 11, 12), 3), Candidate((10, 11, 13), 2), Candidate((20,), 1), Candidate((10, 30), 2))


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


def scoring(prompt: tuple[int, ...]) -> Request:
    return Request(prompt_ids=prompt, num_prefix_tokens=9, candidates=CANDIDATES)


def generating(prompt: tuple[int, ...]) -> Request:
    return Request(prompt_ids=prompt, num_prefix_tokens=9, max_tokens=6, stop_ids=(257,))


@torch.inference_mode()
def written_out(decoder: Decoder, prompt: tuple[int, ...], candidate: Candidate) -> float:
    """Return the log-probability of `candidate` after `prompt`, read as one sequence."""
    ids = [*prompt, *candidate.token_ids]
    every = torch.log_softmax(decoder.logits(decoder.forward_one(ids)), dim=-1)
    return sum(every[i - 1, ids[i]].item() for i in range(len(ids) - candidate.num_scored, len(ids)))


def test_the_tree_shares_beginnings_and_asks_each_question_once() -> None:
    tree = candidate_tree(CANDIDATES)
    assert tree.token_ids == (10, 11)
    assert tree.depths == (0, 1)
    assert tree.ancestors == (frozenset({0}), frozenset({0, 1}))
    assert tree.parents == (ROOT, 0, 1)
    assert tree.targets == ((10, 20), (11, 30), (12, 13))
    assert [sum(1 for c, *_ in tree.edges if c == number) for number in range(4)] == [3, 2, 1, 2]
    with pytest.raises(ValueError, match="candidate 0 scores 0 of 1"):
        candidate_tree((Candidate((1,), 0),))


def test_logprobs_are_those_of_the_candidates_written_out(engine: Engine) -> None:
    """The tree in one pass against each candidate as a prompt of its own."""
    requests = [scoring(prompt) for prompt in prompts(5)]
    for request, completion in zip(requests, engine.submit(requests).result(), strict=True):
        for candidate, logprob in zip(CANDIDATES, completion.logprobs, strict=True):
            expected = written_out(engine.decoder, request.prompt_ids, candidate)
            assert logprob == pytest.approx(expected, abs=0.15)  # a bfloat16 head against itself, up to three tokens


def test_generation_is_greedy_decoding_one_token_at_a_time(checkpoint: str) -> None:
    decoder, tokenizer = load(checkpoint, "float32")
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
    decoder, tokenizer = load(family_folder, "float32")
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


def test_submissions_from_several_threads_keep_their_own_answers(engine: Engine) -> None:
    batches = [[scoring(p) for p in prompts(30, seed)] + [generating(p) for p in prompts(5, seed)] for seed in range(4)]
    futures = [engine.submit(batch) for batch in batches]
    for batch, future in zip(batches, futures, strict=True):
        assert future.result() == engine.submit(batch).result()


def test_the_shared_beginning_is_not_computed_again(engine: Engine) -> None:
    request = scoring(prompts(1)[0])
    completion = engine.submit([request]).result()[0]
    assert completion.computed_tokens == len(request.prompt_ids) - 9 + 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt_ids=(1,)), "either has candidates"),
        (Request(prompt_ids=(1,), num_prefix_tokens=1, max_tokens=1), "must leave a token"),
        (Request(prompt_ids=(1,) * 1024, max_tokens=1), "max_position_embeddings"),
    ],
)
def test_a_senseless_request_is_refused_at_once(engine: Engine, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit([request_])


def test_a_failing_step_reaches_its_owner_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            engine.submit([scoring(p) for p in prompts(3)]).result(timeout=10)
    assert len(engine.submit([scoring(p) for p in prompts(3)]).result(timeout=30)) == 3


def test_a_closed_engine_says_so(checkpoint: str) -> None:
    opened = Engine.open(checkpoint)
    pending = opened.submit([generating(p) for p in prompts(3)])
    opened.close()
    assert len(pending.result(timeout=0)) == 3
    with pytest.raises(K2Error, match="closed"):
        opened.submit([scoring(prompts(1)[0])])


def waiting(requests: list[Request]) -> tuple[Submission, list[Sequence]]:
    from concurrent.futures import Future

    future: Future[list[Completion]] = Future()
    submission = Submission(future, [None] * len(requests), len(requests))
    return submission, [Sequence(request, submission, i) for i, request in enumerate(requests)]


def test_a_step_holds_equal_shapes_together_within_its_budget() -> None:
    scheduler = Scheduler(max_num_batched_tokens=100, max_num_kv_tokens=1000)
    scheduler.add(waiting([scoring(p) for p in prompts(40)])[1])
    seen = 0
    while scheduler.has_waiting():
        groups = scheduler.next_prefill(0)
        assert all(len({s.num_prefill_tokens for s in group}) == 1 for group in groups)
        assert sum(s.num_prefill_tokens for group in groups for s in group) <= 100
        seen += sum(len(group) for group in groups)
    assert seen == 40


def test_one_submission_is_finished_before_the_next_is_begun() -> None:
    scheduler = Scheduler(max_num_batched_tokens=64, max_num_kv_tokens=1000)
    first, second = waiting([scoring(p) for p in prompts(10)]), waiting([scoring(p) for p in prompts(10, 1)])
    scheduler.add(first[1])
    scheduler.add(second[1])
    order = []
    while scheduler.has_waiting():
        order += [s.submission is first[0] for group in scheduler.next_prefill(0) for s in group]
    assert order == [True] * 10 + [False] * 10


def test_key_value_room_bounds_what_decodes_together() -> None:
    scheduler = Scheduler(max_num_batched_tokens=10_000, max_num_kv_tokens=100)
    scheduler.add(waiting([generating((1,) * 30)] * 5)[1])
    assert sum(map(len, scheduler.next_prefill(0))) == 2
    assert scheduler.next_prefill(72) == []
    assert sum(map(len, scheduler.next_prefill(0))) == 2


def test_the_conversion_is_made_once_and_opens_as_w8a8(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = prepare_int8(checkpoint)
    assert {info.dtype for n, info in converted.weights().infos.items() if n.endswith("_proj.weight")} == {"I8"}
    monkeypatch.setattr("k2model.compress.recipe.convert", lambda *_: pytest.fail("converted twice"))
    assert prepare_int8(checkpoint) == converted
    assert prepare_int8(str(converted.path)).path == converted.path
    assert fingerprint(checkpoint, "cpu") in str(converted.path)
