"""The running average of weights: its closed form, lending and giving back, round trips."""

import copy

import pytest
import torch
from torch import nn

from conjugo.optim import PolynomialAverage, WeightEMA
from conjugo.optim.averaging import ema_decay


def model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def disturb(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))


def values(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_decays_of_the_recipe():
    assert [ema_decay(t, 0.9999) for t in (0, 1, 8)] == pytest.approx([1 / 10, 2 / 11, 0.5])
    assert ema_decay(89_989, 0.9999) < 0.9999  # reaches its limit at (1 + t) / (10 + t) = 0.9999
    assert ema_decay(89_990, 0.9999) == pytest.approx(0.9999, abs=1e-12)
    assert ema_decay(10**9, 0.9999) == 0.9999


def test_closed_form():
    """After T updates the average is the sum of the weights of step t times (1 - d_t) prod_{u > t} d_u."""
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average = WeightEMA(nn.ParameterList([w]), decay=0.4)
    history = [torch.randn(2, dtype=torch.float64) for _ in range(12)]
    expected, rest = torch.zeros(2, dtype=torch.float64), 1.0
    for value in history:
        with torch.no_grad():
            w.copy_(value)
        average.update()
    for t in reversed(range(12)):
        decay = min(0.4, (1 + t) / (10 + t))
        expected += rest * (1 - decay) * history[t]
        rest *= decay
    with average.averaged():
        torch.testing.assert_close(w.detach(), expected, rtol=1e-14, atol=1e-15)


def test_a_constant_model_is_its_own_average():
    net = model()
    average, before = WeightEMA(net), values(net)
    for _ in range(5):
        average.update()
    with average.averaged():
        for a, b in zip(values(net), before):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_decay_zero_follows_at_once():
    net = model()
    average = WeightEMA(net, decay=0.0)
    disturb(net)
    average.update()
    before = values(net)
    with average.averaged():
        assert equal(values(net), before)


def test_the_model_gets_its_weights_back_bit_for_bit():
    net = model()
    average = WeightEMA(net)
    disturb(net)
    average.update()
    before, pointers = values(net), [p.data_ptr() for p in net.parameters()]
    with average.averaged():
        assert not equal(values(net), before)
        assert pointers == [p.data_ptr() for p in net.parameters()]
    assert equal(values(net), before)


def test_also_after_an_exception():
    net = model()
    average = WeightEMA(net)
    disturb(net)
    average.update()
    before = values(net)
    with pytest.raises(ZeroDivisionError), average.averaged():
        raise ZeroDivisionError
    assert equal(values(net), before)
    average.update()  # not thought to be lent any more
    with average.averaged():
        pass


def test_lending_twice_or_updating_while_lent_is_refused():
    net = model()
    average = WeightEMA(net)
    with average.averaged():
        with pytest.raises(RuntimeError, match="holds the averages"):
            average.update()
        with pytest.raises(RuntimeError, match="holds the averages already"), average.averaged():
            pass
        lent = values(net)
    assert average.updates == 0
    assert equal(values(net), lent)


def test_statistics_of_batch_normalisation_stay_those_of_the_model():
    net = model()
    average = WeightEMA(net)
    net(torch.randn(8, 3))
    average.update()
    before = net[1].running_mean.clone()
    with average.averaged():
        assert torch.equal(net[1].running_mean, before)


def test_low_precision_parameters_have_float32_averages():
    net = model(torch.bfloat16)
    average = WeightEMA(net, decay=0.99)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    for _ in range(200):
        average.update()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(2**-7)  # one unit in the last place
    averages = average.state_dict()["averages"]
    assert {t.dtype for t in averages.values()} == {torch.float32}
    weight = averages["0.weight"]
    assert weight.to(torch.bfloat16).float().ne(weight).any()
    with average.averaged():
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_types(dtype):
    net = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=dtype))])
    average = WeightEMA(net)
    with torch.no_grad():
        net[0].mul_(2)
    average.update()
    with average.averaged():
        torch.testing.assert_close(net[0].detach(), torch.full((2,), 1.9, dtype=dtype))


def test_shared_parameters_are_averaged_once():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    average = WeightEMA(net)
    assert sorted(average.state_dict()["averages"]) == ["0.bias", "0.weight", "1.bias"]
    with average.averaged():
        assert net[0].weight is net[1].weight


def test_round_trip_through_a_file(tmp_path):
    net = model()
    average = WeightEMA(net, decay=0.7)
    for _ in range(3):
        disturb(net)
        average.update()
    torch.save(average.state_dict(), tmp_path / "average")
    other = copy.deepcopy(net)
    resumed = WeightEMA(other)
    resumed.load_state_dict(torch.load(tmp_path / "average", weights_only=True))
    assert (resumed.decay, resumed.updates) == (0.7, 3)
    for a in (average, resumed):
        a.update()
    with average.averaged(), resumed.averaged():
        assert equal(values(net), values(other))


def test_the_average_of_another_model_is_refused_and_nothing_changes():
    net = model()
    average = WeightEMA(net, decay=0.5)
    before = copy.deepcopy(average.state_dict())
    other = WeightEMA(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4)), decay=0.9).state_dict()
    with pytest.raises(ValueError, match=r"WeightEMA: averages must be of the same names and shapes.*0\.weight"):
        average.load_state_dict(other)
    assert average.decay == 0.5
    assert equal(list(average.state_dict()["averages"].values()), list(before["averages"].values()))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decays_are_named(decay):
    with pytest.raises(ValueError, match=rf"WeightEMA: decay must be in \[0, 1\), got {decay}"):
        WeightEMA(model(), decay=decay)


# ---- the polynomial average ----


@pytest.mark.parametrize("gamma", [0.0, 1.0, 8.0])
def test_polynomial_average_in_closed_form(gamma):
    """Weights in proportion to Gamma(t + gamma) / Gamma(t): for gamma = 0 the mean, for gamma = 1 in proportion to t."""
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average = PolynomialAverage(nn.ParameterList([w]), gamma=gamma)
    history = torch.randn(12, 2, dtype=torch.float64)
    for value in history:
        with torch.no_grad():
            w.copy_(value)
        average.update()
    t = torch.arange(1, 13, dtype=torch.float64)
    weights = torch.exp(torch.lgamma(t + gamma) - torch.lgamma(t))
    with average.averaged():
        torch.testing.assert_close(w.detach(), weights @ history / weights.sum(), rtol=1e-12, atol=1e-12)


def test_polynomial_average_goes_on_from_a_saved_one():
    net = model()
    average = PolynomialAverage(net, gamma=3.0)
    disturb(net)
    average.update()
    state = copy.deepcopy(average.state_dict())
    other = PolynomialAverage(net)
    other.load_state_dict(state)
    for one in (average, other):
        one.update()
    with average.averaged():
        expected = values(net)
    with other.averaged():
        assert equal(values(net), expected)
    assert (other.gamma, other.updates) == (3.0, 2)
    with pytest.raises(ValueError, match="WeightEMA: the state must be one with 'decay', got"):
        WeightEMA(net).load_state_dict(state)


@pytest.mark.parametrize("gamma", [-1.0, float("inf"), float("nan")])
def test_bad_gammas_are_named(gamma):
    with pytest.raises(ValueError, match=r"PolynomialAverage: gamma must be in \[0, inf\), got"):
        PolynomialAverage(model(), gamma=gamma)
