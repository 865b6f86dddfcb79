"""A step's layout: every token in its slot of a page, whole pages shared, the page in which sequences part copied.

And a token's bits, which hang on none of this.
"""

import gc
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from k2model.config import ModelConfig
from k2model.decoder.branches import Branches
from k2model.decoder.model import Decoder, page_pool
from k2model.decoder.pages import PagePool
from k2model.decoder.precision import PRECISIONS
from k2model.decoder.step import KeyValues, Span, Step, trees_of
from k2model.formats.weights import in_memory
from tests.checkpoints import config_json, random_tensors

TREE = Branches((7, 8, 9), (0, 0, 1), (frozenset({0}), frozenset({1}), frozenset({1, 2})))
"""Two children of the prompt's end, and a child of the second."""

CHAIN = Branches((7, 8), (0, 1), (frozenset({0}), frozenset({0, 1})))
PAGE = 16


def small_pool() -> PagePool:
    return PagePool(2, 1, 1, torch.float32, torch.device("cpu"), PAGE)


def num_taken(pool: PagePool) -> int:
    return len(pool.layers[0]) - pool.num_free


def kept(pool: PagePool, size: int, past: KeyValues | None = None, first: int = 0) -> KeyValues:
    """Return what a step leaves of a prompt of `size` tokens `first`, `first` + 1, ..., that follows `past`."""
    kv = KeyValues((past.end if past else 0) + size)
    write(Step(pool, [Span(tuple(range(first, first + size)), past, keep=kv)]))
    return kv


def write(step: Step) -> None:
    """Store of each token its id, and its negative in the second layer, as attention would store keys."""
    for layer, sign in enumerate((1, -1)):
        step.begun(layer)[step.places.pages, 0, step.places.offsets, 0] = sign * step.token_ids.float()


def stored(kv: KeyValues) -> list[int]:
    """Return the ids that `write` stored of a sequence, one slot after the other."""
    assert kv.pages is not None
    first, second = (layer[kv.pages.ids].flatten()[: kv.end] for layer in kv.pages.pool.layers)
    assert torch.equal(first, -second)
    return [int(value) for value in first.tolist()]


def page_ids(kv: KeyValues) -> list[int]:
    assert kv.pages is not None
    return kv.pages.ids


def test_tokens_are_packed_in_the_order_of_their_spans_each_in_its_slot() -> None:
    pool = small_pool()
    sizes = [(3, 0), (40, 0), (16, 16), (1, 15), (30, 10), (17, 0)]
    spans = [
        Span(tuple(range(100 * i, 100 * i + size)), kept(pool, start) if start else None, TREE if i % 2 else CHAIN)
        for i, (size, start) in enumerate(sizes)
    ]
    spans += [Span((901,), kept(pool, 5), decodes=True), Span((902, 903, 904), kept(pool, 15), decodes=True)]
    step = Step(pool, spans)
    prompts = sum(span.size for span in spans[:-2])
    assert step.num_prompt_tokens == prompts
    assert step.rows[-2:] == [slice(prompts, prompts + 1), slice(prompts + 1, prompts + 4)]
    end = 0
    for index, (span, rows) in enumerate(zip(spans, step.rows, strict=True)):
        assert (rows.start, rows.stop) == (end, end := end + span.size)
        assert step.token_ids[rows].tolist() == [*span.token_ids, *span.branches.token_ids]
        depths = [span.end + depth for depth in span.branches.depths]
        assert step.positions[rows].tolist() == [*range(span.start, span.end), *depths]
        assert step.slots[rows].tolist() == [*range(span.start, span.start + span.size)]
        assert step.owners[rows].unique().tolist() == [index]
        assert step.places.ends[index] == span.end
    assert end == len(step.token_ids)
    where = step.places.pages * PAGE + step.places.offsets
    assert len(where.unique()) == end, "each token has a place of its own"
    for name in ("owners", "slots", "positions", "pages", "offsets"):
        assert torch.equal(getattr(step.decoding_places, name), getattr(step.places, name)[prompts:])


