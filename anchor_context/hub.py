"""Asks the hub, and waits for its answer no longer than a person would.

The hub's libraries try a lost connection again and again, and a network that swallows packets holds them for
minutes without a word. So what is asked first is asked here: it says so at once, and ends in one line.
Costs: one more request for a model named by its hub name.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import TypeVar

Answer = TypeVar("Answer")

ANSWER_SECONDS = 20.0


def ask_hub(what: str, question: Callable[[], Answer]) -> Answer:
    """Say that the hub is asked for `what`, and return the answer to `question`, which asks it.

    Raises:
        ConnectionError: the reason why there is no answer, whatever it is, in one line.
    """
    _say_once(f"asking the hub for {what} …")
    answers: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((question(), None))
        except Exception as error:  # of the hub's library, of its HTTP library, of sockets
            answers.put((None, error))

    # A thread, for no timeout of an HTTP library bounds the resolution of a name. It may never end: a daemon.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer, error = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise ConnectionError(f"no answer in {ANSWER_SECONDS:.0f} seconds") from None
    if error is not None:
        raise ConnectionError(" ".join(str(error).split()) or type(error).__name__) from error
    return answer


def find_model_on_hub(name: str, flag: str) -> None:
    """Let the hub's libraries look for the model `name` only where that ends soon.

    Where the hub does not answer, this process goes offline and takes what was downloaded before.

    Raises:
        ValueError: it does not answer, and nothing was downloaded before.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if constants.is_offline_mode():
        return

    def call() -> None:
        status = get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS).status_code
        # A proxy's, for the hub that it does not reach; any other status is the hub's own.
        if status >= 500:
            raise ConnectionError(f"HTTP status {status}")

    try:
        ask_hub(name, call)
    except ConnectionError as error:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise ValueError(
                f"{flag} {name} is no folder here, and the hub ({constants.ENDPOINT}) does not give it "
                f"to us: {error}; check the path, the name and the network"
            ) from error
        constants.HF_HUB_OFFLINE = True
        _say_once(f"no answer ({error}); {flag} {name} is taken as downloaded before")


@cache
def _say_once(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the first of the machine speaks for its ranks
        print(text, file=sys.stderr, flush=True)
