"""Orthogonalised gradients, and Adam in a Kronecker eigenbasis: against twins in NumPy, limits, bad input, resume."""

import copy
import io
import logging
import math

import numpy as np
import pytest
import torch
from tests.contract.problems import assert_same
from torch import nn

from conjugo.optim import NLCG, _matrix_products, kronecker, orthogonal
from conjugo.optim._fused import kernels
from conjugo.optim._matrix_products import symmetric_product
from conjugo.optim.adaptive_preconditioner import AdamDiagonal
from conjugo.optim.kronecker import Kronecker
from conjugo.optim.orthogonal import Orthogonal, orthogonalized

BAND = (0.65, 1.25)
"""Where five Newton-Schulz steps bring singular values that are at least 1/700 of the norm."""


def everything(p):
    """Every parameter with two dimensions or more is a matrix."""
    return True


def nothing(p):
    return False


def gradients(shapes, count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        for _ in range(count)
    ]


def parameters(shapes, dtype=torch.float64):
    return [nn.Parameter(w.to(dtype)) for w in gradients(shapes, 1, seed=99)[0]]


def run(optimizer, params, steps):
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.dtype).clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


def preconditioned(precond, grads, **options):
    """P g of the last of *grads*: what one parameter moves by with beta = 0 and a learning rate of 1."""
    p = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = NLCG([p], lr=1.0, beta_max=0.0, precond=precond, **options)
    for g in grads:
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
    return before - p.detach()


# ---- Adam ----


@pytest.mark.parametrize("foreach", [False, True])
def test_without_memory_it_is_adam_without_momentum(foreach):
    shapes, results = [(3, 4), (5,), (2, 3, 2), ()], []
    for make in (
        lambda p: NLCG(p, lr=0.01, beta_max=0.0, precond="adam", foreach=foreach),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.99), eps=1e-8),
    ):
        params = parameters(shapes)
        results.append(run(make(params), params, gradients(shapes, 7)))
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)


def test_adam_and_fletcher_reeves_by_hand():
    """The whole method, with beta, in NumPy."""
    beta2, eps, lr, limit = 0.9, 1e-3, 0.1, 0.8
    shapes, steps = [(4, 3), (6,)], gradients([(4, 3), (6,)], 6)
    params = parameters(shapes)
    w = np.concatenate([p.detach().numpy().ravel() for p in params])
    optimizer = NLCG(params, lr=lr, beta_max=limit, precond=AdamDiagonal(beta2=beta2, eps=eps))
    found = run(optimizer, params, steps)
    v, d, before = np.zeros_like(w), np.zeros_like(w), None
    for n, grads in enumerate(steps, 1):
        g = np.concatenate([x.numpy().ravel() for x in grads])
        v = beta2 * v + (1 - beta2) * g**2
        z = g / (np.sqrt(v / (1 - beta2**n)) + eps)
        beta = 0.0 if before is None else min(g @ z / before, limit)
        d, before = beta * d - z, g @ z
        w = w + lr * d
    np.testing.assert_allclose(np.concatenate([p.numpy().ravel() for p in found]), w, rtol=1e-12)


def test_the_metric_of_adam():
    params = parameters([(3, 2)])
    optimizer = NLCG(params, lr=0.1, precond="adam")
    assert torch.equal(optimizer.metric()[params[0]], torch.ones(3, 2, dtype=torch.float64))
    (g,) = gradients([(3, 2)], 1)[0]
    run(optimizer, params, [[g]])
    torch.testing.assert_close(optimizer.metric()[params[0]] * g, g.sign(), rtol=1e-6, atol=0)
    for precond in ("orthogonal", "kron"):
        assert NLCG(parameters([(32, 32), (3,)]), precond=precond).metric() == {}


# ---- orthogonal ----


def matrix_with(values, rows, columns, seed=0):
    """A matrix with the singular values *values*, and its factor U V^T."""
    random = np.random.default_rng(seed)
    k = len(values)
    u, v = (np.linalg.qr(random.standard_normal((n, k)))[0] for n in (rows, columns))
    return torch.from_numpy(u * values @ v.T), u @ v.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (16, 48), (48, 16)])
def test_singular_values_become_about_one_and_singular_vectors_stay(dtype, rows, columns):
    values = np.geomspace(1, 2e-3, 16)
    g, factor = matrix_with(values, rows, columns)
    z = orthogonalized(g.to(dtype)[None])[0]
    assert z.dtype == dtype
    found = np.linalg.svd(z.double().numpy(), compute_uv=False)[:16]
    assert found.min() > BAND[0]
    assert found.max() < BAND[1]
    # The same singular vectors: U^T Z V is diagonal, so Z and the factor differ by the band only.
    error = np.linalg.norm(z.double().numpy() - factor, 2)
    assert error < 1 - BAND[0]
    cosine = (z.double().numpy() * factor).sum() / (np.linalg.norm(z.double().numpy()) * np.linalg.norm(factor))
    assert cosine > 0.97


