"""The noise scale while training: averages over steps, hooks that change nothing, ranks that find what one process finds."""

import contextlib
import math
import statistics

import pytest
import torch
import torch.distributed as dist
from tests.distributed.ranks import run
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from conjugo.scaling import MicroBatchNorms, NoiseScaleMonitor, attach, diagonal_metric
from conjugo.scaling.noise_scale import moments

TRUTH = 30.0
"""B_simple of the drawn gradients: tr Sigma = 20, |G|^2 = 20 / 30."""


def drawn(steps, *, seed=0, small=16, parts=4, shrink=1.0):
    """(mean |g|^2, |mean|^2) of *steps* steps: micro-batches of *small* examples, gradients ~ N(G, I) in 20 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.zeros(20, dtype=torch.float64)
    center[0] = math.sqrt(20 / TRUTH)
    g = center + torch.randn(steps, parts, 20, generator=generator, dtype=torch.float64) / math.sqrt(small)
    g = g * (shrink ** torch.arange(steps))[:, None, None]
    return list(zip(g.square().sum(2).mean(1), g.mean(1).square().sum(1)))


def filled(pairs, monitor, small=16, parts=4):
    for sq_small, sq_big in pairs:
        monitor.update(sq_small, sq_big, small, small * parts)
    return monitor


# ---- averages ----


def test_one_step_is_the_form_of_two_batches():
    monitor = filled([(3.0, 1.5)], NoiseScaleMonitor(), small=1, parts=4)
    found = monitor.noise_scale()
    assert (found.trace, found.grad_norm2, found.b_simple) == pytest.approx((2.0, 1.0, 2.0))
    assert (found.micro_batches, found.micro_batch, found.examples) == (4, 1, 4)
    assert found.ci95 == monitor.ci95 == (0.0, math.inf)


@pytest.mark.parametrize("settings", [{"window": 64}, {"ema": 0.97}])
@pytest.mark.parametrize("shrink", [1.0, 0.97])
def test_estimate_and_interval_are_right(settings, shrink):
    """100 draws of 150 steps; also where gradients shrink to a hundredth meanwhile."""
    found = [filled(drawn(150, seed=s, shrink=shrink), NoiseScaleMonitor(**settings)).noise_scale() for s in range(100)]
    assert not any(each.lower_bound_only for each in found)
    assert statistics.median(each.b_simple for each in found) == pytest.approx(TRUTH, rel=0.04)
    assert 0.88 <= statistics.mean(each.ci95[0] < TRUTH < each.ci95[1] for each in found) <= 1.0
    assert statistics.median(each.ci95[1] / each.ci95[0] for each in found) < 2


def test_a_window_forgets():
    pairs = drawn(300)
    whole, late = filled(pairs, NoiseScaleMonitor(50)), filled(pairs[-50:], NoiseScaleMonitor(50))
    assert whole.noise_scale() == late.noise_scale()
    assert whole.updates == 300
    assert whole.noise_scale().examples == 50 * 64
    assert filled(pairs[:40], NoiseScaleMonitor(50)).noise_scale().examples == 40 * 64


def test_an_average_forgets_slowly_and_begins_without_bias():
    constant = NoiseScaleMonitor(ema=0.9)
    for step in range(100):
        filled([(3.0, 1.5)], constant, small=1, parts=4)
        found = constant.noise_scale()
        assert (found.trace, found.grad_norm2) == pytest.approx((2.0, 1.0), rel=1e-9), step
    # Then another noise scale with |g|^2 as large: the weights of steps are powers of 0.9.
    after = [(3.0, 2.4)] * 40
    filled(after, constant, small=1, parts=4)
    kept = 0.9**40
    other = moments(3.0, 2.4, 1, 4)
    assert constant.noise_scale().trace == pytest.approx(2.0 * kept + other.trace * (1 - kept), rel=1e-3)
    assert constant.b_simple == pytest.approx(
        (2.0 * kept + other.trace * (1 - kept)) / (kept + other.grad_norm2 * (1 - kept)), rel=1e-3
    )


def test_one_step_that_stands_out_does_not_decide():
    pairs = drawn(64)
    calm = filled(pairs, NoiseScaleMonitor(64)).b_simple
    pairs[30] = (pairs[30][0] * 1000, pairs[30][1] * 1000)
    assert filled(pairs, NoiseScaleMonitor(64)).b_simple == pytest.approx(calm, rel=0.2)


@pytest.mark.parametrize("settings", [{"window": 16}, {"ema": 0.9}])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_steps_that_overflowed_are_skipped_and_counted(settings, bad):
    pairs = drawn(100)
    expected = filled(pairs, NoiseScaleMonitor(**settings))
    monitor = NoiseScaleMonitor(**settings)
    for i, pair in enumerate(pairs):
        filled([pair], monitor)
        if i % 10 == 3 and i < 80:
            filled([(bad, 1.0) if i % 20 == 3 else (torch.tensor(1.0), torch.tensor(bad))], monitor)
    assert monitor.skipped == 8
    assert monitor.updates == 108
    assert expected.skipped == 0
    assert monitor.b_simple == pytest.approx(expected.b_simple, rel=0.1)


def test_scaled_losses_are_scaled_back():
    pairs = drawn(20)
    plain = filled(pairs, NoiseScaleMonitor()).noise_scale()
    scaled = NoiseScaleMonitor()
    for i, (sq_small, sq_big) in enumerate(pairs):
        scale = 2.0 ** (i // 5 + 10)
        given = scale if i % 2 else torch.tensor(scale)
        scaled.update(sq_small * scale**2, sq_big * scale**2, 16, 64, loss_scale=given)
    assert scaled.noise_scale() == plain


def test_a_hidden_gradient_gives_a_bound():
    monitor = NoiseScaleMonitor()
    for _ in range(16):
        monitor.update(1.0, 0.2, 16, 64)  # pure noise would be 0.25
    assert monitor.noise_scale().lower_bound_only
    assert monitor.b_simple == pytest.approx(64 * 4 / 2)
    assert monitor.ci95 == (pytest.approx(64 * 4 / 2), math.inf)


def test_nothing_is_known_at_first():
    monitor = NoiseScaleMonitor()
    assert math.isnan(monitor.b_simple)
    assert monitor.ci95 == (0.0, math.inf)
    monitor.update(math.nan, 1.0, 1, 2)
    with pytest.raises(ValueError, match="the number of finite updates must be at least 1, got 0"):
        monitor.noise_scale()


def test_a_batch_that_is_all_of_the_population_knows_the_gradient():
    monitor = NoiseScaleMonitor()
    monitor.update(3.0, 1.5, 1, 4, population=4)
    assert monitor.noise_scale().grad_norm2 == pytest.approx(1.5)


@pytest.mark.parametrize("settings", [{"window": 8}, {"ema": 0.8}])
@pytest.mark.parametrize("place", [0, 3, 8, 16, 29])
def test_it_goes_on_bit_for_bit(settings, place):
    pairs = drawn(40)
    whole = filled(pairs, NoiseScaleMonitor(**settings))
    first, second = filled(pairs[:place], NoiseScaleMonitor(**settings)), NoiseScaleMonitor(**settings)
    second.load_state_dict(first.state_dict())
    filled(pairs[place:20], first)  # the state is a copy
    filled(pairs[place:], second)
    assert second.noise_scale() == whole.noise_scale()
    assert second.updates == 40


def test_arguments_out_of_range():
    for arguments, message in (
        ({"window": 0}, "window must be an integer >= 1"),
        ({"ema": 1.0}, r"ema must be in \(0, 1\) or None"),
        ({"window": 3, "ema": 0.9}, "window must be None where ema is given"),
    ):
        with pytest.raises(ValueError, match=f"NoiseScaleMonitor: {message}"):
            NoiseScaleMonitor(**arguments)
    for sizes in ((4, 4), (0, 4), (8, 4)):
        with pytest.raises(ValueError, match="0 < b_small < b_big"):
            NoiseScaleMonitor().update(1.0, 1.0, *sizes)
    with pytest.raises(ValueError, match=r"b_big must be at most 3 \(population\)"):
        NoiseScaleMonitor().update(1.0, 1.0, 1, 4, population=3)
    with pytest.raises(ValueError, match="the saved window must be 4 as here, got 3"):
        NoiseScaleMonitor(4).load_state_dict(NoiseScaleMonitor(3).state_dict())


# ---- micro-batches ----


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)


def inputs(steps=3, parts=8, examples=4):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(steps, parts, examples, 6, generator=generator, dtype=torch.float64)


def loss_of(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def flat_gradients(model, parts):
    return torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(model, x), model.parameters())]) for x in parts]
    )


def by_hand(model, data, metric=None):
    """The monitor fed with norms of gradients that are computed one by one."""
    monitor = NoiseScaleMonitor()
    root = 1.0 if metric is None else torch.cat([metric[p].reshape(-1) for p in model.parameters()]).sqrt()
    for parts in data:
        g = flat_gradients(model, parts) * root
        monitor.update(
            g.square().sum(1).mean(), g.mean(0).square().sum(), parts.shape[1], parts.shape[0] * parts.shape[1]
        )
    return monitor.noise_scale()


def same(found, expected, rel=1e-6):
    for name in ("trace", "grad_norm2", "b_simple", "ci95", "examples"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rel), name


@pytest.mark.parametrize("divided", [True, False])
def test_norms_of_micro_batches_on_one_process(divided):
    model, monitor = network(), NoiseScaleMonitor()
    norms = MicroBatchNorms(model, monitor)
    weight = 1 / 8 if divided else 1.0
    for parts in inputs():
        model.zero_grad()
        for x in parts:
            with norms.micro_batch(len(x), weight=weight):
                (loss_of(model, x) * weight).backward()
        norms.step()
    same(monitor.noise_scale(), by_hand(model, inputs()), rel=1e-12)


def test_a_weight_that_is_left_out_scales_the_moments_but_not_their_ratio():
    model, monitor = network(), NoiseScaleMonitor()
    norms = MicroBatchNorms(model.parameters(), monitor)
    for parts in inputs():
        model.zero_grad()
        for x in parts:
            with norms.micro_batch(len(x)):
                (loss_of(model, x) / 8).backward()
        norms.step()
    found, expected = monitor.noise_scale(), by_hand(model, inputs())
    assert found.b_simple == pytest.approx(expected.b_simple, rel=1e-12)
    assert found.trace == pytest.approx(expected.trace / 64, rel=1e-12)


def test_micro_batches_of_different_sizes_have_no_bias():
    """E |g_i|^2 = |G|^2 + tr / b_i: a linear model whose examples are standard normal, 400 steps."""
    torch.manual_seed(1)
    w = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    monitor = NoiseScaleMonitor(400)
    norms = MicroBatchNorms([w], monitor)
    sizes = (1, 3, 8)
    for _ in range(400):
        w.grad = None
        for size in sizes:
            with norms.micro_batch(size, weight=size / 12):
                x = torch.randn(size, 10, dtype=torch.float64) + 1.0
                ((x @ w).mean() * (size / 12)).backward()
        norms.step()
    found = monitor.noise_scale()
    assert found.b_simple == pytest.approx(1.0, rel=0.1)
    assert found.grad_norm2 == pytest.approx(10, rel=0.1)
    assert found.examples == pytest.approx(4800)


def test_a_micro_batch_that_does_not_count():
    model, monitor = network(), NoiseScaleMonitor()
    norms = MicroBatchNorms(model, monitor)
    for parts in inputs():
        model.zero_grad()
        for x in parts:
            with norms.micro_batch(len(x), weight=1 / 8):
                (loss_of(model, x) / 8).backward()
        with norms.micro_batch(4, weight=0.0):
            (loss_of(model, parts[0]) * 0.0).backward()
        norms.step()
    same(monitor.noise_scale(), by_hand(model, inputs()), rel=1e-12)


def test_gradients_are_not_touched_and_hooks_are_gone():
    plain, watched = network(), network()
    norms = MicroBatchNorms(watched, NoiseScaleMonitor())
    for x in inputs()[0]:
        loss_of(plain, x).backward()
        with norms.micro_batch(len(x)):
            loss_of(watched, x).backward()
    norms.step()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), watched.parameters()))
    with pytest.raises(RuntimeError, match="midway"), norms.micro_batch(4):
        raise RuntimeError("midway")
    assert not any(p._backward_hooks for p in watched.parameters())
    assert norms.seen == 0


def test_the_metric_of_an_optimizer():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4)
    raw, own = NoiseScaleMonitor(), NoiseScaleMonitor(optimizer=optimizer)
    norms = MicroBatchNorms(model, raw, own)

    def backward(parts):
        model.zero_grad()
        for x in parts:
            with norms.micro_batch(len(x), weight=1 / 8):
                (loss_of(model, x) / 8).backward()
        norms.step()

    backward(inputs()[0])
    assert (raw.updates, own.updates) == (1, 0)  # Adam has no metric before its first step
    optimizer.step()
    raw.load_state_dict(NoiseScaleMonitor().state_dict())
    for parts in inputs():
        backward(parts)
    same(raw.noise_scale(), by_hand(model, inputs()))
    same(own.noise_scale(), by_hand(model, inputs(), diagonal_metric(optimizer)))
    assert own.noise_scale().metric == "adam"


def test_a_large_parameter_and_half_precision():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        w = nn.Parameter(torch.randn(300_000).to(dtype))
        monitor = NoiseScaleMonitor()
        norms = MicroBatchNorms([w], monitor)
        gradients = torch.randn(2, 300_000).to(dtype)
        for g in gradients:
            with norms.micro_batch(1):
                (w * g).sum().backward()
        norms.step()
        expected = gradients.double().square().sum(1).mean()
        small = float(monitor._rows[0, 0])
        assert small == pytest.approx(float(expected), rel=1e-5)


def test_embeddings_with_sparse_gradients():
    torch.manual_seed(0)
    pair = [nn.Embedding(10, 3, sparse=sparse).double() for sparse in (True, False)]
    pair[1].load_state_dict(pair[0].state_dict())
    found = []
    for model in pair:
        monitor = NoiseScaleMonitor()
        norms = MicroBatchNorms(model, monitor)
        for rows in ([1, 2, 2], [2, 5, 1]):
            with norms.micro_batch(3):
                model(torch.tensor(rows)).square().sum().backward()
        norms.step()
        found.append(monitor.noise_scale())
    same(found[0], found[1], rel=1e-12)


def test_what_micro_batch_norms_refuse():
    model, monitor = network(), NoiseScaleMonitor()
    with pytest.raises(ValueError, match="the number of monitors must be at least 1"):
        MicroBatchNorms(model)
    with pytest.raises(ValueError, match="the number of trainable parameters must be at least 1"):
        MicroBatchNorms([], monitor)
    norms = MicroBatchNorms(model, monitor)
    with pytest.raises(ValueError, match="examples must be > 0"), norms.micro_batch(0):
        pass
    with norms.micro_batch(4):
        loss_of(model, inputs()[0, 0]).backward()
    with pytest.raises(ValueError, match="micro-batches of a batch must be >= 2, got 1"):
        norms.step()


# ---- ranks ----


def train(model, world, *, wrapped, steps=3, local=2, no_sync=True):
    """This rank's micro-batches of all steps; gives the gradients. The weights stay."""
    rank = dist.get_rank()
    grads = []
    for parts in inputs(steps, world * local):
        model.zero_grad()
        for i, x in enumerate(parts[rank * local : (rank + 1) * local]):
            silent = no_sync and i + 1 < local
            with wrapped.no_sync() if silent else contextlib.nullcontext():
                (loss_of(wrapped, x) / local).backward()
        grads += [p.grad.clone() for p in model.parameters()]
    return grads


