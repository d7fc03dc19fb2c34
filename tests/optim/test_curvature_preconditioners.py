"""Diagonals of the Hessian and of the Gauss-Newton matrix as preconditioners of NLCG: exact where that is possible."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from tests.contract.problems import assert_same, snapshot
from tests.distributed import ranks
from tests.distributed.test_virtual_batch import examples, wrapped
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from conjugo._space import is_dtensor
from conjugo.distributed import share, vjp
from conjugo.optim import NLCG
from conjugo.optim.curvature_preconditioners import GaussNewtonDiagonal, Hutchinson, output_factor
from conjugo.training import TrainConfig, Trainer, data, train

KINDS = {"hutchinson": Hutchinson, "gauss-newton": GaussNewtonDiagonal}
CURVATURE = torch.tensor([0.5, 1.0, 4.0, 32.0], dtype=torch.float64)


class Scaled(nn.Module):
    """Outputs a w: with squared errors a diagonal quadratic."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -2.0, 1.0, 0.5], dtype=dtype))

    def forward(self, a):
        return a.sqrt() * self.w


def half_squares(outputs, targets):
    return (outputs - targets).square().sum() / 2


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batch(n=12, seed=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64).to(dtype), torch.randint(0, 3, (n,), generator=g)


def whole(model):
    """The parameters as one vector, and the outputs for inputs x as a function of such a vector."""
    names = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def outputs(vector, x):
        pieces = vector.split([shape.numel() for shape in names.values()])
        values = {name: piece.view(shape) for (name, shape), piece in zip(names.items(), pieces)}
        return torch.func.functional_call(model, values, (x,))

    return flat, outputs


def diagonals(model, x, y):
    """Exact: of the Hessian and of the Gauss-Newton matrix of the mean cross-entropy."""
    flat, outputs = whole(model)
    hessian = torch.func.hessian(lambda v: F.cross_entropy(outputs(v, x), y))(flat)
    jacobian = torch.func.jacrev(lambda v: outputs(v, x))(flat)
    p = outputs(flat, x).softmax(1)
    inner = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(x)
    return hessian, torch.einsum("nkp,nkl,nlp->p", jacobian, inner, jacobian)


def estimate(optimizer):
    """What the optimizer was shown last."""
    return torch.cat([e.flatten() for e in optimizer._estimates.values()])


