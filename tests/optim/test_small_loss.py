"""Discarding small losses: what is kept, the gradient of it, when, on several ranks, and what is refused."""

import math

import pytest
import torch
from tests.distributed import ranks
from torch import nn
from torch.nn import functional as F

from conjugo.errors import UnknownName
from conjugo.optim import DiscardSmallLoss
from conjugo.optim.small_loss import kept_count

LOSSES = torch.tensor([3.0, 1.0, 2.0, 0.0])


def test_the_worked_example():
    discard = DiscardSmallLoss(0.5)
    assert discard.keep_mask(LOSSES).tolist() == [True, False, True, False]
    assert discard(LOSSES) == 2.5
    assert DiscardSmallLoss(0.5, denominator="batch")(LOSSES) == 1.25


def test_nothing_discarded_is_the_mean():
    losses = torch.rand(37)
    for denominator in ("kept", "batch"):
        assert torch.equal(DiscardSmallLoss(0.0, denominator=denominator)(losses), losses.mean())


@pytest.mark.parametrize("batch", [1, 2, 3, 10, 37, 100])
@pytest.mark.parametrize("hundredths", [0, 1, 10, 20, 29, 30, 50, 57, 58, 70, 90, 99])
def test_the_kept_fraction_is_rounded_up(batch, hundredths):
    expected = -(-(100 - hundredths) * batch // 100)  # in whole numbers
    assert kept_count(batch, hundredths / 100) == expected
    keep = DiscardSmallLoss(hundredths / 100).keep_mask(torch.rand(batch))
    assert keep.sum() == expected


def test_equal_losses_are_kept_by_their_order():
    discard = DiscardSmallLoss(0.5)
    assert discard.keep_mask(torch.ones(6)).tolist() == [True] * 3 + [False] * 3
    many = torch.ones(1000)  # enough for a sort that is not stable
    many[::7] = 2.0
    expected = many == 2
    expected[(~expected).nonzero()[: 500 - expected.sum(), 0]] = True
    assert torch.equal(discard.keep_mask(many), expected)


def test_largest_losses_may_be_wrong_labels():
    losses = torch.arange(10.0)
    keep = DiscardSmallLoss(0.3, drop_top=0.2).keep_mask(losses)
    assert keep.nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7]
    keep = DiscardSmallLoss(threshold=2.5, drop_top=0.5).keep_mask(losses)
    assert keep.nonzero()[:, 0].tolist() == [3, 4]


def test_a_threshold():
    assert DiscardSmallLoss(threshold=1.0).keep_mask(LOSSES).tolist() == [True, True, True, False]
    assert DiscardSmallLoss(threshold=9.0).keep_mask(LOSSES).tolist() == [True, False, False, False]  # never none
    assert DiscardSmallLoss(threshold=9.0)(LOSSES) == 3.0


def test_when():
    discard = DiscardSmallLoss(0.5, warmup_steps=2, total_steps=20)
    seen = []
    for _ in range(22):
        seen.append(discard.active)
        assert discard.keep_mask(LOSSES).all() != discard.active
        discard.step()
    assert seen == [False] * 2 + [True] * 16 + [False] * 4
    resumed = DiscardSmallLoss(0.5, warmup_steps=2, total_steps=20)
    resumed.load_state_dict({"steps": 2})
    assert resumed.active
    assert resumed.state_dict() == {"steps": 2}


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(24, 5, dtype=torch.float64), torch.randint(3, (24,))