def attached(world, settings, hook, every):
    """Gradients with and without, and what the monitor says."""
    results = []
    for watch in (False, True):
        model = network()
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.0003, **settings)
        inner = {"allreduce": allreduce_hook, "fp16": fp16_compress_hook}.get(hook)
        monitor = NoiseScaleMonitor()
        if watch:
            handle = attach(wrapped, monitor, inner_hook=inner, every=every)
        elif inner is not None:
            wrapped.register_comm_hook(None, inner)
        results.append(train(model, world, wrapped=wrapped))
        if watch:
            count, found = monitor.updates, monitor.noise_scale()
            handle.detach()
            handle.detach()
        results.append(train(model, world, wrapped=wrapped))
    assert monitor.updates == count
    again = NoiseScaleMonitor()
    with attach_and_detach(wrapped, again):
        train(model, world, wrapped=wrapped)
    assert again.updates == 3
    plain, plain_later, watched, later = results
    equal = all(torch.equal(a, b) for a, b in zip(plain + plain_later, watched + later, strict=True))
    return equal, count, found


@contextlib.contextmanager
def attach_and_detach(model, monitor):
    handle = attach(model, monitor)
    yield
    handle.detach()


@pytest.mark.parametrize(
    ("world", "settings", "hook", "every"),
    [
        (2, {}, None, 1),
        (3, {}, None, 1),  # 1/3 is not exact
        (2, {"gradient_as_bucket_view": True}, None, 2),
        (2, {"gradient_as_bucket_view": True}, "allreduce", 1),
        (2, {}, "fp16", 1),
    ],
)
def test_the_hook_of_ddp_measures_and_changes_nothing(world, settings, hook, every):
    results = run(world, attached, world, settings, hook, every)
    model, data = network(), inputs(3, world * 2)
    # The gradient of a rank is the mean over its two micro-batches.
    merged = data.reshape(3, world, 8, 6)[::every]
    expected = by_hand(model, merged)
    for equal, count, found in results:
        assert equal
        assert count == len(merged)
        assert found == results[0][2]
        same(found, expected, rel=1e-2 if hook == "fp16" else 1e-9)


