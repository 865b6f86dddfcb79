"""The waiting line: parents first, within the budget, one submission after the other."""

import random
from concurrent.futures import Future

from k2model.decoder.pages import PAGE
from k2model.engine.prefix import Segment
from k2model.engine.request import Candidate, Completion, Request
from k2model.engine.scheduler import Item, Scheduler, Sequence, Submission, num_tokens

LABELS = (Candidate((1,), 1), Candidate((2,), 1))
SHARED = tuple(range(100, 109))


def scoring(prompt: tuple[int, ...], prefix: int = 9) -> Request:
    return Request(prompt_ids=prompt, num_prefix_tokens=prefix, candidates=LABELS)


def generating(prompt: tuple[int, ...]) -> Request:
    return Request(prompt_ids=prompt, max_tokens=6)


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [SHARED + tuple(rng.randrange(256) for _ in range(rng.randint(1, longest))) for _ in range(count)]


def submit(scheduler: Scheduler, requests: list[Request]) -> Submission:
    submission = Submission(Future(), [None] * len(requests), len(requests))
    scheduler.add(requests, submission)
    return submission


def drain(scheduler: Scheduler) -> list[list[Item]]:
    """Return every step until nothing waits, as if each were computed."""
    steps = []
    while scheduler.has_waiting():
        items = scheduler.next_prefill(0, 0)
        assert items, "the line is stuck"
        for item in items:
            assert item.parent is None or item.parent.kv is not None
        for item in items:
            if isinstance(item, Segment):
                assert item.kv is None
                item.kv = "computed"
            else:
                scheduler.close(item)
        steps.append(items)
    return steps


def answered(steps: list[list[Item]]) -> list[Sequence]:
    return [item for items in steps for item in items if isinstance(item, Sequence)]


def prompt_of(sequence: Sequence) -> tuple[int, ...]:
    """Return the tokens that its segments and itself compute."""
    shared = [i for part in sequence.parent.chain() for i in part.token_ids] if sequence.parent else []
    return (*shared, *sequence.request.prompt_ids[len(shared) :])


def test_every_request_is_computed_once_behind_its_parents_within_the_budget() -> None:
    scheduler = Scheduler(max_num_batched_tokens=100, max_num_kv_tokens=1000)
    tails = prompts(30, 1, 20)
    requests = [scoring(p) for p in prompts(40)]
    requests += [scoring(SHARED + (7,) * 30 + tail) for tail in tails]  # all quote the same 39 tokens
    requests += [scoring(SHARED + (8,) * 300)]
    submit(scheduler, requests)
    steps = drain(scheduler)
    assert sorted(s.request.prompt_ids for s in answered(steps)) == sorted({r.prompt_ids for r in requests})
    assert all(prompt_of(s) == s.request.prompt_ids for s in answered(steps))
    assert all(sum(map(num_tokens, items)) <= 100 for items in steps)
    computed = sum(num_tokens(item) for items in steps for item in items)
    alone = sum(len(r.prompt_ids) for r in requests)
    assert computed == alone - 9 * (len(requests) - 1) - 39 * (len(tails) - 1)


def test_every_computed_token_is_somebodys() -> None:
    """But for the instructions, which are nobody's: shared segments are counted for the first that needs them."""
    scheduler = Scheduler(max_num_batched_tokens=40, max_num_kv_tokens=100)
    requests = [scoring(SHARED + (i,) * 50 + (j,) * 3) for i in range(4) for j in range(5)]
    requests += [scoring(p) for p in prompts(10)]
    submit(scheduler, requests)
    steps = drain(scheduler)
    computed = sum(num_tokens(item) for items in steps for item in items)
    assert sum(s.num_computed_tokens + s.num_prefill_tokens for s in answered(steps)) == computed - len(SHARED)
    for s in answered(steps):
        assert s.num_shared_tokens + s.num_computed_tokens + s.num_prefill_tokens == len(s.request.prompt_ids)
    assert any(s.num_segment_tokens == 40 and s.num_shared_tokens == len(SHARED) for s in answered(steps))  # in pieces


def test_short_ones_first_so_that_neighbours_are_alike() -> None:
    scheduler = Scheduler(max_num_batched_tokens=1000, max_num_kv_tokens=1000)
    submit(scheduler, [scoring(p, 0) for p in prompts(40)])
    sizes = [s.num_prefill_tokens for s in answered(drain(scheduler))]
    assert sizes == sorted(sizes)


