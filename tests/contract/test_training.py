"""Together with the rest of torch: schedules, clipping, loss scaling, compiled models, hooks."""

import copy

import pytest
import torch
from tests.contract.problems import Regression, assert_same, gradient, parameters, same, snapshot, train
from tests.contract.rows import rows
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from conjugo.optim import WeightEMA
from conjugo.optim.schedules import WarmupCosine, WarmupPolynomial

SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.1),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=8, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "WarmupPolynomial": lambda o: WarmupPolynomial(o, 3, 7),
    "WarmupCosine": lambda o: WarmupCosine(o, 3, 7),
}


@rows()
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_set_what_they_set_for_sgd(row, name):
    params, others = parameters((3, 4), (3,)), parameters((3, 4), (3,))

    def groups(ps):
        return [{"params": [ps[0]], "lr": 0.5}, {"params": [ps[1]], "lr": 0.25}]

    optimizer, sgd = row.make(groups(params)), SGD(groups(others))
    schedule, reference = SCHEDULES[name](optimizer), SCHEDULES[name](sgd)
    argument = (1.0,) if name == "ReduceLROnPlateau" else ()
    seen = []
    for t in range(7):
        train(row, optimizer, params, steps=1, start=t)
        sgd.step()
        schedule.step(*argument)
        reference.step(*argument)
        seen.append([group["lr"] for group in optimizer.param_groups])
        assert seen[-1] == [group["lr"] for group in sgd.param_groups]
    assert len({tuple(lrs) for lrs in seen}) > 1


@rows()
def test_a_schedule_reaches_the_step(row):
    """Training with a schedule is training with those learning rates set by hand."""
    a, b = parameters(), parameters()
    scheduled, by_hand = row.make(a), row.make(b)
    schedule = WarmupPolynomial(scheduled, 2, 6)
    for t in range(6):
        by_hand.param_groups[0]["lr"] = row.lr * schedule.factor(t)
        train(row, scheduled, a, steps=1, start=t)
        train(row, by_hand, b, steps=1, start=t)
        schedule.step()
    assert_same(a, b)


@rows()
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_optimizer_and_schedule_resume_together(row, tensor):
    def make(params):
        optimizer = row.make(params, lr=torch.tensor(row.lr, dtype=torch.float64) if tensor else row.lr)
        return optimizer, WarmupCosine(optimizer, 2, 8)

    def go_on(optimizer, schedule, params, start):
        for t in range(start, start + 3):
            train(row, optimizer, params, steps=1, start=t)
            schedule.step()

    params = parameters()
    optimizer, schedule = make(params)
    go_on(optimizer, schedule, params, 0)
    resumed = copy.deepcopy(params)
    fresh, its_schedule = make(resumed)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_schedule.load_state_dict(copy.deepcopy(schedule.state_dict()))
    go_on(optimizer, schedule, params, 3)
    go_on(fresh, its_schedule, resumed, 3)
    assert_same(params, resumed)
    assert float(fresh.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])


@rows()
def test_clipped_gradients_are_what_the_step_sees(row):
    clipped, scaled = parameters(), parameters()
    a, b = row.make(clipped), row.make(scaled)
    for t in range(4):
        for i, (p, q) in enumerate(zip(clipped, scaled)):
            p.grad = gradient(p, i, t)
            q.grad = gradient(q, i, t)
        norm = nn.utils.clip_grad_norm_(clipped, 0.5)
        assert norm > 0.5
        for p, q in zip(clipped, scaled):
            q.grad.copy_(p.grad)
        row.step(a)
        row.step(b)
        assert all(p.grad.norm() <= 0.5 + 1e-6 for p in clipped)
    assert_same(clipped, scaled)
    assert all(p.isfinite().all() for p in clipped)


@rows("gradients will do")
def test_scaled_losses(row):
    """GradScaler unscales the gradients in place, and leaves a step out when they are not finite."""
    plain, scaled = Regression(), Regression()
    a, b = row.make(plain.params), row.make(scaled.params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(factor=1.0):
        loss = scaled.loss()
        scaler.scale(loss * factor).backward()
        scaler.step(b, **({"loss": loss.detach()} if row.needs_loss else {}))
        scaler.update()
        b.zero_grad()

    for _ in range(3):
        loss = plain.loss()
        loss.backward()
        row.step(a, loss.detach())
        a.zero_grad()
        step()
    assert_same(plain.params, scaled.params)  # 1024 is a power of two
    before = snapshot(b)
    step(factor=float("inf"))
    assert_same(before, snapshot(b))
    assert scaler.get_scale() == 512.0


@rows("moves at once")
def test_hooks_run_before_and_after_the_step(row):
    params = parameters()
    optimizer = row.make(params)
    first = params[0].detach().clone()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(("before", same(params[0].detach(), first))))
    optimizer.register_step_post_hook(lambda *_: calls.append(("after", same(params[0].detach(), first))))
    everywhere = register_optimizer_step_post_hook(lambda o, *_: calls.append(("any", o is optimizer)))
    try:
        train(row, optimizer, params, steps=1)
    finally:
        everywhere.remove()
    assert sorted(calls) == [("after", False), ("any", True), ("before", True)]


@rows()
def test_hooks_around_saving_and_loading(row):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: calls.append(sorted(state)))
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: calls.append(
            all(isinstance(v, torch.Tensor) for s in state["state"].values() for v in s.values())
        )
    )
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o is optimizer and len(o.state)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", ["param_groups", "state"], True, len(params)]


@rows()
def test_averaged_weights(row):
    """Lending the averages for evaluation leaves no trace in training."""
    runs = []
    for evaluated in (False, True):
        problem = Regression()
        model = nn.ParameterList(problem.params)
        optimizer, average = row.make(model.parameters()), WeightEMA(model)
        for _ in range(5):
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            row.step(optimizer, loss.detach())
            average.update()
            if evaluated:
                with average.averaged():
                    problem.loss()
        runs.append(snapshot(optimizer))
    assert_same(*runs)


# ---- compiled models ----


class Compiled:
    """One small model, compiled once for all rows, and its twin that is not compiled."""

    def __init__(self, backend: str) -> None:
        torch.manual_seed(4)
        self.plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.twin = copy.deepcopy(self.plain)
        self.start = copy.deepcopy(self.plain.state_dict())
        self.compiled = torch.compile(self.twin, backend=backend)
        self.inputs = torch.randn(16, 4)

    def check(self, row, rtol: float) -> None:
        self.plain.load_state_dict(self.start)
        self.twin.load_state_dict(self.start)
        losses = []
        for model in (self.plain, self.compiled):
            optimizer = row.make(model.parameters(), lr=row.lr / 4)
            seen = []
            for _ in range(5):
                optimizer.zero_grad()
                loss = (model(self.inputs) - self.inputs[:, :2]).square().mean()
                loss.backward()
                row.step(optimizer, loss.detach())
                seen.append(loss.item())
            losses.append(seen)
        assert losses[0] == pytest.approx(losses[1], rel=rtol)
        assert losses[0][-1] < losses[0][0]


@pytest.fixture(scope="module", params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiled(request):
    yield Compiled(request.param)
    torch.compiler.reset()


@rows("stays close")
def test_compiled_models_train_alike(row, compiled):
    compiled.check(row, rtol=1e-4)