def gradient(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def losses(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(inputs), targets, reduction="none")


@pytest.mark.parametrize("denominator", ["kept", "batch"])
def test_both_ways_give_the_gradient_of_the_kept(denominator):
    model, x, y = problem()
    discard = DiscardSmallLoss(0.4, denominator=denominator)
    values = losses(model, x, y)
    expected = gradient(model, values.topk(15).values.sum() / (15 if denominator == "kept" else 24))
    once = gradient(model, discard(losses(model, x, y)))
    with torch.no_grad():
        keep = discard.keep_mask(losses(model, x, y))
    twice = gradient(model, discard.mean(losses(model, x[keep], y[keep]), keep))
    torch.testing.assert_close(once, expected)
    torch.testing.assert_close(twice, expected)


# ---- several ranks ----

SHARES = [(0, 9), (9, 16), (16, 24)]


def on_a_rank(arguments: dict, way: str) -> list[torch.Tensor]:
    """Gradients as DDP averages them, for the ranks' unequal shares of one batch."""
    import torch.distributed as dist

    model, x, y = problem()
    spread = nn.parallel.DistributedDataParallel(model)
    own = slice(*SHARES[dist.get_rank()])
    x, y = x[own], y[own]
    discard = DiscardSmallLoss(**arguments)
    if way == "once":
        grad = gradient(model, discard(losses(spread, x, y)))
    else:
        with torch.no_grad():
            keep = discard.keep_mask(losses(spread, x, y))
        grad = gradient(model, discard.mean(losses(spread, x[keep], y[keep]), keep))
    with torch.no_grad():
        keep = discard.keep_mask(losses(model, x, y))
    return [grad, keep]


@pytest.mark.parametrize(
    ("arguments", "way"),
    [
        ({"q": 0.4}, "once"),
        ({"q": 0.4}, "twice"),
        ({"q": 0.3, "drop_top": 0.1}, "twice"),
        ({"q": 0.4, "denominator": "batch"}, "once"),
        ({"threshold": 1.0}, "twice"),
    ],
)
def test_all_ranks_together_do_what_one_process_does(arguments, way):
    model, x, y = problem()
    alone = DiscardSmallLoss(**arguments)
    expected, keep = gradient(model, alone(losses(model, x, y))), alone.keep_mask(losses(model, x, y).detach())
    counts = {int(keep[slice(*own)].sum()) for own in SHARES}
    assert len(counts) > 1  # so that the scaling matters
    found = ranks.run(3, on_a_rank, {**arguments, "selection": "global"}, way)
    assert torch.equal(torch.cat([mask for _, mask in found]), keep)
    for grad, _ in found:
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


def selected(losses: list[list[float]], selection: str) -> object:
    import torch.distributed as dist

    mine = torch.tensor(losses[dist.get_rank()])
    discard = DiscardSmallLoss(0.5, selection=selection)
    try:
        return discard.keep_mask(mine).tolist(), discard(mine).item()
    except ValueError as error:
        return str(error)


def test_each_rank_selects_alone_or_keeps_its_largest_at_least():
    losses = [[9.0, 8.0, 7.0, 6.0], [1.0, 3.0, 2.0, 0.0]]
    assert ranks.run(2, selected, losses, "local") == [
        ([True, True, False, False], 8.5),
        ([False, True, True, False], 2.5),
    ]
    together = ranks.run(2, selected, losses, "global")
    assert [keep for keep, _ in together] == [[True] * 4, [False, True, False, False]]
    assert sum(mean for _, mean in together) / 2 == pytest.approx(33 / 5)


def test_all_ranks_refuse_a_loss_that_one_has():
    said = ranks.run(2, selected, [[1.0, math.nan], [1.0, 2.0]], "global")
    assert said[0] == said[1] == "DiscardSmallLoss: losses must be finite, got '1 of 4 that are not'"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": 1.0}, r"q must be in \[0, 1\), got 1.0"),
        ({"q": -0.1}, "q must be"),
        ({"q": math.nan}, "q must be"),
        ({"q": 0.6, "drop_top": 0.4}, r"drop_top must be in \[0, 0.4\): not all may be discarded, got 0.4"),
        ({"drop_top": -0.1}, "drop_top must be"),
        ({"threshold": math.nan}, "threshold must be a finite number or None, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"total_steps": 0}, "total_steps must be >= 1 or None, got 0"),
        ({"tail": 1.5}, r"tail must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"DiscardSmallLoss: {message}"):
        DiscardSmallLoss(**arguments)


@pytest.mark.parametrize("argument", ["denominator", "selection", "nonfinite"])
def test_unknown_choices_are_named(argument):
    with pytest.raises(UnknownName, match=f"unknown {argument} 'x'"):
        DiscardSmallLoss(**{argument: "x"})


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_losses_are_one_per_example(shape):
    with pytest.raises(ValueError, match=r"losses must be of shape \[B\], got"):
        DiscardSmallLoss().keep_mask(torch.ones(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite(value):
    losses = torch.tensor([1.0, value, 2.0, 3.0])
    with pytest.raises(ValueError, match="losses must be finite, got '1 of 4 that are not'"):
        DiscardSmallLoss(0.5)(losses)
    for arguments in ({"q": 0.5}, {"q": 0.5, "drop_top": 0.25}, {"threshold": 2.5}):
        kept = DiscardSmallLoss(**arguments, nonfinite="keep")
        assert kept.keep_mask(losses)[1]
        assert not kept(losses).isfinite()
