"""The base class, with the smallest optimizer that uses it."""

import copy
import math
import pickle

import pytest
import torch

from conjugo.optim._base import Optimizer, as_real, check_lr, evaluate, state_dtype, zeros_for


class Plain(Optimizer):
    """Gradient descent that remembers the last gradient; counts how often its views were rebuilt."""

    _pickled = ("label",)

    def __init__(self, params, lr=0.1, label="a"):
        self.label, self.rebuilt = label, 0
        super().__init__(params, {"lr": lr, "maximize": False})

    def _check_group(self, group):
        check_lr("Plain", group["lr"])

    def _init_state(self, p, group):
        return {"last": zeros_for(p)}

    def _state_replaced(self):
        self.rebuilt = getattr(self, "rebuilt", 0) + 1

    @torch.no_grad()
    def step(self, closure=None):
        loss = evaluate(closure)
        for group, params in self._with_gradient():
            for p in params:
                self.state[p]["last"].copy_(as_real(p.grad))
                p.sub_(p.grad, alpha=group["lr"])
        return loss


def parameter(*shape, dtype=torch.float32, device="cpu"):
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device))


def test_hooks_are_mandatory():
    class Bare(Optimizer):
        pass

    with pytest.raises(NotImplementedError):
        Bare([parameter(1)], {"lr": 0.1})


def test_views_are_rebuilt_after_each_change_of_state_or_groups():
    p = parameter(2)
    optimizer = Plain([p])
    assert optimizer.rebuilt == 1
    optimizer.add_param_group({"params": [parameter(3)]})
    assert optimizer.rebuilt == 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.rebuilt == 3
    assert pickle.loads(pickle.dumps(optimizer)).rebuilt == 1
    assert copy.deepcopy(optimizer).rebuilt == 1


def test_a_refused_loading_rebuilds_nothing():
    optimizer = Plain([parameter(2)])
    groups = optimizer.param_groups
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = math.nan
    with pytest.raises(ValueError, match="Plain: lr must be"):
        optimizer.load_state_dict(state)
    assert optimizer.rebuilt == 1
    assert optimizer.param_groups is groups


def test_named_attributes_travel_with_copies():
    optimizer = Plain([parameter(2)], label="b")
    assert pickle.loads(pickle.dumps(optimizer)).label == "b"
    assert copy.deepcopy(optimizer).label == "b"


def test_loading_neither_casts_nor_moves_nor_replaces():
    p = parameter(2, dtype=torch.bfloat16)
    optimizer = Plain([p])
    tensor = optimizer.state[p]["last"]
    state = {
        "state": {0: {"last": torch.full((2,), 1 / 3, dtype=torch.float64)}},
        "param_groups": optimizer.state_dict()["param_groups"],
    }
    optimizer.load_state_dict(state)
    assert optimizer.state[p]["last"] is tensor
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.full((2,), 1 / 3))


def test_state_goes_where_the_parameter_is():
    p = parameter(2)
    optimizer = Plain([p])
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["last"] += 2
    optimizer.state[p] = {"last": torch.zeros(2, device="meta")}  # as if the parameter had been there
    optimizer.load_state_dict(state)
    assert optimizer.state[p]["last"].tolist() == [2.0, 2.0]


def test_frozen_parameters_may_come_without_state():
    """``torch.distributed.checkpoint`` drops it."""
    trained, frozen = parameter(2), parameter(2)
    frozen.requires_grad_(False)
    optimizer = Plain([trained, frozen])
    optimizer.state[frozen]["last"].fill_(5.0)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[frozen]["last"], torch.zeros(2))
    del state["state"][0]
    with pytest.raises(ValueError, match=r"shape \(2,\) must have \['last'\], got \[\]"):
        optimizer.load_state_dict(state)


def test_own_hooks_do_not_stay():
    optimizer = Plain([parameter(2)])
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_defaults_stay_as_they_were():
    optimizer = Plain([parameter(2)])
    before = dict(optimizer.defaults)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.defaults == before
    assert pickle.loads(pickle.dumps(optimizer)).defaults == before


def test_groups_without_gradients_are_left_out():
    a, b, c = parameter(2), parameter(2), parameter(2)
    optimizer = Plain([{"params": [a, b]}, {"params": [c]}])
    b.grad = torch.ones(2)
    ((group, params),) = optimizer._with_gradient()
    assert group is optimizer.param_groups[0]
    assert len(params) == 1
    assert params[0] is b


@pytest.mark.parametrize("lr", [0, 0.0, 1e-3, 5, torch.tensor(0.1), torch.tensor(1, dtype=torch.int64)])
def test_learning_rates_that_are_accepted(lr):
    check_lr("X", lr)


@pytest.mark.parametrize(
    "lr", [-1e-9, math.nan, math.inf, torch.tensor(-0.1), torch.tensor([0.1]), torch.tensor(math.nan)]
)
def test_learning_rates_that_are_refused(lr):
    with pytest.raises(ValueError, match=r"X: lr must be a finite number >= 0 \(float or 0-d tensor\), got"):
        check_lr("X", lr)


def test_state_types():
    expected = {
        torch.float64: torch.float64,
        torch.complex128: torch.float64,
        torch.float32: torch.float32,
        torch.complex64: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
    }
    for dtype, wide in expected.items():
        assert state_dtype(torch.ones(1, dtype=dtype)) == wide


def test_zeros_have_the_layout_of_the_parameter():
    p = torch.nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))
    zeros = zeros_for(p)
    assert zeros.stride() == p.stride()
    assert not zeros.requires_grad
    assert not zeros.any()
    z = zeros_for(parameter(3, dtype=torch.complex64))
    assert (z.shape, z.dtype) == ((3, 2), torch.float32)


def test_real_views_share_memory():
    z = torch.zeros(2, dtype=torch.complex64)
    as_real(z)[0, 1] = 3.0
    assert z[0] == 3j
    x = torch.ones(2)
    assert as_real(x) is x


def test_closures_run_with_gradients():
    with torch.no_grad():
        assert evaluate(torch.is_grad_enabled) is True
        assert evaluate(None) is None
