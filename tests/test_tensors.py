"""Sums over many tensors: how accurate they are, and for which layouts and types they work."""

import numpy as np
import pytest
import torch

from conjugo._tensors import CHUNK, dot, flat, namespace, wide_dtype


def pair(n: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def exact(x: torch.Tensor, y: torch.Tensor) -> float:
    """In extended precision where numpy has it; pairwise summation in any case."""
    return float((x.double().numpy().astype(np.longdouble) * y.double().numpy().astype(np.longdouble)).sum())


# ---- accuracy ----


def test_squared_norms_of_millions_of_float32_values():
    x, _ = pair(4_200_000, torch.float32)
    truth = exact(x, x)
    error = abs(dot(x, x).item() / truth - 1)
    assert error < 1e-6
    # Why the chunks are there: one float32 sum over everything is worse.
    assert abs(torch.dot(x, x).item() / truth - 1) > 4 * error


def test_errors_are_bounded_by_the_chunk():
    """|error| <= eps sqrt(CHUNK) sum |x y|, with room: each chunk is a float32 sum in random order."""
    x, y = pair(1_000_000, torch.float32, seed=1)
    bound = torch.finfo(torch.float32).eps * CHUNK**0.5 * exact(x.abs(), y.abs())
    assert abs(dot(x, y).item() - exact(x, y)) < bound / 16


def test_sums_over_equal_values_do_not_stagnate():
    """2^26 ones: a float32 counter stops at 2^24."""
    x = torch.ones(1).expand(2**20).contiguous()
    total = sum(dot(x, x).item() for _ in range(2))
    assert total == 2**21
    big = torch.full((3 * CHUNK + 5,), 1.0)
    assert dot(big, big).item() == 3 * CHUNK + 5


def test_a_small_part_survives_beside_a_large_one():
    """Chunks are added in float64: 1 beside 1e8, in different chunks."""
    x = torch.zeros(2 * CHUNK)
    x[0], x[CHUNK] = 1e4, 1.0
    assert dot(x, x).item() == 1e8 + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])
def test_around_the_edges_of_chunks(n, dtype):
    x = torch.ones(n, dtype=dtype)
    y = torch.full((n,), 0.5, dtype=dtype)
    y[-1] = 7.0
    assert dot(x, y).item() == 0.5 * (n - 1) + 7


def test_float64_is_not_rounded_to_float32():
    x = torch.tensor([1.0, 2.0**-40], dtype=torch.float64)
    assert dot(x, torch.ones(2, dtype=torch.float64)).item() == 1 + 2.0**-40


# ---- types, shapes and layouts ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_0d_float64(dtype):
    x, y = pair(1000, dtype)
    result = dot(x, y)
    assert result.shape == ()
    assert result.dtype == torch.float64
    magnitude = exact(x.abs(), y.abs())
    # Low precision is multiplied and summed in float32, but each chunk's sum is rounded to the tensors' type.
    assert result.item() == pytest.approx(exact(x, y), abs=4 * torch.finfo(dtype).eps * magnitude)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_empty_tensors_have_product_zero(shape, dtype):
    x = torch.zeros(shape, dtype=dtype)
    result = dot(x, x)
    assert result.item() == 0
    assert result.dtype == torch.float64


def test_scalars():
    x = torch.tensor(3.0)
    assert dot(x, x).item() == 9.0


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in other orders in memory."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return {
        "contiguous": x.clone(),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": wide[..., ::2],
        "negative view": torch.flip(torch.flip(x, (0,)), (0,)),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("first", list(layouts(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize("second", list(layouts(torch.zeros(1, 1, 1, 1))))
def test_elements_meet_their_partners_in_any_layout(first, second, dtype):
    generator = torch.Generator().manual_seed(2)
    # Small integers: the sum is exact in every order.
    x, y = (torch.randint(-4, 5, (4, 3, 5, 2), generator=generator).to(dtype) for _ in range(2))
    assert dot(layouts(x)[first], layouts(y)[second]).item() == (x * y).sum().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_expanded_tensors(dtype):
    x, y = torch.full((1,), 2.0, dtype=dtype).expand(7), torch.arange(7, dtype=dtype)
    assert dot(x, y).item() == 42
    assert dot(x, x).item() == 28


def test_real_views_of_complex_tensors():
    z = torch.tensor([3 + 4j, 1j])
    assert dot(torch.view_as_real(z), torch.view_as_real(z)).item() == 26
    w = torch.randn(3, 5, dtype=torch.complex64).t()
    real = torch.view_as_real(w)
    assert dot(real, real).item() == pytest.approx(w.abs().square().sum().item(), rel=1e-6)


def test_not_finite_stays_visible():
    for bad in (float("nan"), float("inf")):
        x = torch.ones(CHUNK + 2)
        x[-1] = bad
        assert not torch.isfinite(dot(x, x))


# ---- flat ----


def test_flat_is_a_view_in_the_order_of_memory():
    x = torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    y = flat(x)
    assert y.shape == (24,)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, torch.as_strided(x, (24,), (1,)))
    y[0] = 100.0
    assert x[0, 0, 0, 0] == 100.0


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6, 1), (2, 1, 3)])
def test_flat_of_permuted_tensors_is_a_view(shape):
    x = torch.arange(6.0).reshape(shape)
    for order in ((0,), (1, 0), (2, 0, 1), (1, 2, 0)):
        if len(order) == x.ndim:
            y = x.permute(order)
            assert flat(y).data_ptr() == x.data_ptr()
            assert flat(y).tolist() == list(range(6))


def test_flat_copies_what_is_not_dense():
    x = torch.arange(6.0)[::2]
    assert flat(x).tolist() == [0.0, 2.0, 4.0]
    assert flat(torch.ones(1).expand(3)).tolist() == [1.0] * 3


def test_flat_of_scalars_and_nothing():
    assert flat(torch.tensor(2.0)).shape == (1,)
    assert flat(torch.zeros(0, 3)).shape == (0,)


# ---- the rest ----


def test_sums_are_float64_where_there_is_float64():
    assert wide_dtype(torch.device("cpu")) == torch.float64
    assert wide_dtype(torch.device("cuda")) == torch.float64
    assert wide_dtype(torch.device("mps")) == torch.float32


def test_namespaces():
    assert namespace(torch.ones(1)) is torch
    assert namespace(np.ones(1)) is np
    assert namespace(np.float64(1.0)) is np
