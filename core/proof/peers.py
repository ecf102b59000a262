"""What a rank says when a wait on another rank fails."""

import re


class PeerError(RuntimeError):
    """A wait on another rank ended without its answer: it died, or was silent for all of the timeout."""

    def __init__(self, what: str, cause: Exception):
        # gloo says: [/its/source/file.cc:123] What happened [address]. Advice.
        reason = re.sub(r"^\[.*?\] |\. .*", "", str(cause), flags=re.DOTALL)
        if "timed out" in reason.lower():
            reason += "; if it is only slow, a larger --timeout gives it the time"
        super().__init__(f"{what} failed: {reason or type(cause).__name__}")


class peer_errors:
    """Turn the failure of a wait on other ranks into a PeerError that says in words what was waited for."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, RuntimeError):
            raise PeerError(self._what, error) from error
