"""Layers before batch norm: which are found, the least squares known exactly, networks against whole matrices, the tracker."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conjugo.curvature import from_dense
from conjugo.errors import UnknownName
from conjugo.optim import LARS
from conjugo.scaling import EffectiveLRTracker, bn_layers, effective_condition, scale_invariant_groups
from conjugo.scaling.bngd import OLS
from conjugo.training.models import build


def half_mse(outputs, targets):
    return F.mse_loss(outputs, targets) / 2


def least_squares(r=1.0, n=200, d=5):
    """A linear layer with batch norm at a minimum on least squares, its data, and the problem."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(0, 0.5, d, dtype=torch.float64)
    x = x - x.mean(0)
    y = x @ torch.randn(d, generator=generator, dtype=torch.float64) + torch.randn(n, generator=generator).double()
    y = y - y.mean()
    problem = OLS.from_data(x, y)
    model = nn.Sequential(nn.Linear(d, 1, bias=False), nn.BatchNorm1d(1, eps=1e-30)).double()
    with torch.no_grad():
        model[0].weight.copy_(r * problem.u[None])
        model[1].weight.fill_(math.sqrt(problem.S))
    return model, (x, y[:, None]), problem


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 64, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 5),
    )


IMAGES = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 5


# ---- which ----


def test_the_groups_of_a_network():
    model = convolutional()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    expected = [("0.weight", 0), ("3.weight", 1)]
    assert [tuple(group) for group in scale_invariant_groups(model, F.cross_entropy, IMAGES)] == expected
    found = scale_invariant_groups(model, F.cross_entropy, [IMAGES, IMAGES], structural=True)
    assert [tuple(group) for group in found] == expected
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_ends_in_a_sum_is_not_invariant():
    """In a pre-activation network the second convolution of a block is added to the shortcut, which batch norm sees later."""
    torch.manual_seed(0)
    model = build("resnet8", input_shape=(3, 8, 8), num_classes=4)
    data = torch.randn(24, 3, 8, 8), torch.arange(24) % 4
    structural = {group.name for group in scale_invariant_groups(model, F.cross_entropy, data, structural=True)}
    found = {group.name for group in scale_invariant_groups(model.double(), F.cross_entropy, data)}
    assert found == structural
    assert all("conv2" not in name for name in found)
    assert len(found) == 4  # that before the blocks, and the first of each


def test_a_relu_between_is_seen_by_gradients_only():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6, eps=1e-12), nn.Linear(6, 2))
    data = torch.randn(30, 4), torch.randn(30, 2)
    with torch.no_grad():
        model[0].bias.zero_()
    # The bias is no part of a row: with it at zero a row can be scaled, though not for the next step.
    assert [group.name for group in scale_invariant_groups(model.double(), F.mse_loss, data)] == ["0.weight"]
    assert scale_invariant_groups(model, F.mse_loss, (data[0].double(), data[1]), structural=True) == []


def test_without_a_gradient_nothing_is_found():
    model, data, _ = least_squares()
    assert scale_invariant_groups(model, half_mse, data) == []
    assert scale_invariant_groups(nn.Linear(4, 2), F.mse_loss, (torch.randn(9, 4), torch.randn(9, 2))) == []
    model = convolutional()
    nn.init.zeros_(model[9].weight)
    assert "0.weight" not in [group.name for group in scale_invariant_groups(model, F.cross_entropy, IMAGES)]


def test_an_orthogonal_gradient_at_one_length_is_not_enough():
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight *= (model(x) * y).mean() / model(x).square().mean()  # the best length
    F.mse_loss(model(x), y).backward()
    assert float((model.weight * model.weight.grad).sum().detach().abs()) < 1e-12
    assert scale_invariant_groups(model, F.mse_loss, (x, y)) == []


# ---- conditioning ----


def test_least_squares_is_known_exactly():
    model, data, problem = least_squares()
    spectrum = problem.spectrum()
    found = effective_condition(model, half_mse, data, "0")
    s = math.sqrt(problem.S)
    torch.testing.assert_close(found.eigenvalues, spectrum.lam_star.flip(0) * problem.S / s**2, rtol=1e-10, atol=0)
    assert found.kappa_eff == pytest.approx(spectrum.kappa_star, rel=1e-10)
    assert found.exact
    assert (found.name, found.parameters) == ("0.weight", 5)
    assert found.norms.tolist() == pytest.approx([float(problem.u.norm())])
    assert found.edge(0.3) == pytest.approx(0.15 * found.lam_max)
    torch.testing.assert_close(found.eff_lr(0.3), 0.3 / found.norms**2)
    longer = effective_condition(least_squares(r=3.0)[0], half_mse, data, "0.weight")
    assert longer.lam_max == pytest.approx(found.lam_max / 9, rel=1e-9)
    assert longer.free_lam_max == pytest.approx(found.free_lam_max, rel=1e-9)
    assert longer.kappa_free == pytest.approx(found.kappa_free, rel=1e-9)
    assert longer.kappa_eff == pytest.approx(found.kappa_eff, rel=1e-9)


