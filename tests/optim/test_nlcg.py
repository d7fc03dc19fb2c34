"""NLCG against published numbers, an independent twin, and limits in which it must be something known."""

import copy
import math

import numpy as np
import pytest
import torch
from tests.optim.nlcg_twin import Twin

from conjugo.errors import UnknownName
from conjugo.optim import NLCG, batch_norm_scales, depth_scales
from conjugo.optim._fused import kernels
from conjugo.optim.nlcg import lars_scale

needs_kernels = pytest.mark.skipif(kernels is None, reason="the C kernels are not built")
IMPLEMENTATIONS = [
    pytest.param({"fused": False, "foreach": False}, id="plain"),
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param({"fused": True}, id="fused", marks=needs_kernels),
]


def parameter(values, dtype=torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def feed(optimizer: NLCG, w: torch.Tensor, gradients, losses=None) -> list[dict[str, float]]:
    """One step for each gradient; what ``last`` says after each."""
    seen = []
    for i, g in enumerate(gradients):
        w.grad = torch.as_tensor(g, dtype=w.dtype).clone()
        optimizer.step(loss=None if losses is None else losses[i])
        seen.append({name: value.item() for name, value in optimizer.last.items()})
    return seen


def scalar(optimizer: NLCG, w: torch.Tensor, name: str) -> float:
    return optimizer.state[w]["scalars"][list(optimizer._start).index(name)].item()


# ---- published numbers ----

STREAM = ((1.0, 2.0), (0.8, -1.0), (-0.5, 0.25))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("rule", "precond", "betas", "direction", "hs"),
    [
        ("fr", "none", (0.327999999344, 0.190548779326), (-1.12799999934, 0.34400000131), None),
        (
            "fr",
            "bfgs",
            (0.161650254973, 0.023028954181),
            (-1.0870235337, -0.2553478565),
            [(0.8645159841, 14.7161287743), (15.867391487, 21.8715076052)],
        ),
        ("pr", "none", (0.567999998864, 0.586890240324), None, None),
        (
            "pr",
            "bfgs",
            (0.401650254493, 0.611284876690),
            None,
            [(0.8645159841, 14.7161287743), (21.6948317027, 21.7504529479)],
        ),
    ],
)
def test_two_parameter_stream_of_the_reference(implementation, rule, precond, betas, direction, hs):
    w = parameter([0.0, 0.0])
    optimizer = NLCG([w], lr=0.1, rule=rule, precond=precond, mode="reference", **implementation)
    feed(optimizer, w, STREAM[:1])
    state = optimizer.state[w]
    assert state["direction"].tolist() == [-1.0, -2.0]
    for i, g in enumerate(STREAM[1:]):
        seen = feed(optimizer, w, [g])[0]
        assert seen["beta"] == pytest.approx(betas[i], abs=1e-11)
        if hs is not None:
            assert state["h"].tolist() == pytest.approx(hs[i], abs=1e-9)
        if i == 0 and direction is not None:
            assert state["direction"].tolist() == pytest.approx(direction, abs=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("removal", "update"), [("current", (0.0958799999, -0.02924)), ("previous", (0.08436, 0.18172))]
)
def test_online_line_search_of_the_reference(implementation, removal, update):
    w = parameter([0.0, 0.0])
    options = {"lr": 0.1, "precond": "none", "mode": "reference", "line_search": "online", "removal": removal}
    optimizer = NLCG([w], **options, **implementation)
    bases, emas, points = [], [], []
    for g, loss in zip(((1.0, 2.0), (0.8, -1.0), (0.2, 0.1)), (1.0, 1.5, 1.0)):
        feed(optimizer, w, [g], [loss])
        bases.append(scalar(optimizer, w, "base"))
        emas.append(scalar(optimizer, w, "ema"))
        points.append(w.detach().clone())
    assert bases == pytest.approx([1, 0.5, 0.51])
    assert emas == pytest.approx([1, 1.15, 1.105])
    assert (points[1] - points[0]).tolist() == pytest.approx(update, abs=1e-8)


