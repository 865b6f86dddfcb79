"""A watch over what is computed in this process, which is ended when nothing comes of it for too long.

A thread looks at the engine's clock of work, which each step moves on. Where it stands still, the process is ended, as
no thread can be: with a word to the journal, or, if native code holds Python's lock so that our thread never runs, by
faulthandler's own thread, which needs no lock, a little later.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from k2model.engine.request import SupportsSubmit

STALL_SECONDS = 600.0
"""Far above what one step of the engine takes: 1,024 tokens of a model of 10^12 parameters on a CPU take some 500 s."""

STALLED = 75
"""Exit code of a process that ended itself; faulthandler's is 1."""

_GRACE_S = 15.0
"""What telling the journal may take."""

_LOOK_S = 1.0


class _Watch:
    """What this process computes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tellers: dict[int, Callable[[str], None]] = {}
        self.engine: SupportsSubmit | None = None
        self.seconds = 0.0
        self.worked = 0.0
        self.since = 0.0
        self.thread: threading.Thread | None = None

    def move_on(self) -> None:
        """Note that something came of the work just now."""
        self.since = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + _GRACE_S, exit=True, file=2)

    def look(self) -> None:
        """End the process if nothing came of its work for too long."""
        while True:
            time.sleep(min(_LOOK_S, self.seconds / 4))
            with self.lock:
                if not self.tellers or self.engine is None:
                    continue
                if self.engine.busy_seconds != self.worked:
                    self.worked = self.engine.busy_seconds
                    self.move_on()
                elif time.monotonic() - self.since > self.seconds:
                    try:
                        for tell in self.tellers.values():
                            tell(f"nothing was computed for {self.seconds:g} s")
                    finally:
                        os._exit(STALLED)


_WATCH = _Watch()


@contextmanager
def watched(engine: SupportsSubmit, seconds: float, tell: Callable[[str], None]) -> Iterator[None]:
    """End this process if `engine` computes nothing for `seconds` within the body; `tell` is told why before.

    With 0 seconds nothing is watched.
    """
    if not seconds:
        yield
        return
    token = id(tell)
    with _WATCH.lock:
        _WATCH.engine, _WATCH.seconds, _WATCH.worked = engine, seconds, engine.busy_seconds
        _WATCH.tellers[token] = tell
        _WATCH.move_on()
        if _WATCH.thread is None:
            _WATCH.thread = threading.Thread(target=_WATCH.look, name="k2batch-watch", daemon=True)
            _WATCH.thread.start()
    try:
        yield
    finally:
        with _WATCH.lock:
            del _WATCH.tellers[token]
            if not _WATCH.tellers:
                faulthandler.cancel_dump_traceback_later()