# ---- what is estimated ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", [0, 1, 2])
def test_one_probe_is_exact_on_a_diagonal_quadratic(kind, draw):
    model = Scaled()
    optimizer = NLCG(model.parameters(), precond=KINDS[kind](seed=draw))
    optimizer.measure(model, half_squares, CURVATURE, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(estimate(optimizer), CURVATURE, rtol=1e-14, atol=0)


def test_the_mean_over_probes_is_the_diagonal_of_the_hessian():
    model, (x, y), probes = network(), batch(), 400
    hessian, _ = diagonals(model, x, y)
    optimizer = NLCG(model.parameters(), precond=Hutchinson(probes=probes))
    optimizer.measure(model, F.cross_entropy, x, y)
    rest = hessian - torch.diag(hessian.diag())
    errors = (estimate(optimizer) - hessian.diag()) / (rest.square().sum(1) / probes).sqrt()
    assert errors.abs().max() < 4.5  # standard deviations: one of 43 coordinates is beyond in 3 of 10,000 draws
    assert errors.square().mean().sqrt() > 0.5  # and they are no smaller than they should be


@pytest.mark.parametrize("draw", ["signs", "labels"])
def test_the_mean_over_probes_is_the_diagonal_of_the_gauss_newton_matrix(draw):
    model, (x, y), probes = network(), batch(), 600
    _, diagonal = diagonals(model, x, y)
    optimizer = NLCG(model.parameters(), precond=GaussNewtonDiagonal(probes=probes, draw=draw))
    optimizer.measure(model, F.cross_entropy, x, y)
    errors = (estimate(optimizer) / diagonal - 1) / math.sqrt(2 / probes)  # of squares of normal numbers
    assert errors.abs().max() < 6  # the few examples make the tails longer
    assert errors.square().mean().sqrt() > 0.3


LOSSES = {
    "mean": F.cross_entropy,
    "sum": partial(F.cross_entropy, reduction="sum"),
    "smoothed": partial(F.cross_entropy, label_smoothing=0.2),
    "an index ignored": partial(F.cross_entropy, ignore_index=1),
    "classes weighted": partial(F.cross_entropy, weight=torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)),
    "squares": F.mse_loss,
    "binary": F.binary_cross_entropy_with_logits,
    "last dimension": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "second dimension": F.cross_entropy,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("draw", ["signs", "labels"])
def test_the_factor_of_a_loss_has_its_hessian_as_covariance(name, draw):
    loss_fn = LOSSES[name]
    shape = {"last dimension": (2, 2, 3), "second dimension": (2, 3, 2)}.get(name, (4, 3))
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if name in ("squares", "binary"):
        targets = torch.linspace(0, 1, 12, dtype=torch.float64).view(shape)
    else:
        targets = torch.tensor([0, 1, 2, 2])
        targets = targets.view(2, 2) if len(shape) == 3 else targets
    hessian = torch.func.hessian(lambda z: loss_fn(z, targets))(outputs).reshape(12, 12)
    g = torch.Generator().manual_seed(2)
    draws = torch.stack(
        [output_factor(outputs, loss_fn, targets, generator=g, draw=draw).flatten() for _ in range(3000)]
    )
    # Of different examples the products have the mean 0 like the Hessian.
    error = (draws.T @ draws / len(draws) - hessian).norm() / hessian.norm()
    assert error < 0.2
    assert draws.mean(0).abs().max() < 0.2 * hessian.diag().max().sqrt()


def test_a_loss_with_another_hessian_is_refused():
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="loss_fn must be the cross-entropy of a softmax"):
        output_factor(outputs, _margin, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="loss_fn must be a sum over outputs"):
        output_factor(outputs, lambda z, y: F.cross_entropy(z, y.softmax(1)), torch.randn(4, 3))


def _margin(z, y):
    return (z - z.gather(1, y[:, None]) + 1).relu().square().mean()


def test_a_model_that_is_sure_has_no_curvature_but_finite_numbers():
    for scale in (30.0, 1e3, 1e30):
        outputs = scale * torch.eye(3)
        for draw in ("signs", "labels"):
            factor = output_factor(outputs, F.cross_entropy, torch.tensor([0, 1, 2]), draw=draw)
            assert factor.abs().max() < 1e-5
    assert output_factor(torch.full((2, 3), math.nan), F.cross_entropy, torch.tensor([0, 1])).isnan().all()


def test_measuring_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = batch(dtype=torch.float32)
    for kind in KINDS:
        optimizer = NLCG(model.parameters(), precond=kind)
        F.cross_entropy(model(x), y).backward()
        before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
        state = snapshot(optimizer)
        optimizer.measure(model, F.cross_entropy, x, y)
        after = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
        assert_same(before, after)
        assert_same(state, snapshot(optimizer))


# ---- what is done with it ----


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_reaches_the_minimum_of_a_diagonal_quadratic(kind):
    model, target = Scaled(), torch.ones(4, dtype=torch.float64)
    optimizer = NLCG(model.parameters(), lr=1.0, precond=KINDS[kind](newton=True, damping=0.0))
    optimizer.measure(model, half_squares, CURVATURE, target)
    half_squares(model(CURVATURE), target).backward()
    optimizer.step()
    torch.testing.assert_close(model.w.detach(), 1 / CURVATURE.sqrt(), rtol=1e-13, atol=0)


def test_the_graph_of_the_gradients_serves_as_well_as_a_measurement():
    results = []
    for by_graph in (True, False):
        model, (x, y) = network(), batch()
        params = list(model.parameters())
        optimizer = NLCG(params, lr=0.1, precond=Hutchinson(every=3, probes=2))
        due = []
        for _ in range(7):
            due.append(optimizer.needs_curvature)
            if due[-1] and not by_graph:
                optimizer.measure(model, F.cross_entropy, x, y)
                assert not optimizer.needs_curvature
            loss = F.cross_entropy(model(x), y)
            for p, g in zip(params, torch.autograd.grad(loss, params, create_graph=due[-1] and by_graph)):
                p.grad = g
            optimizer.step()
            assert not any(p.grad.requires_grad for p in params)
        assert due == [True, False, False] * 2 + [True]
        results.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-13)


