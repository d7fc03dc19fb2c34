"""Checkpoints: what is saved comes back bit for bit, on any number of workers and in any layout."""

import os
import random
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from tests.distributed import ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from conjugo.distributed import Checkpointer, GlobalBatchSampler, PerRank, RandomState, export_step, export_weights
from conjugo.optim import LAMB, NLCG, WeightEMA
from conjugo.optim.schedules import WarmupCosine


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 5))


OPTIMIZERS = {
    "nlcg": lambda params: NLCG(params, lr=0.1, rule="pr", precond="bfgs"),
    "lamb": lambda params: LAMB(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
}


class Run:
    """A model in a layout, with what belongs to it; equal on all ranks, since all see the same batches."""

    def __init__(self, layout="alone", optimizer="nlcg"):
        model = network()
        world = dist.get_world_size() if dist.is_initialized() else 1
        if layout == "ddp":
            model = DistributedDataParallel(model)
        elif layout != "alone":
            shape, names = ((2, world // 2), ("replicas", "shards")) if layout == "hsdp" else ((world,), ("shards",))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for part in (model[0], model[3], model):
                fully_shard(part, mesh=mesh)
        self.model = model
        half = list(model.parameters())
        sliced = layout == "ddp" and optimizer == "nlcg"
        groups = [{"params": half[:3]}, {"params": half[3:], "weight_decay": 0.1}]
        self.optimizer = (
            NLCG(groups, lr=0.1, rule="pr", shard_state=True, precond="bfgs")
            if sliced
            else OPTIMIZERS[optimizer](groups)
        )
        self.schedule = WarmupCosine(self.optimizer, 2, 20)
        self.sampler = GlobalBatchSampler(32, 8, seed=1)
        self.progress = {"step": 0, "losses": []}

    def train(self, steps):
        data = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
        for _ in range(steps):
            x = data[next(self.sampler)]
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.progress["step"] += 1
            self.progress["losses"].append(loss.item())
        return self

    def parts(self):
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "sampler", "progress")}

    def values(self):
        """All state as whole tensors and plain values."""
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return whole([model.state_dict(), self.optimizer.state_dict(), self.sampler.state_dict(), self.progress])


def whole(value):
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return [whole(v) for v in value] if isinstance(value, list | tuple) else value


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def trained_and_saved(root, layout, optimizer, asynchronous=False):
    run = Run(layout, optimizer).train(3)
    checkpoints = Checkpointer(root, asynchronous=asynchronous)
    assert checkpoints.save(3, **run.parts())
    run_on = run.train(2) if asynchronous else run  # what is saved is the state at the time of the call
    assert checkpoints.wait()
    del run_on
    return None if asynchronous else run.values()


def loaded(root, layout, optimizer, onward=None):
    run = Run(layout, optimizer)
    step = Checkpointer(root).load_latest(**run.parts())
    values = run.values()
    if onward is not None:
        assert Checkpointer(onward).save(step, **run.parts())
    return step, values, whole(run.train(1).progress["losses"][-1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_moves_over_numbers_of_workers_and_layouts(optimizer, tmp_path):
    saved = ranks.run(2, trained_and_saved, tmp_path / "0", "fsdp", optimizer)[0]
    following = Run("alone", optimizer).train(4).progress["losses"][-1]
    way = [(1, "alone"), (4, "hsdp"), (3, "fsdp"), (2, "ddp"), (4, "fsdp")]
    for i, (world, layout) in enumerate(way):
        arguments = tmp_path / str(i), layout, optimizer, tmp_path / str(i + 1)
        step, values, loss = loaded(*arguments) if world == 1 else ranks.run(world, loaded, *arguments)[-1]
        assert step == 3
        assert same(values, saved), (world, layout)
        assert loss == pytest.approx(following, rel=1e-5)


@pytest.mark.parametrize("layout", ["alone", "ddp", "fsdp"])
def test_saving_in_the_background_stores_the_moment_of_the_call(layout, tmp_path):
    for asynchronous in (False, True):
        arguments = tmp_path / str(asynchronous), layout, "nlcg", asynchronous
        if layout == "alone":
            trained_and_saved(*arguments)
        else:
            ranks.run(2, trained_and_saved, *arguments)
    a, b = (loaded(tmp_path / name, "alone", "nlcg") for name in ("False", "True"))
    assert same(list(a), list(b))


def test_training_goes_on_bit_for_bit(tmp_path):
    uninterrupted = Run().train(6)
    Checkpointer(tmp_path).save(4, **Run().train(4).parts())
    run = Run()
    assert Checkpointer(tmp_path).load_latest(**run.parts()) == 4
    assert same(run.train(2).values(), uninterrupted.values())


def test_only_the_newest_stay(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=2)
    assert checkpoints.load_latest(state={}) is None
    assert checkpoints.describe() == "there is none yet"
    for step in (1, 5, 30):
        assert checkpoints.save(step, state={"step": step})
    assert checkpoints.steps() == [5, 30]
    assert checkpoints.describe().endswith("step-00000030")
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000030"]
    state = {"stale": 1}
    checkpoints.load(5, state=state)
    assert state == {"step": 5}


def test_a_moving_average_and_plain_values_come_back(tmp_path):
    model = network()
    ema = WeightEMA(model, 0.9)
    ema.update()
    values = {
        "a": [1, 2.5, None, "x", (True, {"deep": torch.arange(3)})],
        "empty": {},
        "t": torch.ones((), dtype=torch.bfloat16),
    }
    Checkpointer(tmp_path).save(1, ema=ema, values=values, scalar={"n": 3})
    other, found = WeightEMA(network(), 0.9), {}
    Checkpointer(tmp_path).load_latest(ema=other, values=found)
    assert same(whole(ema.state_dict()), whole(other.state_dict()))
    assert same(whole(found), whole(values))
    assert isinstance(found["a"][4], tuple)


def test_a_fresh_optimizer_takes_a_trained_state_and_a_frozen_parameter(tmp_path):
    run = Run(optimizer="adamw")
    run.model[0].weight.requires_grad_(False)
    run.train(2)
    Checkpointer(tmp_path).save(2, **run.parts())
    other = Run(optimizer="adamw")
    Checkpointer(tmp_path).load_latest(**other.parts())
    assert same(other.values(), run.values())


def test_parameters_are_found_by_name(tmp_path):
    """Their order in the groups may differ; without the model they go by number."""
    model = network()
    names = dict(model.named_parameters())
    optimizer = NLCG(list(names.values()), lr=0.1, precond="bfgs")
    model(torch.ones(4, 6) * torch.arange(4)[:, None]).square().mean().backward()
    optimizer.step()
    Checkpointer(tmp_path / "named").save(1, model=model, optimizer=optimizer)
    other = network()
    reverse = dict(reversed(list(other.named_parameters())))
    turned = NLCG(list(reverse.values()), lr=0.1, precond="bfgs")
    Checkpointer(tmp_path / "named").load_latest(model=other, optimizer=turned)
    for name, p in names.items():
        assert same(dict(optimizer.state[p]), dict(turned.state[reverse[name]]))
    Checkpointer(tmp_path / "numbered").save(1, optimizer=optimizer)
    with pytest.raises(ValueError, match="saved shape of 'optimizer/state/#0/direction'"):
        Checkpointer(tmp_path / "numbered").load_latest(optimizer=turned)


# Ranks of their own -------------------------------------------------------------------------------------------------


def draws():
    numpy = float(np.random.rand())  # noqa: NPY002
    return random.random(), numpy, torch.rand(2).tolist()


def random_numbers(root, seed, loading):
    rank = dist.get_rank()
    random.seed(seed + rank)
    np.random.seed(seed + rank)  # noqa: NPY002
    torch.manual_seed(seed + rank)
    checkpoints = Checkpointer(root)
    with warnings.catch_warnings(record=True) as caught:
        if loading:
            checkpoints.load_latest(random=PerRank(RandomState()))
        else:
            checkpoints.save(1, random=PerRank(RandomState()))
    return draws(), [str(w.message) for w in caught]


def test_each_rank_goes_on_with_its_own_random_numbers(tmp_path):
    first = ranks.run(2, random_numbers, tmp_path, 0, False)
    again = ranks.run(2, random_numbers, tmp_path, 50, True)
    assert again == first
    assert first[0][0] != first[1][0]
    other = ranks.run(3, random_numbers, tmp_path, 50, True)
    assert "was saved by 2 ranks, now there are 3: random cannot be restored" in other[0][1][0]
    assert other[1][1] == other[2][1] == []
    assert all(other[r][0] != again[r][0] for r in range(2))


# What does not fit ---------------------------------------------------------------------------------------------------


def bad_calls(root, call):
    """The message, whether anything changed, and whether the checkpoint is still good."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    checkpoints = Checkpointer(root)
    run = Run().train(1)
    before = run.values()
    if 1 not in checkpoints.steps():
        checkpoints.save(1, model=run.model, optimizer=run.optimizer, progress=run.progress)
    try:
        if call == "step again":
            checkpoints.save(1, model=run.model)
        elif call == "negative step":
            checkpoints.save(-1, model=run.model)
        elif call == "object":
            checkpoints.save(2, progress={"bad": object()} if rank == 0 else {})
        elif call == "name":
            checkpoints.load_latest(model=run.model, teacher=run.model)
        elif call == "shape":
            checkpoints.load_latest(progress=run.progress, model=nn.Sequential(nn.Linear(6, 8), *network()[1:]))
        elif call == "keys":
            checkpoints.load_latest(progress=run.progress, model=network()[:3])
        elif call == "groups":
            checkpoints.load_latest(model=run.model, optimizer=NLCG(run.model.parameters(), precond="bfgs"))
        elif call == "kind of optimizer":
            checkpoints.load_latest(model=run.model, optimizer=LAMB(run.optimizer.param_groups))
        elif call == "number":
            checkpoints.load_latest(progress=3)
        elif call == "unknown step":
            checkpoints.load(7, model=run.model)
    except ValueError as error:
        return str(error), same(run.values(), before), Checkpointer(root).load_latest(model=run.model)
    return None


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("step again", "step must be one that is not in"),
        ("negative step", "step must be >= 0, got -1"),
        ("object", "must consist of tensors and plain values"),
        ("name", "the name must be one of ['model', 'optimizer', 'progress'], got 'teacher'"),
        ("shape", "the saved shape of 'model/0.weight' must be [8, 6], got [7, 6]"),
        ("keys", "tensors of 'model' do not fit: not saved are [], only saved are ['3.bias', '3.weight']"),
        ("groups", "parameter groups of 'optimizer' must be 1, got 2"),
        ("number", "progress must be a dict or an object with load_state_dict, got 3"),
        ("unknown step", "step must be one of [1], got 7"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(call, said, world, tmp_path):
    results = [bad_calls(tmp_path, call)] if world == 1 else ranks.run(2, bad_calls, tmp_path, call)
    for message, unchanged, step in results:
        assert said in message
        assert unchanged
        assert step == 1


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        Checkpointer(tmp_path, keep=0)


# Export --------------------------------------------------------------------------------------------------------------


def exported(root, path):
    run = Run("fsdp").train(1)
    export_weights(run.model, path, note="x")
    Checkpointer(root).save(1, **run.parts())
    return run.values()[0]


def test_weights_for_other_programs(tmp_path):
    weights = ranks.run(2, exported, tmp_path / "run", tmp_path / "live.safetensors")[0]
    assert export_step(tmp_path / "run", tmp_path / "saved.safetensors") == (1, len(weights))
    for name, header in (("live", "note"), ("saved", "step")):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert header in file.metadata()
            found = {key: file.get_tensor(key) for key in list(file.keys())}
        assert same(found, dict(weights))
    assert sorted(os.listdir(tmp_path)) == ["live.safetensors", "run", "saved.safetensors"]
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    export_weights(tied, tmp_path / "tied.safetensors")
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("b.weight"), tied["a"].weight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step": 9}, "step must be one of .1., got 9"),
        ({"part": "teacher"}, "part must be one of"),
        ({"part": "progress"}, "one with tensors"),
    ],
)
def test_export_of_what_is_not_there(options, said, tmp_path):
    Checkpointer(tmp_path).save(1, model=network(), progress={"a": 1})
    with pytest.raises(ValueError, match=said):
        export_step(tmp_path, tmp_path / "out", **options)


def test_torch_reads_the_tensors(tmp_path):
    """The format is that of torch.distributed.checkpoint: nothing locks anybody in."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model = network()
    Checkpointer(tmp_path).save(1, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(tmp_path / "step-00000001", tmp_path / "plain.pt")
    found = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert same({k.removeprefix("model/"): v for k, v in found.items()}, dict(get_model_state_dict(model)))
