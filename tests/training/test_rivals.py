"""Muon and SOAP as rivals: which parameters they take for matrices, memory layouts, state."""

import copy

import pytest
import torch
from torch import nn

from conjugo.training.optimizers import build, entry
from conjugo.training.rivals import MuonAdamW


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.Linear(32, 10)).double()


def trained(model, optimizer, steps=4):
    inputs = torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_muon_is_that_of_torch_and_the_rest_is_adamw():
    ours, theirs = network(), network()
    kernel = theirs[0].weight
    flat = nn.Parameter(kernel.detach().view(32, -1))  # the same memory
    matrices, others = [flat, theirs[3].weight], [theirs[0].bias, theirs[3].bias, *theirs[4].parameters()]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))

    class Both:
        def zero_grad(self):
            theirs.zero_grad()

        def step(self):
            flat.grad = kernel.grad.view(32, -1)
            muon.step()
            adamw.step()

    expected = trained(theirs, Both())
    got = trained(ours, MuonAdamW(ours.parameters(), lr=0.01, weight_decay=0.1, momentum=0.9))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_memory_layout_does_not_matter():
    plain, other = network(), network().to(memory_format=torch.channels_last)
    assert other[0].weight.stride() != plain[0].weight.stride()
    expected = trained(plain, MuonAdamW(plain.parameters(), lr=0.01))
    got = trained(other, MuonAdamW(other.parameters(), lr=0.01))
    for a, b in zip(got, expected):  # the factor is worked out in bfloat16
        torch.testing.assert_close(a, b, rtol=0, atol=3e-3)
    assert (got[0] - network()[0].weight).abs().max() > 0.02


@pytest.mark.parametrize("dims", [(1, 0, 2), (2, 0, 1), (0, 2, 1), (1, 2, 0)])
def test_a_layout_that_is_no_view_of_a_matrix_is_trained_all_the_same(dims):
    torch.manual_seed(0)
    values, gradients = torch.randn(32, 64, 24).double(), torch.randn(2, 32, 64, 24).double()
    odd = nn.Parameter(values.clone().permute(dims))
    plain = nn.Parameter(values.permute(dims).contiguous())
    ways = []
    for p in (odd, plain):
        optimizer = MuonAdamW([p], lr=0.01, weight_decay=0.1, matrices=lambda p: True)
        for gradient in gradients:
            p.grad = gradient.permute(dims)
            optimizer.step()
        ways.append(p.detach())
    torch.testing.assert_close(ways[0], ways[1], rtol=0, atol=1e-3)
    assert (ways[0] - values.permute(dims)).abs().max() > 0.01
    assert odd.stride() == values.permute(dims).stride()


def test_the_count_of_steps_moves_to_its_parameter():
    """As in a state of a GPU that was read onto the CPU; a meta device stands for the GPU."""
    p = nn.Parameter(torch.empty(2, device="meta"))
    optimizer = MuonAdamW([p])
    for fused in (False, True):
        optimizer.state[p] = {"step": torch.tensor(3.0)}
        inner = torch.optim.SGD([p], lr=0.1)  # without a gradient it does nothing
        inner.defaults["fused"] = fused
        optimizer._step_with(inner, [p], [p])
        assert optimizer.state[p]["step"].device.type == ("meta" if fused else "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_read_onto_the_cpu_goes_on_on_a_gpu(tmp_path):
    model = nn.Linear(4, 4, device="cuda")
    optimizer = MuonAdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(2, 4, device="cuda")).sum().backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        optimizer = MuonAdamW(model.parameters())
        optimizer.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu"))


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_resumes(name):
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    whole, parts = network(), network()
    expected = trained(whole, build(name, whole.parameters()), 6)
    first = build(name, parts.parameters())
    trained(parts, first, 3)
    second = build(name, parts.parameters())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for a, b in zip(trained(parts, second, 3), expected):
        assert torch.equal(a, b)


def test_who_is_a_matrix_can_be_said():
    model = network()
    optimizer = MuonAdamW(model.parameters(), matrices=lambda p: p is model[4].weight)
    trained(model, optimizer, 1)
    assert [p.shape[0] for p in model.parameters() if "momentum_buffer" in optimizer.state[p]] == [10]
    groups = [{"params": [model[0].weight], "matrices": False}, {"params": model[3].weight}]
    optimizer = MuonAdamW(groups)
    trained(model, optimizer, 1)
    assert "exp_avg" in optimizer.state[model[0].weight]
    assert "momentum_buffer" in optimizer.state[model[3].weight]


def test_soap_leaves_out_what_is_excepted():
    pytest.importorskip("pytorch_optimizer")
    model = network()
    optimizer = build("soap", model.parameters(), matrices=lambda p: p is not model[4].weight)
    trained(model, optimizer, 2)
    assert [len(basis) for basis in optimizer.state[model[0].weight]["Q"]] == [32, 16, 3, 3]
    assert [len(basis) for basis in optimizer.state[model[4].weight]["Q"]] == [0, 0]


def test_without_its_package_soap_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r"pip install 'conjugo\[bench\]'"):
        build("soap", network().parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"betas": (0.9, 1.5)}, "betas"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=f"MuonAdamW: {message}"):
        MuonAdamW(network().parameters(), **options)


def test_a_closure_is_evaluated():
    model = network()
    assert MuonAdamW(model.parameters()).step(lambda: 3.0) == 3.0


def test_the_catalogue_tunes_the_average():
    assert entry("muon").second.name == "momentum"
    assert entry("soap").second.name == "beta1"