def quantities(precond, estimates, *, scope="global"):
    """h and P after *estimates* of one parameter beside another one of curvature 1."""
    a, b = nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = NLCG([a, b], lr=1.0, precond=precond, scope=scope, beta_max=0.0)
    for e in estimates:
        optimizer.observe([torch.tensor(e, dtype=torch.float64), torch.ones(2, dtype=torch.float64)])
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        with torch.no_grad():
            a.zero_()
        optimizer.step()
    return optimizer.state[a]["curvature"], -a.detach()


@pytest.mark.parametrize("foreach", [False, True])
def test_the_formulas(foreach):
    h, p = quantities(Hutchinson(decay=0.5, damping=0.25), [[4.0, -1.0], [1.0, 1.0]])
    average = torch.tensor([4 / 3 + 2 / 3, -1 / 3 + 2 / 3], dtype=torch.float64)  # weights 1/4 and 1/2, over 3/4
    torch.testing.assert_close(h, average)
    mean = (average.sum() + 2) / 4
    torch.testing.assert_close(p, 1 / (average / mean + 0.25))
    _, newton = quantities(Hutchinson(decay=0.5, damping=0.25, newton=True), [[4.0, -1.0], [1.0, 1.0]])
    torch.testing.assert_close(newton, p / mean)
    h, _ = quantities(Hutchinson(decay=0.5, positive="rms"), [[4.0, -1.0], [1.0, 1.0]])
    torch.testing.assert_close(h, torch.tensor([16 / 3 + 2 / 3, 1.0], dtype=torch.float64).sqrt())
    _, p = quantities(Hutchinson(positive="abs", damping=0.0), [[4.0, -1.0]])
    torch.testing.assert_close(p, 7 / 4 / torch.tensor([4.0, 1.0], dtype=torch.float64))
    _, p = quantities(Hutchinson(positive="clamp", damping=0.0, floor=0.1), [[4.0, -1.0]])
    torch.testing.assert_close(p, 1 / torch.tensor([4 / 1.5, 0.1], dtype=torch.float64))
    _, p = quantities(Hutchinson(damping=0.0), [[4.0, 2.0]], scope="tensor")
    torch.testing.assert_close(p, 3 / torch.tensor([4.0, 2.0], dtype=torch.float64))
    _, p = quantities(Hutchinson(damping=0.0, average="tensor"), [[4.0, 2.0]])
    torch.testing.assert_close(p, 2 / torch.tensor([3.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize(("average", "dims"), [("kernel", (2, 3)), ("row", (1, 2, 3)), ("tensor", (0, 1, 2, 3))])
def test_averages_over_parts_of_a_tensor(average, dims):
    estimate = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = Hutchinson(average=average).averaged(estimate)
    torch.testing.assert_close(found, estimate.mean(dims, keepdim=True).expand_as(estimate))
    vector = torch.randn(5)
    kept = Hutchinson(average=average).averaged(vector)
    assert torch.equal(kept, vector) == (average in ("kernel", "row"))


def test_without_curvature_anywhere_it_is_gradient_descent():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = NLCG([w], lr=0.5, precond="hutchinson")
    optimizer.observe([torch.zeros(2)])
    w.grad = torch.ones(2)
    optimizer.step()
    assert w.tolist() == [0.5, 1.5]


def test_state_is_one_vector_and_named():
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    state = NLCG([w], precond="gauss-newton").state[w]
    assert set(state) == {"direction", "curvature", "estimates", "bad_estimates", "mean_curvature", "scalars"}
    assert state["curvature"].dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_estimates_that_are_not_finite_are_left_out_and_counted(bad):
    w = nn.Parameter(torch.ones(3))
    optimizer = NLCG([w], lr=0.1, precond=Hutchinson(every=2))
    # After a bad one at first another is asked for at once: without any there is no preconditioner.
    due, kept = [], []
    for estimate in ([1.0, bad, 1.0], [1.0, 2.0, 3.0], [bad, 5.0, 5.0], None):
        due.append(optimizer.needs_curvature)
        if estimate is not None:
            optimizer.observe([torch.tensor(estimate)])
        w.grad = w.detach() * torch.tensor([1.0, 2.0, 3.0])
        optimizer.step()
        kept.append(optimizer.state[w]["curvature"].tolist())
    assert due == [True, True, True, False]
    assert kept == [[0.0] * 3] + [[1.0, 2.0, 3.0]] * 3
    assert w.isfinite().all()
    assert optimizer.skipped_estimates.item() == 2
    assert optimizer.skipped_steps.item() == 0
    assert optimizer.state[w]["estimates"].item() == 1


def test_an_estimate_of_a_skipped_step_is_forgotten():
    w = nn.Parameter(torch.ones(2))
    optimizer = NLCG([w], precond="hutchinson")
    before = snapshot(optimizer)
    optimizer.observe([torch.tensor([1.0, 2.0])])
    w.grad = torch.tensor([math.nan, 1.0])
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    after = snapshot(optimizer)
    assert_same(before[1]["state"][0]["curvature"], after[1]["state"][0]["curvature"])
    assert optimizer.state[w]["estimates"].item() == 0
    assert optimizer.needs_curvature


# ---- resuming ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, at):
    def go(model, optimizer, steps):
        x, y = batch(dtype=torch.float32)
        for _ in range(steps):
            if optimizer.needs_curvature:
                optimizer.measure(model, F.cross_entropy, x, y)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    def fresh():
        model = network(dtype=torch.float32)
        model.register_parameter("unused", nn.Parameter(torch.ones(2)))
        return model, NLCG(model.parameters(), lr=0.1, precond=KINDS[kind](every=3))

    model, optimizer = fresh()
    go(model, optimizer, at)
    other, resumed = fresh()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(model, optimizer, 5)
    go(other, resumed, 5)
    assert_same(snapshot(optimizer), snapshot(resumed))


# ---- the trainer ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_run_measures_by_one_option(kind, tmp_path):
    options = {
        "model": "mlp",
        "lr": 0.3,
        "batch_size": 256,
        "steps": 12,
        "evaluations": 1,
        "threads": 1,
        "device": "cpu",
    }
    config = TrainConfig(optimizer="nlcg", optimizer_options={"precond": kind}, **options)
    named = TrainConfig(optimizer=f"nlcg-{kind}", **options)
    by_option, by_name = train(config, progress=False), train(named, progress=False)
    plain = train(TrainConfig(optimizer="nlcg-fr", **options), progress=False)
    assert by_option.loss == by_name.loss
    assert by_option.loss != plain.loss
    assert by_option.accuracy > 0.5
    trainer = Trainer(config, data.load("digits"))
    trainer.train_step()
    p = next(trainer.model.parameters())
    assert trainer.optimizer.state[p]["estimates"].item() == 1
    for _ in range(11):
        trainer.train_step()
    assert trainer.optimizer.state[p]["estimates"].item() == 2


def test_the_trainer_measures_on_the_first_micro_batch(monkeypatch):
    seen = []
    measure = NLCG.measure
    monkeypatch.setattr(NLCG, "measure", lambda self, *a, **o: (seen.append((len(a[2]), o)), measure(self, *a, **o)))
    config = TrainConfig(
        optimizer="nlcg",
        optimizer_options={"precond": GaussNewtonDiagonal(every=3)},
        batch_size=100,
        micro_batch=30,
        steps=5,
        threads=1,
        device="cpu",
    )
    trainer = Trainer(config, data.load("digits"))
    for _ in range(5):
        trainer.train_step()
    assert seen == [(25, {"weight": 25})] * 2


def test_the_mean_over_micro_batches_is_the_estimate_of_the_batch():
    """Of Hutchinson's estimate, which is linear in the loss; of the other one only the mean over random vectors is."""
    model, (x, y) = network(), batch()
    found = []
    for part in (slice(None), slice(0, 6), slice(6, 12)):
        optimizer = NLCG(model.parameters(), precond="hutchinson")
        optimizer.measure(model, F.cross_entropy, x[part], y[part])
        found.append(estimate(optimizer))
    torch.testing.assert_close(found[0], (found[1] + found[2]) / 2, rtol=1e-12, atol=1e-15)


# ---- several ranks ----


def trained(layout, kind, steps=5):
    """Parameters and diagonal after some steps on shares of one batch."""
    model = wrapped(layout)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y = (share(t, rank, world) for t in examples(8))
    optimizer = NLCG(model.parameters(), lr=0.2, precond=KINDS[kind](every=2), process_group=None)
    for _ in range(steps):
        if optimizer.needs_curvature:
            optimizer.measure(model, F.cross_entropy, x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    diagonal = [optimizer.state[p]["curvature"] for p in model.parameters()]
    whole = [t.full_tensor() if is_dtensor(t) else t for t in (*(p.detach() for p in model.parameters()), *diagonal)]
    means = {optimizer.state[p]["mean_curvature"].item() for p in model.parameters()}
    return torch.cat([t.flatten() for t in whole]), means


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_take_the_steps_of_one_process(layout):
    alone, _ = trained("plain", "hutchinson")
    (first, means), (second, others) = ranks.run(2, trained, layout, "hutchinson")
    assert torch.equal(first, second)
    assert means == others
    torch.testing.assert_close(first, alone, rtol=1e-9, atol=1e-12)


def pulled(layout):
    """J^T u for u that depends on the examples alone."""
    model = wrapped(layout)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, _ = (share(t, rank, world) for t in examples(8))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    found = vjp(model, x, lambda outputs: outputs.detach().cos())
    for p, old in zip(model.parameters(), before, strict=True):
        assert bool((p == old).all())
        assert bool((p.grad == 3.0).all())
    return torch.cat([(t.full_tensor() if is_dtensor(t) else t).flatten() for t in found])


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_hold_one_gauss_newton_diagonal(layout):
    """The random vectors differ between ranks; all else is as in one process."""
    alone = pulled("plain")
    for found in ranks.run(2, pulled, layout):
        torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-13)
    (first, means), (second, others) = ranks.run(2, trained, layout, "gauss-newton")
    assert torch.equal(first, second)
    assert means == others
    ddp = ranks.run(2, trained, "ddp", "gauss-newton")[0][0] if layout == "fsdp" else first
    torch.testing.assert_close(first, ddp, rtol=1e-9, atol=1e-12)


def different_draws():
    """The estimate of each rank's own half, and that of both."""
    model, (x, y) = network(), batch()
    rank = dist.get_rank()
    own, both = (NLCG(model.parameters(), precond=GaussNewtonDiagonal(probes=300)) for _ in range(2))
    half = slice(6 * rank, 6 * rank + 6)
    both.measure(model, F.cross_entropy, x[half], y[half])
    group = [dist.new_group([0]), dist.new_group([1])][rank]
    own.process_group = group
    own.measure(model, F.cross_entropy, x[half], y[half])
    return estimate(own), estimate(both)


def test_the_draws_of_ranks_are_independent():
    """Sums of squares of equal draws would be up to twice as large."""
    model, (x, y) = network(), batch()
    _, diagonal = diagonals(model, x, y)
    results = ranks.run(2, different_draws)
    for _, both in results:
        assert (both / diagonal - 1).abs().mean() < 0.12
    assert not torch.equal(results[0][0], results[1][0])


def unequal():
    x, y = batch()
    return torch.cat([8 * x[:3], x[3:]]), y


def of_unequal_shares(kind, weight):
    """The estimate where rank 0 has 3 and rank 1 has 9 of 12 examples."""
    model, (x, y) = network(), unequal()
    part = slice(0, 3) if dist.get_rank() == 0 else slice(3, 12)
    optimizer = NLCG(model.parameters(), precond=KINDS[kind](probes=1 if kind == "hutchinson" else 300))
    optimizer.measure(model, F.cross_entropy, x[part], y[part], weight=weight)
    return estimate(optimizer)


def test_ranks_count_by_their_examples():
    model, (x, y) = network(), unequal()
    optimizer = NLCG(model.parameters(), precond=Hutchinson())
    optimizer.measure(model, F.cross_entropy, x, y)
    for found in ranks.run(2, of_unequal_shares, "hutchinson", None):
        torch.testing.assert_close(found, estimate(optimizer), rtol=1e-10, atol=1e-13)
    _, diagonal = diagonals(model, x, y)
    (found, same), (equally, _) = (ranks.run(2, of_unequal_shares, "gauss-newton", w) for w in (None, 1.0))
    assert torch.equal(found, same)
    assert (found / diagonal - 1).abs().mean() < 0.12
    assert (equally / diagonal - 1).abs().mean() > 0.2  # so the weights can be seen


def nan_on_one_rank(layout):
    model = wrapped(layout)
    x, y = (share(t, dist.get_rank(), 2) for t in examples(8))
    optimizer = NLCG(model.parameters(), lr=0.2, precond="hutchinson")
    poisoned = x * (math.nan if dist.get_rank() == 1 else 1.0)
    optimizer.measure(model, F.cross_entropy, poisoned, y)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return int(optimizer.skipped_estimates), int(optimizer.skipped_steps), optimizer.needs_curvature


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_an_estimate_that_is_not_finite_on_one_rank_is_left_out_on_all(layout):
    assert ranks.run(2, nan_on_one_rank, layout) == [(1, 0, True)] * 2


def sliced():
    model = wrapped("plain")
    x, y = examples(8)
    results = []
    for options in ({}, {"shard_state": True}):
        twin = copy.deepcopy(model)
        optimizer = NLCG(twin.parameters(), lr=0.2, precond=Hutchinson(average="row"), **options)
        for _ in range(4):
            if optimizer.needs_curvature:
                optimizer.measure(twin, F.cross_entropy, x, y)
            optimizer.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    return results


def test_sliced_state_takes_the_same_steps():
    for plain, cut in ranks.run(2, sliced):
        torch.testing.assert_close(plain, cut, rtol=1e-10, atol=1e-13)


def by_tensor_parallelism():
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x, y = batch()
    optimizer = NLCG(model.parameters(), precond="gauss-newton")
    with pytest.raises(ValueError, match="vjp: model must be plain, DDP, or with fully_shard"):
        optimizer.measure(model, F.cross_entropy, x, y)


def test_tensor_parallelism_is_refused():
    """Its ranks see the same examples, each with random vectors of its own."""
    ranks.run(2, by_tensor_parallelism)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"every": True}, "every must be an integer >= 1, got True"),
        ({"probes": 1.5}, "probes must be an integer >= 1, got 1.5"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": math.nan}, "decay must be"),
        ({"damping": -1.0}, r"damping must be in \[0, inf\), got -1.0"),
        ({"floor": 0.0}, r"floor must be in \(0, 1\], got 0.0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"positive": "ab"}, "positive 'ab'; did you mean 'abs'"),
        ({"average": "rows"}, "average 'rows'; did you mean 'row'"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(ValueError, match=f"{KINDS[kind].__name__}.*{message}"):
        KINDS[kind](**options)


def test_bad_calls_are_refused_before_anything_changes():
    with pytest.raises(ValueError, match="GaussNewtonDiagonal draw 'label'; did you mean 'labels'"):
        GaussNewtonDiagonal(draw="label")
    model, (x, y) = network(), batch()
    optimizer = NLCG(model.parameters(), lr=0.1, precond="gauss-newton")
    before = snapshot(optimizer)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="GaussNewtonDiagonal needs the curvature in this step: call measure"):
        optimizer.step()
    with pytest.raises(ValueError, match="NLCG: shapes of estimates must be those of the parameters"):
        optimizer.observe([torch.ones(3)])
    with pytest.raises(ValueError, match="NLCG: model must be a model with all parameters"):
        optimizer.measure(network(), F.cross_entropy, x, y)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"NLCG: weight must be in \[0, inf\), got"):
            optimizer.measure(model, F.cross_entropy, x, y, weight=bad)
    assert_same(before, snapshot(optimizer))
    optimizer = NLCG(network().parameters(), precond="hutchinson")
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"Hutchinson needs .*backward\(create_graph=True\)"):
        optimizer.step()
    plain = NLCG(network().parameters(), precond="bfgs")
    assert not plain.needs_curvature
    for call in (lambda: plain.observe([]), lambda: plain.skipped_estimates):
        with pytest.raises(ValueError, match="NLCG: precond must be 'hutchinson', 'gauss-newton'"):
            call()