def test_products_in_bfloat16_are_right_to_a_few_per_cent():
    for dtype in (torch.float32, torch.float64):
        g = matrix_with(np.geomspace(1, 2e-2, 16), 16, 48)[0].to(dtype)
        exact = preconditioned(Orthogonal(dtype=torch.float64), [g])
        found = preconditioned(Orthogonal(dtype=torch.bfloat16), [g])
        assert found.dtype == dtype
        assert 1e-4 < ((found - exact).norm() / exact.norm()).item() < 0.03


def test_newton_schulz_step_by_step_on_singular_values():
    values = np.geomspace(3, 1e-4, 8)
    g, _ = matrix_with(values, 8, 30)
    x = values / np.linalg.norm(values)
    for steps in (1, 2, 5, 7):
        y = x.copy()
        for _ in range(steps):
            y = 3.4445 * y - 4.7750 * y**3 + 2.0315 * y**5
        found = np.linalg.svd(orthogonalized(g[None], steps)[0].numpy(), compute_uv=False)
        np.testing.assert_allclose(found, np.sort(y)[::-1], rtol=1e-9)


def test_the_scale_and_the_root_mean_square():
    for shape in ((32, 64), (64, 32), (32, 4, 3, 3)):
        (g,) = gradients([shape], 1)[0]
        z = preconditioned("orthogonal", [g])
        rows, columns = shape[0], math.prod(shape[1:])
        expected = 0.2 * math.sqrt(max(rows, columns)) * orthogonalized(g.reshape(1, rows, columns))[0]
        torch.testing.assert_close(z, expected.reshape(shape), rtol=1e-10, atol=1e-12)
        assert 0.14 < z.square().mean().sqrt().item() < 0.25


def test_the_product_of_gradient_and_step_is_a_nuclear_norm():
    params = parameters([(24, 40)])
    (g,) = gradients([(24, 40)], 1)[0]
    optimizer = NLCG(params, precond="orthogonal")
    run(optimizer, params, [[g]])
    nuclear = 0.2 * math.sqrt(40) * np.linalg.svd(g.numpy(), compute_uv=False).sum()
    assert BAND[0] < optimizer.last["rho"].item() / nuclear < BAND[1]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_the_size_of_a_gradient_does_not_matter(scale):
    (g,) = gradients([(16, 20)], 1, dtype=torch.float32)[0]
    torch.testing.assert_close(orthogonalized(g[None] * scale), orthogonalized(g[None]), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_zeros_and_what_is_not_finite_become_zero_and_disturb_no_neighbour(bad):
    g = torch.stack([x[0] for x in gradients([(16, 16)], 3)])
    expected = orthogonalized(g)
    g[1] = 0.0
    g[1, 2, 3] = bad
    found = orthogonalized(g)
    assert torch.equal(found[1], torch.zeros(16, 16, dtype=torch.float64))
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-12, atol=1e-14)


def test_rank_one_and_a_single_value():
    u, v = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.linspace(1, 2, 7, dtype=torch.float64)
    z = orthogonalized(torch.outer(u, v)[None])[0]
    values = np.linalg.svd(z.numpy(), compute_uv=False)
    assert BAND[0] < values[0] < BAND[1]
    assert values[1:].max() < 1e-12
    assert BAND[0] < orthogonalized(torch.full((1, 1, 1), 3.0))[0].item() < BAND[1]


def test_matrices_of_one_shape_are_worked_on_together(monkeypatch):
    shapes = [(16, 20)] * 3 + [(20, 16), (30, 30), (16, 4, 5), (7,)]
    (grads,) = gradients(shapes, 1)
    calls = []

    def spy(matrices, *args, **options):
        calls.append(tuple(matrices.shape))
        return orthogonalized(matrices, *args, **options)

    monkeypatch.setattr(orthogonal, "orthogonalized", spy)
    params = parameters(shapes)
    before = [p.detach().clone() for p in params]
    after = run(NLCG(params, lr=1.0, precond="orthogonal"), params, [grads])
    assert sorted(calls) == [(4, 16, 20), (20, 16), (30, 30)]
    for a, b, g in zip(before[:-1], after, grads):
        torch.testing.assert_close(a - b, preconditioned("orthogonal", [g]), rtol=1e-9, atol=1e-12)
    calls.clear()
    monkeypatch.setattr(_matrix_products, "BATCH_ON_CPU", 1000)  # three of them
    params = parameters(shapes)
    bounded = run(NLCG(params, lr=1.0, precond="orthogonal"), params, [grads])
    assert sorted(calls) == [(3, 16, 20), (16, 20), (20, 16), (30, 30)]
    torch.testing.assert_close(bounded, after, rtol=1e-12, atol=1e-14)


def test_which_parameters_are_matrices():
    chosen = Orthogonal()
    for shape, expected in {
        (16, 16): True,
        (64, 3, 3, 3): True,
        (128, 1024): True,
        (15, 64): False,  # a head with few classes
        (8192, 512): False,  # an embedding
        (64, 1, 3, 3): False,  # a kernel for each channel
        (64,): False,
        (): False,
        (0, 16): False,
    }.items():
        assert chosen.is_matrix(torch.zeros(shape)) == expected, shape
        assert not Orthogonal(matrices=nothing).is_matrix(torch.zeros(shape))
        assert Orthogonal(matrices=everything).is_matrix(torch.zeros(shape)) == (len(shape) > 1 and 0 not in shape)
    assert not chosen.is_matrix(torch.zeros(16, 16, dtype=torch.complex64))


