"""The engine: one model in memory, one thread that computes, any number of threads that submit.

Knows token ids; what they say, and which row asked, is the caller's. Answers do not depend on what else is waiting:
the same request gets the same bits alone, among others, and on any number of threads.
"""

import atexit
import tempfile
import threading
from collections.abc import Sequence as Items
from concurrent.futures import Future
from pathlib import Path

import torch

from k2model.compress.recipe import copy_tokenizer, prepare_int8
from k2model.decoder.model import Decoder
from k2model.engine.request import Completion, Request
from k2model.engine.runner import Runner
from k2model.engine.scheduler import Scheduler, Sequence, Submission
from k2model.formats.checkpoint import fingerprint, open_checkpoint
from k2model.tokenizer import Tokenizer
from schemas.errors import K2Error

MAX_NUM_BATCHED_TOKENS = 1024
"""Tokens of a step: its int32 products (12 MB at SmolLM2's widest) still fit the cache of a small server."""

MAX_NUM_KV_TOKENS = 32768
"""Key-value slots of decoding sequences: 750 MB for SmolLM2-135M in bfloat16."""


class Engine:
    """A decoder and its loop."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        fingerprint: str,
        *,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        max_num_kv_tokens: int = MAX_NUM_KV_TOKENS,
    ) -> None:
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.max_position_embeddings = decoder.config.max_position_embeddings
        self.decoder = decoder
        self._runner = Runner(decoder)
        self._scheduler = Scheduler(max_num_batched_tokens, max_num_kv_tokens)
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="k2batch-engine", daemon=True)
        self._thread.start()
        # A computing thread must not outlive the interpreter: torch's own threads would abort the process.
        atexit.register(self._abandon)

    @classmethod
    def open(cls, checkpoint: str, *, mode: str = "cpu") -> "Engine":
        """Return an engine for `checkpoint`, converting it to INT8 first if it is not (once; seconds for the default).

        Args:
            checkpoint: `smollm2-135m-instruct`, a folder, a `.gguf` file, or an fsspec URL of either.
            mode: `cpu` (W8A8). `float32` computes the checkpoint's own weights, slowly: the reference for measurement.

        Raises: CheckpointError.
        """
        decoder, tokenizer = load(checkpoint, mode)
        return cls(decoder, tokenizer, fingerprint(checkpoint, mode))

    def submit(self, requests: Items[Request]) -> Future[list[Completion]]:
        """Return a future of one completion per request, in order.

        Raises: ValueError if a request is empty, too long for the model, or asks for both or neither of scoring and
            generation. K2Error if the engine is closed.
        """
        for request in requests:
            self._check(request)
        future: Future[list[Completion]] = Future()
        submission = Submission(future, [None] * len(requests), len(requests))
        if not requests:
            future.set_result([])
            return future
        with self._wake:
            if self._closing:
                raise K2Error("the engine is closed", remedy="open another one")
            self._scheduler.add([Sequence(request, submission, i) for i, request in enumerate(requests)])
            self._wake.notify()
        return future

    def close(self) -> None:
        """Finish what was submitted, then stop the loop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """Stop after the step in progress; what was submitted is not answered."""
        with self._wake:
            self._scheduler = Scheduler(MAX_NUM_BATCHED_TOKENS, MAX_NUM_KV_TOKENS)
            self._runner.cohorts = []
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _check(self, request: Request) -> None:
        if bool(request.candidates) == bool(request.max_tokens):
            raise ValueError("a request either has candidates to score or max_tokens to generate")
        if not 0 <= request.num_prefix_tokens < len(request.prompt_ids):
            raise ValueError(f"{request.num_prefix_tokens=} must leave a token of {len(request.prompt_ids)=}")
        longest = max((len(c.token_ids) for c in request.candidates), default=request.max_tokens)
        if len(request.prompt_ids) + longest > self.max_position_embeddings:
            raise ValueError(f"{len(request.prompt_ids)=} + {longest} passes {self.max_position_embeddings=}")

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._scheduler.has_waiting() or self._runner.cohorts):
                    self._wake.wait()
                held = sum(cohort.num_kv_tokens for cohort in self._runner.cohorts)
                groups = self._scheduler.next_prefill(held)
                if self._closing and not groups and not self._runner.cohorts and not self._scheduler.has_waiting():
                    return
            active = [s for group in groups for s in group] or [s for c in self._runner.cohorts for s in c.sequences]
            try:
                if groups:
                    self._runner.prefill(groups)
                elif self._runner.cohorts:
                    self._runner.decode()
            except Exception as error:  # the owners of the step must hear of it; the loop must go on
                for sequence in active:
                    sequence.fail(error)
                self._runner.cohorts = [] if not groups else self._runner.cohorts


def load(checkpoint: str, mode: str = "cpu") -> tuple[Decoder, Tokenizer]:
    """Return the decoder and tokenizer of `checkpoint`; see `Engine.open` for the modes. Raises: CheckpointError."""
    source = prepare_int8(checkpoint) if mode == "cpu" else open_checkpoint(checkpoint)
    if source.is_gguf:
        with tempfile.TemporaryDirectory() as folder:
            copy_tokenizer(source, Path(folder))
            tokenizer = Tokenizer.open(Path(folder))
    else:
        tokenizer = Tokenizer.open(source.path)
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    decoder = Decoder.from_weights(source.config(), source.weights(), dtype=dtype, expand=mode == "float32")
    return decoder, tokenizer
