"""The engine: one model in memory, one thread that computes, any number of threads that submit.

Knows token ids; what they say, and which row asked, is the caller's. Answers do not depend on what else is waiting:
the same request gets the same bits alone, among others, and on any number of threads.
"""

import atexit
import threading
import time
from collections.abc import Sequence as Items
from concurrent.futures import Future

import torch

from k2model.compress.recipe import open_tokenizer, prepare_int8
from k2model.compress.sparsity import dropped_experts, with_thresholds
from k2model.decoder.card import find_card
from k2model.decoder.model import Decoder
from k2model.decoder.precision import find_precision
from k2model.engine.candidates import candidate_tree
from k2model.engine.prefix import Segment
from k2model.engine.request import Completion, Request, Work
from k2model.engine.runner import Batch, Runner
from k2model.engine.scheduler import Scheduler, Submission
from k2model.formats.checkpoint import fingerprint, open_checkpoint
from k2model.tokenizer import Tokenizer
from kernels.threads import in_thread_that_ends
from schemas.errors import EnvironmentMismatch, K2Error

MAX_NUM_BATCHED_TOKENS = 1024
"""Tokens of a step: its int32 products (12 MB at SmolLM2's widest) still fit the cache of a small server."""

MAX_NUM_KV_TOKENS = 65536
"""Key-value slots of decoding sequences, taken as they come: at most 1.5 GB for SmolLM2-135M in bfloat16."""