def test_matrices_that_are_too_large_get_adams_scaling_and_are_named_once(caplog):
    orthogonal._log_too_large.cache_clear()
    shapes = [(24, 20), (20, 24), (20, 20), (24, 20), (30,)]
    with caplog.at_level(logging.INFO):
        params = parameters(shapes)
        optimizer = NLCG(params, precond=Orthogonal(max_dim=20))
    assert ["square" in optimizer.state[p] for p in params] == [True, True, False, True, True]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"Orthogonal: a matrix of shape {shape} has a side above max_dim=20: Adam's scaling instead"
        for shape in shapes[:2]
    ]
    run(optimizer, params, gradients(shapes, 3))
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("able", [False, True])
def test_the_type_of_products_by_default(monkeypatch, able):
    """float64 stays; a CPU that can takes bfloat16 for matrices that are large."""
    monkeypatch.setattr(_matrix_products, "_multiplies_bfloat16", lambda: able)
    for shape, dtype, rough in (
        ((128, 256), torch.float32, able),
        ((300, 140), torch.float32, able),
        ((127, 256), torch.float32, False),
        ((128, 256), torch.float64, False),
    ):
        g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        for part in (g, g[:1], g[0], g.mT):
            found = orthogonalized(part)
            assert found.dtype == dtype
            error = (found.double() - orthogonalized(part.double())).norm() / found.norm()
            assert (1e-3 < error < 0.03) if rough else error < 1e-4
            expected = torch.bfloat16 if rough else dtype
            assert torch.equal(found, orthogonalized(part, dtype=expected))


@pytest.mark.parametrize("kind", [Orthogonal, Kronecker])
def test_what_is_no_matrix_is_scaled_as_adam_does(kind):
    shapes, steps = [(20, 20), (5,)], gradients([(20, 20), (5,)], 6)
    params, others = parameters(shapes), parameters(shapes)
    mixed = NLCG(params, lr=0.1, beta_max=0.0, precond=kind(matrices=nothing))
    adam = NLCG(others, lr=0.1, beta_max=0.0, precond=AdamDiagonal(beta2=0.95))
    found = run(mixed, params, steps[:1])
    if kind is Kronecker:  # where no first step moves anything
        assert_same(found, [p.detach() for p in parameters(shapes)])
        with torch.no_grad():
            for p, q in zip(params, run(adam, others, steps[:1]), strict=True):
                p.copy_(q)
    else:
        run(adam, others, steps[:1])
    torch.testing.assert_close(run(mixed, params, steps[1:]), run(adam, others, steps[1:]), rtol=1e-13, atol=1e-15)


def test_polak_ribiere_takes_what_p_made_of_the_previous_gradient():
    shapes, steps = [(16, 18)], gradients([(16, 18)], 2)
    steps[1][0] = 2 * steps[0][0] + 0.1 * steps[1][0]
    params = parameters(shapes)
    optimizer = NLCG(params, lr=0.1, rule="pr", precond="orthogonal")
    run(optimizer, params, steps)
    (g_prev,), (g,) = steps
    z_prev, z = (0.2 * math.sqrt(18) * orthogonalized(x[None])[0] for x in (g_prev, g))
    expected = (g * z).sum() - (g * z_prev).sum()
    expected = (expected / (g_prev * z_prev).sum()).clamp(0, 1)
    assert optimizer.last["beta"].item() == pytest.approx(expected.item(), rel=1e-9)


# ---- Kronecker ----


class Twin:
    """The method on one matrix in NumPy float64, with the exact eigenvectors wherever the basis is new."""

    def __init__(self, shape, *, beta2, decay, period, damping, eps):
        m, n = shape
        self.left, self.right, self.v = np.zeros((m, m)), np.zeros((n, n)), np.zeros(shape)
        self.q, self.r = np.eye(m), np.eye(n)
        self.beta2, self.decay, self.period, self.damping, self.eps = beta2, decay, period, damping, eps
        self.n = 0

    @staticmethod
    def power(mean, basis):
        order = np.argsort(-np.einsum("ij,ij->j", basis, mean @ basis), kind="stable")
        return np.linalg.qr(mean @ basis[:, order])[0], order

    def step(self, g):
        if self.n == 1:
            self.q, self.r = (np.linalg.eigh(x)[1][:, ::-1] for x in (self.left, self.right))
        elif self.n > 1 and (self.n - 1) % self.period == 0:
            self.q, rows = self.power(self.left, self.q)
            self.r, columns = self.power(self.right, self.r)
            self.v = self.v[rows][:, columns]
        z = np.zeros_like(g)
        if self.n:
            rotated = self.q.T @ g @ self.r
            self.v = self.beta2 * self.v + (1 - self.beta2) * rotated**2
            root = np.sqrt(self.v / (1 - self.beta2**self.n))
            root = root + self.damping * np.sqrt((root**2).mean())
            z = self.q @ (rotated / (root + self.eps)) @ self.r.T
        self.left = self.decay * self.left + (1 - self.decay) * g @ g.T
        self.right = self.decay * self.right + (1 - self.decay) * g.T @ g
        self.n += 1
        return z


