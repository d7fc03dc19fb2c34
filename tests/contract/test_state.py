"""State: complete from the start, of the promised size, and the same after every round trip."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.contract.problems import assert_same, parameters, same, snapshot, train
from tests.contract.rows import implementations, rows
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)


def saved_and_loaded(state):
    """*state* through a file that may hold nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- what there is ----


@implementations("state from the start")
def test_state_is_complete_from_the_start(row):
    params = parameters()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = row.make([*params, frozen])
    shapes = [{name: (t.shape, t.dtype) for name, t in optimizer.state[p].items()} for p in (*params, frozen)]
    assert all(shapes)
    tensors = [t for p in params for t in optimizer.state[p].values() if t.shape == p.shape]
    pointers = [t.data_ptr() for t in tensors]
    train(row, optimizer, params, steps=3)
    after = [{name: (t.shape, t.dtype) for name, t in optimizer.state[p].items()} for p in (*params, frozen)]
    assert shapes == after
    assert pointers == [t.data_ptr() for t in tensors]
    assert all(isinstance(t, torch.Tensor) for s in optimizer.state.values() for t in s.values())


@rows()
def test_state_is_as_large_as_promised(row):
    params = parameters((64, 64), (64, 8))
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    for p in params:
        state = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        rest = sum(t.numel() for t in state) - row.vectors * p.numel() - row.beyond(p)
        assert 0 <= rest <= 12  # scalars


@rows()
def test_making_an_optimizer_changes_no_parameter(row):
    params = parameters()
    before = [p.detach().clone() for p in params]
    row.make(params)
    assert_same(before, [p.detach() for p in params])
    assert all(p.grad is None for p in params)


# ---- round trips ----


@implementations()
def test_training_goes_on_bit_for_bit_in_a_fresh_instance(row):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=4)
    resumed = copy.deepcopy(params)
    fresh = row.make(resumed)
    fresh.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same(optimizer.state_dict(), fresh.state_dict())
    train(row, optimizer, params, steps=4, start=4)
    train(row, fresh, resumed, steps=4, start=4)
    assert_same(snapshot(optimizer), snapshot(fresh))


@implementations()
def test_going_back_to_an_earlier_state_repeats_the_steps(row):
    """Loading into an instance that has taken steps, with other options than those that were saved."""
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=3)
    values, state = snapshot(optimizer)
    train(row, optimizer, params, steps=3, start=3)
    expected = snapshot(optimizer)
    optimizer.param_groups[0]["lr"] *= 3
    with torch.no_grad():
        for p, value in zip(params, values):
            p.copy_(value)
    optimizer.load_state_dict(state)
    train(row, optimizer, params, steps=3, start=3)
    assert_same(expected, snapshot(optimizer))


@implementations()
def test_after_loading_a_changed_learning_rate_counts(row):
    results = []
    for factor in (1, 2):
        params = parameters()
        optimizer = row.make(params)
        train(row, optimizer, params, steps=2)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["lr"] *= factor
        train(row, optimizer, params, steps=2, start=2)
        results.append(params)
    assert not same(*results)


@rows()
def test_saved_state_is_a_picture_not_a_view(row):
    """What was saved to a file does not change with later steps; what is in memory is torch's usual view."""
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    picture = saved_and_loaded(optimizer.state_dict())
    expected = copy.deepcopy(optimizer.state_dict())
    train(row, optimizer, params, steps=2, start=2)
    assert_same(picture, expected)


@rows()
def test_loading_copies(row):
    """The dict that was loaded is still the caller's: later steps do not write into it."""
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    fresh = row.make(params)
    fresh.load_state_dict(state)
    if "state from the start" not in row.exempt:
        train(row, fresh, params, steps=2, start=2)
    assert_same(state, kept)


@implementations()
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_of_the_whole_optimizer_go_their_own_way(row, way):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=3)
    twin = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    assert type(twin) is type(optimizer)
    assert_same(snapshot(optimizer), snapshot(twin))
    before = snapshot(optimizer)
    train(row, twin, twins, steps=3, start=3)
    assert_same(before, snapshot(optimizer))
    train(row, optimizer, params, steps=3, start=3)
    assert_same(snapshot(optimizer), snapshot(twin))
    twin.add_param_group({"params": parameters((2,))})
    assert len(optimizer.param_groups) == 1


@rows("own state type")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_low_precision_parameters_is_wide_through_every_round_trip(row, dtype):
    params = parameters(dtype=dtype)
    optimizer = row.make(params, lr=row.lr / 10)
    train(row, optimizer, params, steps=3)
    states = [(p, name, t) for p in params for name, t in optimizer.state[p].items()]
    vectors = [t for p, name, t in states if t.shape == p.shape and name != "scalars"]
    assert {t.dtype for t in vectors} == ({torch.float32} if row.vectors else set())
    for t in vectors:
        t.fill_(1 / 3)  # which rounding to the parameters' type would change
    for copied in (saved_and_loaded(optimizer.state_dict()), optimizer.state_dict()):
        fresh = row.make(copy.deepcopy(params), lr=row.lr / 10)
        fresh.load_state_dict(copied)
        assert_same(optimizer.state_dict(), fresh.state_dict())
    assert_same(copy.deepcopy(optimizer).state_dict(), optimizer.state_dict())


