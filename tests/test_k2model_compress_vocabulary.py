"""Trimmed vocabularies: any text still goes there and back, and texts of kept tokens are the same tokens."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from k2model.compress.convert import convert
from k2model.compress.examples import Batch, Example
from k2model.compress.recipe import copy_tokenizer
from k2model.compress.vocabulary import Trim, kept_ids, read_tokenizer_json, renumbered, trim_vocabulary, trimmed
from k2model.engine.request import Candidate
from k2model.formats.checkpoint import open_checkpoint
from k2model.tokenizer import Tokenizer
from schemas.errors import CheckpointError
from tests.checkpoints import write_checkpoint
from tests.forward import float_decoder, packed_logits, stored_decoder

SHARED = Path(__file__).parents[2] / "shared"
CORPUS = """Where is my parcel? It was sent on Monday, and the courier lost it again. I want my money back now.
The new phone arrived broken; please send another charger and tell me when the refund arrives.
They said that the parcel was refunded, but nothing arrived. Thank you for the quick answer, it works again.
Déjà vu: la commande n'est pas arrivée. 我的包裹在哪里？ Привет, где моя посылка? 12,450.00 EUR 🙂"""
NEEDED = "Where is my parcel? I want my money back."


def quiet(line: dict[str, Any]) -> None:
    pass


def trained(*, vocab_size: int = 420, ignore_merges: bool = False) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE with merges, control tokens first and a post-processor with ids."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines() * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def split_everywhere() -> dict[str, Any]:
    """Return the same vocabulary with every way to make a token a merge, whole pieces first: as Llama 3's."""
    spelled = trained(ignore_merges=True)
    vocab = spelled["model"]["vocab"]
    merges = [
        [token[:cut], token[cut:]]
        for token in sorted(vocab, key=vocab.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab and not token.startswith("<|")
    ]
    return {**spelled, "model": {**spelled["model"], "merges": merges}}


def with_fallback() -> dict[str, Any]:
    """Return a BPE of characters that falls back to bytes, its merges as strings: as Mixtral's."""
    words = [" " + word for word in NEEDED.split()]
    letters = sorted({*"".join(words).replace(" ", "▁"), "▁", "q", "é"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in words:
        made = "▁"
        for letter in word[1:]:
            if made + letter not in tokens:
                tokens.append(made + letter)
                merges.append(f"{made} {letter}")
            made += letter
    step = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": step},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def smollm2() -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        copy_tokenizer(open_checkpoint("smollm2-135m-instruct"), Path(folder))
        return read_tokenizer_json(Path(folder))


MADE = {"trained": trained, "split everywhere": split_everywhere, "fallback": with_fallback, "smollm2": smollm2}


@cache
def before_and_after(kind: str) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, frozenset[str]]:
    """Return a tokenizer, the one trimmed to what a text takes, and the tokens that are left."""
    spelled = MADE[kind]()
    before = tokenizers.Tokenizer.from_str(json.dumps(spelled))
    needed = CORPUS if kind == "smollm2" else NEEDED
    ids = kept_ids(spelled, before.encode(needed, add_special_tokens=False).ids, "test")
    smaller = trimmed(spelled, ids)
    after = tokenizers.Tokenizer.from_str(json.dumps(smaller))
    return before, after, frozenset(smaller["model"]["vocab"])


TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*NEEDED.split(" "), " ", "mo", "ney", "par", "  ", ".", "?", "é", "包", "7"]), max_size=12
    ).map("".join),
    st.lists(st.sampled_from(CORPUS.split(" ")), max_size=12).map(" ".join),
)


@pytest.mark.parametrize("kind", MADE)
@given(text=TEXTS)
@settings(max_examples=80, deadline=None)
def test_any_text_goes_there_and_back_and_kept_tokens_are_the_same(kind: str, text: str) -> None:
    """What the whole vocabulary loses (SmolLM2 has no token for 21 bytes), the trimmed one loses, too."""
    before, after, vocab = before_and_after(kind)
    old, new = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in (before, after))
    assert after.decode(new.ids) == before.decode(old.ids)
    if kind != "smollm2" and "▁" not in text:
        assert after.decode(new.ids) == text
    assert "<unk>" not in new.tokens
    if vocab.issuperset(old.tokens):
        assert new.tokens == old.tokens