def test_pages_that_prompts_read_are_found_once_whoever_shares_them() -> None:
    pool = small_pool()
    shared = kept(pool, 2 * PAGE + 3)
    decoding = kept(pool, 5)
    step = Step(pool, [*(Span((n,), shared) for n in range(4)), Span((5,)), Span((9,), decoding, decodes=True)])
    used, filled, places = step.prompt_pages
    read = {*page_ids(shared)[:2], *(pages.ids[-1] for pages in step.pages[:-1])}
    assert len(used.unique()) == len(used)
    assert {*used.tolist()} == read
    assert filled.sum(dim=1).sort()[0].tolist() == [1, 4, 4, 4, 4, PAGE, PAGE]
    assert len(places.slots) == 5
    assert torch.equal(used[places.pages], step.places.pages[:5])
    used, _, places = Step(pool, [Span((9,), decoding, decodes=True)]).prompt_pages
    assert (len(used), len(places.slots)) == (0, 0)


@pytest.mark.parametrize("end", [1, 15, 16, 17, 31, 32, 40])
def test_whole_pages_are_shared_and_the_page_in_which_sequences_part_is_copied(end: int) -> None:
    pool = small_pool()
    shared = kept(pool, end)
    before, whole, others = stored(shared), end // PAGE, num_taken(pool)
    first, second = kept(pool, 20, shared, first=200), kept(pool, 3, shared, first=300)
    for kv, tail in ((first, [*range(200, 220)]), (second, [300, 301, 302])):
        assert page_ids(kv)[:whole] == page_ids(shared)[:whole]
        assert not {*page_ids(kv)[whole:]} & {*page_ids(shared)}
        assert stored(kv) == [*range(end), *tail]
    assert stored(shared) == before, "neither wrote into what both read"
    assert num_taken(pool) - others == sum(-(-kv.end // PAGE) - whole for kv in (first, second))


def test_a_page_is_given_back_when_nobody_holds_it() -> None:
    pool = small_pool()
    shared = kept(pool, PAGE + 2)
    step = Step(pool, [Span((7,) * 20, shared, keep=(tail := KeyValues(PAGE + 22))), Span((8,), shared)])
    assert num_taken(pool) == 2 + 2  # a beginning; 20 tokens behind its first page; the last one passes
    del step
    gc.collect()
    assert num_taken(pool) == 2 + 2
    del shared  # but whose past it is holds it
    gc.collect()
    assert num_taken(pool) == 2 + 2
    del tail
    gc.collect()
    assert num_taken(pool) == 0
    assert sorted(pool.take(pool.num_free)) == [*range(len(pool.layers[0]))]


def test_what_nobody_keeps_stands_in_passing_pages_one_room_for_all_layers_and_steps() -> None:
    """Behind whole pages of what it continues; the page in which it parts from that is copied in each layer."""
    pool = small_pool()
    shared = kept(pool, PAGE + 3, first=500)
    for _ in range(3):
        step = Step(pool, [Span((1,) * 40, shared), Span((2,)), Span((3,), shared, keep=KeyValues(PAGE + 4))])
        assert [[~page for page in pages.ids if page < 0] for pages in step.pages] == [[0, 1, 2], [3], []]
        assert (step.pages[0].ids[0], len(pool.passing)) == (page_ids(shared)[0], 4)
        for layer, sign in enumerate((1, -1)):
            pool.passing.fill_(float("nan"))
            step.begun(layer)
            assert pool.passing[0, 0, :3, 0].tolist() == [sign * (500 + PAGE + place) for place in range(3)]
            assert pool.passing[1:].isnan().all()
        assert num_taken(pool) == 2 + 1


def test_what_decodes_goes_on_in_its_own_pages() -> None:
    """A page more where one is full; slots behind what is known, of wrong guesses, are filled anew."""
    pool = small_pool()
    kv = kept(pool, PAGE - 3)
    (first,) = page_ids(kv)
    for tokens, is_right in (((50, 51), True), ((90, 91, 92), False), ((52,), True), ((53,), True)):
        step = Step(pool, [Span(tokens, kv, decodes=True)])
        write(step)
        assert step.pages == [kv.pages]
        kv = KeyValues(kv.end + len(tokens) * is_right, kv.pages)
    assert stored(kv) == [*range(PAGE - 3), 50, 51, 52, 53]
    assert page_ids(kv)[0] == first
    assert num_taken(pool) == len(page_ids(kv)) == 2


def test_a_sequence_that_decodes_before_a_prompt_is_refused() -> None:
    pool = small_pool()
    decoding = Span((1,), kept(pool, 3), decodes=True)
    Step(pool, [Span((2,)), decoding])
    with pytest.raises(ValueError, match="spans that decode stand behind the others"):
        Step(pool, [Span((2,)), decoding, Span((3,))])


@pytest.mark.parametrize(
    ("window", "deep"), [(None, [0, 1]), (1, [1]), (2, [0, 1])], ids=["whole", "itself", "and its parent"]
)
def test_a_branch_sees_itself_and_what_it_follows_within_the_window(window: int | None, deep: list[int]) -> None:
    """Equal trees are one; smaller ones are padded, and see nothing there."""
    spans = [Branches(), CHAIN, TREE, CHAIN]
    of, visible = trees_of(spans, window)
    assert of.tolist() == [0, 1, 2, 1]
    assert (visible.shape, visible.dtype) == ((3, 3, 3), torch.bool)
    seen = [[[i for i, sees in enumerate(row) if sees] for row in tree] for tree in visible.tolist()]
    assert seen == [[[], [], []], [[0], deep, []], [[0], [1], [1 + i for i in deep]]]
    step = Step(small_pool(), [Span((1,), branches=branches) for branches in spans])
    assert all(torch.equal(one, other) for one, other in zip(step.trees(window), (of, visible), strict=True))


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5])
def test_trees_are_what_the_definition_says(window: int | None) -> None:
    chance = random.Random(5)
    for _ in range(30):
        parents = [chance.randint(-1, i - 1) for i in range(chance.randint(1, 12))]
        depths, ancestors = [0] * len(parents), [frozenset({i}) for i in range(len(parents))]
        for i, parent in enumerate(parents):
            if parent >= 0:
                depths[i], ancestors[i] = depths[parent] + 1, ancestors[parent] | {i}
        of, visible = trees_of([Branches((0,) * len(parents), tuple(depths), tuple(ancestors)), TREE], window)
        assert of.tolist() == [0, 1]
        for i in range(len(parents)):
            expected, node, left = set(), i, window or 100
            while node >= 0 and left:
                expected.add(node)
                node, left = parents[node], left - 1
            assert {*visible[0, i].nonzero()[:, 0].tolist()} == expected


