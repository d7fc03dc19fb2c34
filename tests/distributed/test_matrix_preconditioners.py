"""Adam's scaling, orthogonalised gradients and the Kronecker eigenbasis on several ranks."""

import pytest
import torch
from tests.distributed import ranks
from tests.distributed.test_nlcg import entire, fitted, wrapped

from conjugo.optim import NLCG
from conjugo.optim.adaptive_preconditioner import AdamDiagonal
from conjugo.optim.kronecker import Kronecker
from conjugo.optim.orthogonal import Orthogonal


def everything(p):
    return True


def nothing(p):
    return False


WHOLE = {
    "orthogonal": {"precond": Orthogonal(matrices=everything), "lr": 0.05},
    "orthogonal pr": {"precond": Orthogonal(matrices=everything), "lr": 0.1, "rule": "pr"},
    "kron": {"precond": Kronecker(period=3), "lr": 0.01},
    "adam": {"precond": "adam", "lr": 0.01},
}
CUT = {
    "adam": {"precond": AdamDiagonal(), "lr": 0.01},
    "adam constant": {"precond": "adam", "lr": 0.01, "rule": "constant"},
    "orthogonal, no matrices": {"precond": Orthogonal(matrices=nothing), "lr": 0.01},
    "kron, no matrices": {"precond": Kronecker(matrices=nothing), "lr": 0.01},
}
STEPS = 20


def fits(kind, options):
    return {name: fitted(kind, STEPS, {"beta_max": 0.9} | chosen) for name, chosen in options.items()}


@pytest.mark.parametrize("world", [2, 4])
def test_whole_matrices_on_every_rank(world):
    """All ranks get the same bits; what one process gets, to rounding, which an eigenbasis amplifies step by step."""
    alone = fits("alone", WHOLE)
    everyone = ranks.run(world, fits, "ddp", WHOLE)
    for name, (losses, _) in alone.items():
        assert losses[-1] < 0.7 * losses[0], name
        for found, params in (rank[name] for rank in everyone):
            steps, rel = (6, 0.02) if name == "kron" else (STEPS, 1e-3)
            assert found[:steps] == pytest.approx(losses[:steps], rel=rel), name
            assert all(torch.equal(a, b) for a, b in zip(params, everyone[0][name][1], strict=True)), name


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("fsdp", 4), ("tp", 2)])
def test_what_acts_on_single_values_may_be_cut(kind, world):
    alone = fits("alone", CUT)
    everyone = ranks.run(world, fits, kind, CUT)
    for name, (losses, wanted) in alone.items():
        assert losses[-1] < 0.7 * losses[0], name
        for found, params in (rank[name] for rank in everyone):
            assert found == pytest.approx(losses, rel=1e-3), name
            for a, b in zip(params, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def refused(kind, options):
    model, _, _ = wrapped(kind)
    before = entire(model.parameters())
    try:
        NLCG(model.parameters(), **options)
    except ValueError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, entire(model.parameters()), strict=True))
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "options"), [("fsdp", {}), ("tp", {}), ("ddp", {"shard_state": True})], ids=["fsdp", "tp", "shard_state"]
)
@pytest.mark.parametrize("precond", [Orthogonal(matrices=everything), Kronecker()], ids=["orthogonal", "kron"])
def test_a_matrix_that_is_cut_is_refused_on_all_ranks_with_what_to_do(kind, options, precond):
    messages = ranks.run(2, refused, kind, {"precond": precond} | options)
    for message in messages:
        assert message == messages[0]
        assert f"{type(precond).__name__}: the matrices must be whole on every rank" in message
        assert "take DDP without shard_state" in message
        assert "matrices=..." in message
        assert "cut over ranks" in message


def one_rank(options):
    return fitted("fsdp", 6, {"beta_max": 0.9} | options)[0]


@pytest.mark.parametrize("name", ["orthogonal", "kron"])
def test_shards_of_one_rank_are_whole(name):
    options = WHOLE[name]
    (found,) = ranks.run(1, one_rank, options)
    assert found == pytest.approx(fitted("alone", 6, {"beta_max": 0.9} | options)[0], rel=1e-3)
