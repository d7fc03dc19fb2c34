"""Lanczos against exact quadratures, polynomials and whole spectra; orthogonality, breakdowns, places of the basis, ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks

from conjugo.curvature import from_dense, from_matvec, lanczos
from conjugo.curvature.lanczos import Basis, Recurrence
from conjugo.errors import UnknownName

DTYPES = [torch.float64, torch.float32]


def with_values(values, dtype=torch.float64):
    values = torch.as_tensor(values, dtype=dtype)
    return from_matvec(lambda v: v * values, len(values), dtype=dtype, rows=True)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spectrum(size=3000):
    """Ten large values, which one run finds and would find again and again, over a bulk."""
    return torch.cat([torch.arange(10.0, 0, -1, dtype=torch.float64), normal(size - 10).abs() / 10])


def symmetric(size, seed=0):
    half = normal(size, size, seed=seed)
    return half + half.T


# ---- what it should be ----


def test_two_by_two():
    op = from_dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    found = lanczos(op, torch.tensor([3.0, 0.0], dtype=torch.float64), 2)
    assert found.alpha.tolist() == pytest.approx([2, 2])
    assert found.beta.tolist() == pytest.approx([1])
    values, weights, residuals = found.ritz()
    assert values.tolist() == pytest.approx([1, 3])
    assert weights.tolist() == pytest.approx([0.5, 0.5])
    assert residuals.tolist() == [0, 0]
    assert found.breakdown == 2


def test_three_values():
    found = lanczos(with_values([0, 1, 3]), torch.ones(3, dtype=torch.float64), 3)
    assert found.alpha.tolist() == pytest.approx([4 / 3, 38 / 21, 6 / 7], abs=1e-14)
    assert found.beta.tolist() == pytest.approx([1.247219128925, 0.742307488958], abs=1e-12)
    assert found.breakdown == 3
    assert found.ritz().values.tolist() == pytest.approx([0, 1, 3], abs=1e-14)
    assert found.ritz().weights.tolist() == pytest.approx([1 / 3] * 3, abs=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_polynomials_up_to_twice_the_steps_are_exact(steps):
    matrix = symmetric(40) / 10
    v = normal(40, seed=1)
    v /= v.norm()
    values, weights, _ = lanczos(from_dense(matrix), v, steps).ritz()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-14)
    for p in range(2 * steps + 1):
        truth = float(v @ torch.linalg.matrix_power(matrix, p) @ v)
        off = abs(float(weights @ values**p) - truth) / float(weights @ values.abs() ** p)
        assert (off < 1e-12) == (p < 2 * steps)


def test_as_many_steps_as_dimensions_give_all_eigenvalues():
    matrix = symmetric(60)
    found = lanczos(from_dense(matrix), normal(60, seed=1), 60)
    truth = torch.linalg.eigvalsh(matrix)
    assert (found.ritz().values - truth).abs().max() < 1e-12 * truth.abs().max()
    assert found.breakdown == 60


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("values", "distinct"),
    [([7.0] * 50, [7.0]), ([0.0] * 50, [0.0]), ([1.0] * 20 + [-2.0] * 5 + [4.0] * 25, [-2, 1, 4])],
    ids=["constant", "zero", "three values"],
)
def test_an_invariant_space_ends_it(values, distinct, dtype):
    op = with_values(values, dtype)
    found = lanczos(op, normal(50, dtype=dtype), 20)
    assert found.breakdown == op.n_matvec == len(found.alpha) == len(found.basis) == len(distinct)
    assert len(found.beta) == len(distinct) - 1
    assert found.residual == 0
    assert found.ritz().values.tolist() == pytest.approx(distinct, abs=1e-6)
    assert float(found.ritz().weights.sum()) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("factor", [3.0, -0.25, 1e150, 1e-150])
def test_scale_and_shift(factor):
    matrix, v = symmetric(50), normal(50, seed=1)
    shift = 2 * factor
    plain = lanczos(from_dense(matrix), v, 12).ritz()
    moved = lanczos(from_dense(factor * matrix + shift * torch.eye(50, dtype=torch.float64)), v, 12).ritz()
    values, weights = factor * plain.values + shift, plain.weights
    if factor < 0:
        values, weights = values.flip(0), weights.flip(0)
    assert (moved.values - values).abs().max() < 1e-11 * abs(factor)
    assert (moved.weights - weights).abs().max() < 1e-11


def test_float32_does_not_stop_early_where_squares_vanish():
    found = lanczos(with_values(1e-25 * spectrum(), torch.float32), normal(3000, dtype=torch.float32), 20)
    assert found.breakdown is None
    assert float(found.ritz().values[-1]) == pytest.approx(1e-24, rel=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_the_basis_is_orthonormal_and_makes_t(dtype, bound):
    values = spectrum(20_000)
    op = with_values(values, dtype)
    found = lanczos(op, normal(20_000, dtype=dtype), 100)
    q = found.basis.double()
    assert (q @ q.T - torch.eye(100)).abs().max() < bound
    t = torch.diag(found.alpha) + torch.diag(found.beta, 1) + torch.diag(found.beta, -1)
    assert ((q * values) @ q.T - t).abs().max() < 10 * 2 * bound
    copies = (found.ritz().values > 9.9).sum()
    assert copies == 1


def test_a_vector_of_which_little_is_left_is_made_orthogonal_again():
    """All but 1e-8 of each product lies along the locked row: one pass of Gram-Schmidt leaves 1e-8 of it."""
    u, w = torch.linalg.qr(normal(200, 2))[0].T
    bulk = normal(200, seed=1)
    op = from_dense(1e8 * (torch.outer(u, w) + torch.outer(w, u)) + torch.diag(bulk))
    locked, basis = Basis(op, 1), Basis(op, 10)
    locked.append(u)
    recurrence = Recurrence(op, locked.project(normal(200, seed=2)), 10, basis, locked=locked)
    while not recurrence.done:
        recurrence.take(op.matvec(recurrence.vector))
    q = basis.rows
    assert (q @ u).abs().max() < 1e-13
    assert (q @ q.T - torch.eye(10)).abs().max() < 1e-13


def test_residuals_and_ritz_vectors():
    values = spectrum()
    op = with_values(values)
    found = lanczos(op, normal(3000), 25)
    ritz = found.ritz()
    chosen = [24, 23, 10, 0]
    x = found.ritz_vectors(chosen)
    assert x.shape == (4, 3000)
    true = (op.matmat(x) - ritz.values[chosen][:, None] * x).norm(dim=1)
    assert (true - ritz.residuals[chosen]).abs().max() < 1e-12
    assert ritz.residuals[10] > 1e-3
    assert found.ritz_vectors([]).shape == (0, 3000)
    q_next = op.matmat(found.basis[-1:]) - found.alpha[-1] * found.basis[-1] - found.beta[-1] * found.basis[-2]
    assert float(q_next.norm()) == pytest.approx(found.residual, rel=1e-10)


def test_without_orthogonalisation_values_come_in_copies_but_masses_add_up():
    values, v = spectrum(), normal(3000)
    found = lanczos(with_values(values), v, 80, reorth="none")
    full = lanczos(with_values(values), v, 80)
    assert found.basis is None
    near = found.ritz().values > 9.9
    assert near.sum() >= 2
    assert float(found.ritz().weights[near].sum()) == pytest.approx(float(full.ritz().weights[-1]), rel=1e-6)
    with pytest.raises(ValueError, match=r"LanczosResult\.ritz_vectors: reorth must be 'full'"):
        found.ritz_vectors([0])


def test_a_product_may_be_the_vector_itself():
    v = normal(30)
    found = lanczos(from_matvec(lambda x: x, 30, dtype=torch.float64, rows=True), v, 3)
    assert found.alpha.tolist() == pytest.approx([1])
    assert torch.equal(v, normal(30))
    assert (found.basis[0] - v / v.norm()).abs().max() < 1e-15


# ---- where the basis is ----


def test_a_basis_of_another_type():
    values, v = spectrum(), normal(3000, dtype=torch.float32)
    op = with_values(values, torch.float32)
    plain, wide, narrow = (lanczos(op, v, 40, basis_dtype=t) for t in (None, torch.float64, torch.bfloat16))
    assert plain.basis.dtype == torch.float32
    assert wide.basis.dtype == torch.float64
    assert narrow.basis.dtype == torch.bfloat16
    gram = wide.basis @ wide.basis.T
    assert (gram - torch.eye(40, dtype=torch.float64)).abs().max() < 1e-12
    exact = lanczos(with_values(values), v.double(), 40).ritz()
    for found, bound in ((wide, 1e-6), (plain, 1e-5), (narrow, 5e-3)):
        assert (found.ritz().values[-5:] - exact.values[-5:]).abs().max() < bound
        assert found.ritz_vectors([0]).dtype == torch.float32
    assert (narrow.ritz().values > 9.9).sum() == 1


def test_a_narrow_basis_serves_orthogonality_only():
    """The recurrence itself has its last two vectors as they are. With rounded ones the error is 15 times this."""
    axis = normal(3000, seed=2)
    axis /= axis.norm()
    values = spectrum()

    def product(x):  # no special coordinates
        x = x - 2 * (x @ axis)[:, None] * axis
        x = x * values
        return x - 2 * (x @ axis)[:, None] * axis

    op32 = from_matvec(lambda x: product(x.double()), 3000, rows=True)
    v = normal(3000, dtype=torch.float32)
    found = lanczos(op32, v, 60, basis_dtype=torch.bfloat16).ritz()
    exact = lanczos(from_matvec(product, 3000, dtype=torch.float64, rows=True), v.double(), 60).ritz()
    assert (found.values[-10:] - exact.values[-10:]).abs().max() < 3e-3
    assert 3000 * (found.weights[-10:] - exact.weights[-10:]).abs().max() < 1e-2


def test_a_basis_on_another_device():
    """The same numbers; here a device is told from another by its index only."""
    v = normal(3000)
    plain, elsewhere = (lanczos(with_values(spectrum()), v, 30, basis_device=d) for d in (None, "cpu:0"))
    assert torch.equal(plain.alpha, elsewhere.alpha)
    assert torch.equal(plain.beta, elsewhere.beta)


def shared_operator(noise=0.0):
    """diag(spectrum) of which each rank has a part; the ranks' rounding differs by *noise*."""
    values = spectrum(301)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = torch.zeros_like(values)
    parts[rank::world] = values[rank::world]

    def product(v):
        found = parts * v
        if dist.is_initialized():
            dist.all_reduce(found)
        return found * (1 + noise * rank)

    op = from_matvec(product, len(values), dtype=torch.float64)
    op.group = dist.group.WORLD if dist.is_initialized() else None
    return op


