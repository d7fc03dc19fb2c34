"""What all tests share: results that do not depend on the order in which tests run."""

import random
import signal

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test may draw from the global generator)
    torch.manual_seed(0)


# A shell starts background jobs with SIGINT ignored, and children inherit that: tests of Ctrl-C want what a terminal gives.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
