import json

import pytest

from conjugo.studies import CompareConfig
from conjugo.studies.presets import presets
from conjugo.training import data, optimizers


@pytest.mark.parametrize("name", ["demo", "cifar10"])
def test_presets_are_honest_comparisons(name):
    preset = presets()[name]
    assert {"nlcg", "momentum", "adamw", "lars", "lamb"} <= set(preset.optimizers)
    assert preset.seeds >= 2
    assert preset.trials >= 5
    assert CompareConfig.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
    assert set(preset.optimizers) <= set(optimizers.names())


def test_the_demo_goes_from_small_batches_to_the_full_one_without_a_download():
    demo = presets()["demo"]
    assert demo.batch_sizes[-1] == "full"
    assert demo.batch_sizes[0] == 32
    assert (demo.trials, demo.seeds) >= (8, 3)
    assert len(data.load(demo.train.data).train) == 1437


def test_the_cifar_comparison_goes_to_batch_8192():
    cifar = presets()["cifar10"]
    assert (cifar.batch_sizes[0], cifar.batch_sizes[-1]) == (256, 8192)
    assert cifar.train.model == "resnet8"
