"""Eigenpairs against dense eigenvalues and ARPACK: every end, multiple eigenvalues, exact structures, ranks, bad input."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.sparse.linalg import eigsh as arpack
from tests.distributed import ranks

from conjugo.curvature import eigenpairs, eigsh, from_dense, from_matvec
from conjugo.curvature._blocks import Random, exact_products, inner, norms, orthonormal, remove
from conjugo.curvature._ranks import agree, same
from conjugo.curvature.eigenpairs import Krylov, select
from conjugo.errors import UnknownName

ENDS = ["LA", "SA", "LM", "BE"]
DTYPES = [torch.float64, torch.float32]


def with_values(values, dtype=torch.float64):
    """The operator diag(values): the methods know of no coordinates, so that it is as good as any other."""
    values = torch.as_tensor(values, dtype=dtype)
    return from_matvec(lambda v: v * values, len(values), dtype=dtype, rows=True)


def uniform(n, low=0.0, high=1.0, seed=0):
    return low + (high - low) * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outliers(*tops, size=800):
    """*tops* and a bulk within [-0.3, 0.3]."""
    values = uniform(size, -0.3, 0.3)
    values[: len(tops)] = torch.tensor(tops, dtype=torch.float64)
    return values


def expected(values, k, which):
    values = torch.as_tensor(values, dtype=torch.float64).sort().values
    return values[select(values, k, which)]


def assert_eigenpairs(found, op, values, tol):
    """Values, true residuals, orthonormal vectors, order, types: those of eigenpairs of diag(values) to *tol*."""
    scale = float(torch.as_tensor(values).abs().max())
    eps = torch.finfo(op.dtype).eps
    k = len(found.values)
    assert found.converged
    assert found.values.dtype == found.residuals.dtype == torch.float64
    assert found.vectors.shape == (k, op.size)
    assert found.vectors.dtype == op.dtype
    assert (found.values.diff() <= 0).all()
    assert (found.residuals <= tol * scale).all()
    true = (op.matmat(found.vectors).double() - found.values[:, None] * found.vectors.double()).norm(dim=1)
    assert (true <= found.residuals + 20 * eps * scale).all()
    assert (inner(found.vectors, found.vectors) - torch.eye(k, dtype=torch.float64)).abs().max() < 20 * eps


# ---- what it should be ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("k", [1, 4, 7])
def test_the_ends_of_a_spectrum(k, which, dtype):
    values = torch.cat([outliers(9.0, 7.0, 6.5, 5.0, 4.0, 3.0, 2.5, 2.0), -2 * uniform(8, 0.5, 3.0, seed=1)])
    op = with_values(values, dtype)
    found = eigsh(op, k, which)
    assert_eigenpairs(found, op, values, 1e-6)
    assert found.verified
    assert found.n_matvec == found.matvecs == op.n_matvec - k  # those of assert_eigenpairs
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    assert (found.values - expected(values, k, which)).abs().max() < bound


def test_a_matrix_in_no_special_coordinates():
    turn = torch.linalg.qr(torch.randn(150, 150, dtype=torch.float64))[0]
    values = outliers(5.0, 4.0, -4.5, 3.0, size=150)
    op = from_dense(turn @ torch.diag(values) @ turn.T)
    found = eigsh(op, 3, "LM", tol=1e-10)
    assert found.values.tolist() == pytest.approx([5.0, 4.0, -4.5], abs=1e-12)
    assert ((found.vectors @ turn[:, :3]).abs() - torch.eye(3)[[0, 1, 2]]).abs().max() < 1e-8


@pytest.mark.parametrize("size", [1, 2, 5, 25])
@pytest.mark.parametrize("which", ENDS)
def test_small_matrices_are_exact(size, which):
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = matrix + matrix.T
    dense = torch.linalg.eigvalsh(matrix)
    for k in {1, (size + 1) // 2, size}:
        op = from_dense(matrix)
        found = eigsh(op, k, which)
        assert found.values.tolist() == pytest.approx(expected(dense, k, which).tolist(), rel=1e-8)
        assert_eigenpairs(found, op, dense, 1e-12)
        assert found.verified


def test_all_but_a_few_of_the_eigenvalues():
    values = uniform(200, -1, 1)
    op = with_values(values)
    found = eigsh(op, 190, max_matvec=200, basis_size=195)
    assert (found.values - expected(values, 190, "LA")).abs().max() < 1e-8


def test_scale_and_shift():
    values = outliers(5.0, 4.0, 3.0)
    plain = eigsh(with_values(values), 3, tol=1e-9)
    for factor in (1e-30, 1e30):
        assert (eigsh(with_values(factor * values), 3, tol=1e-9).values / factor - plain.values).abs().max() < 1e-12
        single = eigsh(with_values(factor * values, torch.float32), 3, tol=1e-6)
        assert (single.values / factor - plain.values).abs().max() < 1e-5
    mirrored = eigsh(with_values(1 - values), 3, "SA", tol=1e-9)
    assert (1 - mirrored.values.flip(0) - plain.values).abs().max() < 1e-12


def test_a_seed_is_a_run_and_a_start_vector_another():
    values = outliers(5.0, 4.0, 3.0)
    one, two = (eigsh(with_values(values), 3, seed=4) for _ in range(2))
    assert torch.equal(one.vectors, two.vectors)
    assert not torch.equal(one.vectors, eigsh(with_values(values), 3, seed=5).vectors)
    start = torch.zeros(800, dtype=torch.float64)
    start[0] = 7.0  # an eigenvector: nothing new comes of it
    op = with_values(values)
    found = eigsh(op, 3, v0=start)
    assert_eigenpairs(found, op, values, 1e-6)
    assert (found.values - expected(values, 3, "LA")).abs().max() < 1e-9
    assert start[0] == 7.0


def test_half_from_either_end():
    values = outliers(5.0, 4.0, 3.0, -2.0, -3.0)
    assert eigsh(with_values(values), 4, "BE").values.tolist() == pytest.approx([5, 4, -2, -3], abs=1e-9)
    assert eigsh(with_values(values), 5, "BE").values.tolist() == pytest.approx([5, 4, 3, -2, -3], abs=1e-9)
    assert eigsh(with_values(values), 1, "BE").values.tolist() == pytest.approx([5], abs=1e-9)


# ---- eigenvalues that occur several times ----

THREEFOLD = [5.0, 3.0, 3.0, 3.0, 2.0, 1.5]


def test_one_krylov_space_shows_no_copies():
    """Which is why there are blocks and the search for copies: the tests below would find nothing to do otherwise."""
    found = eigsh(with_values(outliers(*THREEFOLD)), 4, verify=False)
    assert found.values.tolist() == pytest.approx([5, 3, 2, 1.5], abs=1e-6)
    assert not found.verified


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_are_found(block_size, dtype, seed):
    values = outliers(*THREEFOLD)
    op = with_values(values, dtype)
    found = eigsh(op, 6, block_size=block_size, seed=seed)
    assert_eigenpairs(found, op, values, 1e-6)
    assert found.values.tolist() == pytest.approx(sorted(THREEFOLD, reverse=True), abs=1e-5)
    assert found.verified == (block_size == 1)


@pytest.mark.parametrize("which", ["LM", "BE"])
def test_copies_at_both_ends(which):
    values = outliers(5.0, 5.0, 4.0, -5.0, -5.0, -4.0)
    for k, tops in ((4, [5, 5, -5, -5]), (6, [5, 5, 4, -4, -5, -5])):
        assert eigsh(with_values(values), k, which).values.tolist() == pytest.approx(tops, abs=1e-6)


def test_many_copies():
    values = outliers(*[4.0] * 9, *[2.0] * 9)
    for block_size, verify in ((1, None), (2, True), (9, None)):
        op = with_values(values)
        found = eigsh(op, 12, block_size=block_size, verify=verify)
        assert_eigenpairs(found, op, values, 1e-6)
        assert found.values.tolist() == pytest.approx([4.0] * 9 + [2.0] * 3, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize(
    ("values", "top"),
    [
        (torch.zeros(300), [0, 0, 0, 0, 0]),
        (torch.full((300,), -7.0), [-7] * 5),
        (torch.tensor([1.0, 2.0, 3.0]).repeat(100), None),
        (torch.cat([torch.ones(2), torch.zeros(298)]), [1, 1, 0, 0, 0]),
    ],
    ids=["zero", "multiple of the identity", "three values", "projector"],
)
def test_invariant_spaces_end_early(values, top, block_size, dtype):
    op = with_values(values, dtype)
    found = eigsh(op, 5, block_size=block_size)
    # A block of 4 sees 4 copies of each value at most.
    top = top or ([3] * 5 if block_size == 1 else [3] * 4 + [2])
    assert found.values.tolist() == pytest.approx(top, abs=1e-5)
    assert_eigenpairs(found, op, values, 1e-6)
    assert op.n_matvec - 5 < 40


def test_no_eigenvalue_beyond_those_found_is_overlooked_more_often_than_promised():
    """The search for copies ends soon and is right: 60 seeds, where a lenient rule would be wrong in some."""
    values = outliers(5.0, 5.0, 1.0, size=400)
    spent = []
    for seed in range(60):
        found = eigsh(with_values(values), 2, seed=seed)
        assert found.values.tolist() == pytest.approx([5, 5], abs=1e-6)
        spent.append(found.n_matvec)
    assert max(spent) < 40


def test_the_chance_of_overlooking_a_copy_is_the_one_that_was_set(monkeypatch):
    """A search that may be wrong in 20 % of all cases is so where the next eigenvalue is near (100 seeds, 3 sd)."""
    monkeypatch.setattr(eigenpairs, "OVERLOOKED", 0.2)
    values = outliers(1.0, 1.0, 0.99, size=400)
    wrong = sum(float(eigsh(with_values(values), 2, seed=seed).values[1]) < 0.995 for seed in range(100))
    assert 8 <= wrong <= 32


def test_the_overlap_with_an_unseen_eigenvector_is_no_larger_than_the_bound():
    """x' r of an eigenvector x beyond the Ritz values, in multiples of x' F: its length over the basis is at most 1."""
    values = outliers(1.0, size=200)
    op = with_values(values)
    krylov = Krylov(op, 8, 1, Random(op, 3), "test")
    krylov.start()
    first = krylov._basis[0].clone()
    for _ in range(8):
        krylov.grow()
    trail = krylov.trail(1.0, 0)
    along = krylov._basis[:, 0]
    assert (along[:8] - trail * along[8]).abs().max() < 1e-8  # F has little of x: its rounding counts 2000-fold
    assert 0 < abs(float(first[0])) <= abs(float(trail[0] / trail.norm())) + 1e-8


# ---- what it costs ----

SPECTRA = {
    "1/i": 1 / torch.arange(1, 2001, dtype=torch.float64),
    "outliers": torch.cat([torch.logspace(1, 0, 10, dtype=torch.float64), uniform(1990, -0.2, 0.2) ** 3]),
    "normal": torch.randn(2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("which", "k"), [("LA", 1), ("LA", 10), ("LM", 5), ("LM", 20)])
def test_no_more_products_than_arpack(name, which, k):
    values = SPECTRA[name]
    op = with_values(values)
    start = Random(op, 0).normal(1)[0]
    theirs = arpack(op.to_scipy(), k, which=which, tol=1e-6, v0=start.numpy(), return_eigenvectors=False)
    spent = op.n_matvec
    found = eigsh(op, k, which, tol=1e-6, verify=False, v0=start)
    assert found.converged
    assert (found.values - torch.from_numpy(np.sort(theirs)[::-1].copy())).abs().max() < 1e-6 * values.abs().max()
    assert found.n_matvec <= spent


def test_memory_is_as_promised():
    op = with_values(outliers(5.0, size=100_000))
    sizes = []
    empty = torch.empty

    def seen(*shape, **options):
        sizes.append(shape)
        return empty(*shape, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", seen)
        eigsh(op, 1)
    assert sum(shape[0] for shape in sizes if shape[-1] == op.size) == 25  # 24 and a block


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("limit", [12, 50])
def test_too_few_products_are_a_warning(limit, block_size):
    values = torch.linspace(0, 1, 2000, dtype=torch.float64)
    op = with_values(values)
    with pytest.warns(
        UserWarning, match=r"eigsh: after \d+ products \d+ of 10 residuals are above .*; raise max_matvec"
    ):
        found = eigsh(op, 10, max_matvec=limit, block_size=block_size)
    assert not found.converged
    assert not found.verified
    assert limit - block_size < found.n_matvec <= limit
    assert op.n_matvec == found.n_matvec
    assert (found.residuals > 1e-6).any()
    assert (found.values < 1).all()
    assert found.vectors.shape == (10, 2000)


# ---- vectors ----


def test_matrix_products_are_exact_whatever_the_program_has_set():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with exact_products():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), exact_products():
            raise KeyError
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_inner_products_are_summed_in_float64():
    x = torch.rand(2, 300_000) + 1
    assert (inner(x, x) / (x.double() @ x.double().T) - 1).abs().max() < 1e-6
    assert norms(torch.full((1, 4), 1e30)).item() == pytest.approx(2e30)
    assert norms(torch.full((1, 4), 1e-35)).item() == pytest.approx(2e-35, rel=1e-6)
    assert norms(torch.zeros(2, 4)).tolist() == [0, 0]


def test_dependent_rows_add_nothing():
    x = torch.randn(4, 50, dtype=torch.float64)
    x[2] = x[0] - 2 * x[1]
    q, r = orthonormal(x, 1e-12, None)
    assert q.shape == (3, 50)
    assert (inner(q, q) - torch.eye(3)).abs().max() < 1e-14
    assert (r.T @ q - x).abs().max() < 1e-13
    taken = remove(q, x)
    assert (taken - r).abs().max() < 1e-13
    assert x.abs().max() < 1e-13


# ---- ranks ----


def test_agreement_of_one_is_the_value_itself():
    value = torch.ones(3)
    assert agree(value, None) is value
    assert agree(2, None) == 2
    assert same(value, torch.zeros(1), None) is value


def values_of_ranks():
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    given = torch.arange(6.0).reshape(2, 3).T + 10 * rank
    tensor = agree(given, group)
    own = torch.equal(given, torch.arange(6.0).reshape(2, 3).T + 10 * rank)
    pair = dist.new_group([1, 0]) if world == 2 else group
    mine = torch.full((2,), float(rank))
    own &= same(mine, torch.ones(3), group) is mine
    own &= torch.equal(same(mine, torch.full((3,), 1 + 1e-6 * rank), group), torch.zeros(2))
    return tensor, agree(rank + 0.5, group), agree(rank + 7, group), agree(rank == 0, group), own, agree(rank, pair)


def test_ranks_agree_on_what_rank_0_has():
    for tensor, number, count, truth, own, first in ranks.run(2, values_of_ranks):
        assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3).T)
        assert (number, count, truth, own) == (0.5, 7, True, True)
        assert isinstance(count, int)
        assert truth is True
        assert first in (0, 1)


def shared_operator(noise=0.0):
    """diag(outliers) of which each rank has a part; the others' rounding is told apart by *noise*."""
    values = outliers(5.0, 5.0, 4.0, 3.0, -2.0, size=300)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = torch.zeros_like(values)
    parts[rank::world] = values[rank::world]

    def product(v):
        found = parts * v
        if dist.is_initialized():
            dist.all_reduce(found)
        return found * (1 + noise * rank)

    op = from_matvec(product, len(values), dtype=torch.float64)
    if dist.is_initialized():
        op.group = dist.group.WORLD
    return op


