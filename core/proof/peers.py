"""What a rank says when a wait on another rank fails."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class PeerError(RuntimeError):
    """A wait on another rank ended without its answer: it died, or was silent for all of the timeout."""

    def __init__(self, what: str, cause: Exception):
        # gloo says: [/its/source/file.cc:123] What happened [address]. Advice.
        reason = re.sub(r"^\[.*?\] |\. .*", "", str(cause), flags=re.DOTALL)
        if "timed out" in reason.lower():
            reason += "; if it is only slow, a larger --timeout gives it the time"
        super().__init__(f"{what} failed: {reason or type(cause).__name__}")


@contextmanager
def peer_errors(what: str) -> Iterator[None]:
    """Turn the failure of a wait on other ranks into a PeerError that says in words what was waited for."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(what, error) from error
