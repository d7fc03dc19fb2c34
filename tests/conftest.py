"""What all tests share: results that do not depend on the order in which tests run."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test may draw from the global generator)
    torch.manual_seed(0)