def lanczos_of_ranks(noise, shard):
    found = lanczos(shared_operator(noise), normal(301), 30, shard_basis=shard)
    return found.alpha, found.beta, found.residual, found.basis.shape, found.ritz_vectors([29, 0]), *found.ritz()


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("noise", [0.0, 1e-14])
def test_ranks_agree_with_each_other_and_with_one_process(noise, shard):
    world = 2
    one, two = ranks.run(world, lanczos_of_ranks, noise, shard)
    alone = lanczos(shared_operator(), normal(301), 30)
    assert [tuple(x[3]) for x in (one, two)] == ([(30, 151), (30, 150)] if shard else [(30, 301)] * 2)
    for a, b in zip(one[:3] + one[4:], two[:3] + two[4:], strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert (one[0] - alone.alpha).abs().max() < 1e-9
    assert (one[1] - alone.beta).abs().max() < 1e-9
    assert (one[4].abs() - alone.ritz_vectors([29, 0]).abs()).abs().max() < 1e-8


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"lanczos: steps must be from 1 to P = 5, got 0"),
        ({"steps": 6}, r"lanczos: steps must be from 1 to P = 5, got 6"),
        ({"v0": torch.ones(4)}, r"lanczos: the shape of v0 must be \(5,\), got \(4,\)"),
        ({"v0": torch.ones(5, dtype=torch.float64)}, r"lanczos: the dtype of v0 must be torch.float32"),
        ({"v0": torch.zeros(5)}, r"lanczos: the length of v0 must be positive and finite, got 0.0"),
        ({"v0": torch.full((5,), math.inf)}, r"lanczos: the length of v0 must be positive and finite"),
        ({"breakdown_tol": 1.0}, r"lanczos: breakdown_tol must be in \[0, 1\) or None, got 1.0"),
        ({"basis_dtype": torch.int64}, r"lanczos: basis_dtype must be float64, float32, bfloat16 or None"),
        ({"shard_basis": True}, r"lanczos: shard_basis must be False for an operator without process group"),
    ],
)
def test_bad_input_is_refused_before_any_product(options, message):
    op = with_values(torch.ones(5), torch.float32)
    with pytest.raises(ValueError, match=message):
        lanczos(op, **{"v0": torch.ones(5), "steps": 3} | options)
    assert op.n_matvec == 0


def test_an_unknown_reorthogonalisation():
    with pytest.raises(UnknownName, match="did you mean 'full'"):
        lanczos(with_values([1.0, 2.0]), torch.ones(2, dtype=torch.float64), 1, reorth="ful")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite(bad):
    values = torch.ones(20, dtype=torch.float64)
    calls = []

    def product(v):
        calls.append(1)
        return values * v * torch.arange(20) if len(calls) < 3 else torch.where(torch.arange(20) == 7, bad, v)

    with pytest.raises(FloatingPointError, match="lanczos: product 3 of MatrixFree is not finite"):
        lanczos(from_matvec(product, 20, dtype=torch.float64), torch.ones(20, dtype=torch.float64), 5)


def test_the_callback_counts_steps():
    seen = []
    lanczos(with_values(spectrum()), normal(3000), 4, callback=seen.append)
    assert seen == [1, 2, 3, 4]