@pytest.mark.parametrize("kind", MADE)
def test_what_is_needed_is_the_same_and_much_else_is_gone(kind: str) -> None:
    before, after, vocab = before_and_after(kind)
    for text in (NEEDED, CORPUS) if kind == "smollm2" else (NEEDED,):
        assert after.encode(text).tokens == before.encode(text).tokens
    assert (after.token_to_id("<unk>") is None) == (before.token_to_id("<unk>") is None)
    merged = [[tuple(merge) for merge in json.loads(each.to_str())["model"]["merges"]] for each in (before, after)]
    assert merged[1] == [merge for merge in merged[0] if merge in set(merged[1])]  # in the old order
    assert after.get_vocab_size() < before.get_vocab_size()
    numbers = sorted(after.get_vocab().values())
    assert numbers == list(range(len(numbers)))
    parts = {left + right for left, right in merged[1]}
    assert all(len(token) == 1 or token in parts or token.startswith("<") for token in vocab)  # all can be made


@dataclass(frozen=True)
class Texts:
    """Prompts of one text each behind shared instructions."""

    tokenizer: Tokenizer
    texts: tuple[str, ...]
    held_back: tuple[str, ...] = ()
    digest: str = "texts"

    def batch(self, texts: Sequence[str]) -> Batch:
        prefix = self.tokenizer.encode("Where:")
        answers = tuple(Candidate(tuple(self.tokenizer.encode(word)), 1) for word in ("refund", "lost"))
        return Batch(
            tuple(Example((*prefix, *self.tokenizer.encode(text)), len(prefix), answers, None) for text in texts)
        )

    def epoch(self, number: int) -> Iterator[Batch]:
        yield self.batch(self.texts)

    def validation(self) -> Sequence[Batch]:
        return [self.batch(self.held_back)] if self.held_back else []


