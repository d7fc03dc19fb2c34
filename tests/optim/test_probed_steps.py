"""Step sizes that look at the loss again: exact on quadratics, careful elsewhere, without a trace in the model."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conjugo.optim import NLCG
from conjugo.optim.probed_steps import Parabola, Plane, Subspace, parabola_minimum
from conjugo.optim.step_sizes import StepSizeController
from conjugo.training.optimizers import build

F64 = torch.float64


# The search along a direction ----------------------------------------------------------------------------------------


def quadratic(slope, bend):
    return lambda t: 3.0 + slope * t + bend * t * t / 2


@pytest.mark.parametrize("t", [0.01, 1.0, 7.0])
def test_the_minimum_of_a_parabola(t):
    assert parabola_minimum(3.0, -2.0, t, quadratic(-2.0, 5.0)(t)) == pytest.approx(0.4, rel=1e-9)


@pytest.mark.parametrize("bend", [0.0, -1.0])
def test_no_minimum_without_curvature(bend):
    assert parabola_minimum(3.0, -2.0, 0.5, quadratic(-2.0, bend)(0.5)) == math.inf


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0.3, 0.4), (0.4, 0.4), (0.1, 0.2), (0.2 + 1e-6, 0.4), (0.799, 0.4)],
)
def test_the_step_goes_to_the_minimum_by_at_most_the_factor(alpha, expected):
    found = Parabola().search(alpha, loss=3.0, slope=-2.0, trial=quadratic(-2.0, 5.0))
    assert found.alpha == pytest.approx(expected)
    assert (found.move, found.trials) == (True, 1)


@pytest.mark.parametrize(("tries", "expected"), [(12, (0.4, True, 4)), (2, (1.0, True, 2)), (1, (2.0, True, 1))])
def test_a_step_that_is_much_too_long_is_halved_as_often_as_it_takes(tries, expected):
    found = Parabola(tries=tries).search(4.0, loss=3.0, slope=-2.0, trial=quadratic(-2.0, 5.0))
    assert found == (pytest.approx(expected[0]), *expected[1:])


@pytest.mark.parametrize("minimum", [1e-6, 3e-3, 0.4, 2e4])
def test_the_first_step_finds_its_scale(minimum):
    found = Parabola().search(0.0, loss=3.0, slope=-1.0, trial=quadratic(-1.0, 1 / minimum), eps=lambda: 1e-16)
    assert found.alpha == pytest.approx(minimum)
    assert found.trials <= 9


def test_the_first_step_stops_looking_after_some_tries():
    seen = []
    found = Parabola(tries=3, initial=1e-3).search(0.0, loss=3.0, slope=-1.0, trial=lambda t: seen.append(t) or 3.0 - t)
    assert seen == pytest.approx([1e-3, 1e-2, 1e-1])
    assert found.alpha == pytest.approx(0.2)


@pytest.mark.parametrize("bend", [0.0, -3.0])
def test_without_curvature_the_step_grows(bend):
    assert Parabola(growth=3.0).search(0.5, loss=3.0, slope=-2.0, trial=quadratic(-2.0, bend)).alpha == 1.5


def test_uphill_nothing_is_tried_and_nothing_moves():
    found = Parabola().search(0.5, loss=3.0, slope=1.0, trial=lambda t: pytest.fail("tried"))
    assert found == (0.25, False, 0)
    assert Parabola().search(0.5, loss=3.0, slope=0.0, trial=lambda t: pytest.fail("tried")) == (0.5, False, 0)


def test_a_trial_that_is_not_finite_is_made_again_nearer():
    def trial(t):
        return math.nan if t > 0.2 else 3.0 - t

    assert Parabola().search(1.0, loss=3.0, slope=-1.0, trial=trial) == (0.125, True, 4)
    first = Parabola(initial=1.0).search(0.0, loss=3.0, slope=-1.0, trial=trial)
    assert first == (pytest.approx(0.1), True, 2)


def test_if_no_trial_is_finite_nothing_moves():
    found = Parabola(tries=4).search(1.0, loss=3.0, slope=-1.0, trial=lambda t: math.inf)
    assert found == (1 / 16, False, 4)


def test_a_change_below_the_rounding_error_says_nothing():
    def flat(t):
        return 3.0 + 1e-7

    assert Parabola().search(0.5, loss=3.0, slope=-1e-8, trial=flat).alpha == 1.0
    assert Parabola(growth=1e9).search(0.5, loss=3.0, slope=-1e-8, trial=flat).alpha == 1.0
    exact = Parabola(tries=1).search(0.5, loss=3.0, slope=-1e-8, trial=flat, eps=lambda: 1e-16)
    assert exact.alpha == 0.25


def test_a_step_that_was_too_short_to_be_seen_becomes_longer():
    """In float32: the loss does not change at all until the trial is 100,000 times as long."""

    def trial(t):
        return float(torch.tensor(3.0 - 1.0 * t + t * t / 2))

    alpha = 1e-12
    for _ in range(50):
        alpha = Parabola().search(alpha, loss=3.0, slope=-1.0, trial=trial).alpha
    assert alpha == pytest.approx(1.0, rel=1e-3)


def test_a_flat_slope_does_not_hide_a_loss_that_rises():
    found = Parabola().search(0.5, loss=3.0, slope=-1e-8, trial=lambda t: 3.0 + t * t)
    assert found.alpha < 0.5


def test_the_first_step_knows_no_scale_if_no_trial_is_finite():
    assert Parabola().search(0.0, loss=3.0, slope=-1.0, trial=lambda t: math.nan) == (0.0, False, 12)


# The plane -------------------------------------------------------------------------------------------------------------


def test_the_best_point_of_the_plane():
    matrix = torch.tensor([[3.0, -1.0], [-1.0, 2.0]], dtype=F64)  # over (-z, u)
    slopes = torch.tensor([-4.0, -0.5], dtype=F64)
    alpha, mu = torch.linalg.solve(matrix, -slopes).tolist()
    found = Subspace(damping=0.0, mu_max=math.inf).solve(Plane(gz=4.0, gu=-0.5, zz=3.0, zu=1.0, uu=2.0), last=0.0)
    assert found == pytest.approx((alpha, mu))


@pytest.mark.parametrize(
    ("plane", "expected"),
    [
        (Plane(gz=4.0, gu=9.0, zz=2.0, zu=1.0, uu=2.0), (2.0, 0.0)),  # mu < 0
        (Plane(gz=4.0, gu=0.0, zz=2.0, zu=0.0, uu=0.0), (2.0, 0.0)),  # no last update
        (Plane(gz=4.0, gu=0.0, zz=2.0, zu=9.0, uu=2.0), (2.0, 0.0)),  # not positive definite
        (Plane(gz=4.0, gu=0.0, zz=2.0, zu=math.nan, uu=2.0), (2.0, 0.0)),
        (Plane(gz=4.0, gu=0.0, zz=0.0, zu=1.0, uu=2.0), (0.7, 0.0)),
        (Plane(gz=4.0, gu=0.0, zz=-1.0, zu=1.0, uu=2.0), (0.7, 0.0)),
        (Plane(gz=4.0, gu=0.0, zz=math.nan, zu=1.0, uu=2.0), (0.7, 0.0)),
        (Plane(gz=1.0, gu=-4.0, zz=2.0, zu=-1.9, uu=2.0), (0.5, 0.0)),  # alpha < 0 for mu = 1
    ],
)
def test_what_serves_where_the_plane_does_not(plane, expected):
    assert Subspace(damping=0.0).solve(plane, last=0.7) == pytest.approx(expected)


def test_mu_has_a_limit_and_alpha_is_the_best_for_it():
    alpha, mu = Subspace(damping=0.0).solve(Plane(gz=4.0, gu=-9.0, zz=2.0, zu=0.5, uu=2.0), last=0.0)
    assert (alpha, mu) == (2.25, 1.0)


@pytest.mark.parametrize(("minimum", "factor"), [(0.0, 0.5), (0.5625, 0.25), (-2.0, 1.0), (2.0, 1.0), (-math.inf, 1.0)])
def test_the_loss_does_not_fall_below_its_minimum(minimum, factor):
    plane = Plane(gz=4.0, gu=-1.0, zz=4.0, zu=0.0, uu=2.0)  # alpha = 1, mu = 0.5, slope -4.5
    found = Subspace(damping=0.0, minimum=minimum).solve(plane, last=0.0, loss=1.125)
    assert found == pytest.approx((factor, factor / 2))


# Options -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Parabola, growth=1.0), r"Parabola: growth must be in \(1, inf\), got 1.0"),
        (partial(Parabola, initial=0.0), r"Parabola: initial must be in \(0, inf\), got 0.0"),
        (partial(Parabola, tries=0), "Parabola: tries must be an integer >= 1, got 0"),
        (partial(Subspace, fraction=0.0), r"Subspace: fraction must be in \(0, 1\], got 0.0"),
        (partial(Subspace, damping=-1.0), r"Subspace: damping must be in \[0, inf\), got -1.0"),
        (partial(Subspace, mu_max=0.0), "Subspace: mu_max must be above 0, got 0.0"),
        (partial(Subspace, minimum=math.inf), "Subspace: minimum must be below inf, got inf"),
        (partial(Subspace, initial=math.inf), r"Subspace: initial must be in \(0, inf\), got inf"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["parabola", "subspace"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "tensor"}, "NLCG: scope must be 'global' with line_search=(Parabola|Subspace), got 'tensor'"),
        ({"scope": "group"}, "NLCG: scope must be 'global'"),
        ({"fused": True}, "NLCG: fused must be False or None with line_search="),
        ({"mode": "reference"}, "NLCG: mode must be 'exact' with line_search="),
    ],
)
def test_what_these_step_sizes_do_not_go_with(name, options, message):
    with pytest.raises(ValueError, match=message):
        NLCG([torch.ones(2)], line_search=name, **options)


def test_they_are_for_optimizers_that_know_the_batch():
    with pytest.raises(ValueError, match="StepSizeController: rule must be one that needs no batch, got 'Parabola'"):
        StepSizeController(torch.optim.SGD([torch.ones(2)], lr=1.0), Parabola())


# In the optimizer ------------------------------------------------------------------------------------------------------


def least_squares(n=20, k=6, seed=0, most=2.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator, dtype=F64) * torch.linspace(0.3, most, k, dtype=F64)
    return nn.Linear(k, 1, bias=False).to(F64), x, torch.randn(n, 1, generator=generator, dtype=F64)


def take_step(model, optimizer, x, y, loss_fn=F.mse_loss):
    optimizer.zero_grad()
    if optimizer.needs_batch:
        optimizer.observe_batch(model, loss_fn, x, y)
    loss = loss_fn(model(x), y)
    loss.backward()
    optimizer.step(loss=loss.detach())
    return loss.detach()


@pytest.mark.parametrize("rule", ["fr", "pr", "constant"])
def test_on_a_quadratic_the_parabola_finds_the_minimum_along_the_direction(rule):
    model, x, y = least_squares()
    optimizer = NLCG(
        model.parameters(), lr=1.0, rule=rule, precond="none", line_search=Parabola(growth=1e9), beta_max=0.9
    )
    for _ in range(4):
        take_step(model, optimizer, x, y)
        direction = optimizer.state[model.weight]["direction"]
        (slope,) = torch.autograd.grad(F.mse_loss(model(x), y), model.weight)
        scale = float(slope.norm() * direction.norm())
        assert abs(float((slope * direction).sum())) < 1e-6 * scale


def test_with_a_parabola_fletcher_reeves_are_conjugate_gradients():
    model, x, y = least_squares(n=1000, most=0.5)  # so well conditioned that no beta is above 1
    optimizer = NLCG(model.parameters(), lr=1.0, precond="none", line_search=Parabola(growth=1e9))
    for _ in range(6):
        take_step(model, optimizer, x, y)
        assert optimizer.last["beta"] < 1
    exact = torch.linalg.lstsq(x, y).solution.T
    assert torch.allclose(model.weight, exact, atol=1e-6)


def conjugate_gradients(x, y, w, steps):
    """On the mean of (x w - y)^2, from the textbook."""
    a, b = 2 * x.T @ x / len(x), 2 * x.T @ y / len(x)
    w = w.clone()
    r = b - a @ w
    p = r.clone()
    for _ in range(steps):
        alpha = (r.T @ r) / (p.T @ a @ p)
        w = w + alpha * p
        new = r - alpha * (a @ p)
        p = new + (new.T @ new) / (r.T @ r) * p
        r = new
    return w


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_on_least_squares_the_plane_gives_conjugate_gradients(steps):
    model, x, y = least_squares()
    start = model.weight.detach().T.clone()
    rule = Subspace(fraction=1.0, damping=0.0, mu_max=math.inf)
    optimizer = NLCG(model.parameters(), lr=1.0, precond="none", line_search=rule)
    for _ in range(steps):
        take_step(model, optimizer, x, y)
    assert torch.allclose(model.weight.T, conjugate_gradients(x, y, start, steps), rtol=1e-9, atol=1e-11)


def small_model(seed=0, *, norm=False, dropout=0.0):
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def small_data(n=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("line_search", ["parabola", "subspace"])
@pytest.mark.parametrize("precond", ["bfgs", "none", "adam", "orthogonal", "kron"])
def test_losses_fall_with_a_factor_of_one(line_search, precond):
    model, (x, y) = small_model(), small_data()
    optimizer = NLCG(model.parameters(), lr=1.0, precond=precond, line_search=line_search, beta_max=0.9)
    first = take_step(model, optimizer, x, y, F.cross_entropy)
    for _ in range(25):
        last = take_step(model, optimizer, x, y, F.cross_entropy)
    assert last < 0.5 * first


@pytest.mark.parametrize("line_search", ["parabola", "subspace"])
def test_the_batch_leaves_no_trace(line_search):
    model, (x, y) = small_model(norm=True, dropout=0.3), small_data()
    optimizer = NLCG(model.parameters(), lr=0.0, precond="none", line_search=line_search)
    optimizer.observe_batch(model, F.cross_entropy, x, y)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    before = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()], torch.get_rng_state()))
    optimizer.step(loss=loss.detach())
    after = (model.state_dict(), [p.grad for p in model.parameters()], torch.get_rng_state())
    for old, new in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True):
        assert torch.equal(old, new)
    assert optimizer.passes > 1


def test_dropout_draws_the_same_numbers_again():
    model, (x, y) = small_model(dropout=0.5), small_data()
    seen = []

    def loss_fn(outputs, targets):
        seen.append(outputs.detach().clone())
        return F.cross_entropy(outputs, targets)

    rule = Parabola(initial=1e-12, tries=1)
    optimizer = NLCG(model.parameters(), lr=1.0, precond="none", line_search=rule)
    take_step(model, optimizer, x, y, loss_fn)
    assert len(seen) == 3  # that of the step, at 0, and a trial
    assert torch.equal(seen[0], seen[1])
    assert torch.allclose(seen[0], seen[2], atol=1e-6)


def test_passes_are_counted():
    model, (x, y) = small_model(), small_data()
    plain = NLCG(model.parameters(), precond="none")
    take_step(model, plain, x, y, F.cross_entropy)
    assert plain.passes == 1
    parabola = NLCG(model.parameters(), lr=1.0, precond="none", line_search=Parabola(tries=1))
    for _ in range(3):
        take_step(model, parabola, x, y, F.cross_entropy)
    assert parabola.passes == pytest.approx(4 + 1 / 3)  # the first loss as well
    subspace = NLCG(model.parameters(), lr=1.0, precond="none", line_search="subspace")
    for _ in range(3):
        take_step(model, subspace, x, y, F.cross_entropy)
    assert subspace.passes == pytest.approx(3 + 5 * 0.25 * 2 / 3)


OPTIONS = {
    "weight decay": {"weight_decay": 0.3},
    "a scaled gradient": {"grad_scale": 0.25},
    "LARS": {"lars": 0.01},
    "lists of tensors": {"foreach": True},
    "all of it": {"weight_decay": 0.3, "grad_scale": 0.25, "lars": 0.01},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_method_does_to_gradients_does_not_move_the_minimum(name):
    """The lowest loss along the direction, with the weight decay in it, whatever the gradients are multiplied by."""
    model, x, y = least_squares()
    optimizer = NLCG(model.parameters(), lr=1.0, precond="none", line_search=Parabola(growth=1e9), **OPTIONS[name])
    for _ in range(3):
        take_step(model, optimizer, x, y)
        direction, decay = optimizer.state[model.weight]["direction"], OPTIONS[name].get("weight_decay", 0.0)
        (slope,) = torch.autograd.grad(F.mse_loss(model(x), y) + decay / 2 * model.weight.square().sum(), model.weight)
        assert abs(float((slope * direction).sum())) < 1e-3 * float(slope.norm() * direction.norm())


@pytest.mark.parametrize("name", [*OPTIONS, "nothing"])
def test_the_plane_knows_the_weight_decay(name):
    """The first step is the minimum of loss and decay along -z, whatever the gradients are multiplied by."""
    options = OPTIONS.get(name, {})
    model, x, y = least_squares()
    rule = Subspace(fraction=1.0, damping=0.0, mu_max=math.inf)
    optimizer = NLCG(model.parameters(), lr=1.0, precond="none", line_search=rule, **options)
    decay = options.get("weight_decay", 0.0)
    last = torch.zeros(1, 6, dtype=F64)
    for _ in range(2):
        before = model.weight.detach().clone()
        take_step(model, optimizer, x, y)
        update = model.weight.detach() - before
        (slope,) = torch.autograd.grad(F.mse_loss(model(x), y) + decay / 2 * model.weight.square().sum(), model.weight)
        scale = float(slope.norm() * update.norm())
        assert abs(float((slope * update).sum())) < 1e-9 * scale
        # The last update is in the plane, too.
        assert abs(float((slope * last).sum())) <= 1e-9 * float(slope.norm() * last.norm())
        last = update


@pytest.mark.parametrize("line_search", ["parabola", "subspace"])
def test_ascent_is_descent_of_the_negative_loss(line_search):
    def loss_of(sign):
        return lambda outputs, targets: sign * F.mse_loss(outputs, targets)

    weights = []
    for sign, maximize in ((1, False), (-1, True)):
        torch.manual_seed(0)
        model, x, y = least_squares()
        optimizer = NLCG(
            model.parameters(),
            lr=1.0,
            precond="none",
            line_search=line_search,
            maximize=maximize,
            weight_decay=0.1,
        )
        for _ in range(3):
            take_step(model, optimizer, x, y, loss_of(sign))
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)


def test_groups_agree_about_the_direction():
    model, (x, y) = small_model(), small_data()
    groups = [{"params": model[0].parameters(), "maximize": True}, {"params": model[3].parameters()}]
    optimizer = NLCG(groups, lr=1.0, line_search="parabola", precond="bfgs")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NLCG: maximize must be the same in all groups with line_search=Parabola"):
        take_step(model, optimizer, x, y, F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_decoupled_decay_goes_by_the_step():
    model, x, y = least_squares()
    optimizer = NLCG(
        model.parameters(), lr=1.0, precond="none", line_search="parabola", weight_decay=0.1, decoupled=True
    )
    before = model.weight.detach().clone()
    take_step(model, optimizer, x, y)
    length = float(optimizer.last["step_size"])
    assert length != 1.0
    expected = (1 - 0.1 * length) * before + length * optimizer.state[model.weight]["direction"]
    assert torch.allclose(model.weight, expected, rtol=1e-12)


class Complex(nn.Module):
    """Least squares in complex numbers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 1, dtype=torch.complex128))

    def forward(self, x):
        return torch.view_as_real(x @ self.w)


