"""Probes: the examples they take, the runs they make, and the races that find a learning rate."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from conjugo.studies.probes import Clock, Examples, Problem, Run, _vertex, race, steps_to

CPU = torch.device("cpu")


def data(n=96, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, d, generator=generator)
    return inputs, (inputs.sum(1) > 0).long()


def sgd(params, lr):
    return torch.optim.SGD(params, lr=lr)


def problem(make=sgd, *, inputs=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    return Problem(model, F.cross_entropy, Examples(data() if inputs is None else inputs, CPU), make, **options)


class Quadratic(nn.Module):
    """Loss (w - 1)' H (w - 1) / 2 without noise: the best learning rate to a small loss is known."""

    def __init__(self, sizes):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(sizes), dtype=torch.float64))
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.float64))

    def forward(self, inputs):
        return ((self.w - 1) ** 2 * self.sizes).sum() / 2 + 0 * inputs.sum()


def quadratic(sizes, make=sgd):
    examples = Examples((torch.zeros(8, 1, dtype=torch.float64), torch.zeros(8)), CPU)
    return Problem(Quadratic(sizes), lambda outputs, targets: outputs, examples, make)


# Examples ---------------------------------------------------------------------------------------------------------------


def test_all_forms_of_data_give_the_same_examples():
    inputs, targets = data()
    dataset = TensorDataset(inputs, targets)
    forms = [
        (inputs, targets),
        dataset,
        DataLoader(dataset, batch_size=7, shuffle=True),
        [(inputs[:50], targets[:50]), (inputs[50:], targets[50:])],
        (lambda rows: (inputs[rows], targets[rows]), len(inputs)),
    ]
    rows = torch.tensor([5, 90, 0, 5])
    for form in forms:
        examples = Examples(form, CPU)
        assert examples.n == 96
        taken = examples.take(rows)
        assert torch.equal(taken[0], inputs[rows])
        assert torch.equal(taken[1], targets[rows])


def test_inputs_may_be_nested():
    inputs, targets = data()
    examples = Examples(({"x": inputs, "y": (inputs * 2,)}, targets), CPU)
    taken, _ = examples.take(torch.tensor([3]))
    assert torch.equal(taken["y"][0], inputs[3:4] * 2)


def test_datasets_of_something_else_are_named_when_they_are_asked():
    class Named(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"x": torch.zeros(2), "y": 1}

    with pytest.raises(ValueError, match="what the dataset gives must be a pair"):
        Examples(Named(), CPU).take(torch.tensor([0, 1]))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="data must be"):
        Examples(Stream(), CPU)


def test_inputs_may_be_a_pair():
    inputs, targets = data()
    taken = Examples(((inputs, 2 * inputs), targets), CPU).take(torch.tensor([7]))
    assert torch.equal(taken[0][1], 2 * inputs[7:8])
    assert torch.equal(taken[1], targets[7:8])
    two = Examples(((inputs, targets), (inputs, targets)), CPU)  # two batches
    assert two.n == 192


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ((torch.zeros(4, 1), torch.zeros(3)), "number of targets"),
        ((torch.zeros(1, 1), torch.zeros(1)), "number of examples"),
        ([torch.zeros(4)], "a batch"),
        ([], "number of examples"),
        (torch.zeros(4, 1), "data must be"),
        ({"x": torch.zeros(4, 1)}, "data must be"),
        ([(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4))], "a batch"),
    ],
)
def test_data_that_are_none_are_named(form, message):
    with pytest.raises(ValueError, match=f"advise: .*{message}"):
        Examples(form, CPU)