def test_step_line_search_of_the_reference():
    w = parameter([0.0, 0.0])
    optimizer = NLCG([w], lr=0.1, precond="none", mode="reference", line_search="step", period=2)
    bases, emas = [], []
    for g, loss in zip(((1.0, 2.0), (0.8, -1.0), *[(0.2, 0.1)] * 3), (1.0, 1.1, 1.3, 1.0, 0.9)):
        feed(optimizer, w, [g], [loss])
        bases.append(scalar(optimizer, w, "base"))
        emas.append(scalar(optimizer, w, "ema"))
    assert emas == pytest.approx([1, 1.03, 1.111, 1.0777, 1.02439])
    assert bases == pytest.approx([1, 1, 0.8, 0.8, 0.84])


# ---- the independent twin ----


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["exact", "reference"])
@pytest.mark.parametrize("rule", ["fr", "pr"])
@pytest.mark.parametrize("precond", ["bfgs", "none"])
@pytest.mark.parametrize(
    ("line_search", "removal"), [("none", None), ("online", "previous"), ("online", "current"), ("step", None)]
)
def test_follows_the_twin(implementation, mode, rule, precond, line_search, removal):
    """A noisy quadratic, losses that jump, a learning rate that rises and drops; four tensors against one vector."""
    n, steps, sizes = 23, 40, [5, 0, 1, 17]
    rng = np.random.default_rng(1)
    a = np.geomspace(0.3, 30, n)
    noise = 0.05 * rng.standard_normal((steps, n))
    lrs = np.where(np.arange(steps) < 30, 0.02 * (1 + np.arange(steps) / 10), 0.005)
    losses = 1 + 0.3 * rng.standard_normal(steps) ** 2
    options = {
        "rule": rule,
        "precond": precond,
        "mode": mode,
        "line_search": line_search,
        "removal": removal,
        "period": 3,
    }
    twin = Twin(np.ones(n), **options)
    pieces = [parameter(np.ones(size)) for size in sizes]
    optimizer = NLCG(pieces, lr=0.0, **options, **implementation)
    taken_back = 0
    for eps, lr, loss in zip(noise, lrs, losses):
        twin.step(a * twin.w + eps, lr, loss)
        taken_back += twin.altered
        w = torch.cat([p.detach() for p in pieces])
        for p, g in zip(pieces, (torch.from_numpy(a) * w + torch.from_numpy(eps)).split(sizes)):
            p.grad = g.clone()
        optimizer.param_groups[0]["lr"] = float(lr)
        optimizer.step(loss=None if line_search == "none" else float(loss))
        assert optimizer.last["beta"].item() == pytest.approx(twin.beta, rel=1e-6, abs=1e-9)
        np.testing.assert_allclose(torch.cat([p.detach() for p in pieces]).numpy(), twin.w, rtol=1e-7, atol=1e-9)
    assert taken_back >= 2 or line_search == "none"


@pytest.mark.parametrize("implementation", [{"foreach": True}, pytest.param({"fused": True}, marks=needs_kernels)])
@pytest.mark.parametrize("precond", ["bfgs", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}, {"lars": 0.01}, {"rule": "pr"}]
)
def test_fast_paths_follow_the_plain_one_in_float32(implementation, precond, options):
    def run(**which):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 300), torch.nn.Tanh(), torch.nn.Linear(300, 5))
        optimizer = NLCG(model.parameters(), lr=0.05, precond=precond, **options, **which)
        x, y = torch.randn(64, 20), torch.randint(5, (64,))
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    # 20 steps of a nonlinear problem amplify the last bit of float32 (6e-8) by some hundreds.
    torch.testing.assert_close(run(**implementation), run(fused=False, foreach=False), rtol=2e-4, atol=2e-5)


@needs_kernels
def test_kernels_give_the_same_with_any_number_of_threads():
    def run(threads):
        w = torch.nn.Parameter(torch.randn(700_000, generator=torch.Generator().manual_seed(9)))
        optimizer = NLCG([w], lr=0.1, precond="bfgs")
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for i in range(3):
                w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(i))
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return w.detach(), optimizer.last["beta"]

    for other in (2, 3):
        for a, b in zip(run(1), run(other)):
            assert torch.equal(a, b)