def on_rank(world, kind):
    model = network()
    monitor = NoiseScaleMonitor()
    if kind == "static":
        wrapped = DistributedDataParallel(model, static_graph=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4)
        handle = attach(wrapped, monitor, own := NoiseScaleMonitor(optimizer=optimizer), examples=4)
        train(model, world, local=1, no_sync=False, wrapped=wrapped)
        assert (monitor.updates, own.updates) == (3, 0)
        optimizer.step()
        handle.detach()
        handle = attach(wrapped, own, loss_scale=lambda: 2.0)
        train(model, world, local=1, no_sync=False, wrapped=wrapped)
        metric = diagonal_metric(optimizer)
        expected = by_hand(model, inputs(3, world), metric)
        found = own.noise_scale()
        assert found.b_simple == pytest.approx(expected.b_simple, rel=1e-9)
        assert found.trace == pytest.approx(expected.trace / 4, rel=1e-9)
        return found
    wrapped = DistributedDataParallel(model)
    if kind == "uneven":  # DDP gives each rank the same weight, however many examples it has
        attach(wrapped, monitor)
        x = inputs(1, 2, 9)[0, dist.get_rank(), : 3 + 6 * dist.get_rank()]
        with torch.no_grad():
            wrapped(x)  # these two do not count
        wrapped.eval()(x)
        loss_of(wrapped.train(), x).backward()
        return monitor._rows[0].tolist() if monitor.updates else None
    norms = MicroBatchNorms(model, monitor)
    for parts in inputs(3, 8):
        model.zero_grad()
        mine = parts[dist.get_rank() :: world]
        for i, x in enumerate(mine):
            with contextlib.nullcontext() if i + 1 == len(mine) else wrapped.no_sync():
                loss = loss_of(wrapped, x) / len(mine)
                with norms.micro_batch(len(x), weight=1 / len(mine)):
                    loss.backward()
        norms.step()
    return monitor.noise_scale()


