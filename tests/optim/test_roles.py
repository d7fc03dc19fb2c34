"""Roles of parameters, and a preconditioner for each group."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from conjugo.optim import NLCG, AdamDiagonal, Orthogonal, parameter_groups, roles
from conjugo.optim._fused import FusedPasses, kernels
from conjugo.optim.curvature_preconditioners import GaussNewtonDiagonal, Hutchinson
from conjugo.optim.preconditioners import DiagonalBFGS
from conjugo.training import models, optimizers


class Transformer(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(50, 32)
        self.pos_emb = nn.Parameter(torch.zeros(16, 32))
        self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.lm_head = nn.Linear(32, 50, bias=False)
        if tied:
            self.lm_head.weight = self.token.weight


def _named(model: nn.Module, **options) -> dict[str, str]:
    found = roles(model, **options)
    return {name: found[p] for name, p in model.named_parameters()}


def test_roles_in_a_transformer():
    found = _named(Transformer())
    assert found["token.weight"] == found["pos_emb"] == "embedding"
    assert found["lm_head.weight"] == "head"
    for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"):
        assert found[f"block.{name}"] == "matrix"
    assert {role for name, role in found.items() if "bias" in name or "norm" in name} == {"vector"}


def test_a_head_that_shares_the_embedding_is_one_and_no_other_takes_its_place():
    model = Transformer(tied=True)
    found = _named(model)
    assert found["token.weight"] == "embedding"
    assert found["block.linear2.weight"] == "matrix"
    assert "head" not in found.values()
    assert _named(model, heads=["lm_head"]) == found


@pytest.mark.parametrize("last", [nn.Linear(48, 1), nn.Conv2d(48, 48, 3, groups=48)])
def test_a_last_layer_that_is_a_vector_leaves_no_head(last):
    model = nn.Sequential(nn.Linear(20, 64), nn.Linear(64, 48), nn.BatchNorm1d(48), last)
    assert [role for name, role in _named(model).items() if name in ("0.weight", "1.weight")] == ["matrix"] * 2
    assert "head" not in _named(model).values()


def test_a_table_listed_last_is_no_head():
    model = nn.Module()
    model.layer = nn.Linear(20, 30)
    model.token = nn.Embedding(50, 20)
    model.position_embeddings = nn.ParameterList([torch.zeros(16, 20)])
    assert list(_named(model).values()) == ["head", "vector", "embedding", "embedding"]


def test_tables_are_known_by_whole_words_of_the_last_names():
    model = nn.Module()
    for name in ("composition", "proposition_mix", "embedder", "remember", "disposition2"):
        model.register_parameter(name, nn.Parameter(torch.zeros(32, 32)))
    model.text_embedding = nn.Module()
    model.text_embedding.mixer = nn.Module()
    model.text_embedding.mixer.weight = nn.Parameter(torch.zeros(32, 32))  # around it is something with that name
    model.embedding = nn.MultiheadAttention(32, 4)
    model.position = nn.GRU(32, 32)
    model.last = nn.Linear(32, 32)
    found = _named(model)
    assert [name for name, role in found.items() if role == "embedding"] == []
    tables = nn.Module()
    for name in (
        "pos_emb",
        "pos_embed2",
        "position_embeddings",
        "positional_embedding",
        "relative_position_bias_table",
    ):
        tables.register_parameter(name, nn.Parameter(torch.zeros(32, 32)))
    tables.position = nn.Module()
    tables.position.weight = nn.Parameter(torch.zeros(32, 32))
    assert set(_named(tables).values()) == {"embedding"}


@pytest.mark.parametrize(("name", "head"), [("mlp", "5.weight"), ("cnn", "classifier.weight"), ("resnet8", None)])
def test_the_last_layer_is_the_head(name, head):
    found = _named(models.build(name, input_shape=(3, 32, 32), num_classes=10))
    heads = [own for own, role in found.items() if role == "head"]
    assert len(heads) == 1
    assert head in (None, heads[0])
    assert list(found)[-2:][0] == heads[0] or list(found)[-1] == heads[0]
    assert "matrix" in found.values()


def test_kernels():
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 3, groups=4), nn.Conv2d(8, 1, 1), nn.Linear(4, 4)
    )
    weights = [role for name, role in _named(model).items() if "weight" in name]
    assert weights == ["vector", "matrix", "vector", "head"]


def test_heads_by_name_also_behind_a_wrapper():
    model = nn.Sequential()
    model.add_module("module", Transformer())
    assert _named(model, heads=["lm_head", "linear2"])["module.block.linear2.weight"] == "head"
    assert _named(model, heads="lm_head") == _named(model, heads=["lm_head"])
    with pytest.raises(ValueError, match=r"roles heads.*lm_head"):
        roles(model, heads=["lm_haed"])
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        roles(list(model.parameters()))  # type: ignore[arg-type]


def test_parameter_groups():
    model = Transformer()
    model.token.weight.requires_grad_(False)
    groups = parameter_groups(model, vector={"weight_decay": 0.0}, head={"precond": "bfgs", "lr": 0.5})
    assert [group["role"] for group in groups] == ["matrix", "vector", "embedding", "head"]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1
    optimizer = NLCG(groups, lr=0.1, weight_decay=0.25)
    kinds = [type(precond) for precond in optimizer.preconds]
    assert kinds == [Orthogonal, AdamDiagonal, AdamDiagonal, DiagonalBFGS]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0, 0.25, 0.25]
    assert optimizer.param_groups[3]["lr"] == 0.5
    assert all("precond" not in group for group in optimizer.param_groups)  # a checkpoint holds no objects
    with pytest.raises(ValueError, match="needs a gradient"):
        parameter_groups(nn.ReLU())


# A preconditioner for each group -------------------------------------------------------------------------------------


def _problem(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    return model, torch.randn(64, 20).double(), torch.randint(0, 3, (64,))


def _train(model, optimizer, inputs, targets, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("precond", ["bfgs", "none", "adam", "orthogonal", "kron"])
def test_groups_that_agree_are_as_one_choice(precond, foreach):
    ways = []
    for apart in (False, True):
        model, inputs, targets = _problem()
        halves = [list(model[:3].parameters()), list(model[3:].parameters())]
        groups = [{"params": half, **({"precond": precond} if apart else {})} for half in halves]
        default = "none" if apart and precond != "none" else precond if not apart else "bfgs"
        optimizer = NLCG(groups, lr=0.05, beta_max=0.9, precond=default, foreach=foreach)
        _train(model, optimizer, inputs, targets, 6)
        ways.append(torch.cat([p.detach().ravel() for p in model.parameters()]))
    assert torch.equal(*ways)


@pytest.mark.parametrize("rule", ["fr", "pr", "constant"])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_mixed_groups_with_every_rule_and_scope(rule, scope):
    model, inputs, targets = _problem(1)
    weights = [model[0].weight, model[2].weight]
    rest = [p for p in model.parameters() if all(p is not w for w in weights)]
    groups = [{"params": weights, "precond": "kron"}, {"params": rest, "precond": "adam"}]
    optimizer = NLCG(groups, lr=0.02, rule=rule, scope=scope, beta_max=0.8)
    losses = _train(model, optimizer, inputs, targets, 6)
    assert losses[-1] < losses[1]
    beta = optimizer.last["beta"].reshape(-1)
    assert len(beta) == (1 if scope == "global" else 6)
    assert len(beta.unique()) == 1 or scope != "global"
    if rule == "constant":
        assert torch.all(beta == 0.8)
    elif scope == "group":
        assert [len(part.unique()) for part in (beta[:2], beta[2:])] == [1, 1]
    elif scope == "tensor" and rule == "pr":
        assert len(beta.unique()) > 2


def test_beta_is_made_of_sums_over_all_groups():
    torch.manual_seed(0)
    w, v = (nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2))
    optimizer = NLCG([{"params": [w], "precond": "none"}, {"params": [v], "precond": "adam"}], lr=0.1, precond="kron")
    rhos = []
    for _ in range(2):
        w.grad, v.grad = (torch.randn(4, dtype=torch.float64) for _ in range(2))
        optimizer.step()
        squares, n = optimizer.state[v]["square"], optimizer.state[v]["updates"]
        root = (squares / (1 - 0.99**n)).sqrt() + 1e-8
        rhos.append(w.grad @ w.grad + v.grad @ (v.grad / root))
    torch.testing.assert_close(optimizer.last["beta"], (rhos[1] / rhos[0]).clamp(max=1.0))
    torch.testing.assert_close(optimizer.last["rho"], rhos[1])


@pytest.mark.parametrize("foreach", [False, True])
def test_diagonal_bfgs_learns_from_its_own_parameters_only(foreach):
    """Beside another group, h is what it is without that, where beta is the same."""
    hs = []
    for with_other in (False, True):
        torch.manual_seed(0)
        w, v = nn.Parameter(torch.randn(30)), nn.Parameter(torch.randn(50))
        groups = [{"params": [w], "precond": "bfgs"}, {"params": [v], "precond": "adam"}][: 1 + with_other]
        optimizer = NLCG(groups, lr=0.1, rule="constant", beta_max=0.5, foreach=foreach, fused=False)
        scale = torch.linspace(0.5, 3, 30)
        for _ in range(5):
            w.grad, v.grad = (scale * w).detach(), 100 * v.detach()
            optimizer.step()
        hs.append(optimizer.state[w]["h"])
        assert "h" not in optimizer.state.get(v, {})
        assert "grad_prev" not in optimizer.state.get(v, {})
    assert hs[0].std() > 0.01
    torch.testing.assert_close(hs[1], hs[0])


def test_curvature_is_measured_for_the_groups_that_want_it():
    model, inputs, targets = _problem()
    groups = parameter_groups(model, head={"precond": "hutchinson"})
    optimizer = NLCG(groups, lr=0.01, beta_max=0.9)
    assert optimizer.needs_curvature
    with pytest.raises(RuntimeError, match="needs the curvature"):
        _train(model, optimizer, inputs, targets, 1)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()), create_graph=True)):
        p.grad = g
    optimizer.step()
    curvature = optimizer.state[model[4].weight]["curvature"]
    assert curvature.abs().max() > 0
    assert int(optimizer.skipped_estimates) == 0
    optimizer.measure(model, nn.functional.cross_entropy, inputs, targets)
    _train(model, optimizer, inputs, targets, 1)
    with pytest.raises(ValueError, match="the same as in other groups where curvature"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2).double())], "precond": GaussNewtonDiagonal()})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2).double())], "precond": Hutchinson()})


def test_bad_names_change_nothing():
    w = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"precond.*'othogonal'.*orthogonal"):
        NLCG([{"params": [w], "precond": "othogonal"}], lr=0.1)
    with pytest.raises(ValueError, match=r"precond"):
        NLCG([w], precond="")
    optimizer = NLCG([w], lr=0.1)
    given = {"params": [nn.Parameter(torch.zeros(3))], "precond": "adam", "lr": -1.0}
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group(given)
    assert len(optimizer.preconds) == len(optimizer.param_groups) == 1
    assert given["precond"] == "adam"  # the caller's own


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_it_goes_on_bit_for_bit(how):
    model, inputs, targets = _problem()

    def make(model: nn.Module) -> NLCG:
        return NLCG(parameter_groups(model, head={"precond": "bfgs"}), lr=0.02, beta_max=0.9)

    optimizer = make(model)
    _train(model, optimizer, inputs, targets, 3)
    if how == "state_dict":
        other = copy.deepcopy(model)
        twin = make(other)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "pickle":
        other, twin = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other, twin = copy.deepcopy((model, optimizer))
    assert twin.preconds == optimizer.preconds
    assert _train(model, optimizer, inputs, targets, 3) == _train(other, twin, inputs, targets, 3)


def test_groups_by_role_are_as_a_predicate_and_as_fast():
    ways = []
    for by_role in (False, True):
        model, inputs, targets = _problem()
        head = model[4].weight
        one = [{"params": list(model.parameters()), "precond": Orthogonal(matrices=lambda p, head=head: p is not head)}]
        optimizer = NLCG(parameter_groups(model) if by_role else one, lr=0.02, beta_max=0.9)
        losses = _train(model, optimizer, inputs, targets, 4)
        assert isinstance(optimizer._passes, FusedPasses) == (kernels is not None)
        ways.append(losses)
    torch.testing.assert_close(ways[0], ways[1], rtol=1e-9, atol=0.0)


def test_kernels_only_for_what_fits_together():
    w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for first, second, fits in [("bfgs", "adam", False), ("none", "bfgs", False), ("kron", "adam", True)]:
        optimizer = NLCG([{"params": [w], "precond": first}, {"params": [v], "precond": second}], lr=0.1, fused=True)
        w.grad, v.grad = torch.ones(3), torch.ones(3)
        if fits and kernels is not None:
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="fused=True needs"):
                optimizer.step()


def test_orthogonal_leaves_out_what_the_roles_leave_out():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))  # a head that looks like a matrix
    optimizer = NLCG(parameter_groups(model), lr=0.01, beta_max=0.9)
    assert "square" not in optimizer.state[model[0].weight]
    assert "square" in optimizer.state[model[2].weight]


@pytest.mark.parametrize("name", ["nlcg-orthogonal", "muon"])
@pytest.mark.parametrize("decay_vectors", [False, True])
def test_the_catalogue_goes_by_roles(name, decay_vectors):
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40))
    optimizer = optimizers.build(name, model, weight_decay=0.5, decay_vectors=decay_vectors)
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    adams = {"square", "exp_avg_sq"}
    assert [bool(adams & optimizer.state[p].keys()) for p in model.parameters()] == [True, False, True, True, True]
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for p in model.parameters():
        assert decays[p] == (0.5 if decay_vectors or p.ndim > 1 else 0.0)
    whole = optimizers.build("nlcg-orthogonal", model, precond="kron")
    assert len(whole.param_groups) == 1


def test_what_is_said_of_matrices_goes_over_the_roles():
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40))
    for matrices, expected in ((lambda p: p.shape[0] == 40, [True, False, False, True, False]), (None, [False, True])):
        optimizer = optimizers.build("muon", model, matrices=matrices)
        model(torch.arange(8)).square().mean().backward()
        optimizer.step()
        taken = ["momentum_buffer" in optimizer.state[p] for p in model.parameters()]
        assert taken == expected + [False] * (len(taken) - len(expected))


# What is not said -----------------------------------------------------------------------------------------------------


def test_without_further_arguments_matrices_are_orthogonalised():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    whole, plain = NLCG(model), NLCG(model.parameters())
    assert [group["role"] for group in whole.param_groups] == ["matrix", "vector", "head"]
    head = model[2].weight
    assert "square" in whole.state[head]  # of a model it is known to be one
    assert "square" not in plain.state[head]
    for optimizer in (whole, plain):
        assert "square" not in optimizer.state[model[0].weight]
        assert {(group["lr"], group["beta_max"]) for group in optimizer.param_groups} == {(0.01, 0.9)}
    assert len(NLCG(model, precond="bfgs").param_groups) == 1


@pytest.mark.parametrize(("precond", "usual"), [("bfgs", (0.1, 1.0)), ("none", (0.1, 1.0)), ("kron", (0.01, 0.9))])
def test_learning_rate_and_limit_of_beta_go_with_the_preconditioner(precond, usual):
    w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for optimizer in (
        NLCG([w], precond=precond),
        NLCG([{"params": [v]}, {"params": [w], "precond": precond}]),
    ):
        group = optimizer.param_groups[-1]
        assert (group["lr"], group["beta_max"]) == usual
    given = NLCG([{"params": [w], "precond": precond}], lr=0.3, beta_max=0.5).param_groups[0]
    assert (given["lr"], given["beta_max"]) == (0.3, 0.5)


def test_the_reference_mode_is_the_published_method():
    w = nn.Parameter(torch.ones(3))
    optimizer = NLCG([w], mode="reference", h0=2.0)
    assert isinstance(optimizer.preconds[0], DiagonalBFGS)
    assert optimizer.param_groups[0]["lr"] == 0.1
    for precond in (None, "adam"):
        with pytest.raises(ValueError, match=r"h0, h_bounds.*precond='bfgs'"):
            NLCG([w], h0=2.0, precond=precond)
    NLCG([{"params": [w], "precond": "bfgs"}], h0=2.0)
