"""Functions that are linear in some tensors, traced, cut in two and simplified."""

import pytest
import torch

from conjugo.curvature._linearized import Linearized, available_memory


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def operations(traced):
    return [str(node.target) for node in traced._second.graph.nodes if node.op == "call_function"]


def check(function, constants, vectors):
    traced = Linearized(function, constants, vectors)
    kept = traced.constants(constants)
    before = [x.clone() for x in (*constants, *vectors, *kept)]
    for found, wanted in zip(traced(kept, vectors), function(constants, vectors), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-14, atol=1e-14)
    for x, y in zip((*constants, *vectors, *kept), before, strict=True):
        assert torch.equal(x, y)  # nothing given or kept is written over
    return traced


def test_what_does_not_depend_on_the_vectors_is_computed_once():
    traced = check(lambda c, v: [(c[0] @ c[0]).tanh() @ v[0]], tensors((3, 3)), tensors((3, 2)))
    assert operations(traced) == ["aten.mm.default"]


def test_sums_of_products_need_no_memory_of_their_own():
    traced = check(lambda c, v: [c[0] @ v[0] + c[1] @ v[0]], tensors((3, 3), (3, 3)), tensors((3, 2)))
    assert operations(traced) == ["aten.mm.default", "aten.addmm_.default"]


def test_sums_with_zeros_and_copies_are_dropped():
    def function(c, v):
        zeros = torch.zeros_like(c[0]) * v[0]
        return [zeros + c[0] * v[0].expand(3, 2).view(3, 2)]

    assert operations(check(function, tensors((3, 2)), tensors((3, 2)))) == ["aten.mul.Tensor"]


def test_a_row_that_is_added_to_a_product_is_a_part_of_it():
    def function(c, v):
        return [torch.zeros_like(c[0]) + v[1] + c[0] @ v[0], c[0] @ v[0] + v[1]]

    traced = check(function, tensors((3, 3)), tensors((3, 3), (3,)))
    assert operations(traced) == ["aten.expand.default", "aten.mm.default", *["aten.add.Tensor"] * 2]


def test_a_row_and_two_products_are_one_sum():
    function = lambda c, v: [c[0] @ v[0] + v[1] + v[0] @ c[0]]  # noqa: E731
    assert operations(check(function, tensors((3, 3)), tensors((3, 3), (3,)))) == [
        "aten.addmm.default",
        "aten.addmm_.default",
    ]


def test_what_is_computed_twice_is_computed_once():
    traced = check(lambda c, v: [(c[0] * v[0]).sum() + (c[0] * v[0]).sum()], tensors((4,)), tensors((4,)))
    assert operations(traced).count("aten.mul.Tensor") == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda c, v: [v[0] + c[0], v[0] - c[0]],  # an input is not written over
        lambda c, v: [c[0] * v[0] + v[0], c[0] * v[0] * 2],  # nor what is needed again
        lambda c, v: [(c[0] * v[0]).T.T + c[0], (c[0] * v[0])[0]],  # nor what others look at
        lambda c, v: [c[0].sin().t() * v[0] + c[0].sin().t()],  # nor what is kept
        lambda c, v: [-(c[0] * v[0]), (c[0] * v[0] - c[0]) / 3],
        lambda c, v: [v[0].sum(0).expand(3, 3) + c[0] * v[0]],  # nor what has less memory than places
        lambda c, v: [c[0] - c[0] * v[0], v[0] * 0],
        lambda c, v: [c[0] + c[0] @ v[0], v[0] + c[0] @ v[0]],
    ],
)
def test_nothing_that_is_needed_is_written_over(function):
    check(function, tensors((3, 3)), tensors((3, 3)))


def test_a_result_that_depends_on_no_vector_is_a_constant():
    check(lambda c, v: [c[0].exp(), v[0] * 1], tensors((3,)), tensors((3,)))


def test_a_tensor_of_the_function_itself_is_known_to_both_parts():
    own = torch.arange(3.0, dtype=torch.float64)
    check(lambda c, v: [c[0] * own + v[0] * own], tensors((3,)), tensors((3,)))


def test_random_numbers_are_seen():
    assert Linearized(lambda c, v: [torch.rand_like(c[0]) * v[0]], tensors((3,)), tensors((3,))).random
    assert not Linearized(lambda c, v: [c[0] * v[0]], tensors((3,)), tensors((3,))).random


def test_random_numbers_are_not_taken_for_the_same():
    traced = Linearized(
        lambda c, v: [(torch.rand_like(c[0]) - torch.rand_like(c[0])) * v[0]], tensors((3,)), tensors((3,))
    )
    assert traced(traced.constants(tensors((3,))), tensors((3,)))[0].abs().min() > 0


def test_available_memory_is_that_of_this_machine():
    assert 2**20 < available_memory(torch.device("cpu")) < 2**50
