"""Step time and memory: lines through measurements, and counts that can be made by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conjugo.optim import NLCG
from conjugo.studies import throughput
from conjugo.studies.probes import Clock, Examples, Problem
from conjugo.studies.throughput import Memory, StepTime, measure_memory, measure_step_time


def problem(make, model=None, d=8):
    torch.manual_seed(0)
    examples = Examples((torch.randn(256, d), torch.zeros(256, dtype=torch.long)), torch.device("cpu"))
    return Problem(model or nn.Sequential(nn.Linear(d, 5), nn.ReLU(), nn.Linear(5, 2)), F.cross_entropy, examples, make)


def sgd(params, lr):
    return torch.optim.SGD(params, lr=lr)


def test_a_line_comes_back_and_its_coefficients_are_not_negative():
    exact = throughput._line([(n, 0.01 + 2e-4 * n) for n in (4, 16, 64, 256)])
    assert (exact.fixed, exact.per_example) == pytest.approx((0.01, 2e-4), rel=1e-9)
    through_zero = throughput._line([(10, 0.9), (100, 10.0), (1000, 105.0)])  # a fixed part would be negative
    assert through_zero.fixed == 0
    assert through_zero.per_example == pytest.approx(0.1, rel=0.1)
    flat = throughput._line([(10, 1.0), (100, 0.9)])
    assert flat.per_example == 0
    assert flat.fixed == pytest.approx(0.95, rel=0.01)
    one = throughput._line([(10, 1.0)])
    assert (one.fixed, one.per_example) == (0, pytest.approx(0.1))


def test_workers_share_a_batch_and_add_up_their_gradients():
    time = StepTime(0.5, 0.01, ())
    assert time.seconds(100) == pytest.approx(1.5)
    assert time.seconds(100, all_reduce=9) == pytest.approx(1.5)
    assert time.seconds(100, workers=4, all_reduce=0.25) == pytest.approx(1.0)


def test_larger_batches_take_longer():
    wide = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 2))
    found = measure_step_time(problem(sgd, wide, d=512), [2, 16, 256], lr=1e-8, clock=Clock(60))
    assert [size for size, _ in found.measured] == [2, 16, 256]
    assert found.seconds(256) > found.seconds(2)


def test_where_there_is_no_time_two_sizes_must_do():
    found = measure_step_time(problem(sgd), [2, 4, 8, 16], lr=1e-8, clock=Clock(0))
    assert [size for size, _ in found.measured] == [2, 4]


def test_where_memory_ends_the_sizes_before_count():
    def limited(outputs, targets):
        if len(outputs) > 16:
            raise torch.OutOfMemoryError("for a test")
        return F.cross_entropy(outputs, targets)

    whole = problem(sgd)
    whole.judge_by(8)
    whole.loss_fn = limited
    found = measure_step_time(whole, [4, 16, 64, 256], lr=1e-8, clock=Clock(60))
    assert [size for size, _ in found.measured] == [4, 16]
    assert measure_step_time(whole, [64, 256], lr=1e-8, clock=Clock(60)) is None


@pytest.mark.parametrize(
    ("make", "vectors"),
    [(sgd, 0), (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 1), (lambda p, lr: torch.optim.Adam(p, lr), 2)],
)
def test_fixed_memory_is_that_of_parameters_gradients_and_state(make, vectors):
    whole = problem(make)
    parameters = 4 * sum(p.numel() for p in whole.model.parameters())
    steps = 4 * len(list(whole.model.parameters())) if vectors == 2 else 0
    assert measure_memory(whole, lr=1e-3).fixed == (2 + vectors) * parameters + steps


def test_nlcg_keeps_three_vectors():
    whole = problem(lambda p, lr: NLCG(p, lr=lr, precond="bfgs"))
    parameters = 4 * sum(p.numel() for p in whole.model.parameters())
    fixed = measure_memory(whole, lr=1e-3).fixed
    assert 5 * parameters <= fixed <= 5 * parameters + 4096


def test_memory_per_example_is_what_autograd_keeps():
    """Inputs of the first layer and the loss, hidden units before or after ReLU, which share their memory or not."""
    found = measure_memory(problem(sgd), lr=1e-3)
    numbers = 8 + 5 + 2 + 2  # inputs, hidden, log-probabilities, int64 targets
    assert 4 * numbers <= found.per_example <= 4 * (numbers + 5 + 2)


def test_the_largest_micro_batch_fits():
    memory = Memory(1000, 10, 2000)
    assert memory.largest == 80
    assert 1000 + 10 * memory.largest <= 0.9 * 2000
    assert Memory(3000, 10, 2000).largest == 0
    assert Memory(1000, 0, 2000).largest is None
    assert measure_memory(problem(sgd), lr=1e-3).available > 2**20
    assert math.isfinite(measure_memory(problem(sgd), lr=1e-3).largest)
