"""Medians of layers that lie on several ranks: histograms that are added up."""

import pytest
import torch
from tests.distributed import ranks
from tests.test_space import laid_out
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from conjugo.optim import MCLR, layer_curvature, layer_rates


def large(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(37, 50), (64, 32, 3, 3), (400, 100)]
    return [torch.randn(shape, generator=generator) * 10.0**-i for i, shape in enumerate(shapes)]


def medians(layout, sample):
    """Curvatures in a step, quantiles, rates, and the collectives of the next step."""
    ws, gs = large(1), large(2)
    gs[0][:9] = 0  # dead units, most of them on one rank
    params = [nn.Parameter(w) for w in laid_out(ws, layout)]
    for p, g in zip(params, laid_out(gs, layout), strict=True):
        p.grad = g
    quantiles = [
        layer_curvature([p.grad for p in params], params, statistic="quantile", quantile=q, sample=sample)
        for q in (0.1, 0.5, 0.9)
    ]
    rates = layer_rates(params, sample=sample)
    optimizer = MCLR(params, sample=sample)
    optimizer.step()
    curvature = optimizer.last["curvature"]
    with CommDebugMode() as mode:
        optimizer.step()
    return curvature, torch.stack(quantiles), torch.stack(rates), mode.get_total_counts()


@pytest.mark.parametrize(
    ("world", "layout"), [(2, "fsdp"), (3, "tensor parallel"), (4, "hsdp"), (2, "mixed with whole")]
)
def test_medians_come_from_histograms(world, layout):
    """To 2 % of the median of one process; all ranks agree."""
    (exact, quantiles, rates, _), everyone = medians("whole", None), ranks.run(world, medians, layout, None)
    for found in everyone:
        torch.testing.assert_close(found[0], exact, rtol=0.02, atol=0)
        torch.testing.assert_close(found[1], quantiles, rtol=0.02, atol=0)
        torch.testing.assert_close(found[2], rates, rtol=0.02, atol=0)
        assert found[3] == 1
        assert all(torch.equal(a, b) for a, b in zip(found[:3], everyone[0][:3], strict=True))


def test_samples_of_shards():
    exact = medians("whole", None)[0]
    for found in ranks.run(2, medians, "fsdp", 4096):
        torch.testing.assert_close(found[0], exact, rtol=0.06, atol=0)  # over twice the standard error
        assert not torch.equal(found[0], exact)
