"""Condition number and gradient alignment: exact where they say so, bounds where they do not."""

import math

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks

from conjugo.curvature import condition_number, eigsh, from_dense, from_matvec, gradient_alignment


def with_values(values, dtype=torch.float64):
    values = torch.as_tensor(values, dtype=dtype)
    return from_matvec(lambda v: v * values, len(values), dtype=dtype, rows=True)


def turned(values, dtype=torch.float64):
    values = torch.as_tensor(values, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    matrix = turn @ torch.diag(values) @ turn.T
    return from_dense(((matrix + matrix.T) / 2).to(dtype)), turn.to(dtype)


# ---- condition number ----


@pytest.mark.parametrize("size", [1, 2, 3, 30, 120])
def test_a_small_matrix_is_exact(size):
    values = torch.linspace(0.5, 10, size, dtype=torch.float64) * torch.tensor([1.0, -1.0]).repeat(60)[:size]
    op, _ = turned(values)
    found = condition_number(op)
    assert found.exact
    assert found.value == pytest.approx(float(values.abs().max() / values.abs().min()), rel=1e-10)
    assert found.largest == pytest.approx(float(values.abs().max()), rel=1e-12)
    assert found.smallest == pytest.approx(float(values.abs().min()), rel=1e-10)
    assert found.n_matvec == op.n_matvec == size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_zeros_do_not_count(dtype):
    op, _ = turned([8.0, -4.0, 0.5] + [0.0] * 50, dtype)
    assert condition_number(op).value == pytest.approx(16, rel=1e-4)
    assert condition_number(op, rtol=0.2).value == pytest.approx(2, rel=1e-5)
    assert condition_number(op, rtol=0.9).value == pytest.approx(1)


def test_a_matrix_of_zeros_has_none():
    for size in (3, 400):
        found = condition_number(from_matvec(torch.zeros_like, size), dense_up_to=10)
        assert math.isnan(found.value)
        assert found.largest == 0
        assert found.exact == (size == 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("matvecs", [1, 5, 30, 100, 1000])
@pytest.mark.parametrize("kind", ["positive", "indefinite", "singular"])
def test_a_large_matrix_has_a_lower_bound(kind, matvecs, dtype):
    """Also where Ritz values lie between eigenvalues, or between them and zero."""
    values = torch.logspace(0, -3, 400, dtype=torch.float64)
    if kind == "indefinite":
        values[::2] *= -1
    if kind == "singular":
        values = torch.cat([values[:100], torch.zeros(300)])
    op = with_values(values, dtype)
    true = float(values.abs().max() / values[values != 0].abs().min())
    found = condition_number(op, dense_up_to=300, matvecs=matvecs)
    assert not found.exact
    assert 1 <= found.value <= true * (1 + 1e-4)
    assert found.smallest >= float(values[values != 0].abs().min()) * (1 - 1e-4)
    assert found.largest <= 1 + 1e-5
    assert found.n_matvec == op.n_matvec == min(matvecs, 398)
    assert str(found).startswith("at least ")
    if matvecs == 1000:
        assert found.value > true / 1.1
    assert condition_number(op).value == pytest.approx(true, rel=1e-3)


def test_the_bound_of_a_large_matrix_is_of_use():
    found = condition_number(with_values(torch.linspace(0.01, 1, 6000, dtype=torch.float64)))
    assert not found.exact
    assert 85 < found.value <= 100
    assert found.n_matvec == 100


def test_an_exact_number_says_so():
    assert str(condition_number(with_values([1.0, 4.0]))) == "4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, r"condition_number: rtol must be in \[0, 1\), or None, got -1.0"),
        ({"rtol": 1.0}, r"condition_number: rtol must be"),
        ({"dense_up_to": -1}, r"condition_number: dense_up_to must be >= 0, got -1"),
        ({"matvecs": 0}, r"condition_number: matvecs must be >= 1, got 0"),
    ],
)
def test_condition_number_refuses(options, message):
    op = with_values(torch.ones(20))
    with pytest.raises(ValueError, match=message):
        condition_number(op, **options)
    assert op.n_matvec == 0
    with pytest.raises(ValueError, match=r"the dtype of op must be float32 or float64, got torch.float16"):
        condition_number(with_values(torch.ones(20), torch.float16))


@pytest.mark.parametrize("size", [10, 100])
def test_products_that_are_not_finite(size):
    with pytest.raises(FloatingPointError, match="condition_number: a product of MatrixFree"):
        condition_number(with_values(torch.full((size,), torch.nan)), dense_up_to=50)