def eigenpairs_of_ranks(noise, block_size):
    op = shared_operator(noise)
    found = eigsh(op, 4, block_size=block_size)
    small = from_matvec(lambda v: 2 * v, 3, dtype=torch.float64)
    small.group = op.group
    return found.values, found.vectors, found.residuals, found.n_matvec, eigsh(small, 2).values


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("noise", [0.0, 1e-14])
def test_all_ranks_take_the_same_branches(noise, block_size):
    one, two = ranks.run(2, eigenpairs_of_ranks, noise, block_size)
    alone = eigsh(shared_operator(), 4, block_size=block_size)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[2], two[2])
    assert one[3] == two[3] == alone.n_matvec
    assert torch.equal(one[1], two[1])
    assert one[0].tolist() == pytest.approx([5, 5, 4, 3], abs=1e-9)
    assert (one[0] - alone.values).abs().max() < 1e-12
    assert two[4].tolist() == [2, 2]


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"eigsh: k must be from 1 to P = 50, got 0"),
        ({"k": 51}, r"eigsh: k must be from 1 to P = 50, got 51"),
        (
            {"k": 2, "tol": 1e-17},
            r"eigsh: tol must be in \[2.2e-16, 1\), where 2.2e-16 is the rounding of torch.float64",
        ),
        ({"k": 2, "tol": 1.0}, r"eigsh: tol must be in"),
        ({"k": 2, "block_size": 0}, r"eigsh: block_size must be >= 1, got 0"),
        ({"k": 5, "max_matvec": 4}, r"eigsh: max_matvec must be >= k \+ block_size - 1 = 5, got 4"),
        ({"k": 49, "max_matvec": 49}, r"eigsh: max_matvec must be >= 50 for so small a matrix, got 49"),
        ({"k": 5, "basis_size": 6}, r"eigsh: basis_size must be >= k \+ 2 block_size = 7, or None, got 6"),
        ({"k": 2, "v0": torch.ones(3)}, r"eigsh: the shape of v0 must be \(50,\), got \(3,\)"),
        ({"k": 2, "v0": torch.ones(50)}, r"eigsh: the dtype of v0 must be torch.float64, got torch.float32"),
        ({"k": 2, "v0": torch.zeros(50, dtype=torch.float64)}, r"eigsh: the length of v0 must be positive and finite"),
        ({"k": 2, "v0": torch.full((50,), torch.nan, dtype=torch.float64)}, r"eigsh: the length of v0 must be"),
    ],
)
def test_values_out_of_range(options, message):
    op = with_values(torch.ones(50))
    with pytest.raises(ValueError, match=message):
        eigsh(op, **options)
    assert op.n_matvec == 0


def test_names_and_types_that_do_not_exist():
    with pytest.raises(UnknownName, match=r"unknown eigsh which 'LR'.*Known: BE, LA, LM, SA"):
        eigsh(with_values(torch.ones(50)), 2, "LR")
    with pytest.raises(ValueError, match=r"eigsh: the dtype of op must be float32 or float64, got torch.bfloat16"):
        eigsh(with_values(torch.ones(50), torch.bfloat16), 2)


@pytest.mark.parametrize("size", [10, 100])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_products_that_are_not_finite(bad, size):
    values = torch.ones(size)
    values[3] = bad
    with pytest.raises(FloatingPointError, match=r"eigsh: a product of MatrixFree .*is not finite"):
        eigsh(with_values(values), 2)