def test_a_network_against_its_whole_matrix():
    """Also with rows that are not the first dimension, and away from minima, where the raw block has the scale in it."""
    model = convolutional().double()
    named = dict(model.named_parameters())
    inputs = IMAGES[0].double()
    for layer, dim in (("0", 0), ("3", 1)):
        name = f"{layer}.weight"

        def loss(weights, name=name):
            buffers = {key: x.clone() for key, x in model.named_buffers()}
            return F.cross_entropy(torch.func.functional_call(model, {name: weights, **buffers}, (inputs,)), IMAGES[1])

        weights = named[name].detach()
        P = weights.numel()
        raw = torch.func.hessian(loss)(weights).view(P, P).detach()
        Pi, D = torch.eye(P, dtype=torch.float64), torch.zeros(P, dtype=torch.float64)
        for c in range(weights.shape[dim]):
            row = torch.zeros_like(weights)
            row.select(dim, c).copy_(weights.select(dim, c))
            Pi -= torch.outer(row.flatten(), row.flatten()) / row.square().sum()
            D += (row.flatten() != 0) * row.norm()
        exact = torch.linalg.eigvalsh(Pi @ raw @ Pi)
        C = weights.shape[dim]
        found = effective_condition(model, F.cross_entropy, IMAGES, layer)
        assert len(found.eigenvalues) == P - C
        kept = exact[exact.abs().argsort()[C:]].sort(descending=True).values
        torch.testing.assert_close(found.eigenvalues, kept, rtol=1e-8, atol=1e-10)
        assert found.raw_lam_max == pytest.approx(float(torch.linalg.eigvalsh(raw)[-1]), rel=1e-9)
        free = D[:, None] * (Pi @ raw @ Pi) * D
        assert found.free_lam_max == pytest.approx(float(torch.linalg.eigvalsh(free)[-1]), rel=1e-9)
        assert found.lam_min_pos == pytest.approx(float(kept[kept > 1e-12 * kept[0]][-1]), rel=1e-6)
        assert found.kappa(0.5) == pytest.approx(found.lam_max / float(kept.abs().quantile(0.5)), rel=0.1)
        assert found.quantiles[0.1] < found.quantiles[0.5] < found.lam_max


def test_a_larger_layer_by_lanczos(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12, bias=False), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3)).double()
    data = torch.randn(300, 20, dtype=torch.float64), torch.arange(300) % 3
    whole = effective_condition(model, F.cross_entropy, data, "0", "ggn")
    monkeypatch.setattr(bn_layers, "DENSE", 100)
    found = effective_condition(model, F.cross_entropy, data, "0", "ggn", k=4, steps=60)
    assert not found.exact
    assert (found.kappa_eff, found.lam_min_pos, found.kappa_raw, found.kappa_free) == (None,) * 4
    torch.testing.assert_close(found.eigenvalues, whole.eigenvalues[:4], rtol=1e-6, atol=0)
    assert found.raw_lam_max == pytest.approx(whole.raw_lam_max, rel=1e-6)
    assert found.free_lam_max == pytest.approx(whole.free_lam_max, rel=1e-6)
    for q in (0.5, 0.1):
        assert found.quantiles[q] == pytest.approx(whole.quantiles[q], rel=0.6)  # of 230 values, two probes
        assert found.raw_quantiles[q] == pytest.approx(whole.raw_quantiles[q], rel=0.6, abs=1e-4)
    assert whole.lam_min_pos > 0
    assert bool((whole.eigenvalues > -1e-12).all())


def test_quantiles_leave_out_the_zeros_of_the_rows():
    values = torch.cat([torch.zeros(40), torch.linspace(1, 2, 160)]).double()
    found = bn_layers._estimated(from_dense(torch.diag(values)), 3, 120, 0, 40)
    assert found.values.tolist() == pytest.approx(values[-3:].flip(0).tolist(), rel=1e-5)
    assert found.quantiles[0.1] == pytest.approx(1.1, rel=0.03)
    assert found.quantiles[0.5] == pytest.approx(1.5, rel=0.03)
    assert bn_layers._quantile(torch.tensor([3.0, 1.0, 2.0]), torch.ones(3), 0.5) == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "99"}, "unknown layer '99'"),
        ({"layer": "7"}, "part of the gradient of 7.weight along its rows must be next to nothing"),
        ({"layer": "1"}, "one of rows"),
        ({"layer": "0", "matrix": "fisher"}, "unknown matrix of a layer 'fisher'"),
        ({"layer": "0", "k": 0}, "k must be >= 1"),
        ({"layer": "0", "steps": 1}, "steps must be >= 2"),
        ({"layer": "0", "tol": 2.0}, "tol"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        effective_condition(convolutional(), F.cross_entropy, IMAGES, **options)


def test_other_bad_input():
    model = convolutional()
    with torch.no_grad():
        model[0].weight[2] = 0
    with pytest.raises(ValueError, match="without rows of zeros"):
        effective_condition(model, F.cross_entropy, IMAGES, "0")
    with pytest.raises(ValueError, match="one with batch norm"):
        effective_condition(nn.Linear(3, 2), F.mse_loss, (torch.ones(4, 3), torch.ones(4, 2)), "")
    with pytest.raises(ValueError, match="tol"):
        scale_invariant_groups(model, F.cross_entropy, IMAGES, tol=0.0)
    found = effective_condition(convolutional(), F.cross_entropy, IMAGES, "0")
    with pytest.raises(ValueError, match="q must be one of"):
        found.kappa(0.3)


# ---- the tracker ----


def train(model, optimizer, tracker, steps=3):
    """What the tracker says after each step."""
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES[0]), IMAGES[1]).backward()
        optimizer.step()
        yield tracker.step()