# ---- gradient alignment ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fractions_are_those_of_the_eigenvectors(dtype):
    values = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.rand(97)])
    op, turn = turned(values, dtype)
    gradient = torch.randn(100, dtype=dtype)
    found = gradient_alignment(op, 3, gradient)
    exact = (turn[:, :3].T @ gradient).square() / gradient.square().sum()
    assert (found.fractions - exact).abs().max() < (1e-9 if dtype == torch.float64 else 1e-4)
    assert found.total == pytest.approx(float(exact.sum()), rel=1e-4)
    assert found.pairs.values.tolist() == pytest.approx([9, 7, 5], rel=1e-5)
    assert found.n_matvec == op.n_matvec == found.pairs.n_matvec


def test_fractions_of_all_eigenvectors_make_one():
    for size in (3, 40):
        op, _ = turned(torch.linspace(-1, 1, size))
        found = gradient_alignment(op, size, torch.randn(size, dtype=torch.float64))
        assert found.fractions.shape == (size,)
        assert found.total == pytest.approx(1, rel=1e-12)


def test_the_gradient_of_a_quadratic_along_one_eigenvector():
    op = with_values(torch.cat([torch.tensor([5.0, 3.0]), torch.rand(500)]))
    op.gradient = lambda: torch.eye(502, dtype=torch.float64)[1] * 1e-200
    found = gradient_alignment(op, 2)
    assert found.fractions.tolist() == pytest.approx([0, 1], abs=1e-9)


def test_known_eigenpairs_and_options():
    op = with_values(torch.cat([torch.tensor([5.0, 3.0, 3.0]), torch.rand(500)]))
    gradient = torch.randn(503, dtype=torch.float64)
    pairs = eigsh(op, 3)
    before = op.n_matvec
    found = gradient_alignment(op, gradient=gradient, pairs=pairs)
    assert op.n_matvec == before
    assert found.n_matvec == 0
    assert found.pairs is pairs
    again = gradient_alignment(op, 3, gradient, block_size=2, seed=7)
    assert again.total == pytest.approx(found.total, abs=1e-6)
    lowest = gradient_alignment(op, 1, gradient, which="SA", max_matvec=300)
    assert lowest.pairs.values[0] < 0.1


def test_a_gradient_of_zeros_has_no_direction():
    found = gradient_alignment(with_values(torch.ones(5)), 2, torch.zeros(5, dtype=torch.float64))
    assert math.isnan(found.total)
    assert found.fractions.isnan().all()


def test_gradient_alignment_refuses():
    op = with_values(torch.ones(5))
    with pytest.raises(
        ValueError, match=r"gradient_alignment: gradient must be given, as MatrixFree has none of its own"
    ):
        gradient_alignment(op, 2)
    for gradient, message in (
        (torch.ones(4, dtype=torch.float64), r"the shape of gradient must be \(5,\), got \(4,\)"),
        (torch.ones(5), r"the dtype of gradient must be torch.float64, got torch.float32"),
        (torch.full((5,), torch.nan, dtype=torch.float64), r"the length of gradient must be finite, got nan"),
        (torch.full((5,), torch.inf, dtype=torch.float64), r"the length of gradient must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient_alignment(op, 2, gradient)
    with pytest.raises(ValueError, match=r"eigsh: k must be from 1 to P = 5, got 6"):
        gradient_alignment(op, 6, torch.ones(5, dtype=torch.float64))
    other = eigsh(with_values(torch.ones(4)), 2)
    with pytest.raises(ValueError, match=r"the shape of the eigenvectors must be \(k, 5\), got \(2, 4\)"):
        gradient_alignment(op, 2, torch.ones(5, dtype=torch.float64), pairs=other)
    assert op.n_matvec == 0


# ---- ranks ----


def diagnostics_of_ranks():
    rank, world = dist.get_rank(), dist.get_world_size()
    values = torch.linspace(0.1, 2, 300, dtype=torch.float64)
    part = torch.where(torch.arange(300) % world == rank, values, 0)

    def product(v):
        found = part * v
        dist.all_reduce(found)
        return found * (1 + 1e-15 * rank)  # ranks whose rounding differs

    op = from_matvec(product, 300, dtype=torch.float64)
    op.group = dist.group.WORLD
    gradient = torch.ones(300, dtype=torch.float64)
    aligned = gradient_alignment(op, 3, gradient)
    return condition_number(op), condition_number(op, dense_up_to=10), aligned.fractions


def test_all_ranks_get_the_same():
    one, two = ranks.run(2, diagnostics_of_ranks)
    assert one[:2] == two[:2]
    assert one[0].value == pytest.approx(20)
    assert one[1].value <= 20
    assert torch.equal(one[2], two[2])
    assert one[2].tolist() == pytest.approx([1 / 300] * 3, rel=1e-4)