# Runs -------------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_the_model_alone_and_comes_out_the_same_again():
    whole = problem()
    before = copy.deepcopy(whole.model.state_dict())
    random = torch.get_rng_state()
    curves = []
    for _ in range(2):
        run = Run(whole, 0.3, 16, seed=3)
        run.advance(12)
        run.advance(30)
        curves.append(run.curve)
    assert curves[0] == curves[1]
    assert curves[0][-1][1] < curves[0][0][1]
    assert all(torch.equal(before[name], value) for name, value in whole.model.state_dict().items())
    assert all(p.grad is None for p in whole.model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    other = Run(whole, 0.3, 16, seed=4)
    other.advance(30)
    assert other.curve != curves[0]


def test_micro_batches_change_nothing_but_rounding():
    whole, cut = Run(problem(), 0.3, 17), Run(problem(micro_batch=5), 0.3, 17)
    for run in (whole, cut):
        run.advance(20)
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert max(len(part) for part in cut.problem.parts(torch.arange(17))) == 5


def test_a_run_stops_at_its_target_at_the_end_of_the_clock_and_when_it_explodes():
    run = Run(problem(), 0.5, 32)
    run.advance(1000, target=0.4)
    assert run.loss <= 0.4
    assert run.step < 1000
    assert run.curve[-2][0] < run.steps_to(0.4) <= run.step
    short = problem(clock=Clock(examples=100))
    run = Run(short, 0.5, 32)
    run.advance(1000)
    assert run.step == 4  # the first number of steps with 100 examples
    wild = Run(quadratic([1.0]), 50.0, 4)
    wild.advance(100)
    assert wild.failed
    assert wild.step < 20


def test_steps_to_a_loss_are_read_between_two_looks():
    curve = [(0, 4.0), (10, 2.0), (20, 1.0), (30, 1.5), (40, 0.25)]
    assert steps_to(curve, 5.0) == 0
    assert steps_to(curve, math.sqrt(8)) == pytest.approx(5)
    assert steps_to(curve, 1.0) == 20
    assert steps_to(curve, 0.5) == pytest.approx(30 + 10 * math.log(3) / math.log(6))
    assert steps_to(curve, 0.1) == math.inf
    assert steps_to([(0, 1.0), (10, -1.0)], 0.0) == pytest.approx(5)  # losses that are not above 0: by the loss itself


# Races ------------------------------------------------------------------------------------------------------------------


def best_of_quadratic(sizes, target):
    """By trying: steps of exact gradient descent."""

    def count(lr):
        w = torch.zeros(len(sizes), dtype=torch.float64)
        h = torch.tensor(sizes, dtype=torch.float64)
        for step in range(2000):
            loss = float(((w - 1) ** 2 * h).sum() / 2)
            if loss <= target:
                return step
            w -= lr * h * (w - 1)
        return math.inf

    lrs = [2 ** (k / 16) / max(sizes) for k in range(-40, 24)]
    return min(lrs, key=count), min(count(lr) for lr in lrs)


@pytest.mark.parametrize("start", [0.01, 0.1, 0.5])
def test_a_race_finds_the_best_learning_rate_wherever_it_begins(start):
    sizes, target = [1.0, 4.0, 0.3], 1e-3
    lr, steps = best_of_quadratic(sizes, target)
    found = race(quadratic(sizes), 4, [start / 2, start, start * 2], target=target)
    assert found.reached
    assert found.bracketed
    assert found.lr == pytest.approx(lr, rel=0.3)
    assert found.steps <= 1.25 * steps + 1


def test_where_all_explode_smaller_learning_rates_are_tried():
    found = race(quadratic([1.0, 4.0]), 4, [8.0, 16.0], target=1e-3)
    assert found is not None
    assert found.lr < 0.5  # 2 / lambda_max
    assert {8.0, 16.0} <= set(found.failed)
    assert not set(found.failed) & set(found.results)


def test_a_leader_whose_noise_keeps_it_from_the_target_gets_a_smaller_rival():
    """With one example at a time a large learning rate is ahead at first, and never gets there."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 4, generator=generator)
    targets = inputs.sum(1, keepdim=True) + 0.5 * torch.randn(256, 1, generator=generator)
    torch.manual_seed(0)
    whole = Problem(nn.Linear(4, 1), F.mse_loss, Examples((inputs, targets), CPU), sgd, clock=Clock(examples=100000))
    best = float(((inputs @ torch.linalg.lstsq(inputs, targets).solution - targets) ** 2).mean())
    found = race(whole, 1, [0.1], target=1.02 * best)
    assert found is not None
    assert found.reached
    assert found.lr < 0.05


def test_when_the_time_is_over_the_target_is_what_the_leader_reached():
    whole = quadratic([1.0, 0.01])
    whole.clock = Clock(examples=4 * 60)
    found = race(whole, 4, [0.25, 0.5, 1.0], target=1e-9)
    assert not found.reached
    assert 1e-9 < found.target < 0.5
    whole.clock = Clock(examples=4 * 60)
    again = race(whole, 4, [0.25, 0.5, 1.0], target=None)
    assert again.target == found.target


@pytest.mark.parametrize("examples", range(150, 420, 14))
def test_wherever_the_clock_stops_it_the_larger_of_three_good_rates_wins(examples):
    """All are far below the limit of stability: the largest is the best, however many steps each has had."""
    whole = quadratic([1.0, 0.01])
    whole.clock = Clock(examples=examples)
    found = race(whole, 4, [0.05, 0.06, 0.07], target=None)
    assert found.lr == 0.07
    assert not found.bracketed


def test_a_rival_that_the_clock_stopped_is_no_worse_one():
    for examples in range(120, 260, 4):
        whole = quadratic([1.0, 0.01])
        whole.clock = Clock(examples=examples)
        found = race(whole, 4, [0.2, 0.4, 0.8], target=0.006)
        if found is not None and found.bracketed:
            assert found.lr > 1.0  # 1.6 needs half the steps of 0.8


def test_where_nothing_helps_there_is_no_winner():
    flat = Problem(
        Quadratic([1.0]),
        lambda outputs, targets: 0 * outputs,
        Examples((torch.zeros(8, 1, dtype=torch.float64), torch.zeros(8)), CPU),
        sgd,
        clock=Clock(examples=400),
    )
    assert race(flat, 4, [0.1, 0.2], target=None) is None


def test_the_vertex_lies_between_the_neighbours():
    results = {2.0**k: math.exp((k - 0.4) ** 2 * 0.1 + 2) for k in range(-3, 4)}
    lr, bracketed = _vertex(results, 1.0)
    assert bracketed
    assert lr == pytest.approx(2**0.4, rel=1e-6)
    assert _vertex({1.0: 5.0, 2.0: 6.0}, 1.0) == (1.0, False)
    assert _vertex({0.5: 6.0, 1.0: 5.0, 2.0: math.inf}, 1.0) == (1.0, True)


def test_a_clock_counts_seconds_and_examples():
    clock = Clock(examples=100)
    assert not clock.over
    part = clock.share(0.5)
    part.examples += 60
    assert part.over
    assert not clock.over
    assert Clock(seconds=-1).over