@needs_kernels
def test_kernels_take_gradients_of_another_layout():
    results = []
    for channels_last, fused in ((True, True), (False, False)):
        w = torch.nn.Parameter(torch.ones(8, 3, 5, 5))
        if channels_last:
            w = torch.nn.Parameter(w.detach().to(memory_format=torch.channels_last))
        optimizer = NLCG([w], lr=0.1, fused=fused, precond="bfgs")
        for i in range(3):
            w.grad = torch.arange(600.0).reshape(8, 3, 5, 5) * (i + 1) / 600
            optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_over_millions_of_float32_values_are_right(implementation):
    w = parameter(np.zeros(3_000_000), torch.float32)
    optimizer = NLCG([w], lr=0.1, precond="none", **implementation)
    w.grad = torch.rand(w.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.last["rho"].item() == pytest.approx(w.grad.double().square().sum().item(), rel=1e-6)


@needs_kernels
def test_kernels_bump_the_version_of_parameters():
    """Autograd must notice that a saved parameter was changed in place."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = NLCG([w], lr=0.1, fused=True, precond="bfgs")
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_whose_memory_was_exchanged_are_followed():
    w, v = parameter([1.0, 2.0]), parameter([1.0, 2.0])
    mine, other = NLCG([w], lr=0.1, precond="bfgs"), NLCG([v], lr=0.1, precond="bfgs")
    for i in range(4):
        w.data = w.data.clone() if i == 2 else w.data
        for p, optimizer in ((w, mine), (v, other)):
            p.grad = 2 * p.detach()
            optimizer.step()
    assert torch.equal(w.detach(), v.detach())


# ---- limits and invariants ----


@pytest.mark.parametrize(
    "options", [{"precond": "bfgs"}, {"precond": "none"}, {"rule": "pr", "precond": "bfgs"}, {"mode": "reference"}]
)
def test_first_step_is_a_gradient_step(options):
    w = parameter([1.0, -2.0])
    feed(NLCG([w], lr=0.25, **options), w, [(4.0, 8.0)])
    assert w.tolist() == [0.0, -4.0]


def test_without_memory_it_is_sgd():
    w, v = parameter([1.0, -2.0, 3.0]), parameter([1.0, -2.0, 3.0])
    mine = NLCG([w], lr=0.1, precond="none", beta_max=0.0, weight_decay=0.01)
    sgd = torch.optim.SGD([v], lr=0.1, weight_decay=0.01)
    for _ in range(20):
        for p, optimizer in ((w, mine), (v, sgd)):
            p.grad = p.detach() ** 3
            optimizer.step()
    torch.testing.assert_close(w.detach(), v.detach(), rtol=1e-14, atol=0)


def test_constant_gradient_norm_is_heavy_ball_without_damping():
    w = parameter([0.0, 0.0])
    optimizer = NLCG([w], lr=1.0, precond="none")
    seen = feed(optimizer, w, [(3.0, 4.0), (4.0, 3.0), (0.0, 5.0), (-5.0, 0.0)])
    assert [s["beta"] for s in seen] == [0, 1, 1, 1]
    assert optimizer.state[w]["direction"].tolist() == [-2.0, -12.0]


@pytest.mark.parametrize(("mode", "tolerance"), [("exact", 1e-12), ("reference", 1e-6)])
def test_curvature_of_one_parameter_is_found_at_once(mode, tolerance):
    w = parameter([2.0])
    optimizer = NLCG([w], lr=0.1, mode=mode, precond="bfgs")
    for _ in range(2):
        w.grad = 3 * w.detach()
        optimizer.step()
    assert optimizer.state[w]["h"].item() == pytest.approx(3, abs=tolerance)


def test_diagonal_hessian_is_a_fixed_point():
    a = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    w = parameter([1.0, -1.0, 2.0])
    optimizer = NLCG([w], lr=0.1, precond="bfgs")
    state = optimizer.state_dict()
    state["state"][0]["h"] = a.clone()
    optimizer.load_state_dict(state)
    for _ in range(10):
        w.grad = a * w.detach()
        optimizer.step()
    # The first direction is -P g with this h, so every pair (s, y) has y = a s.
    torch.testing.assert_close(optimizer.state[w]["h"], a, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", ["exact", "reference"])
@pytest.mark.parametrize("rule", ["fr", "pr"])
def test_beta_and_h_stay_in_their_ranges(mode, rule):
    rng = np.random.default_rng(0)
    w = parameter(np.zeros(30))
    optimizer = NLCG([w], lr=0.3, mode=mode, rule=rule, precond="bfgs")
    gradients = rng.standard_normal((60, 30)) * np.geomspace(1e-3, 1e3, 60)[:, None]
    for g in gradients:
        seen = feed(optimizer, w, [g])[0]
        assert 0 <= seen["beta"] <= 1
        low, high = (0, math.inf) if mode == "reference" else (1e-6, 1e6)
        assert low <= optimizer.state[w]["h"].min().item() <= optimizer.state[w]["h"].max().item() <= high


def test_scaling_the_loss_and_h0_changes_nothing():
    def run(scale):
        w = parameter(np.linspace(-1, 1, 12))
        optimizer = NLCG([w], lr=0.0, h0=scale, precond="bfgs")
        a = torch.from_numpy(np.geomspace(0.5, 20, 12))
        for t in range(30):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + t % 7)
            w.grad = scale * (a * w.detach() + 0.1 * torch.sin(5 * w.detach()))
            optimizer.step()
        return w.detach(), optimizer.state[w]["h"]

    (w1, h1), (wc, hc) = run(1.0), run(37.0)
    torch.testing.assert_close(wc, w1, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(hc, 37 * h1, rtol=1e-11, atol=0)


def test_pr_is_fr_when_successive_gradients_are_orthogonal():
    directions = []
    for rule in ("fr", "pr"):
        w = parameter([0.0, 0.0])
        optimizer = NLCG([w], lr=0.1, rule=rule, precond="bfgs")
        feed(optimizer, w, [(1.0, 0.0), (0.0, 2.0)])
        directions.append(optimizer.state[w]["direction"].tolist())
    assert directions[0] == directions[1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_gradient_moves_nothing(implementation):
    w = parameter([1.0, 2.0])
    optimizer = NLCG([w], lr=0.1, **implementation)
    feed(optimizer, w, [(0.0, 0.0)] * 3)
    assert w.tolist() == [1.0, 2.0]
    assert all(torch.isfinite(t).all() for t in optimizer.state[w].values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_converged_problem_stays_finite(implementation):
    w = parameter([1.0, 1.0])
    optimizer = NLCG([w], lr=0.4, precond="bfgs", **implementation)
    for _ in range(400):
        w.grad = torch.tensor([1.0, 3.0], dtype=torch.float64) * w.detach()
        optimizer.step()
    assert w.detach().norm() < 1e-10


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_scope(scope, grouped):
    """Two tensors are, by scope, one problem or two problems solved apart."""
    gradients = torch.from_numpy(np.random.default_rng(3).standard_normal((8, 4)))

    def run(sizes, scope, grouped=False):
        pieces = [parameter(np.zeros(n)) for n in sizes]
        optimizer = NLCG([{"params": [p]} for p in pieces] if grouped else pieces, lr=0.1, scope=scope, precond="bfgs")
        for g in gradients:
            for p, part in zip(pieces, g.split(sizes)):
                p.grad = part.clone()
            optimizer.step()
        return torch.cat([p.detach() for p in pieces])

    apart = []
    for part in (slice(0, 1), slice(1, 4)):
        w = parameter(np.zeros(len(gradients[0][part])))
        feed(NLCG([w], lr=0.1, precond="bfgs"), w, gradients[:, part])
        apart.append(w.detach())
    separate = scope == "tensor" or (scope == "group" and grouped)
    expected = torch.cat(apart) if separate else run([4], "global")
    torch.testing.assert_close(run([1, 3], scope, grouped), expected, rtol=1e-12, atol=1e-13)


def test_split_invariance_in_float32():
    def run(sizes, groups):
        a = torch.logspace(-1, 1.3, 120)
        pieces = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
        optimizer = NLCG([{"params": pieces[i::groups]} for i in range(groups)], lr=0.02, precond="bfgs")
        for _ in range(50):
            w = torch.cat([p.detach() for p in pieces])
            for p, g in zip(pieces, (a * w + 0.1 * w**3).split(sizes)):
                p.grad = g.clone()
            optimizer.step()
        return torch.cat([p.detach() for p in pieces])

    whole = run([120], 1)
    torch.testing.assert_close(run([7, 50, 63], 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run([7, 50, 63], 3), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mode", "found"), [("exact", 3), ("reference", 30)])
def test_secant_pair_uses_the_step_that_was_taken(mode, found):
    """After the learning rate drops tenfold, "exact" finds the true curvature 3; the reference is off by the ratio."""
    w = parameter([1.0])
    optimizer = NLCG([w], lr=0.1, mode=mode, precond="bfgs")
    feed(optimizer, w, [3 * w.detach()])
    optimizer.param_groups[0]["lr"] = 0.01
    feed(optimizer, w, [3 * w.detach()])
    assert optimizer.state[w]["h"].item() == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize(("restart", "direction"), [(True, 2.0), (False, 1.0)])
def test_restart_on_ascent(restart, direction):
    w = parameter([0.0, 0.0])
    optimizer = NLCG([w], lr=0.1, precond="none", restart_on_ascent=restart)
    # beta = 1 and <g, d'> = 2: <g, -g + d'> = -4 + 2 is still descent; with g = (-1, 0) it is not.
    feed(optimizer, w, [(1.0, 0.0), (-2.0, 0.0)])
    assert optimizer.state[w]["direction"].tolist() == [1.0, 0.0]
    feed(optimizer, w, [(2.0, 0.0)])
    assert optimizer.state[w]["direction"][0].item() == pytest.approx(-1.0)
    feed(optimizer, w, [(-2.0, 0.0)])
    assert optimizer.state[w]["direction"][0].item() == pytest.approx(1.0)
    w = parameter([0.0, 0.0])
    optimizer = NLCG([w], lr=0.1, precond="none", restart_on_ascent=restart)
    feed(optimizer, w, [(2.0, 0.0), (2.0, 0.0), (-2.0, 0.0)])  # d' = -4: <g, 2 + beta d'> = 4 > 0
    assert optimizer.state[w]["direction"][0].item() == pytest.approx(direction if restart else -2.0)


# ---- line search ----


@pytest.mark.parametrize(
    ("line_search", "removal", "least", "most"),
    [
        ("none", "current", 20, 500),
        ("online", "current", 0, 10),
        ("online", "previous", 0, 0.01),
        ("step", "previous", 0, 2),
    ],
)
def test_line_search_saves_a_run_with_a_learning_rate_that_is_too_large(line_search, removal, least, most):
    """Digits, tanh MLP 64-16-10, full batch, lr 4, 100 steps; over seeds the runs without a search end at 0.02 to 100."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
    optimizer = NLCG(
        model.parameters(), lr=4.0, mode="reference", line_search=line_search, removal=removal, precond="bfgs"
    )
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step(loss=loss)
    assert least <= loss.item() < most


def test_line_search_needs_a_loss():
    w = parameter([1.0])
    optimizer = NLCG([w], line_search="online", precond="bfgs")
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match=r"step\(closure\).*step\(loss=loss\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="one element"):
        optimizer.step(loss=torch.ones(2))
    assert w.item() == 1.0
    optimizer.step(loss=torch.tensor([0.5]))
    assert w.item() == pytest.approx(0.9)


def test_no_curvature_update_after_a_step_that_was_partly_taken_back():
    w = parameter([1.0, 1.0])
    optimizer = NLCG([w], lr=0.1, line_search="online", precond="bfgs")
    feed(optimizer, w, [(1.0, 2.0), (0.5, 1.0)], [1.0, 9.0])
    before = optimizer.state[w]["h"].clone()
    feed(optimizer, w, [(0.3, 0.7)], [1.0])
    assert torch.equal(optimizer.state[w]["h"], before)
    feed(optimizer, w, [(0.2, 0.5)], [0.5])
    assert not torch.equal(optimizer.state[w]["h"], before)


# ---- scaling of the gradient ----


def test_lars_scale_formula():
    norms = (torch.tensor(value, dtype=torch.float64) for value in (2.0, 0.5))
    assert lars_scale(*norms, 0.001).item() == pytest.approx(0.00399840056, rel=1e-8)
    w = parameter([[2.0, 0.0]])
    feed(NLCG([w], lr=1.0, lars=0.001, precond="bfgs"), w, [[[0.3, 0.4]]])
    expected = torch.tensor([[2 - 0.00399840056 * 0.3, -0.00399840056 * 0.4]], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("mode", "moved"), [("exact", 0.01), ("reference", 0.0)])
def test_lars_moves_vectors_and_zeros_in_exact_mode_only(mode, moved):
    weight, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = NLCG([weight, bias], lr=1.0, lars=0.01, mode=mode, precond="bfgs")
    for p in (weight, bias):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in (weight, bias):
        assert p.detach().flatten()[0].item() == pytest.approx(-moved)


def test_gradient_scales_by_layer():
    layers = (torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    model = torch.nn.Sequential(*layers)
    assert batch_norm_scales(model) == [1, 1, 0.01, 0.01, 1, 1]
    assert depth_scales(model) == pytest.approx([0.1 + 0.9 * i / 6 for i in range(6)])
    optimizer = NLCG(model.parameters(), lr=1.0, grad_scale=depth_scales(model), precond="bfgs")
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, old, scale in zip(model.parameters(), before, depth_scales(model)):
        torch.testing.assert_close(old - p.detach(), torch.full_like(p, scale))


# ---- weight decay, groups ----


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoupled_weight_decay_shrinks_the_weights_only(implementation):
    w = parameter([1.0, -2.0])
    optimizer = NLCG([w], lr=0.1, weight_decay=0.5, decoupled=True, **implementation)
    feed(optimizer, w, [(0.0, 0.0)])
    assert w.tolist() == pytest.approx([0.95, -1.9])
    assert optimizer.last["rho"].item() == 0


def test_groups_have_their_own_learning_rates():
    a, b = parameter([0.0]), parameter([0.0])
    optimizer = NLCG([{"params": [a], "lr": 1.0}, {"params": [b], "lr": torch.tensor(0.5)}], precond="none")
    a.grad = b.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert (a.item(), b.item()) == (-1.0, -0.5)


def test_parameters_added_later_begin_with_a_gradient_step_and_disturb_nobody():
    old, new, twin = parameter([1.0, 1.0]), parameter([1.0]), parameter([1.0, 1.0])
    optimizer, alone = NLCG([old], lr=0.1, precond="bfgs"), NLCG([twin], lr=0.1, precond="bfgs")
    for w, o in ((old, optimizer), (twin, alone)):
        feed(o, w, [(1.0, 2.0), (0.5, 1.5)])
    optimizer.add_param_group({"params": [new]})
    new.grad = torch.tensor([3.0], dtype=torch.float64)
    feed(optimizer, old, [(0.25, 1.0)])
    feed(alone, twin, [(0.25, 1.0)])
    assert optimizer.state[new]["direction"].item() == -3.0
    torch.testing.assert_close(old.detach(), twin.detach(), rtol=1e-13, atol=0)


# ---- gradients that are missing or not finite ----


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", ["nan gradient", "inf gradient", "nan loss"])
@pytest.mark.parametrize("options", [{}, {"precond": "none", "rule": "pr"}, {"decoupled": True}])
def test_a_step_that_is_not_finite_changes_nothing(implementation, bad, options):
    w, v = parameter([1.0, 2.0]), parameter([3.0])
    optimizer = NLCG([w, v], lr=0.1, line_search="online", weight_decay=0.1, **options, **implementation)

    def step(loss, poison=None):
        w.grad, v.grad = w.detach() * 2, v.detach().clone()
        if poison is not None:
            w.grad[1] = poison
        optimizer.step(loss=loss)

    for _ in range(3):
        step(1.0)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    values = w.detach().clone(), v.detach().clone()
    step(math.nan if bad == "nan loss" else 1.0, {"nan gradient": math.nan, "inf gradient": -math.inf}.get(bad))
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.last["skipped"].item()
    assert torch.equal(w.detach(), values[0])
    assert torch.equal(v.detach(), values[1])
    for i, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            expected = before[i][name].clone()
            if name == "scalars":
                expected[-1] += 1
            assert torch.equal(tensor, expected), name
    step(1.0)
    assert not torch.equal(w.detach(), values[0])
    assert not optimizer.last["skipped"].item()


def test_parameters_that_never_have_a_gradient_are_left_alone():
    used, unused, alone = parameter([1.0]), parameter([5.0]), parameter([1.0])
    optimizer, other = (
        NLCG([unused, used], lr=0.1, weight_decay=0.1, precond="bfgs"),
        NLCG([alone], lr=0.1, weight_decay=0.1, precond="bfgs"),
    )
    for _ in range(3):
        feed(optimizer, used, [used.detach()])
        feed(other, alone, [alone.detach()])
    assert unused.item() == 5.0
    assert optimizer.state[unused]["h"].item() == 1.0
    assert used.item() == alone.item()


def test_a_changed_set_of_gradients_is_refused():
    a, b = parameter([1.0]), parameter([1.0])
    optimizer = NLCG([a, b], lr=0.1, precond="bfgs")
    a.grad = b.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    b.grad = None
    with pytest.raises(RuntimeError, match="allow_missing=True"):
        optimizer.step()
    assert a.item() == pytest.approx(0.9)


def test_missing_gradients_count_as_zero_where_that_is_allowed():
    results = []
    for missing in (True, False):
        a, b = parameter([1.0]), parameter([1.0])
        optimizer = NLCG([a, b], lr=0.1, allow_missing=True, precond="bfgs")
        for late in (None if missing else torch.zeros(1).double(), torch.ones(1).double()):
            a.grad, b.grad = torch.ones(1).double(), late
            optimizer.step()
        results.append((a.item(), b.item()))
    assert results[0] == results[1]


def test_all_gradients_missing_is_no_step():
    w = parameter([1.0])
    optimizer = NLCG([w], precond="bfgs")
    optimizer.step()
    assert scalar(optimizer, w, "step") == 0


# ---- types ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_have_float32_state(dtype):
    w, v = parameter([1.0, 2.0, 3.0], dtype), parameter([1.0, 2.0, 3.0], torch.float32)
    low, full = NLCG([w], lr=0.25, precond="bfgs"), NLCG([v], lr=0.25, precond="bfgs")
    for _ in range(4):
        feed(low, w, [w.detach()])
        feed(full, v, [v.detach()])
    assert {t.dtype for name, t in low.state[w].items() if name != "scalars"} == {torch.float32}
    torch.testing.assert_close(w.detach().float(), v.detach(), rtol=0.03, atol=0.01)


def test_complex_parameters_are_pairs_of_real_ones():
    z = torch.nn.Parameter(torch.tensor([1 + 2j, -1 + 0.5j], dtype=torch.complex128))
    r = parameter([[1.0, 2.0], [-1.0, 0.5]])
    complex_one, real_one = NLCG([z], lr=0.1, precond="bfgs"), NLCG([r], lr=0.1, precond="bfgs")
    for _ in range(5):
        z.grad = 2 * z.detach() * (1 + 0.1 * z.detach().abs())
        r.grad = torch.view_as_real(z.grad).clone()
        complex_one.step()
        real_one.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), r.detach(), rtol=1e-12, atol=1e-13)


