"""The tree of shared beginnings: right, and worth its while."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from k2model.engine.prefix import MIN_SHARED_TOKENS, Segment, share


def tokens_of(segment: Segment | None) -> tuple[int, ...]:
    return tuple(token_id for part in segment.chain() for token_id in part.token_ids) if segment else ()


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=80).map(tuple), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_every_prompt_continues_its_segment_by_at_least_a_token(prompts: list[tuple[int, ...]]) -> None:
    for prompt, segment in zip(prompts, share(prompts, None), strict=True):
        beginning = tokens_of(segment)
        assert prompt[: len(beginning)] == beginning
        assert len(beginning) < len(prompt)
        assert segment is None or segment.end == len(beginning)
        assert segment is None or all(len(part.token_ids) >= MIN_SHARED_TOKENS for part in segment.chain())


def test_what_two_prompts_share_is_one_segment_at_any_depth() -> None:
    a, b, c = (tuple(range(i, i + 40)) for i in (0, 100, 200))
    prompts = [a + b + (1,), a + b + (2,), a + c + (3,), a + c, (9,) * 50, a + b + (1,)]
    found = share(prompts, None)
    assert [tokens_of(segment) for segment in found] == [a + b, a + b, a + c[:-1], a + c[:-1], (), a + b]
    assert found[0] is found[1] is found[5]
    assert found[2] is found[3]
    assert found[0].parent is found[2].parent  # type: ignore[union-attr]


def test_known_instructions_are_the_root() -> None:
    root = Segment(tuple(range(30)))
    found = share([root.token_ids + (1,) * 20, root.token_ids + (2,) * 5, root.token_ids + (1,) * 21], root)
    assert found[1] is root
    assert found[0] is found[2]
    assert found[0] is not None
    assert found[0].parent is root
    assert share([(*root.token_ids, 1)], root) == [root]


def test_short_coincidences_are_not_shared() -> None:
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(3) for _ in range(60)) for _ in range(200)]
    assert share(prompts, None) == [None] * 200