def checkpoint(folder: Path, **options: Any) -> Path:
    """Write a checkpoint with a vocabulary of 420, more rows than tokens, and ids in every file that has them."""
    write_checkpoint(folder, vocab_size=430, eos_token_id=[1, 429], pad_token_id=2, **options)
    (folder / "tokenizer.json").write_text(json.dumps(trained()))
    settings_json = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = {"0": {"content": "<|im_start|>"}, "2": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings_json, "added_tokens_decoder": decoder}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "max_length": 9}))
    return folder


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"family": "mixtral"}])
def test_a_trimmed_model_says_the_same_of_the_tokens_that_are_left(options: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", **options)
    old = Tokenizer.open(source)
    data = Texts(old, (NEEDED, "the parcel"))
    facts = trim_vocabulary(str(source), tmp_path / "small", data, Trim(), quiet)
    new, opened = Tokenizer.open(tmp_path / "small"), open_checkpoint(str(tmp_path / "small"))
    assert facts["tokens"] == {"before": 430, "after": opened.config().vocab_size}
    tables = 1 if opened.config().tie_word_embeddings else 2
    assert facts["parameters_saved"] == tables * 48 * (430 - opened.config().vocab_size)
    assert facts["tokens_per_prompt"]["before"] == facts["tokens_per_prompt"]["after"]
    rendered = old.render([{"role": "user", "content": f"Where:{NEEDED}"}])
    pairs = [(old.encode_markup(text), new.encode_markup(text)) for text in (rendered, "refund", "lost", "the parcel")]
    assert [[old.markup.id_to_token(i) for i in ids] for ids, _ in pairs] == [
        [new.markup.id_to_token(i) for i in ids] for _, ids in pairs
    ]
    spelled = sorted(new.markup.get_vocab(), key=new.markup.get_vocab().__getitem__)
    ids = torch.tensor([old.markup.token_to_id(token) for token in spelled])
    before = packed_logits(float_decoder(source), [a for a, _ in pairs])[:, ids]
    assert torch.equal(packed_logits(float_decoder(tmp_path / "small"), [b for _, b in pairs]), before)
    assert [spelled[i] for i in new.stop_ids] == ["<|im_end|>"]
    raw = opened.config_json()
    assert (raw["eos_token_id"], raw["pad_token_id"]) == ([1], 2)
    assert set(json.loads((tmp_path / "small/tokenizer_config.json").read_text())["added_tokens_decoder"]) == {"0", "2"}


def test_rare_tokens_go_answers_stay_and_rows_held_back_tell_the_price(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    old = Tokenizer.open(source)
    data = Texts(old, (" money money money", "the courier", "the"), held_back=("the courier lost money",))
    facts = trim_vocabulary(str(source), tmp_path / "small", data, Trim(min_count=3), quiet)
    new = Tokenizer.open(tmp_path / "small")
    assert len(new.encode(" money")) == len(old.encode(" money"))
    assert [len(new.encode(word)) for word in ("refund", "lost")] == [len(old.encode(w)) for w in ("refund", "lost")]
    for word in (" courier", "Where"):  # instructions were read once for all three prompts
        assert len(new.encode(word)) > len(old.encode(word))
    lengths = facts["tokens_per_prompt"]
    text = "the courier lost money"
    assert lengths == {"before": len(old.encode(text)), "after": len(new.encode(text))}
    assert lengths["after"] > lengths["before"]


def test_a_quantized_checkpoint_stays_as_it_is_but_for_its_rows(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", family="qwen3_moe")
    (tmp_path / "int8").mkdir()
    copy_tokenizer(open_checkpoint(str(source)), tmp_path / "int8")
    convert(open_checkpoint(str(source)), tmp_path / "int8", None)
    data = Texts(Tokenizer.open(source), (NEEDED,))
    trim_vocabulary(str(tmp_path / "int8"), tmp_path / "small", data, Trim(), quiet)
    prompt = [Tokenizer.open(folder).encode(NEEDED) for folder in (tmp_path / "int8", tmp_path / "small")]
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("int8", "small")]
    assert config[1] == {**config[0], "vocab_size": config[1]["vocab_size"], "eos_token_id": [1]}
    logits = [packed_logits(stored_decoder(tmp_path / n), [i]) for n, i in zip(("int8", "small"), prompt, strict=True)]
    assert torch.equal(logits[1][:, 0], logits[0][:, 0])
    assert logits[1].shape[1] < logits[0].shape[1]


def test_what_cannot_be_trimmed_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", tie_word_embeddings=False)
    data = Texts(Tokenizer.open(source), (NEEDED,))
    tensors = load_file(source / "model.safetensors")
    head = {"lm_head.weight": torch.ones(430, 48, dtype=torch.int8), "lm_head.weight_scale": torch.ones(430, 1)}
    save_file({**tensors, **head}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head"):
        trim_vocabulary(str(source), tmp_path / "small", data, Trim(), quiet)
    assert not (tmp_path / "small").exists()
    pieces = {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "pre_tokenizer": {"type": "ByteLevel"}}
    unknown = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}}
    for spelled in (pieces, unknown):
        with pytest.raises(CheckpointError, match="not byte pair encoding down to bytes"):
            kept_ids(spelled, [0], "test")


def test_ids_in_other_places_are_renumbered() -> None:
    spelled = trained()
    spelled["post_processor"] = {"type": "RobertaProcessing", "sep": ["<|im_end|>", 1], "cls": ["<|im_start|>", 0]}
    spelled["added_tokens"] = [{**token, "id": token["id"] + 200} for token in spelled["added_tokens"]]
    processor = {"type": "TemplateProcessing", "special_tokens": {"x": {"id": "x", "ids": [202], "tokens": ["x"]}}}
    ids = [0, 1, *range(3, 200), 200, 201, 202]
    smaller = trimmed({**spelled, "post_processor": processor}, ids)
    assert smaller["post_processor"]["special_tokens"]["x"] == {"id": "x", "ids": [201], "tokens": ["x"]}
    assert [token["id"] for token in smaller["added_tokens"]] == [199, 200, 201]
    assert trimmed(spelled, ids)["post_processor"]["sep"] == ["<|im_end|>", 1]
    config = {"eos_token_id": [202, 2], "bos_token_id": 2, "pad_token_id": None, "vocab_size": 9}
    assert renumbered(config, ids) == {"eos_token_id": [201], "pad_token_id": None, "vocab_size": 9}


@pytest.mark.skipif(not (SHARED / "fixtures/kimi_tokenizer").exists(), reason="no fixtures")
def test_kimis_vocabulary_becomes_a_tokenizer_json(tmp_path: Path) -> None:
    spelled = read_tokenizer_json(SHARED / "fixtures/kimi_tokenizer")
    before = tokenizers.Tokenizer.from_str(json.dumps(spelled))
    words = [token for token, _ in random.Random(0).sample(sorted(before.get_vocab().items()), 40)]
    ids = kept_ids(spelled, before.encode(CORPUS).ids, "test")
    after = tokenizers.Tokenizer.from_str(json.dumps(trimmed(spelled, ids)))
    assert after.encode(CORPUS).tokens == before.encode(CORPUS).tokens
    text = " ".join(words)
    assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)
