import faulthandler
import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from tests.pool import Pool

os.environ["COLUMNS"] = "200"  # what tests look for in what is printed stays in one line
LONGEST_TEST = 120  # seconds

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """torch and three thousand tests stay: the garbage collector need not look through them each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool(check_messages=True)
    yield workers
    workers.close()


@pytest.fixture(autouse=True)
def _timeout() -> Iterator[None]:
    """No test may hang: the alarm shows where it stood and fails it."""

    def expire(*_: object) -> None:
        faulthandler.dump_traceback()
        raise TimeoutError(f"the test took more than {LONGEST_TEST} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(LONGEST_TEST)
    yield
    signal.alarm(0)