def test_four_ranks_with_two_micro_batches_are_one_process_with_eight():
    expected = by_hand(network(), inputs(3, 8))
    for found in run(4, on_rank, 4, "micro-batches"):
        same(found, expected, rel=1e-6)


def test_static_graphs_metrics_and_scaled_losses():
    found = run(2, on_rank, 2, "static")
    assert found[0] == found[1]


def test_ranks_with_different_numbers_of_examples():
    rows = run(2, on_rank, 2, "uneven")
    assert rows[0] == rows[1]
    harmonic = 2 / (1 / 3 + 1 / 9)
    assert rows[0][2:4] == pytest.approx([harmonic, 2 * harmonic])


def sharded(world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = []
    for shape, names in (((2,), ("shard",)), ((1, 2), ("replicate", "shard")), ((2, 1), ("replicate", "shard"))):
        model, monitor = network(), NoiseScaleMonitor()
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match="the model, where it is sharded"):
            MicroBatchNorms(list(model.parameters()), monitor)
        adam = torch.optim.Adam(model.parameters())
        with pytest.raises(ValueError, match="Euclidean ones for sharded parameters"):
            MicroBatchNorms(model, NoiseScaleMonitor(optimizer=adam))
        norms = MicroBatchNorms(model, monitor)
        for parts in inputs(3, 8):
            model.zero_grad()
            for i, x in enumerate(parts[dist.get_rank() :: world]):
                model.set_requires_gradient_sync(i == 3)
                loss = loss_of(model, x) / 4
                with norms.micro_batch(len(x), weight=1 / 4):
                    loss.backward()
            norms.step()
        found.append(monitor.noise_scale())
    return found


