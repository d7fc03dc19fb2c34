"""Densities against whole spectra: deflation, exact cases, statistics, curves and numbers, files, states, ranks, bad input."""

import json
import math
import os

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks

from conjugo.curvature import SpectralDensity, density, from_dense, from_matvec, spectral_density
from conjugo.errors import CorruptFile, UnknownName

NORMAL = torch.distributions.Normal(0.0, 1.0)


def with_values(values, dtype=torch.float64, scale=1.0):
    values = scale * torch.as_tensor(values, dtype=dtype)
    return from_matvec(lambda v: v * values, len(values), dtype=dtype, rows=True)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TOPS = torch.tensor([100.0, 80, 60, 50, 40, 30, 25, 20, 15, -12], dtype=torch.float64)


def spectrum(size=4000):
    """Ten outliers, a bulk, and 90 % next to zero."""
    bulk = size // 10 - len(TOPS)
    return torch.cat([TOPS, normal(bulk).abs(), 1e-4 * normal(size - bulk - len(TOPS), seed=1)])


def plain(**options):
    return {"probes": 4, "steps": 30, "probe": "gaussian"} | options


def masses(found):
    return float(found.measure[1].sum())


# ---- against the whole spectrum ----


@pytest.mark.parametrize("probe", ["rademacher", "gaussian", "orthogonal"])
def test_outliers_are_exact_with_deflation(probe):
    values = spectrum()
    op = with_values(values)
    found = spectral_density(op, probe=probe, probes=5, steps=40)
    k = len(found.eigenvalues)
    assert 10 <= k <= 20
    assert (found.eigenvalues[:9] - TOPS[:9]).abs().max() < 1e-10
    assert float(found.eigenvalues[-1]) == pytest.approx(-12, abs=1e-10)
    assert float(1 - found.cdf(torch.tensor(10.0))) == pytest.approx(9 / 4000, rel=1e-9)
    vectors = found.eigenvectors
    assert (vectors @ vectors.T - torch.eye(k)).abs().max() < 1e-12
    assert (op.matmat(vectors) - found.eigenvalues[:, None] * vectors).norm(dim=1).max() < 2e-3
    assert masses(found) == pytest.approx(1, abs=1e-12)
    assert all(float(w.sum()) == pytest.approx((4000 - k) / 4000) for w in found.weights)
    assert all(float(t.max()) < 10 for t in found.nodes)
    assert found.n_matvec == op.n_matvec - k == 200
    assert found.probes == 5
    assert (found.size, found.steps, found.probe, found.seed) == (4000, 40, probe, 0)
    assert found.about == {"operator": "MatrixFree", "dtype": "float64"}


def test_deflation_has_a_quarter_of_the_error_of_the_plain_method():
    values = torch.cat([TOPS, 0.05 * normal(990)])
    truth = float(values.sum())
    errors = {}
    for deflate in (False, True):
        found = [spectral_density(with_values(values), deflate=deflate, seed=s, **plain(steps=40)) for s in range(10)]
        errors[deflate] = (
            sum(f.wasserstein(values) for f in found) / 10,
            sum(abs(f.trace - truth) for f in found) / 10,
        )
        assert all(len(f.nodes) == 4 and f.n_matvec == 160 for f in found)
    assert errors[True][0] < errors[False][0] / 4
    assert errors[True][1] < errors[False][1] / 4


def test_the_mass_of_an_outlier_spreads_as_theory_says_without_deflation():
    """sqrt(2 / 8) for means of 8 probes, to 20 %: three standard errors of a standard deviation from 250 means."""
    values = torch.cat([torch.tensor([10.0], dtype=torch.float64), normal(399) / 10])
    found = spectral_density(with_values(values), 2000, 6, probe="gaussian", deflate=False, probes_at_once=100)
    tops = torch.stack([400 * w[t > 5].sum() for t, w in zip(found.nodes, found.weights)])
    spread = float(tops.reshape(250, 8).mean(1).std())
    assert spread == pytest.approx(math.sqrt(2 / 8), rel=0.2)
    assert float(tops.mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / 2000))


