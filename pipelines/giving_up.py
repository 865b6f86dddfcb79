"""When a run must end although units are under way: whatever of this process waits for them, or for a store, stops."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

LOOK_S = 0.2
"""How soon it is noticed, by what cannot wait for the event itself."""

GIVEN_UP = threading.Event()
"""Set by the driver once its deadline, its budget or a SIGTERM is past by `[limits] grace_seconds`; cleared when its
call has ended. Never set in a worker: those are killed, or left alone."""


def wait_or_give_up(call: Callable[[], None]) -> bool:
    """Return True once `call`, made in a thread of its own, has ended; False as soon as the run is given up before.

    Raises: what `call` raises.
    """
    ended: Future[None] = Future()

    def make() -> None:
        try:
            call()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=make, name="k2batch-runner", daemon=True).start()
    while not ended.done():
        if GIVEN_UP.is_set():
            return False
        with suppress(TimeoutError):
            ended.exception(timeout=LOOK_S)
    ended.result()
    return True