def test_sharded_parameters():
    expected = by_hand(network(), inputs(3, 8))
    for results in run(2, sharded, 2):
        for found in results:
            same(found, expected, rel=1e-6)


def refused():
    model = DistributedDataParallel(network())
    with pytest.raises(ValueError, match=r"attach: model must be a DDP model, got .Linear."):
        attach(nn.Linear(1, 1), NoiseScaleMonitor())
    with pytest.raises(ValueError, match="the number of monitors must be at least 1"):
        attach(model)
    with pytest.raises(ValueError, match="every must be an integer >= 1"):
        attach(model, NoiseScaleMonitor(), every=0)
    attach(model, NoiseScaleMonitor())
    with pytest.raises(ValueError, match="model must be one without, or with the same hook"):
        attach(model, NoiseScaleMonitor())
    hooked = DistributedDataParallel(network())
    hooked.register_comm_hook(None, allreduce_hook)
    with pytest.raises(ValueError, match="use inner_hook"):
        attach(hooked, NoiseScaleMonitor())
    alone = DistributedDataParallel(network(), process_group=[dist.new_group([i]) for i in range(2)][dist.get_rank()])
    with pytest.raises(ValueError, match="the number of ranks must be at least 2"):
        attach(alone, NoiseScaleMonitor())
    return True


def test_what_attach_refuses():
    assert all(run(2, refused))