@pytest.mark.parametrize("line_search", [Parabola(growth=1e9), Subspace(fraction=1.0, damping=0.0, mu_max=math.inf)])
def test_complex_parameters(line_search):
    torch.manual_seed(0)
    model, x, y = Complex(), torch.randn(50, 3, dtype=torch.complex128), torch.randn(50, 1, 2, dtype=F64)
    optimizer = NLCG(model.parameters(), lr=1.0, precond="none", line_search=line_search)
    for _ in range(20):
        take_step(model, optimizer, x, y)
    exact = torch.linalg.lstsq(x, torch.view_as_complex(y)).solution
    assert torch.allclose(model.w, exact, atol=1e-5)


@pytest.mark.parametrize("line_search", ["parabola", "subspace"])
def test_bfloat16_parameters(line_search):
    model, (x, y) = small_model().bfloat16(), small_data()
    optimizer = NLCG(model.parameters(), lr=1.0, precond="adam", beta_max=0.9, line_search=line_search)

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs.float(), targets)

    losses = [take_step(model, optimizer, x.bfloat16(), y, loss_fn) for _ in range(20)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("line_search", ["parabola", "subspace"])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(line_search, where):
    model, (x, y) = small_model(norm=True), small_data()
    optimizer = NLCG(model.parameters(), lr=1.0, line_search=line_search, precond="bfgs")
    for _ in range(2):
        take_step(model, optimizer, x, y, F.cross_entropy)
    optimizer.observe_batch(model, F.cross_entropy, x, y)
    if where == "gradient":
        model[0].weight.grad[0, 0] = math.nan
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    passes = optimizer.passes
    optimizer.step(loss=math.nan if where == "loss" else 1.0)
    assert (optimizer.skipped_steps, optimizer.passes) == (1, passes + 1)
    after = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for state in (before, after):
        for values in state[1].values():
            values["scalars"][-1] = 0.0
    for old, new in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True):
        assert torch.equal(old, new)
    with pytest.raises(RuntimeError, match="needs the batch"):  # that one is gone
        optimizer.step(loss=1.0)