@pytest.mark.parametrize("deflate", [False, True])
def test_standard_errors_are_of_the_size_of_the_errors(deflate):
    values = torch.cat([TOPS, normal(490)])
    found = [spectral_density(with_values(values), 6, 20, probe="gaussian", deflate=deflate, seed=s) for s in range(40)]
    off = torch.tensor([(f.trace - float(values.sum())) / f.trace_stderr for f in found]).abs()
    assert 0.4 < float(off.median()) < 1.2  # 0.73 by Student's t with 5 degrees of freedom
    best = spectral_density(with_values(values), 150, 20, probe="gaussian", deflate=deflate, seed=1000)
    distances = torch.tensor([f.wasserstein(best) for f in found])
    ratio = float(distances.mean() / torch.tensor([f.stderr for f in found]).mean())
    assert 0.5 < ratio < 1.3


@pytest.mark.parametrize("steps", [12, 20])
def test_all_steps_give_the_exact_spectrum(steps):
    half = normal(12, 12)
    op = from_dense(half + half.T)
    truth = torch.linalg.eigvalsh(half + half.T)
    if steps > 12:
        with pytest.warns(UserWarning, match="steps = 20 is more than P = 12"):
            found = spectral_density(op, 2, steps)
    else:
        found = spectral_density(op, 2, steps)
    assert found.exact
    assert found.probes == found.stderr == found.trace_stderr == 0
    assert found.wasserstein(truth) < 1e-13
    assert op.n_matvec == found.n_matvec == found.steps == 12
    assert SpectralDensity.from_dict(found.to_dict()).wasserstein(truth) < 1e-13
    t, phi = found.density()
    assert float(torch.trapezoid(phi, t)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        [3.0] * 50,
        [0.0] * 50,
        [5.0, 4, -3, 2, 1] + [0] * 45,
        [5.0, 4, -3, 2, 1] + [0.5] * 995,
        [5.0, 4, 3, 3, 3],
        [float(x) for x in range(30)] + [2.5] * 500,
    ],
    ids=["constant", "zero", "low rank", "low rank, large", "small", "many"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_spectrum_that_one_run_exhausts_is_exact(values, dtype):
    steps = 4 if len(values) == 5 else 40
    found = spectral_density(with_values(values, dtype), 3, steps)
    bound = 1e-10 if dtype == torch.float64 else 1e-4
    assert found.wasserstein(torch.tensor(values)) < bound
    assert masses(found) == pytest.approx(1, abs=1e-12)


def test_a_cluster_is_not_taken_for_one_eigenvector():
    """Eigenvalues that one run cannot tell apart have one Ritz vector, with the mass of all."""
    values = torch.cat([torch.tensor([10.0, 5.0]), torch.zeros(600), torch.rand(398)]).double()
    found = spectral_density(with_values(values), **plain(probes=20, steps=60))
    assert not ((found.eigenvalues.abs() < 1e-6).any())
    middle = float(found.cdf(torch.tensor(1e-6)) - found.cdf(torch.tensor(-1e-6)))
    assert middle == pytest.approx(0.6, abs=4 * math.sqrt(2 * 0.6 * 0.4 / 1000 / 20))


def test_half_the_steps_are_kept_as_eigenvectors_at_most():
    values = torch.cat([1e6 / torch.arange(1.0, 6), normal(995).abs()]).double()
    found = spectral_density(with_values(values), **plain(steps=9))
    assert len(found.eigenvalues) == 4
    assert len(spectral_density(with_values(values), **plain(steps=12)).eigenvalues) == 5


def test_scale_and_shift():
    values = spectrum(1000)
    a = spectral_density(with_values(values), **plain())
    b = spectral_density(with_values(-2 * values), **plain())
    assert (b.eigenvalues.flip(0) + 2 * a.eigenvalues).abs().max() < 1e-6
    for x, y in zip(a.nodes, b.nodes):
        assert (y.flip(0) + 2 * x).abs().max() < 1e-6
    c = spectral_density(with_values(values + 7), deflate=False, **plain(steps=12))
    d = spectral_density(with_values(values), deflate=False, **plain(steps=12))
    assert (torch.cat(c.nodes) - torch.cat(d.nodes) - 7).abs().max() < 1e-8
    assert (torch.cat(c.weights) - torch.cat(d.weights)).abs().max() < 1e-8


@pytest.mark.parametrize("deflate", [False, True])
def test_blocks_of_probes_and_places_of_the_basis_change_nothing(deflate):
    values = spectrum(1000)
    one = spectral_density(with_values(values), deflate=deflate, **plain(probes=5))
    for options in ({"probes_at_once": 3}, {"basis_device": "cpu:0"}, {"basis_dtype": torch.float64}):
        other = spectral_density(with_values(values), deflate=deflate, **plain(probes=5), **options)
        assert other.to_dict() == one.to_dict()
    op = with_values(values)
    blocks = []
    op.rows_at_once = 4
    function = op._function
    op._function = lambda v: (blocks.append(len(v)), function(v))[1]
    other = spectral_density(op, deflate=deflate, **plain(probes=5))
    assert other.to_dict() == one.to_dict()
    assert max(blocks) == 4
    assert blocks[0] == (1 if deflate else 4)
    narrow = spectral_density(with_values(values), deflate=deflate, basis_dtype=torch.bfloat16, **plain(probes=5))
    assert narrow.wasserstein(one) < 0.05


def test_orthogonal_probes_that_fill_the_space_are_exact():
    half = normal(40, 40)
    matrix = half + half.T
    truth = float(matrix.trace())
    for deflate in (False, True):
        found = spectral_density(from_dense(matrix), 40, 25, probe="orthogonal", deflate=deflate)
        assert found.trace == pytest.approx(truth, abs=1e-9)
        assert found.moment(2) == pytest.approx(float(matrix.square().sum()) / 40, rel=1e-9)
        assert found.probes + len(found.eigenvalues) == 40


def test_probes_end_when_the_error_is_small():
    values = spectrum(1000)
    found = spectral_density(with_values(values), tol=3e-5, **plain(probes=100))
    assert 3 < found.probes < 100
    assert found.stderr <= 3e-5 * 112
    fewer = spectral_density(with_values(values), **plain(probes=found.probes - 1))
    assert fewer.stderr > 3e-5 * 112
    assert spectral_density(with_values(values), tol=1.0, **plain(probes=100)).probes == 3


def test_a_seed_is_a_run():
    values = spectrum(500)
    a, b, c = (spectral_density(with_values(values), seed=s, **plain()) for s in (1, 1, 2))
    assert a.to_dict() == b.to_dict()
    assert a.nodes[0].tolist() != c.nodes[0].tolist()


# ---- numbers ----


def small(nodes=((1.0, 2.0), (-1.0, 4.0)), weights=((0.5, 0.25), (0.25, 0.5)), eigenvalues=(8.0,), size=4, **options):
    """Masses: -1: 1/8, 1: 1/4, 2: 1/8, 4: 1/4, 8: 1/4."""
    numbers = [[torch.tensor(x, dtype=torch.float64) for x in part] for part in (nodes, weights)]
    known = torch.tensor(eigenvalues, dtype=torch.float64)
    rest = {"steps": 2, "probe": "gaussian", "seed": 0, "n_matvec": 4, "about": {"dtype": "float32"}} | options
    return SpectralDensity(nodes=numbers[0], weights=numbers[1], eigenvalues=known, size=size, **rest)


def test_numbers():
    found = small()
    assert (found.lmax, found.lmin, found.mean, found.trace) == (8, -1, 3.375, 13.5)
    assert found.moment(0) == 1
    assert found.moment(2) == 1 / 8 + 1 / 4 + 4 / 8 + 16 / 4 + 64 / 4
    # The probes say 0.5 * 1 + 0.25 * 2 = 1 and -0.25 + 2 = 1.75.
    assert found.trace_stderr == pytest.approx(4 * 0.75 / 2)
    assert found.negative_mass() == found.negative_mass(0.5) == 1 / 8
    assert found.negative_mass(1.0) == 0
    assert found.tolerance == pytest.approx(4 * 2 * 2**-23 * 8)
    assert small(nodes=((1.0, 2.0), (-1e-6, 4.0))).negative_mass() == 0
    assert small(nodes=((1.0, 2.0), (-1e-6, 4.0))).negative_mass(0.0) == 1 / 8
    assert found.energy() == (3.5, 0.125)
    assert found.energy(2) == (20.75, 0.125)
    assert found.effective_rank == pytest.approx(4 * 3.625**2 / 20.875)
    assert found.cdf(torch.tensor([-2.0, -1.0, 1.5, 9.0])).tolist() == [0, 1 / 8, 3 / 8, 1]
    assert [found.quantile(q) for q in (0.0, 0.125, 0.2, 0.5, 1.0)] == [-1, -1, 1, 2, 8]
    summary = found.summary()
    assert all(isinstance(x, float) for x in summary.values())
    assert summary["lambda_max"] == 8
    assert summary["lambda_min"] == -1
    assert summary["trace"] == 13.5
    assert summary["negative_mass"] == 1 / 8
    assert summary["largest_stable_step"] == 0.25


def test_the_standard_error_of_the_density_is_an_integral():
    # cdf of the probes: 0, 0.5, 0.75 at (.., 1, 2) and 0.25, 0.75 at (-1, 4); differences 0.25, 0.25, 0.5 over 2, 1, 2.
    area = 2 * 0.25 + 1 * 0.25 + 2 * 0.5
    assert small().stderr == pytest.approx(area / 2)
    one = small(nodes=((1.0, 2.0),), weights=((0.5, 0.25),))
    assert math.isnan(one.stderr)
    assert math.isnan(one.trace_stderr)
    assert bool(one.density_stderr()[1].isnan().all())


def test_the_ratio_of_known_eigenvalues():
    found = small(eigenvalues=(8.0, 5.0, -3.0), weights=((0.1, 0.15), (0.15, 0.1)), size=4)
    assert found.ratio(1) == 1
    assert found.ratio(2) == 1.6
    assert math.isnan(found.ratio(3))
    assert math.isnan(found.ratio(4))
    assert math.isnan(small(eigenvalues=(8.0, 3.0)).ratio(2))  # a node is above


def test_wasserstein_is_exact():
    found = small()
    assert found.wasserstein(found) == 0
    assert found.wasserstein(torch.tensor([-1.0, 1, 1, 2, 4, 4, 8, 8])) == pytest.approx(0, abs=1e-15)
    assert found.wasserstein(torch.tensor([0.0, 2, 2, 3, 5, 5, 9, 9])) == pytest.approx(1)
    scipy = pytest.importorskip("scipy.stats")
    a, b = normal(30), normal(50, seed=1).abs()
    exact = SpectralDensity(
        nodes=[], weights=[], eigenvalues=a, size=30, steps=1, probe="gaussian", seed=0, n_matvec=30
    )
    assert exact.wasserstein(b) == pytest.approx(scipy.wasserstein_distance(a.numpy(), b.numpy()), rel=1e-12)


# ---- curves ----


def test_the_density_is_a_sum_of_normal_ones(monkeypatch):
    found = small()
    t, phi = found.density(sigma=0.5)
    points = zip((-1.0, 1.0, 2.0, 4.0, 8.0), (1 / 8, 1 / 4, 1 / 8, 1 / 4, 1 / 4))
    truth = sum(w * NORMAL.log_prob((t - x) / 0.5).exp() / 0.5 for x, w in points)
    assert (phi - truth).abs().max() < 1e-12
    assert float(t[0]) == -1 - 4 * 0.5
    assert float(t[-1]) == 8 + 4 * 0.5
    assert float(torch.trapezoid(phi, t)) == pytest.approx(1, abs=1e-4)
    monkeypatch.setattr(density, "AT_ONCE", 100)
    assert (found.density(sigma=0.5)[1] - phi).abs().max() < 1e-15
    grid = torch.tensor([0.0, 1.0])
    assert found.density(grid)[0].tolist() == [0, 1]
    assert float(found.density()[0][0]) == -1 - 4 * 9 / 2  # sigma = range / steps
    fine, phi = found.density(sigma=1e-4)
    assert float(torch.trapezoid(phi, fine)) == pytest.approx(1, abs=1e-3)


def test_the_width_of_the_published_code():
    found = small()
    ranges = (7.0 + 9.0) / 2 + 0.02  # of both probes with the eigenvalue 8
    t, phi = found.density(sigma_squared_ref=1e-2, normalize=True)
    other = found.density(t, sigma=math.sqrt(1e-2 * ranges))[1]
    assert (phi * float(other.sum() * (t[1] - t[0])) - other).abs().max() < 1e-12
    assert float(phi.sum() * (t[1] - t[0])) == pytest.approx(1, abs=1e-12)
    tiny = small(nodes=((0.1, 0.2), (-0.1, 0.4)), eigenvalues=(0.5,))
    t, phi = tiny.density(sigma_squared_ref=1e-2)
    assert (phi - tiny.density(t, sigma=0.1)[1]).abs().max() < 1e-12


def test_the_standard_error_of_the_curve():
    found = small()
    t, error = found.density_stderr(sigma=0.5)
    one, two = (
        sum(w * NORMAL.log_prob((t - x) / 0.5).exp() / 0.5 for x, w in zip(*p)) for p in zip(found.nodes, found.weights)
    )
    assert (error - (one - two).abs() / 2).abs().max() < 1e-12


def test_the_logarithmic_axis():
    found = small(nodes=((1e-3, 1.0), (-1.0, 0.0)), eigenvalues=(1000.0,))
    t, phi = found.log_density(threshold=1e-3, sigma=0.05)
    x = torch.asinh(t / 2e-3) / math.log(10)
    assert float(torch.trapezoid(phi, x)) == pytest.approx(1, abs=1e-4)
    right = t > 100
    assert float(torch.trapezoid(phi[right], x[right])) == pytest.approx(1 / 4, abs=1e-4)
    assert float(t[right][phi[right].argmax()]) == pytest.approx(1000, rel=0.02)
    left = t < -0.1
    assert float(torch.trapezoid(phi[left], x[left])) == pytest.approx(1 / 8, abs=1e-4)
    zero = small(nodes=((0.0,), (0.0,)), weights=((1.0,), (1.0,)), eigenvalues=())
    assert bool(zero.log_density()[1].isfinite().all())
    assert bool(zero.density()[1].isfinite().all())


# ---- files and states ----


def test_files(tmp_path):
    found = spectral_density(with_values(spectrum(500)), **plain())
    path = tmp_path / "density.json"
    found.save(path)
    loaded = SpectralDensity.load(path)
    assert loaded.to_dict() == found.to_dict()
    assert loaded.eigenvectors is None
    assert [p.name for p in tmp_path.iterdir()] == ["density.json"]


@pytest.mark.parametrize("damage", ["cut", "format", "missing", "masses", "lengths", "list"])
def test_damaged_files(tmp_path, damage):
    values = small().to_dict()
    if damage == "format":
        values["format"] = 9
    if damage == "missing":
        del values["steps"]
    if damage == "masses":
        values["weights"][0][0] = 0.9
    if damage == "lengths":
        values["nodes"][0].append(3.0)
    text = json.dumps([1] if damage == "list" else values)
    path = tmp_path / "x.json"
    path.write_text(text[: len(text) // 2] if damage == "cut" else text)
    with pytest.raises(CorruptFile, match=r"x\.json"):
        SpectralDensity.load(path)


class Killed(Exception):
    pass


def kill_at(n):
    def callback(done, planned):
        assert planned == 100
        if done >= n:
            raise Killed

    return callback


@pytest.mark.parametrize("probe", ["rademacher", "orthogonal"])
@pytest.mark.parametrize("options", [{}, {"probes_at_once": 2}, {"basis_dtype": torch.bfloat16}, {"deflate": False}])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, every, options, probe):
    monkeypatch.setattr(density, "SAVE_SECONDS", every)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    options = plain(probes=5, steps=20, probe=probe) | options
    values = spectrum(300)
    whole = spectral_density(with_values(values), **options)
    path = tmp_path / "state.pt"
    for stop in (7, 20, 53, 100):
        path.unlink(missing_ok=True)
        with pytest.raises(Killed):
            spectral_density(with_values(values), checkpoint=path, callback=kill_at(stop), **options)
        op = with_values(values)
        found = spectral_density(op, checkpoint=path, **options)
        assert found.to_dict() == whole.to_dict()
        assert torch.equal(found.eigenvectors, whole.eigenvectors)
        if every == 0:
            assert op.n_matvec <= 100 - stop + 1
    op = with_values(values)
    more = spectral_density(op, checkpoint=path, **options | {"probes": 6})
    assert op.n_matvec == 21
    assert more.to_dict() == spectral_density(with_values(values), **options | {"probes": 6}).to_dict()


def test_a_state_of_something_else_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    values = spectrum(300)
    options = plain(steps=10, checkpoint=path)
    spectral_density(with_values(values), **options)
    with pytest.raises(ValueError, match=r"spectral_density: steps of .*state\.pt must be 12, got 10"):
        spectral_density(with_values(values), **options | {"steps": 12})
    with pytest.raises(ValueError, match=r"seed of .*state\.pt must be 3, got 0"):
        spectral_density(with_values(values), seed=3, **options)
    with pytest.raises(ValueError, match=r"size of .*state\.pt must be 200, got 300"):
        spectral_density(with_values(values[:200]), **options)
    with pytest.raises(ValueError, match=r"dtype of .*state\.pt must be"):
        spectral_density(with_values(values, torch.float32), **options)
    with pytest.raises(ValueError, match="the first Lanczos coefficients of"):
        spectral_density(with_values(1.01 * values), **options)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CorruptFile, match=r"state\.pt: not a checkpoint of spectral_density"):
        spectral_density(with_values(values), **options)
    with pytest.raises(ValueError, match="the folder of checkpoint must be there"):
        spectral_density(with_values(values), **plain(checkpoint=tmp_path / "no" / "state.pt"))


# ---- ranks ----


def shared_operator(noise=0.0):
    values = spectrum(301)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = torch.zeros_like(values)
    parts[rank::world] = values[rank::world]

    def product(v):
        found = parts * v
        if dist.is_initialized():
            dist.all_reduce(found)
        return found * (1 + noise * rank)

    op = from_matvec(product, len(values), dtype=torch.float64, rows=True)
    op.group = dist.group.WORLD if dist.is_initialized() else None
    return op


def density_of_ranks(noise, shard, folder):
    density.SAVE_SECONDS, os.fsync = 0.0, lambda descriptor: None
    options = {"probes": 5, "steps": 20, "shard_basis": shard, "tol": 1e-9, "probes_at_once": 2}
    whole = spectral_density(shared_operator(noise), **options)
    path = folder / f"{noise}-{shard}.pt"
    try:
        spectral_density(shared_operator(noise), checkpoint=path, callback=kill_at(35), **options)
    except Killed:
        dist.barrier()
    density.SAVE_SECONDS = 1e9
    resumed = spectral_density(shared_operator(noise), checkpoint=path, **options)
    try:
        spectral_density(shared_operator(noise), checkpoint=path, seed=1, **options)
        refused = False
    except ValueError:
        refused = True
    vectors = whole.eigenvectors is None
    return whole.to_dict(), resumed.to_dict(), refused, vectors


@pytest.mark.parametrize(("noise", "shard"), [(0.0, False), (1e-14, False), (1e-14, True)])
def test_ranks_agree_with_each_other_and_with_one_process(tmp_path, noise, shard):
    one, two = ranks.run(2, density_of_ranks, noise, shard, tmp_path)
    assert one == two
    whole, resumed, refused, no_vectors = one
    assert refused
    assert no_vectors == shard
    assert whole == resumed
    alone = spectral_density(shared_operator(), 5, 20)
    assert SpectralDensity.from_dict(whole).wasserstein(alone) < 1e-6
    assert whole["eigenvalues"] == pytest.approx(alone.eigenvalues.tolist(), abs=1e-9)


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, r"spectral_density: probes must be >= 1, got 0"),
        ({"steps": 0}, r"spectral_density: steps must be >= 1, got 0"),
        ({"probe": "orthogonal", "probes": 51}, r"spectral_density: orthogonal probes must be at most P = 50, got 51"),
        ({"probes_at_once": 0}, r"spectral_density: probes_at_once must be >= 1 or 'auto', got 0"),
        ({"tol": 0.0}, r"spectral_density: tol must be > 0 or None, got 0.0"),
        ({"basis_dtype": torch.float16}, r"spectral_density: basis_dtype must be float64"),
        ({"shard_basis": True}, r"spectral_density: shard_basis must be False"),
    ],
)
def test_bad_input_is_refused_before_any_product(options, message):
    op = with_values(normal(50))
    with pytest.raises(ValueError, match=message):
        spectral_density(op, **{"probes": 2, "steps": 5} | options)
    assert op.n_matvec == 0