def test_parameters_of_mixed_types_are_one_problem():
    a, b, together = parameter([1.0, 2.0], torch.float32), parameter([3.0]), parameter([1.0, 2.0, 3.0])
    mixed, one = NLCG([a, b], lr=0.1, precond="bfgs"), NLCG([together], lr=0.1, precond="bfgs")
    for _ in range(5):
        a.grad, b.grad = a.detach() * 2, b.detach() * 5
        together.grad = together.detach() * torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64)
        mixed.step()
        one.step()
    torch.testing.assert_close(torch.cat([a.detach().double(), b.detach()]), together.detach(), rtol=1e-5, atol=1e-6)


# ---- options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"NLCG: lr must be .*>= 0.*got -0\.1"),
        ({"lr": math.nan}, "NLCG: lr must be"),
        ({"period": 0, "line_search": "step"}, "NLCG: period must be an integer >= 1, got 0"),
        ({"threshold": 0.0}, "NLCG: threshold must be .*> 0, got 0.0"),
        ({"h0": 0.0}, "NLCG: h0 must be .*> 0, got 0.0"),
        ({"h_bounds": (1.0, 0.5)}, r"NLCG: h_bounds must be \(low, high\) with 0 < low < high"),
        ({"h_bounds": (0.0, 0.5)}, "NLCG: h_bounds"),
        ({"beta_max": 1.5}, r"NLCG: beta_max must be in \[0, 1\], got 1.5"),
        ({"lars": 0.0}, "NLCG: lars must be None or in"),
        ({"weight_decay": -1.0}, "NLCG: weight_decay must be in"),
        ({"grad_scale": [1.0, 2.0]}, "NLCG: grad_scale must be a number, or 1 numbers"),
        ({"foreach": True, "fused": True}, "NLCG: foreach must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NLCG([parameter([1.0])], **options)


@pytest.mark.parametrize(
    ("option", "value", "nearest"),
    [
        ("rule", "frr", "fr"),
        ("precond", "bgfs", "bfgs"),
        ("line_search", "onlin", "online"),
        ("mode", "exakt", "exact"),
        ("scope", "globl", "global"),
        ("removal", "previus", "previous"),
    ],
)
def test_unknown_names_suggest_the_nearest(option, value, nearest):
    with pytest.raises(UnknownName, match=f"NLCG {option} '{value}'; did you mean '{nearest}'"):
        NLCG([parameter([1.0])], **{option: value})


def test_fused_is_refused_where_it_cannot_work():
    w = parameter([1.0], torch.bfloat16)
    optimizer = NLCG([w], fused=True, precond="bfgs")
    with pytest.raises(RuntimeError, match="fused=True needs"):
        feed(optimizer, w, [(1.0,)])


def test_several_devices_are_refused():
    a, b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1, device="meta"))
    optimizer = NLCG([a, b], precond="bfgs")
    a.grad = torch.ones_like(a)
    with pytest.raises(RuntimeError, match="one device, got cpu, meta"):
        optimizer.step()