def test_the_tracker_follows_every_row():
    model = convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tracker = EffectiveLRTracker(model, optimizer)
    old = {name: model.get_parameter(name).detach().clone() for name in ("0.weight", "3.weight")}
    for found in train(model, optimizer, tracker):
        assert set(found) == {"0.weight", "3.weight"}
        for name, dim in (("0.weight", 0), ("3.weight", 1)):
            w = model.get_parameter(name).detach()
            for c in range(w.shape[dim]):
                now, before = w.select(dim, c).flatten().double(), old[name].select(dim, c).flatten().double()
                angle = math.acos(min(1.0, float(now @ before / now.norm() / before.norm())))
                assert float(found[name]["norm"][c]) == pytest.approx(float(now.norm()), rel=1e-5)
                assert float(found[name]["eff_lr"][c]) == pytest.approx(0.5 / float(now @ now), rel=1e-5)
                assert float(found[name]["angle"][c]) == pytest.approx(angle, rel=1e-3)
            assert float(found[name]["angle"].min()) > 1e-4
            old[name] = w.clone()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert bool((tracker.step()["0.weight"]["angle"] == 0).all())


@pytest.mark.parametrize(
    ("make", "factor", "power"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 10, 2),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, dampening=0.5), 1, 2),
        (lambda p: torch.optim.AdamW(p, lr=0.1), 1, 1),
        (lambda p: LARS(p, lr=0.1, momentum=0.0), 1, 0),
    ],
)
def test_powers_and_momentum(make, factor, power):
    model = convolutional()
    optimizer = make(model.parameters())
    found = next(train(model, optimizer, EffectiveLRTracker(model, optimizer)))["0.weight"]
    torch.testing.assert_close(found["eff_lr"], 0.1 * factor / found["norm"] ** power)


def test_the_law_of_effective_learning_rates():
    """Rows three times as long with nine times the learning rate turn by the same angles."""
    turns = []
    for r in (1.0, 3.0):
        model = convolutional().double()
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-30
        with torch.no_grad():
            model[0].weight *= r
        rest = [p for name, p in model.named_parameters() if name != "0.weight"]
        optimizer = torch.optim.SGD([{"params": [model[0].weight], "lr": 0.1 * r**2}, {"params": rest, "lr": 0.1}])
        tracker = EffectiveLRTracker(model, optimizer, [("0.weight", 0)])
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(IMAGES[0].double()), IMAGES[1]).backward()
            optimizer.step()
            found = tracker.step()["0.weight"]
        turns.append(found)
    torch.testing.assert_close(turns[0]["angle"], turns[1]["angle"], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(turns[0]["eff_lr"], turns[1]["eff_lr"], rtol=1e-5, atol=0)
    torch.testing.assert_close(turns[1]["norm"], 3 * turns[0]["norm"], rtol=1e-5, atol=0)


def test_the_tracker_says_what_is_wrong():
    model = convolutional()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no layer seen"):
        EffectiveLRTracker(model, sgd).step()
    with pytest.raises(UnknownName, match=r"unknown trainable parameter '0\.wait'"):
        EffectiveLRTracker(model, sgd, [("0.wait", 0)])
    with pytest.raises(ValueError, match="dimension of the rows"):
        EffectiveLRTracker(model, sgd, [("0.weight", 4)])
    with pytest.raises(ValueError, match="groups must be at least one"):
        EffectiveLRTracker(model, sgd, [])
    with pytest.raises(ValueError, match=r"one that has 0\.weight"):
        EffectiveLRTracker(model, torch.optim.SGD([model[9].weight], lr=0.1), [("0.weight", 0)])
    with pytest.raises(ValueError, match="power must be given for LBFGS"):
        EffectiveLRTracker(model, torch.optim.LBFGS(model.parameters()))
    assert EffectiveLRTracker(model, torch.optim.LBFGS(model.parameters()), power=2)