MAX_NUM_BATCHED_TOKENS_ON_CARD = 8192
"""Tokens of a step there: products of 8,192 by SmolLM2's 1,536 are 768 tiles, six for each multiprocessor of an H100.
Not measured."""


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
        self._runner = Runner(decoder, tokenizer)
        self._scheduler = Scheduler(max_num_batched_tokens, max_num_kv_tokens)
        self._wake = threading.Condition()
        self._closing = False
        self._submissions: list[Submission] = []
        self.busy_seconds = 0.0
        """Time spent computing since it was opened."""
        self._told = Work()
        self._thread = threading.Thread(target=self._loop, name="k2batch-engine", daemon=True)
        self._thread.start()
        # A computing thread must not outlive the interpreter: torch's own threads would abort the process.
        atexit.register(self._abandon)

    @classmethod
    def open(
        cls, checkpoint: str, *, precision: str = "int8", router_thresholds: Items[float] = (), device: str = "cpu"
    ) -> "Engine":
        """Return an engine for `checkpoint`.

        Args:
            checkpoint: `smollm2-135m-instruct`, a folder, a `.gguf` file, or an fsspec URL of either.
            precision: of `k2model.decoder.precision`. For `int8` it is converted first if it is not (once; seconds for
                the default); the others compute the checkpoint's own weights.
            router_thresholds: of each layer, to drop experts by; none for all experts.
            device: `cpu`, or `cuda` for the NVIDIA card that is torch's current one.

        Raises: CheckpointError; SpecError for a precision that is none; EnvironmentMismatch if there is no card.
        """
        # With a team of threads left over from this one, the loop would compute at five sixths of its rate.
        decoder, tokenizer = in_thread_that_ends(load, checkpoint, precision, router_thresholds, device)
        digest = fingerprint(checkpoint, precision, router_thresholds, device)
        if not decoder.is_on_card:
            return cls(decoder, tokenizer, digest)
        free = torch.cuda.mem_get_info(decoder.pool.device)[0]
        return cls(
            decoder,
            tokenizer,
            digest,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS_ON_CARD,
            max_num_kv_tokens=free // 2 // decoder.pool.slot_bytes,  # the rest is for steps, and for pages that move
        )

    def submit(self, requests: Items[Request]) -> Future[list[Completion]]:
        """Return a future of one completion per request, in order; one that cannot be computed carries an error.

        Raises: ValueError if a request is empty, too long for the model, asks for both or neither of scoring and
            generation, or has candidates that `candidate_tree` refuses. K2Error if the engine is closed.
        """
        for request in requests:
            self._check(request)
        future: Future[list[Completion]] = Future()
        if not requests:
            future.set_result([])
            return future
        with self._wake:
            if self._closing:
                raise K2Error("the engine is closed", remedy="open another one")
            submission = Submission(future, [None] * len(requests), len(requests))
            self._submissions = [old for old in self._submissions if not old.future.done()] + [submission]
            self._scheduler.add(requests, submission)
            self._wake.notify()
        return future

    def take_work(self) -> Work:
        """Return what was computed since this was last asked, so that everything is told once."""
        with self._wake:
            done = Work(self._runner.num_tokens, dropped_experts(self.decoder), self._runner.num_unread_tokens)
            told, self._told = self._told, done
        return Work(*(now - before for now, before in zip(done, told, strict=True)))

    def close(self) -> None:
        """Finish what was submitted, then stop the loop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._runner.close()
        atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """Stop after the step in progress; what was submitted is not answered."""
        with self._wake:
            self._scheduler = Scheduler(MAX_NUM_BATCHED_TOKENS, MAX_NUM_KV_TOKENS)
            self._runner.decoding.clear()
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _check(self, request: Request) -> None:
        if bool(request.candidates) == bool(request.max_tokens):
            raise ValueError("a request either has candidates to score or max_tokens to generate")
        if not 0 <= request.num_prefix_tokens < len(request.prompt_ids):
            raise ValueError(f"{request.num_prefix_tokens=} must leave a token of {len(request.prompt_ids)=}")
        if request.candidates:
            candidate_tree(request.candidates)  # says what is wrong with them, before anything is queued
        longest = max((len(c.token_ids) for c in request.candidates), default=request.max_tokens)
        if len(request.prompt_ids) + longest > self.max_position_embeddings:
            raise ValueError(f"{len(request.prompt_ids)=} + {longest} passes {self.max_position_embeddings=}")

    def _loop(self) -> None:
        """Compute until closed. A defect of the engine itself fails what waits; it must never leave anyone waiting."""
        try:
            self._compute_all()
        except BaseException as error:
            with self._wake:
                self._closing = True
                for submission in self._submissions:
                    submission.fail(error)

    def _compute_all(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._scheduler.has_waiting() or self._runner.decoding):
                    self._wake.wait()
                items = self._scheduler.next_prefill(self._runner.num_decode_tokens, self._runner.num_kv_tokens)
                batch = self._runner.batch(items, self._scheduler.max_num_batched_tokens)
                if self._closing and not len(batch) and not self._scheduler.has_waiting():
                    return
            if len(batch):
                started = time.perf_counter()
                self._attempt(batch)
                self._runner.settle()
                self.busy_seconds += time.perf_counter() - started

    def _attempt(self, batch: Batch) -> None:
        """Compute `batch`; if that fails, its halves, down to the one request that is at fault.

        Out of memory, steps stay half as large from then on.

        Raises: EnvironmentMismatch if the card computes nothing any more: no request is at fault for that.
        """
        try:
            answers = self._runner.compute(batch)
        except Exception as error:  # the owner of the step must hear of it; the loop must go on
            if is_card_lost(error):
                raise EnvironmentMismatch(
                    f"the card failed: {type(error).__name__}: {error}",
                    remedy="run the job again: it resumes; nvidia-smi and dmesg may say what the card has",
                ) from error
            with self._wake:
                if is_out_of_memory(error):
                    self._scheduler.shrink()
                if len(batch) == 1:
                    self._give_up(batch, f"{type(error).__name__}: {error}")
                    return
        else:
            with self._wake:
                for sequence in self._runner.commit(batch, answers):
                    self._scheduler.close(sequence)
            return
        # The error is let go of before: it holds the step's memory.
        for half in batch.halves():
            self._attempt(half)

    def _give_up(self, batch: Batch, message: str) -> None:
        for item in batch.items:
            if isinstance(item, Segment):
                self._scheduler.unshare(item)
        for sequence in self._runner.fail(batch, message):
            self._scheduler.close(sequence)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory is full; torch on a CPU has no type for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_card_lost(error: BaseException) -> bool:
    """Return whether `error` says that a kernel failed on the card: torch and Triton compute nothing there after it."""
    return isinstance(error, torch.AcceleratorError) or "Triton Error [CUDA]" in str(error)


def load(
    checkpoint: str, precision: str = "int8", router_thresholds: Items[float] = (), device: str = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """Return the decoder and tokenizer of `checkpoint`, for what `Engine.open` takes. Raises: as `Engine.open`."""
    chosen = find_precision(precision)
    card = find_card(device)
    source = open_checkpoint(checkpoint) if chosen.expand else prepare_int8(checkpoint)
    tokenizer = open_tokenizer(source)
    decoder = Decoder.from_weights(source.config(), source.weights(), chosen, card)
    return with_thresholds(decoder, router_thresholds), tokenizer