def test_an_unknown_probe():
    with pytest.raises(UnknownName, match="did you mean 'gaussian'"):
        spectral_density(with_values(normal(50)), probe="gauss")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite(bad):
    values = normal(50)
    values[7] = bad
    with pytest.raises(FloatingPointError, match="spectral_density: product 1 of MatrixFree is not finite"):
        spectral_density(with_values(values), 2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.density(sigma=0.0), r"SpectralDensity.density: sigma must be > 0 or None"),
        (lambda d: d.density(sigma=1.0, sigma_squared_ref=1.0), r"sigma must be None where sigma_squared_ref is given"),
        (lambda d: d.density(sigma_squared_ref=-1.0), r"sigma_squared_ref must be > 0"),
        (lambda d: d.moment(-1), r"moment: p must be >= 0"),
        (lambda d: d.energy(0), r"energy: p must be >= 1"),
        (lambda d: d.negative_mass(-1.0), r"negative_mass: tol must be >= 0"),
        (lambda d: d.quantile(1.5), r"quantile: q must be in \[0, 1\]"),
        (lambda d: d.ratio(0), r"ratio: k must be from 1 to P = 4"),
        (lambda d: d.log_density(threshold=0.0), r"threshold must be > 0"),
        (lambda d: d.wasserstein(torch.empty(0)), r"the number of eigenvalues must be >= 1"),
    ],
)
def test_bad_questions(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())