@dataclass
class Told:
    """A sequence as a test knows it."""

    kv: KeyValues
    ids: list[int]

    def needs(self) -> set[int]:
        """Return its pages, and those of what it began with."""
        pages, found = self.kv.pages, set[int]()
        while pages is not None:
            found |= {*pages.ids}
            pages = pages.past
        return found


def coming(chance: random.Random, alive: list[Told], ids: list[int]) -> tuple[Span, Told]:
    """Return a prompt that ends in `ids`, behind the beginning of somebody alive or of nobody."""
    parent = chance.choice(alive) if alive and chance.random() < 0.6 else None
    begun = chance.randint(1, parent.kv.end) if parent else 0
    past = KeyValues(begun, parent.kv.pages) if parent else None
    kv = KeyValues(begun + len(ids))
    span = Span(tuple(ids), past, chance.choice([TREE, Branches()]), keep=kv)
    return span, Told(kv, [*(parent.ids[:begun] if parent else []), *ids])


def going_on(chance: random.Random, one: Told, ids: list[int]) -> Span:
    """Return `one` decoding `ids`, of which the first few turn out right."""
    span, right = Span(tuple(ids), one.kv, decodes=True), chance.randint(1, len(ids))
    one.kv, one.ids = KeyValues(one.kv.end + right, one.kv.pages), [*one.ids, *ids[:right]]
    return span


def test_many_come_grow_and_leave_and_each_keeps_its_own() -> None:
    """Pages are taken by those alive alone, so that memory does not grow with those who have left."""
    chance, pool, alive, sizes = random.Random(3), small_pool(), list[Told](), set[int]()
    kept(pool, 3, kept(pool, 5))
    gc.collect()  # of the frames, and the pages in them, that numba leaves in cycles when it compiles what copies
    for turn in range(300):
        first = 1000 * turn
        come = [
            coming(chance, alive, [*range(first + 100 * i, first + 100 * i + chance.randint(1, 50))])
            for i in range(chance.randint(1, 3))
        ]
        grow = [
            going_on(chance, one, [*range(first + 900, first + 900 + chance.randint(1, 4))])
            for one in chance.sample(alive, len(alive) // 2)
        ]
        write(Step(pool, [*(span for span, _ in come), *grow]))
        alive += [told for _, told in come]
        del come, grow
        assert all(stored(told.kv) == told.ids for told in alive)
        chance.shuffle(alive)
        del alive[chance.randint(2, 12) :]
        assert num_taken(pool) == len(set.union(*(each.needs() for each in alive)))
        sizes.add(len(alive))
    assert max(sizes) == 12


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"sliding_window": 2},
    "gpt_oss": {"sliding_window": 33},
    "deepseek_v3": {"first_k_dense_replace": 2},
}
"""All heads alike, windows and experts, sinks, latents."""


