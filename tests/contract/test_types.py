"""Types, layouts, shapes and options: what parameters may look like, and what is refused."""

import pytest
import torch
from tests.contract.problems import assert_same, gradient, parameters, same, train
from tests.contract.rows import ROWS, cases, implementations, rows
from torch import nn

HALF = (torch.bfloat16, torch.float16)


@cases(
    "dtype",
    "stays close",
    lambda row: [torch.float32, *([] if "own state type" in row.exempt or "fused" in row.name else HALF)],
)
def test_every_type_goes_the_way_of_float64(row, dtype):
    """To the precision of the type: four steps, each with a rounding of values near 1."""
    params, exact = parameters(dtype=dtype), parameters(dtype=torch.float64)
    with torch.no_grad():
        for p, q in zip(params, exact):
            q.copy_(p)
    optimizer, oracle = row.make(params, lr=row.lr / 20), row.make(exact, lr=row.lr / 20)
    for t in range(4):
        for i, (p, q) in enumerate(zip(params, exact)):
            p.grad = gradient(q.detach(), i, t).to(dtype)
            q.grad = p.grad.double()
        row.step(optimizer)
        row.step(oracle)
    for p, q in zip(params, exact):
        assert p.dtype == dtype
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=32 * torch.finfo(dtype).eps)


@rows()
def test_types_may_be_mixed(row):
    a, b = parameters((3, 4), dtype=torch.float64), parameters((2, 2), dtype=torch.float32)
    params = [*a, *b]
    optimizer = row.make(params)
    before = [p.detach().clone() for p in params]
    train(row, optimizer, params, steps=3)
    assert [p.dtype for p in params] == [torch.float64, torch.float32]
    assert not any(same(p.detach(), q) for p, q in zip(params, before))


@rows()
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_pairs_of_real_ones(row, dtype):
    (z,) = parameters((3, 4), dtype=dtype)
    r = nn.Parameter(torch.view_as_real(z.detach()).clone())
    complex_one, real_one = row.make([z]), row.make([r])
    for t in range(5):
        z.grad = gradient(z, 0, t)
        r.grad = torch.view_as_real(z.grad).clone()
        row.step(complex_one)
        row.step(real_one)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.view_as_real(z.detach()), r.detach(), rtol=16 * eps, atol=16 * eps)


LAYOUTS = {
    "transposed": lambda x: x.clone().t().contiguous().t(),
    "every second": lambda x: torch.repeat_interleave(x, 2, dim=1)[:, ::2],
    "channels last": lambda x: x.reshape(2, 3, 2, 2).clone(memory_format=torch.channels_last),
}


@cases("layout", None, lambda row: [name for name in LAYOUTS if "fused" not in row.name or name != "every second"])
def test_the_layout_in_memory_changes_nothing(row, layout):
    plain = parameters((6, 4), dtype=torch.float64)
    arranged = [nn.Parameter(LAYOUTS[layout](plain[0].detach()))]
    shape = arranged[0].shape
    plain = [nn.Parameter(plain[0].detach().reshape(shape))]
    a, b = row.make(plain), row.make(arranged)
    strides = arranged[0].stride()
    for t in range(4):
        plain[0].grad = gradient(plain[0], 0, t).contiguous()
        arranged[0].grad = plain[0].grad.clone()
        if t % 2:  # gradients have the layout of the parameter, or another
            arranged[0].grad = torch.empty_like(arranged[0]).copy_(plain[0].grad)
        row.step(a)
        row.step(b)
    assert arranged[0].stride() == strides
    # Sums run in another order.
    torch.testing.assert_close(arranged[0].detach(), plain[0].detach(), rtol=1e-12, atol=1e-13)


@implementations()
def test_scalars_and_empty_tensors_are_parameters(row):
    params = parameters((), (0,), (0, 3), (1, 1), (2, 2))
    optimizer = row.make(params)
    before = [p.detach().clone() for p in params]
    train(row, optimizer, params, steps=3)
    assert [p.shape for p in params] == [b.shape for b in before]
    assert all(p.isfinite().all() for p in params)
    assert not same(params[0].detach(), before[0])
    assert not same(params[4].detach(), before[4])


@implementations()
def test_empty_tensors_do_not_matter(row):
    with_empty, without = parameters((2, 3), (0, 2)), parameters((2, 3))
    train(row, row.make(with_empty), with_empty, steps=4)
    train(row, row.make(without), without, steps=4)
    assert_same(with_empty[0], without[0])


@rows()
def test_nothing_but_empty_tensors_is_no_problem(row):
    params = parameters((0, 3))
    optimizer = row.make(params)
    train(row, optimizer, params, steps=2)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("row", "bad", "message"),
    [
        pytest.param(row, bad, message, id=f"{row.name}: {', '.join(bad)} {i}")
        for row in ROWS
        for i, (bad, message) in enumerate(row.errors)
    ],
)
def test_bad_options_are_named(row, bad, message):
    with pytest.raises(ValueError, match=message):
        row.make(parameters(), **bad)


@rows()
def test_no_parameters_at_all(row):
    with pytest.raises(ValueError, match="empty parameter list"):
        row.make([])


@rows("names what is wrong")
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integer_parameters_are_refused(row, dtype):
    with pytest.raises(TypeError, match=f"must be floating point or complex, got {dtype}"):
        row.make([torch.ones(2).to(dtype)])


@rows()
def test_a_parameter_in_two_groups_is_refused(row):
    (p,) = parameters((2, 2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        row.make([{"params": [p]}, {"params": [p]}])


@rows()
def test_results_of_operations_are_refused(row):
    (p,) = parameters((2, 2))
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        row.make([p * 2])