# ---- state that does not fit ----


@rows("names what is wrong")
def test_state_that_does_not_fit_is_refused_and_nothing_changes(row):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    before = snapshot(optimizer)

    def refused(message, state):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert_same(before, snapshot(optimizer))
        assert optimizer.param_groups[0]["params"][0] is params[0]

    refused("size of optimizer's group", row.make(params[:2]).state_dict())
    refused("number of parameter groups", row.make([{"params": [p]} for p in params]).state_dict())
    if row.vectors:  # else no state has the shape of its parameter
        refused("saved .* must be of shape", row.make(parameters((4, 3), (3,), (2, 3, 2))).state_dict())
    missing = copy.deepcopy(before[1])
    name = next(iter(missing["state"][1]))
    del missing["state"][1][name]
    refused(f"must have .*{name}", missing)
    strange = copy.deepcopy(before[1])
    strange["state"][1]["strange"] = torch.ones(1)
    refused("must have .* got .*strange", strange)
    absent = copy.deepcopy(before[1])
    del absent["state"][1]
    refused(r"must have .* got \[\]", absent)
    invalid = copy.deepcopy(before[1])
    invalid["param_groups"][0]["lr"] = -1.0
    refused("lr must be", invalid)
    train(row, optimizer, params, steps=1, start=2)


@rows("names what is wrong")
def test_options_that_an_old_checkpoint_does_not_have_take_their_defaults(row):
    params = parameters()
    optimizer = row.make(params)
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["maximize"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["maximize"] is False
    train(row, optimizer, params, steps=1)


# ---- groups that are added, and parameters that move ----


@implementations()
def test_a_group_may_be_added_in_mid_run(row):
    old, new = parameters((3, 4), (2, 3))
    optimizer = row.make([old])
    train(row, optimizer, [old], steps=2)
    optimizer.add_param_group({"params": [new], "lr": row.lr / 2, "weight_decay": 0.01})
    before = new.detach().clone()
    train(row, optimizer, [old, new], steps=2, start=2)
    assert not same(before, new.detach())
    resumed = copy.deepcopy([old, new])
    fresh = row.make([{"params": [resumed[0]]}, {"params": [resumed[1]]}])
    fresh.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert fresh.param_groups[1]["weight_decay"] == 0.01
    train(row, optimizer, [old, new], steps=2, start=4)
    train(row, fresh, resumed, steps=2, start=4)
    assert_same(snapshot(optimizer), snapshot(fresh))


@rows("names what is wrong")
def test_a_group_that_is_refused_leaves_no_trace(row):
    params = parameters()
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.add_param_group({"params": parameters((2,)), "weight_decay": -1.0})
    with pytest.raises(TypeError, match=r"must be floating point or complex, got torch\.int64"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.int64)]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})
    assert_same(before, snapshot(optimizer))
    train(row, optimizer, params, steps=1, start=2)


@rows()
def test_a_group_may_be_empty(row):
    (p,) = parameters((3, 4))
    optimizer = row.make([{"params": []}, {"params": [p]}])
    before = p.detach().clone()
    train(row, optimizer, [p], steps=2)
    assert not same(before, p.detach())
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))


@rows()
def test_parameters_may_be_named(row):
    a, b = parameters((3, 4), (3,))
    optimizer = row.make([("weight", a), ("bias", b)])
    train(row, optimizer, [a, b], steps=2)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))


# ---- torch.distributed.checkpoint ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 1)
        self.frozen.requires_grad_(False)


def network(row):
    torch.manual_seed(3)
    net = Net()
    optimizer = row.make(
        [
            {"params": [*net.frozen.parameters(), *net.linear.parameters()]},
            {"params": net.head.parameters(), "lr": 0.03},
        ]
    )
    return net, [p for p in net.parameters() if p.requires_grad], optimizer


@rows("state from the start")
def test_asking_a_fresh_optimizer_for_its_state_moves_nothing(row):
    """With empty state torch would take a step with learning rate 0 here."""
    net, params, optimizer = network(row)
    before = snapshot(optimizer)
    get_state_dict(net, optimizer)
    assert_same(before, snapshot(optimizer))
    assert all(p.grad is None for p in params)


@rows("state from the start")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process: intended
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoint_resumes_bit_for_bit(row, flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, params, optimizer = network(row)
    train(row, optimizer, params, steps=3)
    model_state, optimizer_state = get_state_dict(net, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "step", no_dist=True)

    other, others, fresh = network(row)
    fresh.param_groups[1]["lr"] = 7.0
    model_state, optimizer_state = get_state_dict(other, fresh, options=options)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "step", no_dist=True)
    set_state_dict(other, fresh, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    assert_same(optimizer.state_dict()["state"], fresh.state_dict()["state"])
    train(row, optimizer, params, steps=3, start=3)
    train(row, fresh, others, steps=3, start=3)
    assert_same(params, others)
    assert fresh.param_groups[1]["lr"] == 0.03


@rows("state from the start")
def test_state_is_there_although_gradients_are(row):
    """With gradients present and no state torch returns, without a word, nothing."""
    net, params, optimizer = network(row)
    for p in params:
        p.grad = torch.ones_like(p)
    state = get_optimizer_state_dict(net, optimizer)["state"]
    assert len(state) == 6
    assert all(state.values())
