"""One thread: on small tensors threads wait for each other, and a test's two processes for the cores."""
import os

os.environ["OMP_NUM_THREADS"] = "1"                                 # read as torch is loaded

import pytest


@pytest.fixture(scope="module")
def tiny_world():
    """What tiny.py says, for the tests of a file."""
    import tiny
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch)
        yield