NEAR = {torch.float32: 2 * 4 * 70 * 2**-24, torch.bfloat16: 2 * 4 * 2**-8}
"""How far apart attention may be that rounds elsewhere: two layers round queries, keys, weights and values, each by at
most 2**-8 of itself to bfloat16, or by sums of at most 70 roundings of float32."""


def distance(found: Tensor, exact: Tensor) -> float:
    """Return how far apart hidden states [*, D] are, of their size."""
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.fixture(scope="module", params=[(family, kept) for family in FAMILIES for kept in ("float32", "bfloat16")])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    family, kept = request.param
    raw = config_json(family, **FAMILIES[family])
    precision = replace(PRECISIONS["fp32"], key_values=getattr(torch, kept))
    return Decoder.from_weights(
        ModelConfig.from_dict(raw, "test"), in_memory(random_tensors(raw, 1), "test"), precision
    )


@dataclass(eq=False)
class Computed:
    """A sequence that is computed a piece at a time, behind what `kv` holds of it."""

    ids: list[int]
    kv: KeyValues | None = None
    is_own: bool = False
    states: list[Tensor] = field(default_factory=list)
    branched: list[tuple[int, Branches, Tensor]] = field(default_factory=list)
    """Behind how many of its tokens which branches came to what."""

    @property
    def end(self) -> int:
        return self.kv.end if self.kv else 0

    def next_span(self, chance: random.Random, may_decode: bool) -> Span:
        """Return a few more of its tokens: as it decodes, or as a prompt, which may have branches."""
        if may_decode and self.is_own and chance.random() < 0.5:
            assert self.kv is not None
            return Span(tuple(self.ids[self.end : self.end + chance.randint(1, 3)]), self.kv, decodes=True)
        ids = self.ids[self.end : self.end + chance.randint(1, 60)]
        branches = chance.choice([TREE, CHAIN, Branches()])
        return Span(tuple(ids), self.kv, branches, keep=KeyValues(self.end + len(ids)))

    def take(self, span: Span, hidden: Tensor) -> None:
        """Note what a step found of `span`, and go on behind it."""
        self.states.append(hidden[: len(span.token_ids)])
        self.branched.append((span.end, span.branches, hidden[len(span.token_ids) :]))
        if span.decodes:
            assert self.kv is not None
            self.kv = KeyValues(span.end, self.kv.pages)
        else:
            self.kv, self.is_own = span.keep, True


def compute(decoder: Decoder, chance: random.Random, sequences: list[Computed], may_decode: bool) -> None:
    """Compute `sequences` to their ends, some of them in each step, in any order."""
    while waiting := [one for one in sequences if one.end < len(one.ids)]:
        chosen = [(one, one.next_span(chance, may_decode)) for one in waiting if chance.random() < 0.7]
        chance.shuffle(chosen)
        chosen.sort(key=lambda pair: pair[1].decodes)
        if chosen:
            step = decoder.step([span for _, span in chosen])
            hidden = decoder.forward(step)
            for (one, span), rows in zip(chosen, step.rows, strict=True):
                one.take(span, hidden[rows])


