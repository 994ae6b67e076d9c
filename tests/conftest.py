"""One thread, no network: tests neither crowd each other out nor depend on a server."""

import os
import signal

for name, value in {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)

import torch  # noqa: E402  (threads are counted when torch is imported)

torch.set_num_threads(1)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("suite", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture
def terminal():
    """Ctrl-C as a terminal's process has it; what runs in the background may have been told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)