def test_equal_requests_are_one_and_answer_all_who_asked() -> None:
    scheduler = Scheduler(1000, 1000)
    first = submit(scheduler, [scoring((*SHARED, 1)), scoring((*SHARED, 2)), scoring((*SHARED, 1))])
    second = submit(scheduler, [scoring((*SHARED, 2))])
    sequences = answered(drain(scheduler))
    assert len(sequences) == 2
    for sequence in sequences:
        sequence.finish(Completion(logprobs=(0.0, float(len(sequence.owners))), computed_tokens=5))
    assert [c.logprobs[1] for c in first.future.result(0)] == [2.0, 2.0, 2.0]
    assert [c.computed_tokens for c in first.future.result(0)] == [5, 5, 0]
    assert [c.computed_tokens for c in second.future.result(0)] == [0]


def test_instructions_are_kept_for_the_next_submission() -> None:
    scheduler = Scheduler(1000, 1000)
    submit(scheduler, [scoring(p) for p in prompts(3)])
    assert any(isinstance(item, Segment) for items in drain(scheduler) for item in items)
    submit(scheduler, [scoring(p) for p in prompts(3, 1)])
    assert all(isinstance(item, Sequence) for items in drain(scheduler) for item in items)


def test_two_submissions_wait_for_the_same_instructions() -> None:
    scheduler = Scheduler(1000, 1000)
    submit(scheduler, [scoring(p) for p in prompts(3)])
    submit(scheduler, [scoring(p) for p in prompts(3, 1)])
    steps = drain(scheduler)
    assert [len(items) for items in steps] == [1, 6]


def test_the_next_submission_gets_spare_room_alone() -> None:
    def steps_until_done(others: int) -> int:
        scheduler = Scheduler(max_num_batched_tokens=64, max_num_kv_tokens=1000)
        first = submit(scheduler, [scoring(p) for p in prompts(10)])
        for seed in range(others):
            submit(scheduler, [scoring(p) for p in prompts(10, seed + 1)])
        steps = drain(scheduler)
        return max(i for i, items in enumerate(steps) if any(s.owners[0][0] is first for s in answered([items])))

    assert steps_until_done(0) == steps_until_done(3) > 3


def test_key_value_room_bounds_what_decodes_together() -> None:
    scheduler = Scheduler(max_num_batched_tokens=10_000, max_num_kv_tokens=2 * PAGE)
    submit(scheduler, [generating((i,) * (PAGE - 6)) for i in range(5)])
    assert len(scheduler.next_prefill(0, 0)) == 2
    assert scheduler.next_prefill(0, 2 * PAGE) == []
    assert len(scheduler.next_prefill(0, PAGE)) == 1


def test_shared_segments_come_in_waves_that_fit() -> None:
    scheduler = Scheduler(max_num_batched_tokens=500, max_num_kv_tokens=200)
    submit(scheduler, [scoring((i,) * 60 + (j,), 0) for i in range(10) for j in range(3)])
    waiting = 0
    for items in drain(scheduler):
        for item in items:
            waiting += len(item.token_ids) if isinstance(item, Segment) else 0
            assert waiting <= 2 * 200  # the next wave may begin in the step that ends one
        if any(isinstance(item, Sequence) for item in items):
            waiting = 0


def test_a_segment_that_cannot_be_computed_is_computed_by_each() -> None:
    scheduler = Scheduler(1000, 1000)
    requests = [scoring(SHARED + (7,) * 30 + (i,)) for i in range(4)]
    submit(scheduler, requests)
    (root,) = scheduler.next_prefill(0, 0)
    assert isinstance(root, Segment)
    scheduler.unshare(root)
    steps = drain(scheduler)
    assert [len(items) for items in steps] == [1, 4]
    assert all(prompt_of(s) == s.request.prompt_ids for s in answered(steps))


def test_nobody_waits_for_what_was_given_up() -> None:
    scheduler = Scheduler(1000, 1000)
    submission = submit(scheduler, [scoring(p, 0) for p in prompts(3)])
    submission.future.set_exception(RuntimeError("gone"))
    assert scheduler.next_prefill(0, 0) == []
    assert not scheduler.has_waiting()
