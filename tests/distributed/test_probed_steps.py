"""Step sizes that look at the batch again, on several ranks: the numbers of one process, and the same bits everywhere."""

import pytest
import torch
from tests.distributed import ranks
from tests.distributed.test_nlcg import batch, entire, wrapped
from torch import nn
from torch.nn import functional as F

from conjugo._space import to_local
from conjugo.optim import NLCG
from conjugo.optim.probed_steps import Parabola, Subspace

STEPS = 8
PARABOLA = {
    "plain": {"precond": "none"},
    "decay": {"precond": "bfgs", "weight_decay": 0.01},
    "adam": {"precond": "adam", "beta_max": 0.9, "rule": "constant"},
}


def fitted(kind, options, shares=None):
    """Losses, parameters and passes of a run; *shares*: how many of the examples of a batch each rank has."""
    model, rank, world = wrapped(kind)
    optimizer = NLCG(model.parameters(), **{"lr": 1.0, "line_search": "parabola"} | options)
    losses = []
    xs, ys = batch(0)
    for _ in range(STEPS):
        if shares is None:
            x, y = (torch.chunk(t, world)[rank] for t in (xs, ys))
        else:
            x, y = (torch.split(t, shares)[rank] for t in (xs, ys))
        optimizer.zero_grad()
        optimizer.observe_batch(model, F.cross_entropy, x, y)
        loss = F.cross_entropy(model(x), y) * (world * len(x) / len(xs))
        loss.backward()
        optimizer.step(loss=loss.detach())
        losses.append(F.cross_entropy(model(xs), ys).item())
    return losses, entire(model.parameters()), optimizer.passes


def all_fitted(kind, common):
    return {name: fitted(kind, options | common) for name, options in PARABOLA.items()}


@pytest.fixture(scope="module")
def alone():
    return {name: fitted("alone", options) for name, options in PARABOLA.items()}


def compare(found, wanted):
    losses, params, passes = wanted
    assert min(losses) < 0.5 * losses[0]
    for rank in found:
        assert rank[0] == pytest.approx(losses, rel=1e-3)
        assert rank[2] == pytest.approx(passes)
        assert all(torch.equal(a, b) for a, b in zip(rank[1], found[0][1], strict=True))
        for a, b in zip(rank[1], params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "world", "common"),
    [
        ("ddp", 2, {}),
        ("ddp", 4, {"sync_scalars": True}),
        ("ddp", 4, {"shard_state": True}),
        ("fsdp", 2, {}),
        ("fsdp", 4, {}),
        ("hsdp", 4, {}),
        ("tp", 2, {}),
        ("fsdp x tp", 4, {}),
    ],
)
def test_a_parabola_in_every_layout(kind, world, common, alone):
    everyone = ranks.run(world, all_fitted, kind, common)
    for name in PARABOLA:
        compare([rank[name] for rank in everyone], alone[name])


SUBSPACE = {"line_search": Subspace(fraction=1.0), "precond": "none"}


@pytest.mark.parametrize("world", [2, 4])
def test_a_plane_under_ddp(world):
    compare(ranks.run(world, fitted, "ddp", SUBSPACE), fitted("alone", SUBSPACE))


@pytest.mark.parametrize("options", [SUBSPACE, {"precond": "none"}], ids=["subspace", "parabola"])
def test_ranks_count_by_their_examples(options):
    n = len(batch(0)[0])
    compare(ranks.run(2, fitted, "ddp", options, [n // 8, n - n // 8]), fitted("alone", options))


def with_a_rank_without_weight():
    """Passes and parameters where the second rank's examples do not count."""
    model, rank, world = wrapped("ddp")
    x, y = batch(0)
    optimizer = NLCG(model.parameters(), precond="none", line_search=Subspace(fraction=0.25))
    for _ in range(2):
        optimizer.zero_grad()
        for weight in (3.0, 0.0):
            optimizer.observe_batch(model, F.cross_entropy, x, y, weight=weight * (rank == 0))
        loss = F.cross_entropy(model(x), y) * (world * (rank == 0))
        loss.backward()
        optimizer.step(loss=loss.detach())
    return optimizer.passes, entire(model.parameters())


def test_a_rank_may_have_no_weight():
    (passes, params), (others, same) = ranks.run(2, with_a_rank_without_weight)
    assert passes == others == pytest.approx(2 + 3 * 0.25 * 2 / 3)
    assert all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


def refused():
    model, _, _ = wrapped("fsdp")
    try:
        NLCG(model.parameters(), lr=1.0, line_search="subspace")
    except ValueError as error:
        return str(error)
    return None


def test_a_plane_needs_whole_parameters():
    for message in ranks.run(2, refused):
        assert message == (
            "NLCG: line_search must be 'parabola' or another one for sharded parameters (DTensors), got 'Subspace'"
        )


def undisturbed(kind):
    """The bits of parameters and buffers around a step with learning rate 0, and the loss of the model afterwards."""
    model, rank, world = wrapped(kind)
    x, y = (torch.chunk(t, world)[rank] for t in batch(0))
    optimizer = NLCG(model.parameters(), lr=0.0, line_search=Parabola(initial=10.0))
    optimizer.observe_batch(model, F.cross_entropy, x, y)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    before = [to_local(p.detach()).clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.step(loss=loss.detach())
    after = [to_local(p.detach()) for p in optimizer.param_groups[0]["params"]]
    with torch.no_grad():
        again = F.cross_entropy(model(x), y)
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), loss.item(), again.item()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_trial_parameters_are_gone_after_the_step(kind):
    for same, before, after in ranks.run(2, undisturbed, kind):
        assert same
        assert after == before


def one_bad_rank(kind):
    """A trial loss that is infinite on one rank only: all ranks stay where they are."""
    model, rank, world = wrapped(kind)
    x, y = (torch.chunk(t, world)[rank] for t in batch(0))
    optimizer = NLCG(model.parameters(), lr=1.0, line_search=Parabola(tries=3))

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets) * (torch.inf if rank == 1 else 1.0)

    before = entire(model.parameters())
    optimizer.observe_batch(model, loss_fn, x, y)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step(loss=loss.detach())
    after = entire(model.parameters())
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), optimizer.passes


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_ranks_decide_alike(kind):
    assert ranks.run(2, one_bad_rank, kind) == [(True, pytest.approx(1 + 4 / 3))] * 2