def test_where_no_trial_is_finite_the_parameters_stay():
    model, (x, y) = small_model(), small_data()
    optimizer = NLCG(model.parameters(), lr=1.0, line_search=Parabola(tries=3), precond="bfgs")
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(model(x), y).backward()
    optimizer.observe_batch(model, lambda outputs, targets: outputs.sum() * math.inf, x, y)
    optimizer.step(loss=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert optimizer.passes == pytest.approx(1 + 4 / 3)
    assert optimizer.last["step_size"] == 0


@pytest.mark.parametrize("line_search", ["parabola", "subspace"])
def test_an_error_in_the_loss_leaves_the_parameters(line_search):
    model, (x, y) = small_model(norm=True, dropout=0.5), small_data()
    optimizer = NLCG(model.parameters(), lr=1.0, line_search=line_search, precond="bfgs")
    F.cross_entropy(model(x), y).backward()

    def fails(outputs, targets):
        raise KeyError("no loss")

    optimizer.observe_batch(model, fails, x, y)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(KeyError, match="no loss"):
        optimizer.step(loss=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("line_search", ["parabola", "subspace"])
@pytest.mark.parametrize("precond", ["bfgs", "adam", "kron"])
def test_a_run_goes_on_bit_for_bit(line_search, precond):
    def make(model):
        return NLCG(model.parameters(), lr=1.0, precond=precond, line_search=line_search, beta_max=0.9)

    model, (x, y) = small_model(norm=True), small_data()
    optimizer = make(model)
    for _ in range(4):
        take_step(model, optimizer, x, y, F.cross_entropy)
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.passes == optimizer.passes > 4
    for _ in range(4):
        take_step(model, optimizer, x, y, F.cross_entropy)
        take_step(other, resumed, x, y, F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert resumed.passes == optimizer.passes


@pytest.mark.parametrize(
    "line_search", [Parabola(), Subspace(fraction=0.5), Subspace(fraction=0.75), Subspace(fraction=1.0)]
)
def test_micro_batches_are_the_whole_batch(line_search):
    """Uneven ones, made when they are wanted; the part of the examples is that of the whole."""
    x, y = small_data()
    weights = []
    for cuts in ([0, 32], [0, 16, 32], [0, 8, 18, 32]):
        model = small_model().to(F64)
        optimizer = NLCG(model.parameters(), lr=1.0, precond="none", line_search=line_search)
        for _ in range(4):
            optimizer.zero_grad()
            for a, b in pairwise(cuts):
                make = partial(lambda a, b: (x[a:b].to(F64), y[a:b]), a, b)
                optimizer.observe_batch(model, F.cross_entropy, make, weight=b - a)
            loss = F.cross_entropy(model(x.to(F64)), y)
            loss.backward()
            optimizer.step(loss=loss.detach())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in weights[1:]:
        assert torch.allclose(other, weights[0], rtol=1e-6)


def test_a_closure_gives_gradients_and_loss():
    model, (x, y) = small_model(), small_data()
    other = copy.deepcopy(model)
    optimizer = NLCG(model.parameters(), lr=1.0, line_search="parabola", precond="bfgs")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.observe_batch(model, F.cross_entropy, x, y)
    optimizer.step(closure)
    take_step(other, NLCG(other.parameters(), lr=1.0, line_search="parabola", precond="bfgs"), x, y, F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class Clamped(torch.autograd.Function):
    """An operation with a backward pass of its own, and no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_what_cannot_be_done_is_said():
    model, (x, y) = small_model(), small_data()
    optimizer = NLCG(model.parameters(), lr=1.0, line_search="parabola", precond="bfgs")
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"NLCG: line_search=Parabola needs the batch .* call observe_batch\(model"):
        optimizer.step(loss=1.0)
    with pytest.raises(ValueError, match=r"NLCG: model must be a model with all .*, got 'one without .*\[2, 3\]'"):
        optimizer.observe_batch(model[0], F.cross_entropy, x, y)
    with pytest.raises(ValueError, match=r"NLCG: weight must be in \[0, inf\), got -1"):
        optimizer.observe_batch(model, F.cross_entropy, x, y, weight=-1)
    with pytest.raises(ValueError, match=r"line_search=Parabola\(.*needs the loss of each step"):
        optimizer.step()
    optimizer.observe_batch(model, partial(F.cross_entropy, reduction="none"), x, y)
    with pytest.raises(ValueError, match=r"NLCG: the loss of the batch must be a number: its mean, got \(32,\)"):
        optimizer.step(loss=1.0)
    plain = NLCG(model.parameters(), precond="bfgs")
    assert not plain.needs_batch
    with pytest.raises(ValueError, match="NLCG: line_search must be 'parabola' or 'subspace' to observe batches"):
        plain.observe_batch(model, F.cross_entropy, x, y)
    with pytest.raises(ValueError, match="NLCG: shard_state must be False with line_search=Subspace, got True"):
        NLCG(model.parameters(), line_search="subspace", shard_state=True, precond="bfgs")


def test_layers_without_forward_derivative_are_named():
    class Own(nn.Module):
        def forward(self, x):
            return Clamped.apply(x)

    model, (x, y) = nn.Sequential(nn.Linear(5, 3), Own()), small_data()
    optimizer = NLCG(model.parameters(), lr=1.0, line_search="subspace", precond="bfgs")
    with pytest.raises(
        RuntimeError, match="NLCG: line_search=Subspace needs forward derivatives of all layers: You must"
    ):
        take_step(model, optimizer, x, y, F.cross_entropy)


@pytest.mark.parametrize("line_search", ["parabola", Subspace(fraction=1.0)])
def test_attention_with_dropout(line_search):
    torch.manual_seed(0)
    x, y = torch.randn(16, 4, 16), torch.randint(0, 16, (16,))
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 16))
    optimizer = NLCG(model.parameters(), lr=1.0, precond="adam", beta_max=0.9, line_search=line_search)
    losses = [take_step(model, optimizer, x, y, F.cross_entropy) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]


# How the batch is handed over --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "good"), [((None, None), False), ((1.0, 1.0), True), ((24.0, 24.0), True)])
def test_the_loss_must_be_weighted_like_the_batch(weights, good):
    """A loop that averages the means of 24 and 8 examples."""
    model, (x, y) = small_model(), small_data()
    y[24:] = 0
    optimizer = NLCG(model.parameters(), line_search="parabola", precond="bfgs")
    parts = [(x[:24], y[:24]), (x[24:], y[24:])]
    loss = 0.0
    for (inputs, targets), weight in zip(parts, weights, strict=True):
        optimizer.observe_batch(model, F.cross_entropy, inputs, targets, weight=weight)
        part = F.cross_entropy(model(inputs), targets) / 2
        part.backward()
        loss += part.detach()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    if good:
        optimizer.step(loss=loss)
        return
    with pytest.raises(ValueError, match=r"NLCG: loss must be the mean loss of .* pass observe_batch\(..., weight=\)"):
        optimizer.step(loss=loss)
    after = (model.state_dict(), optimizer.state_dict()["state"])
    for old, new in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("line_search", ["parabola", Subspace()])
@pytest.mark.parametrize("precond", ["bfgs", "adam", "orthogonal"])
def test_the_usual_learning_rate_is_a_factor_of_one(line_search, precond):
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = NLCG([{"params": [first]}, {"params": [second], "precond": "adam"}], line_search=line_search)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
    assert NLCG([first], precond=precond, line_search=line_search).param_groups[0]["lr"] == 1.0
    assert NLCG([first], lr=0.5, precond=precond, line_search=line_search).param_groups[0]["lr"] == 0.5
    assert build("nlcg-orthogonal", [first], line_search=line_search).param_groups[0]["lr"] == 1.0
    assert build("nlcg-orthogonal", [first], line_search=line_search, lr=0.5).param_groups[0]["lr"] == 0.5
    assert build("nlcg-orthogonal", [first], line_search="none").param_groups[0]["lr"] == 0.01


def test_a_batch_that_was_given_up_is_forgotten():
    model, (x, y) = small_model(), small_data()
    optimizer = NLCG(model.parameters(), line_search="parabola", precond="bfgs")
    seen = []

    def loss_fn(outputs, targets):
        seen.append(len(targets))
        return F.cross_entropy(outputs, targets)

    optimizer.observe_batch(model, loss_fn, x[:7], y[:7])
    optimizer.zero_grad()
    take_step(model, optimizer, x, y, loss_fn)
    assert set(seen) == {32}


@pytest.mark.parametrize("how", ["no loss", "closure"])
def test_a_step_that_raises_forgets_its_batch(how):
    model, (x, y) = small_model(), small_data()
    optimizer = NLCG(model.parameters(), line_search="parabola", precond="bfgs")

    def closure():
        raise KeyError("no data")

    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.observe_batch(model, F.cross_entropy, x, y)
    with pytest.raises(ValueError if how == "no loss" else KeyError):
        optimizer.step(None if how == "no loss" else closure)
    with pytest.raises(RuntimeError, match="needs the batch"):
        optimizer.step(loss=loss.detach())


@pytest.mark.parametrize("together", [False, True])
def test_each_micro_batch_draws_its_random_numbers_again(together):
    """Observed one by one, with numbers drawn between for something else, or all of them before the first forward pass."""
    model, (x, y) = small_model(dropout=0.5), small_data()
    seen = []

    def loss_fn(outputs, targets):
        seen.append(outputs.detach().clone())
        return F.cross_entropy(outputs, targets)

    optimizer = NLCG(model.parameters(), precond="none", line_search=Parabola(initial=1e-12, tries=1))
    parts = [(x[:16], y[:16]), (x[16:], y[16:])]
    loss = 0.0
    if together:
        for part in parts:
            optimizer.observe_batch(model, loss_fn, *part)
    for part in parts:
        if not together:
            torch.rand(3)
            optimizer.observe_batch(model, loss_fn, *part)
        mean = loss_fn(model(part[0]), part[1]) / 2
        mean.backward()
        loss += mean.detach()
    optimizer.step(loss=loss)
    assert len(seen) == 6
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


class Masked(nn.Module):
    """Takes a table beside its inputs that has nothing to do with examples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, given):
        return self.linear(given["x"] @ given["table"])


def test_only_examples_are_cut():
    model, (x, y) = Masked(), small_data()
    optimizer = NLCG(model.parameters(), precond="none", line_search=Subspace(fraction=0.1))
    sizes = []

    def loss_fn(outputs, targets):
        sizes.append(tuple(outputs.shape))
        return F.cross_entropy(outputs, targets)

    given = {"x": x, "table": torch.eye(5)}
    optimizer.observe_batch(model, loss_fn, given, y)
    loss = F.cross_entropy(model(given), y)
    loss.backward()
    optimizer.step(loss=loss.detach())
    assert sizes == [(3, 3)]