def test_last_is_for_reading():
    w = parameter([1.0, 2.0])
    optimizer = NLCG([w], lr=0.1, precond="bfgs")
    assert optimizer.last == {}
    feed(optimizer, w, [(3.0, 4.0)])
    assert set(optimizer.last) == {"beta", "step_size", "base_lr", "rho", "ys", "shs", "cosine", "skipped"}
    assert optimizer.last["cosine"].item() == pytest.approx(1)
    assert optimizer.last["rho"].item() == pytest.approx(25)
    assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in optimizer.last.values())


@pytest.mark.parametrize("options", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rule", "precond"), [("fr", "adam"), ("constant", "none"), ("pr", "orthogonal")])
def test_nesterov_looks_ahead(rule, precond, options):
    """The directions are those without it; the moves are along -P g + beta d."""
    torch.manual_seed(0)
    w, gradients = torch.randn(20, 20, dtype=torch.float64), torch.randn(5, 20, 20, dtype=torch.float64)
    ways = []
    for nesterov in (False, True):
        p = torch.nn.Parameter(w.clone())
        made = NLCG([p], lr=0.5, rule=rule, precond=precond, beta_max=0.75, nesterov=nesterov, **options)
        moves = []
        for g in gradients:
            before, p.grad = p.detach().clone(), g.clone()
            made.step()
            moves.append((p.detach() - before) / 0.5)
        ways.append((moves, made.state[p]["direction"].clone(), made.last["beta"].item()))
    (directions, d, beta), (moves, other, same) = ways
    assert beta == same
    assert beta > 0.01 or rule == "pr"
    torch.testing.assert_close(other, d)
    minus_z = directions[-1] - beta * directions[-2]
    torch.testing.assert_close(moves[-1], minus_z + beta * directions[-1])
    torch.testing.assert_close(moves[0], directions[0])


def test_nesterov_fits_neither_curvature_pairs_nor_line_searches():
    w = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"nesterov.*DiagonalBFGS"):
        NLCG([w], lr=0.1, precond="bfgs", nesterov=True)
    for search in ("online", "step", "parabola"):
        with pytest.raises(ValueError, match=rf"nesterov.*{search}"):
            NLCG([w], lr=0.1, precond="adam", nesterov=True, line_search=search)
