"""The embedded model k2-mini, for real: small, and right about what it was trained on."""

import pytest
import torch

from k2model.engine.engine import Engine
from k2model.formats.checkpoint import K2_MINI, open_checkpoint
from pipelines.prompts import Prompts
from schemas.runs import Task

POLICY = Task(
    name="policy",
    kind="choose",
    labels={
        "hatespeech": "attacks a group of people for what they are",
        "offensive": "insults or demeans, without that",
        "normal": "neither",
    },
)

ORDINARY = [
    "when does the library open on sunday",
    "i made soup for my grandmother today",
    "thank you for the fast answer, it works now",
    "we are going to the lake with the kids this weekend",
]
INSULTS = [
    "you are such a stupid bitch",
    "shut up you retard",
    "what a dumb cunt",
    "go to hell you fucking idiot",
]


def test_it_is_at_most_40_megabytes_of_which_nothing_runs() -> None:
    files = open_checkpoint(K2_MINI).files()
    assert sum(file.stat().st_size for file in files) <= 40_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors"}


@pytest.mark.slow
def test_it_tells_insults_from_ordinary_talk_the_same_alone_and_in_company() -> None:
    engine = Engine.open(K2_MINI)
    try:
        prompts = Prompts([POLICY], engine.tokenizer, 1024)
        requests = [prompts.requests(text)[0] for text in (*ORDINARY, *INSULTS)]
        together = engine.submit(requests).result()
        alone = [engine.submit([request]).result()[0] for request in requests]
    finally:
        engine.close()
    assert [one.logprobs for one in alone] == [one.logprobs for one in together]
    normal = torch.tensor([one.logprobs[list(POLICY.labels).index("normal")] for one in together])
    ordinary, insults = normal.split([len(ORDINARY), len(INSULTS)])
    assert ordinary.mean() > insults.mean() + 1, normal