@pytest.mark.parametrize("period", [1, 3, 10])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_twin(period, foreach):
    options = {"beta2": 0.9, "decay": 0.8, "period": period, "damping": 0.01, "eps": 1e-6}
    shape, lr, limit = (6, 6), 0.05, 0.7
    steps = gradients([shape], 25)  # square and of full rank, so that no eigenvalue is 0
    params = parameters([shape])
    w = params[0].detach().numpy().copy()
    optimizer = NLCG(params, lr=lr, beta_max=limit, precond=Kronecker(**options), foreach=foreach)
    twin, d, before = Twin(shape, **options), np.zeros(shape), 0.0
    for grads in steps:
        (found,) = run(optimizer, params, [grads])
        g = grads[0].numpy()
        z = twin.step(g)
        rho = (g * z).sum()
        beta = min(rho / before, limit) if before > 0 else 0.0
        d, before = beta * d - z, rho
        w = w + lr * d
        np.testing.assert_allclose(found.numpy(), w, rtol=1e-7, atol=1e-9)
        assert optimizer.last["beta"].item() == pytest.approx(beta, rel=1e-7)
    state = optimizer.state[params[0]]
    np.testing.assert_allclose(state["left"].numpy(), twin.left, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(state["right"].numpy(), twin.right, rtol=1e-12, atol=1e-14)
    assert state["updates"].item() == 25


def test_in_the_identity_basis_it_is_adam(monkeypatch):
    """Bases that stay what they are: the second moments are Adam's, from the second gradient on."""
    monkeypatch.setattr(Kronecker, "_renew_due", lambda *args: None)
    shapes, steps = [(5, 4), (3, 2, 2)], gradients([(5, 4), (3, 2, 2)], 8)
    params, others = parameters(shapes), parameters(shapes)
    found = run(
        NLCG(params, lr=0.01, beta_max=0.0, precond=Kronecker(damping=0.0, beta2=0.95, eps=1e-6)), params, steps
    )
    expected = run(torch.optim.Adam(others, lr=0.01, betas=(0.0, 0.95), eps=1e-6), others, steps[1:])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_eigenbasis_of_a_covariance_is_found():
    """Gradients A X B with random X: the means are near A A^T and B^T B, and the power iteration follows them."""
    random = np.random.default_rng(3)
    u, v = (np.linalg.qr(random.standard_normal((n, n)))[0] for n in (6, 8))
    a, b = np.geomspace(10, 0.1, 6), np.geomspace(10, 0.1, 8)
    params = parameters([(6, 8)])
    optimizer = NLCG(params, lr=0.0, precond=Kronecker(decay=0.999, period=1))
    for _ in range(1500):
        g = (u * a) @ random.standard_normal((6, 8)) @ (v * b).T
        run(optimizer, params, [[torch.from_numpy(g)]])
    state = optimizer.state[params[0]]
    for basis, truth in ((state["left_basis"], u), (state["right_basis"], v)):
        found = np.abs(basis.numpy().T @ truth)
        np.testing.assert_allclose(np.diag(found), 1.0, atol=0.02)
        np.testing.assert_allclose(basis.numpy().T @ basis.numpy(), np.eye(len(truth)), atol=1e-12)
    # There v is the product of the variances, and P g is of one size.
    expected = np.outer(a, b) ** 2
    ratio = state["square"].numpy() / expected
    assert 0.2 < np.exp(np.log(ratio).mean()) < 1.5


@pytest.mark.parametrize("rows", [511, 512, 1030])
@pytest.mark.parametrize("transposed", [False, True])
def test_symmetric_products_of_large_matrices_are_taken_in_blocks(rows, transposed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    if transposed:
        x = x.mT.contiguous().mT
    base, product = torch.randn(rows, rows, generator=generator, dtype=torch.float64), x @ x.mT
    base += base.mT.clone()
    out = torch.full_like(base, math.nan)
    torch.testing.assert_close(symmetric_product(x, out=out), product, rtol=1e-12, atol=1e-12)
    assert symmetric_product(x, out=out, alpha=0.5) is out
    torch.testing.assert_close(out, 0.5 * product, rtol=1e-12, atol=1e-12)
    symmetric_product(x, out=out, base=base, beta=0.25, alpha=-2.0)
    torch.testing.assert_close(out, 0.25 * base - 2 * product, rtol=1e-12, atol=1e-12)
    symmetric_product(x, out=base, base=base, beta=0.25, alpha=-2.0)
    torch.testing.assert_close(base, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(600, 530), (530, 600), (520, 520)])
def test_newton_schulz_on_large_matrices_takes_less_work_for_the_same(shape, monkeypatch):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalized(g[None], 3)
    monkeypatch.setattr(_matrix_products, "BLOCK", 10**9)
    torch.testing.assert_close(found, orthogonalized(g[None], 3), rtol=1e-10, atol=1e-12)
    both = orthogonalized(torch.stack([g, 2 * g]), 3)
    torch.testing.assert_close(both, found.expand_as(both), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("kind", ["adam", "orthogonal", "kron"])
def test_the_step_does_not_depend_on_the_scale_of_the_loss(kind, scale):
    """What the direction is made of is the same, <g, P g> grows with the loss, beta stays."""
    precond = {
        "adam": AdamDiagonal(eps=1e-30),
        "orthogonal": Orthogonal(matrices=everything, eps=1e-30),
        "kron": Kronecker(eps=1e-30, period=2),
    }[kind]
    shapes, steps = [(6, 6), (4,)], gradients([(6, 6), (4,)], 6)
    results, sizes, betas = [], [], []
    for factor in (1.0, scale):
        params = parameters(shapes)
        optimizer = NLCG(params, lr=0.01, beta_max=0.95, precond=precond)
        results.append(run(optimizer, params, [[factor * g for g in grads] for grads in steps]))
        sizes.append(optimizer.last["rho"].item())
        betas.append(optimizer.last["beta"].item())
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)
    assert sizes[1] / sizes[0] == pytest.approx(scale, rel=1e-6)
    assert betas[0] == pytest.approx(betas[1], rel=1e-6)


def test_sides_that_are_too_large_have_no_basis_and_are_named_once(caplog):
    kronecker._log_too_large.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            params = parameters([(5, 4), (4, 5), (5, 6), (3, 4), (3, 1)])
            optimizer = NLCG(params, lr=0.1, precond=Kronecker(max_dim=4))
    kept = [sorted(name for name in optimizer.state[p] if "_basis" in name) for p in params]
    assert kept == [["right_basis"], ["left_basis"], [], ["left_basis", "right_basis"], ["left_basis"]]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "a matrix of shape (5, 4) has more than max_dim=4 rows: no basis there" in said[0]
    assert "rows and columns" in said[2]
    run(optimizer, params, gradients([p.shape for p in params], 5))
    assert all(p.isfinite().all() for p in params)
    assert "left" not in optimizer.state[params[2]]  # Adam's scaling


@pytest.mark.parametrize("period", [1, 2, 5])
def test_the_host_looks_at_the_counts_only_when_a_basis_may_be_due(period, monkeypatch):
    turns, reads = [], []
    renew, tolist = Kronecker._renew, torch.Tensor.tolist
    monkeypatch.setattr(
        Kronecker, "_renew", lambda self, state, **o: turns.append(state["updates"].item()) or renew(self, state, **o)
    )
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    params = parameters([(4, 4)])
    optimizer = NLCG(params, lr=0.1, precond=Kronecker(period=period))
    run(optimizer, params, gradients([(4, 4)], 21))
    assert turns == list(range(1, 21, period))
    assert len(reads) <= 21 if period == 1 else len(reads) <= 2 * len(turns) + 1


@pytest.mark.parametrize("kind", ["orthogonal", "kron"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_skipped_step_neither_learns_nor_renews(kind, at):
    """Also where a basis is due in that very step."""
    shapes, steps = [(16, 16), (3,)], gradients([(16, 16), (3,)], 6)
    params, twins = parameters(shapes), parameters(shapes)
    precond = Kronecker(period=2) if kind == "kron" else kind
    optimizer, other = (NLCG(ps, lr=0.1, beta_max=0.9, precond=precond) for ps in (params, twins))
    run(optimizer, params, steps[:at])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    bad = [g.clone() for g in steps[at]]
    bad[0][2, 3] = math.nan
    run(optimizer, params, [bad, bad])
    after = optimizer.state_dict()["state"]
    for i in before:
        for name in before[i]:
            same = slice(None, -1) if name == "scalars" else ...
            assert torch.equal(before[i][name][same], after[i][name][same]), name
    assert_same(run(optimizer, params, steps[at:]), run(other, twins, steps))


def test_gradients_whose_squares_overflow_are_left_out_and_counted():
    params = parameters([(4, 4), (4, 4)], dtype=torch.float32)
    optimizer = NLCG(params, lr=0.1, precond=Kronecker(matrices=everything), foreach=True)
    steps = gradients([(4, 4), (4, 4)], 4, dtype=torch.float32)
    run(optimizer, params, steps[:3])
    before = copy.deepcopy(optimizer.state[params[0]])
    huge = [1e25 * steps[3][0], steps[3][1]]
    run(optimizer, params, [huge])
    state = optimizer.state[params[0]]
    assert int(optimizer.skipped_steps) == 0  # its norm is finite in float64
    assert state["bad_updates"].item() == 1
    assert optimizer.state[params[1]]["bad_updates"].item() == 0
    for name in ("square", "left", "right", "left_basis", "right_basis", "updates", "renewed"):
        assert torch.equal(before[name], state[name]), name
    assert all(p.abs().max() < 100 for p in params)  # P g is 0 for it: it does not move by its size


def test_where_no_basis_is_found_all_starts_anew_and_is_counted(monkeypatch):
    def fails(*args):
        raise torch.linalg.LinAlgError("did not converge")

    params, twins = parameters([(4, 4)]), parameters([(4, 4)])
    steps = gradients([(4, 4)], 6)
    optimizer, other = NLCG(params, lr=0.1, precond=Kronecker()), NLCG(twins, lr=0.1, precond=Kronecker())
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fails)
        run(optimizer, params, steps[:2])
    state = optimizer.state[params[0]]
    assert (state["bad_updates"].item(), state["renewed"].item(), state["updates"].item()) == (1, 0, 1)
    assert torch.equal(state["left_basis"], torch.eye(4, dtype=torch.float64))
    run(optimizer, params, steps[2:])
    run(other, twins, steps[1:])
    assert state["bad_updates"].item() == 1
    assert_same([params[0].detach()], [twins[0].detach()])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["left", "right", "right_basis"])
def test_what_is_no_longer_finite_starts_anew_and_is_counted(name, first):
    shapes, steps = [(4, 4), (5, 5)], gradients([(4, 4), (5, 5)], 9)
    params = parameters(shapes)
    optimizer = NLCG(params, lr=0.1, beta_max=0.0, precond=Kronecker(period=2))
    run(optimizer, params, steps[:1] if first else steps[:3])
    state, untouched = (copy.deepcopy(optimizer.state[p]) for p in params)
    optimizer.state[params[0]][name][1, 2] = math.inf if first else math.nan
    before = params[0].detach().clone()
    run(optimizer, params, steps[3:4])
    state = optimizer.state[params[0]]
    if first and name == "right_basis":  # of which nothing is left
        assert state["bad_updates"].item() == 0
    else:
        assert (state["bad_updates"].item(), state["renewed"].item(), state["updates"].item()) == (1, 0, 1)
        assert torch.equal(before, params[0])
        twins = parameters(shapes)
        fresh = NLCG(twins, lr=0.1, precond=Kronecker(period=2))
        run(fresh, twins, steps[3:4])
        for kept in ("square", "left", "right", "left_basis", "right_basis"):
            assert torch.equal(state[kept], fresh.state[twins[0]][kept]), kept
    assert optimizer.state[params[1]]["updates"] == untouched["updates"] + 1
    run(optimizer, params, steps[4:])
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(before, params[0])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_products_for_means_and_results_may_be_in_bfloat16(monkeypatch, dtype):
    monkeypatch.setattr(_matrix_products, "_multiplies_bfloat16", lambda: True)
    shapes = [(128, 256), (170, 172), (128, 256), (520, 128), (20, 20), (20, 20)]
    steps, results, states = gradients(shapes, 2, dtype=torch.float32), [], []
    for chosen in (dtype, torch.float32):
        params = parameters(shapes, torch.float32)
        before = [p.detach().clone() for p in params]
        optimizer = NLCG(params, lr=1.0, precond=Kronecker(dtype=chosen))
        with monkeypatch.context() as patch:
            patch.setattr(Kronecker, "_renew_due", lambda *args: None)  # noise moves a basis of random gradients
            run(optimizer, params, steps)
        results.append([p.detach() - w for p, w in zip(params, before, strict=True)])
        states.append(list(optimizer.state.values()))
    for shape, found, exact, state, other in zip(shapes, *results, *states, strict=True):
        rough = dtype is not None or min(shape) >= 128
        for a, b in ((found, exact), (state["left"], other["left"]), (state["right"], other["right"])):
            assert a.dtype == torch.float32
            error = ((a - b).norm() / b.norm()).item()
            assert (1e-4 < error < 6e-3) if rough else error == 0
        assert torch.equal(state["square"], other["square"])


@pytest.mark.parametrize("kind", ["orthogonal", "kron"])
def test_where_the_host_must_not_look_the_steps_are_the_same(kind, monkeypatch):
    """The way of accelerators, on the CPU; also of gradients that are left out, and of what is not finite."""
    shapes = [(20, 20)] * 3 + [(17, 17), (18, 6, 3)]
    steps, results = gradients(shapes, 8), []
    for here in (True, False):
        if not here:
            for module in (_matrix_products, kronecker, orthogonal):
                monkeypatch.setattr(module, "on_host", lambda tensor: False)
        params = parameters(shapes)
        precond = Kronecker(period=2) if kind == "kron" else Orthogonal()
        optimizer = NLCG(params, lr=0.1, beta_max=0.9, precond=precond, fused=here)
        run(optimizer, params, steps[:5])
        if kind == "kron":  # found out in the next step, when the bases are due
            optimizer.state[params[1]]["left"][1, 2] = math.nan
            optimizer.state[params[3]]["right_basis"][1, 2] = math.nan
        run(optimizer, params, steps[5:])
        results.append([[p.detach() for p in params], list(optimizer.state.values())])
        if kind == "kron":
            assert [state["bad_updates"].item() for state in results[-1][1]] == [0, 1, 0, 1, 0]
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_many_small_matrices_are_worked_on_at_once(monkeypatch):
    """The same as one by one."""
    shapes, results = [(6, 6)] * 3 + [(4, 4), (6, 6)], []
    steps = gradients(shapes, 8)
    for most in (2**18, 1):
        monkeypatch.setattr(_matrix_products, "BATCH_ON_CPU", most)
        params = parameters(shapes)
        optimizer = NLCG(params, lr=0.1, beta_max=0.9, precond=Kronecker(period=3))
        run(optimizer, params, steps)
        results.append([[p.detach() for p in params], list(optimizer.state.values())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_gradients_of_zero_leave_the_basis_to_find():
    params = parameters([(4, 4)])
    before = params[0].detach().clone()
    optimizer = NLCG(params, lr=0.1, precond="kron")
    zero = torch.zeros(4, 4, dtype=torch.float64)
    run(optimizer, params, [[zero]] * 3)
    assert torch.equal(before, params[0])
    assert optimizer.state[params[0]]["renewed"].item() == 0
    run(optimizer, params, gradients([(4, 4)], 3))
    assert optimizer.state[params[0]]["renewed"].item() == 4
    assert params[0].isfinite().all()


# ---- all of them ----


PRECONDS = {
    "adam": AdamDiagonal(),
    "orthogonal": Orthogonal(),
    "kron": Kronecker(period=3),
}


@pytest.mark.parametrize("rule", ["fr", "pr", "constant"])
@pytest.mark.parametrize("kind", PRECONDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_run_bit_for_bit(kind, rule, dtype):
    shapes = [(16, 20), (20, 16), (16, 20), (5,), (10, 16)]
    params = parameters(shapes, dtype)
    steps = gradients(shapes, 14, dtype=dtype)
    options = {"lr": 0.01, "beta_max": 0.9, "rule": rule, "precond": PRECONDS[kind], "weight_decay": 0.01}
    optimizer = NLCG(params, **options)
    for at in range(len(steps)):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = copy.deepcopy(params)
        fresh = NLCG(resumed, **options)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert_same(run(fresh, resumed, steps[at : at + 2]), run_ahead(optimizer, params, steps[at : at + 2]))
        run(optimizer, params, steps[at : at + 1])
    vectors = [t for s in optimizer.state.values() for t in s.values() if t.ndim > 1]
    assert {t.dtype for t in vectors} == {torch.float32}


def run_ahead(optimizer, params, steps):
    """What *steps* would make of the parameters."""
    ahead = copy.deepcopy(optimizer)
    return run(ahead, [p for group in ahead.param_groups for p in group["params"]], steps)


MIXED = [(16, 20), (20, 16), (16, 20), (5,), (16, 3, 3, 3), (7, 3)]
SQUARE = [(16, 16), (16, 4, 2, 2), (5,), (18, 18)]
"""Of full rank: the Kronecker basis of others is arbitrary in part, and follows every rounding."""


@pytest.mark.parametrize("kind", PRECONDS)
@pytest.mark.parametrize("rule", ["fr", "pr"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "grad_scale": 0.5, "restart_on_ascent": True},
        {"weight_decay": 0.1, "decoupled": True, "line_search": "online", "scope": "tensor"},
    ],
)
def test_lists_single_tensors_and_kernels_agree(kind, rule, options):
    shapes = SQUARE if kind == "kron" else MIXED
    steps = gradients(shapes, 12)
    losses = np.random.default_rng(1).uniform(size=12)
    results = []
    for implementation in ({"foreach": False, "fused": False}, {"foreach": True}, {"fused": True}):
        if "fused" in implementation and kernels is None:
            continue
        params = parameters(shapes)
        optimizer = NLCG(params, lr=0.01, beta_max=0.9, rule=rule, precond=PRECONDS[kind], **options | implementation)
        seen = []
        for grads, loss in zip(steps, losses, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step(loss=loss)
            seen.append([optimizer.last[name].clone() for name in ("beta", "rho", "cosine", "step_size")])
        states = [{name: t for name, t in s.items() if name != "scalars"} for s in optimizer.state.values()]
        results.append([[p.detach() for p in params], seen, states])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(kernels is None, reason="the C kernels are not built")
@pytest.mark.parametrize("kind", PRECONDS)
def test_kernels_in_float32_are_right_to_rounding(kind):
    steps, results = gradients(MIXED, 2), []
    for dtype, fused in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        params = parameters(MIXED, dtype)
        run(NLCG(params, lr=0.01, beta_max=0.9, precond=PRECONDS[kind], fused=fused), params, steps)
        results.append(torch.cat([p.detach().double().flatten() for p in params]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    if kind != "kron":  # its basis depends on all roundings
        torch.testing.assert_close(results[0], results[2], rtol=0, atol=2e-6)


@pytest.mark.skipif(kernels is None, reason="the C kernels are not built")
def test_kernels_give_the_same_with_any_number_of_threads():
    shapes, before, results = [(400, 700), (30, 40), (9,)], torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            params = parameters(shapes, torch.float32)
            run(NLCG(params, lr=0.01, precond="adam", fused=True), params, gradients(shapes, 4))
            results.append([p.detach() for p in params])
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


@pytest.mark.parametrize("kind", PRECONDS)
def test_kernels_in_channels_last_are_the_same_matrices(kind):
    shape, results = (16, 4, 3, 3), []
    for layout in (torch.contiguous_format, torch.channels_last):
        params = [nn.Parameter(p.detach().clone(memory_format=layout)) for p in parameters([shape])]
        optimizer = NLCG(params, lr=0.01, beta_max=0.9, precond=PRECONDS[kind], foreach=True)
        for (g,) in gradients([shape], 8):
            params[0].grad = g.clone(memory_format=layout)
            optimizer.step()
        assert params[0].is_contiguous(memory_format=layout)
        results.append(params[0].detach().contiguous())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AdamDiagonal, {"beta2": 1.0}, r"AdamDiagonal: beta2 must be in \[0, 1\), got 1.0"),
        (AdamDiagonal, {"eps": 0.0}, r"AdamDiagonal: eps must be in \(0, inf\), got 0.0"),
        (Orthogonal, {"beta2": -0.1}, r"Orthogonal: beta2 must be in \[0, 1\), got -0.1"),
        (Orthogonal, {"steps": 0}, "Orthogonal: steps must be an integer >= 1, got 0"),
        (Orthogonal, {"steps": True}, "Orthogonal: steps must be an integer >= 1, got True"),
        (Orthogonal, {"scale": math.inf}, r"Orthogonal: scale must be in \(0, inf\), got inf"),
        (Orthogonal, {"max_dim": 0}, "Orthogonal: max_dim must be an integer >= 1, got 0"),
        (Orthogonal, {"dtype": torch.int64}, "Orthogonal: dtype must be None or one of .*, got torch.int64"),
        (Kronecker, {"decay": 1.0}, r"Kronecker: decay must be in \[0, 1\), got 1.0"),
        (Kronecker, {"period": 0}, "Kronecker: period must be an integer >= 1, got 0"),
        (Kronecker, {"damping": -1.0}, r"Kronecker: damping must be in \[0, inf\), got -1.0"),
        (Kronecker, {"max_dim": 0}, "Kronecker: max_dim must be an integer >= 1, got 0"),
        (Kronecker, {"dtype": torch.int64}, "Kronecker: dtype must be None or one of .*, got torch.int64"),
        (Kronecker, {"eps": math.nan}, r"Kronecker: eps must be in \(0, inf\), got nan"),
    ],
)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_the_constant_rule():
    shapes, steps, lr, limit = [(4, 3)], gradients([(4, 3)], 6), 0.1, 0.7
    params = parameters(shapes)
    w = params[0].detach().clone()
    optimizer = NLCG(params, lr=lr, rule="constant", beta_max=limit, precond="none")
    d = torch.zeros_like(w)
    for t, grads in enumerate(steps):
        run(optimizer, params, [grads])
        d = (limit if t else 0.0) * d - grads[0]
        w = w + lr * d
        assert optimizer.last["beta"].item() == (limit if t else 0.0)
        torch.testing.assert_close(params[0].detach(), w, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("foreach", [False, True])
def test_kron_leaves_out_a_gradient_whose_products_with_the_basis_overflow(foreach):
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = NLCG([p], lr=0.01, precond="kron", foreach=foreach, fused=False)
    for i in range(20):
        g = torch.randn(4, 4, generator=torch.Generator().manual_seed(i))
        p.grad = torch.full((4, 4), 3e38) if i == 7 else g
        optimizer.step()
    assert p.isfinite().all()
    assert optimizer.state[p]["square"].isfinite().all()
    # Whether its squared norm overflows is up to how that is worked out.
    assert optimizer.state[p]["bad_updates"] + optimizer.skipped_steps == 1
    assert optimizer.state[p]["updates"] == 19


def test_kron_starts_anew_where_squares_are_not_finite():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = NLCG([p], lr=0.0, precond="kron")
    for i in range(25):
        p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(i))
        if i == 8:
            optimizer.state[p]["square"][0, 0] = math.nan
        optimizer.step()
    assert optimizer.state[p]["square"].isfinite().all()
    assert optimizer.state[p]["bad_updates"] == 1


def test_kron_decomposes_nothing_where_there_is_nothing(monkeypatch):
    calls = []
    for name in ("_eigenvectors", "_orthonormalized"):
        original = getattr(kronecker, name)
        monkeypatch.setattr(kronecker, name, lambda x, original=original: calls.append(1) or original(x))
    dead, alive = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(16, 16))
    optimizer = NLCG([dead, alive], lr=0.01, precond=Kronecker(period=10))
    for i in range(31):
        dead.grad, alive.grad = torch.zeros(16, 16), torch.randn(16, 16, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    assert len(calls) == 2 * 3  # both sides of the one that lives, after 1, 11 and 21 gradients
    dead.grad = torch.randn(16, 16)
    optimizer.step()
    optimizer.step()
    assert len(calls) > 2 * 3