@pytest.mark.parametrize("seed", range(8))
@torch.inference_mode()
def test_bits_hang_on_no_step_no_page_and_no_neighbour(decoder: Decoder, seed: int) -> None:
    """Prompts behind a common beginning and alone, cut anyhow, with branches or not, against each of them whole, alone.

    Where tokens decode, too: but for latents, which decoding reads as they are, and prompts expanded.
    """
    chance = random.Random(seed)
    beginning = [chance.randrange(256) for _ in range(chance.choice([16, 32, 64, chance.randint(1, 100)]))]
    tails = [[chance.randrange(256) for _ in range(chance.randint(1, 90))] for _ in range(4)]
    may_decode = decoder.config.family != "deepseek_v3"
    for page in (16, 64):
        own = replace(decoder, pool=page_pool(decoder.config, decoder.kv_dtype, page=page))
        shared = Computed(beginning)
        compute(own, chance, [shared], may_decode)
        behind, others = [Computed([*beginning, *tail], shared.kv) for tail in tails], [Computed(ids) for ids in tails]
        compute(own, chance, [*behind, *others], may_decode)
        for one in (shared, *behind, *others):
            start = len(one.ids) - sum(map(len, one.states))
            assert torch.equal(torch.cat(one.states), decoder.forward_one(one.ids)[start:])
            for end, branches, states in one.branched:
                whole = decoder.forward(decoder.step([Span(tuple(one.ids[:end]), branches=branches)]))
                assert torch.equal(states, whole[end:])


@torch.inference_mode()
def test_a_prompt_decoded_token_by_token_has_the_bits_it_has_at_once(decoder: Decoder) -> None:
    """Of latents, which decoding absorbs, it has others: sums are of other products."""
    chance = random.Random(7)
    prompts = [[chance.randrange(256) for _ in range(length)] for length in (70, 3, 33)]
    kept = [KeyValues(1) for _ in prompts]
    step = decoder.step([Span((ids[0],), keep=kv) for ids, kv in zip(prompts, kept, strict=True)])
    states = [[state] for state in decoder.forward(step)]
    for place in range(1, 70):
        going_on = [index for index, ids in enumerate(prompts) if place < len(ids)]
        step = decoder.step([Span((prompts[index][place],), kept[index], decodes=True) for index in going_on])
        for index, state in zip(going_on, decoder.forward(step), strict=True):
            states[index].append(state)
            kept[index] = KeyValues(place + 1, kept[index].pages)
    for ids, found in zip(prompts, states, strict=True):
        whole = decoder.forward_one(ids)
        if decoder.config.family == "deepseek_v3":
            assert distance(torch.stack(found), whole) < NEAR[decoder.kv_dtype]
        else:
            assert torch.equal(torch.stack(found), whole)


@torch.inference_mode()
def test_a_branch_is_the_end_of_its_own_sequence(decoder: Decoder) -> None:
    """But for its slot, and with that the order of sums."""
    prompt = [*range(100, 130)]
    deep = Branches((7, 8, 9, 10), (0, 1, 2, 3), tuple(frozenset(range(i + 1)) for i in range(4)))
    for tree in (TREE, deep):
        hidden = decoder.forward(decoder.step([Span(tuple(prompt), branches=tree)]))
        for branch, ancestors in enumerate(tree.ancestors):
            alone = decoder.forward_one([*prompt, *(tree.token_ids[i] for i in sorted(ancestors))])
            assert distance(hidden[len(prompt) + branch], alone[-1]) < NEAR[decoder.kv_dtype]


@torch.inference_mode()
def test_what_pages_held_before_changes_nothing(decoder: Decoder) -> None:
    """Not even what is no number, of a request that went wrong."""
    prompt, tokens = [*range(100, 141)], (1, 2, 3)
    own = replace(decoder, pool=page_pool(decoder.config, decoder.kv_dtype))
    own.pool.give(own.pool.take(1))
    own.pool.pass_through(4)
    for waste in (0.0, float("nan")):
        for pages in (*own.pool.layers, own.pool.passing):
            pages.fill_(waste)
        found = []
        for size in (1, 20, 41):
            kv, whole = KeyValues(size), KeyValues(41)
            found.append(own.forward(own.step([Span(tuple(prompt[:size]), keep=kv)])))
            found.append(own.forward(own.step([Span(tuple(prompt[size:]), kv, TREE, keep=whole)])))
            passing = own.forward(own.step([Span((7,) * 3), Span(tuple(prompt[size:]), kv, TREE)]))
            assert torch.equal(passing[3:], found[-1]), "what passes has the bits of what stays"
            for place, token in enumerate(tokens):
                step = own.step([Span((token,), KeyValues(41 + place, whole.pages), decodes=True)])
                found.append(own.forward(step))
        if waste == 0.0:
            expected = found
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
