"""Global batches: every example once per epoch, a sequence that depends on (n, batch, seed) only, exact resume."""

import json
from itertools import chain, islice

import pytest
import torch

from conjugo.distributed import GlobalBatchSampler


def take(sampler: GlobalBatchSampler, count: int) -> list[list[int]]:
    return [batch.tolist() for batch in islice(sampler, count)]


def joined(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def test_every_epoch_holds_every_example_once():
    batches = take(GlobalBatchSampler(12, 4), 6)
    for epoch in (batches[:3], batches[3:]):
        assert sorted(joined(epoch)) == list(range(12))
    assert batches[:3] != batches[3:]


def test_the_rest_of_an_epoch_is_dropped_or_a_smaller_batch():
    assert [len(b) for b in take(GlobalBatchSampler(10, 4), 4)] == [4, 4, 4, 4]
    kept = take(GlobalBatchSampler(10, 4, drop_last=False), 4)
    assert [len(b) for b in kept] == [4, 4, 2, 4]
    assert sorted(joined(kept[:3])) == list(range(10))


def test_the_sequence_depends_on_n_batch_and_seed_only():
    first = take(GlobalBatchSampler(50, 7, seed=3), 20)
    torch.manual_seed(123)
    torch.rand(5)
    assert take(GlobalBatchSampler(50, 7, seed=3), 20) == first
    assert take(GlobalBatchSampler(50, 7, seed=4), 20) != first


def test_seeds_do_not_share_epochs():
    # Mixing by addition would make epoch 1 of seed 0 the epoch 0 of seed 1.
    epochs = {tuple(joined(take(s, 1))) for seed in range(4) for s in [GlobalBatchSampler(20, 20, seed=seed)]}
    later = GlobalBatchSampler(20, 20, seed=0)
    take(later, 1)
    assert not epochs & {tuple(batch) for batch in take(later, 3)}
    assert len(epochs) == 4


def test_it_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(GlobalBatchSampler(20, 4), 12)
    assert torch.equal(torch.rand(1), expected)


def test_without_shuffling_the_order_is_that_of_the_data():
    assert take(GlobalBatchSampler(4, 2, shuffle=False), 3) == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("drawn", [0, 1, 4, 5, 13])
def test_a_saved_place_continues_exactly(drawn):
    whole = GlobalBatchSampler(23, 5, seed=1)
    take(whole, drawn)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = GlobalBatchSampler(23, 5, seed=1)
    take(resumed, 2)
    resumed.load_state_dict(state)
    assert take(resumed, 12) == take(whole, 12)


def test_another_batch_size_continues_with_the_examples_that_are_left():
    first = GlobalBatchSampler(12, 4, seed=1)
    seen = take(first, 1)
    second = GlobalBatchSampler(12, 2, seed=1)
    second.load_state_dict(first.state_dict())
    assert sorted(joined(seen + take(second, 4))) == list(range(12))


def test_the_place_of_other_data_is_refused():
    sampler = GlobalBatchSampler(12, 4)
    take(sampler, 2)
    with pytest.raises(ValueError, match="saved n must be 12 as here, got 13"):
        sampler.load_state_dict(GlobalBatchSampler(13, 4).state_dict())
    with pytest.raises(ValueError, match="saved seed"):
        sampler.load_state_dict(GlobalBatchSampler(12, 4, seed=9).state_dict())
    assert sampler.consumed == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "global_batch": 1}, "n must be >= 1, got 0"),
        ({"n": 10, "global_batch": 0}, "global_batch must be in \\[1, 10\\]"),
        ({"n": 10, "global_batch": 11}, "global_batch must be in \\[1, 10\\].*got 11"),
        ({"n": 10, "global_batch": 5, "seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(**arguments)


def test_it_serves_a_data_loader():
    data = torch.utils.data.TensorDataset(torch.arange(10))
    loader = torch.utils.data.DataLoader(data, batch_sampler=GlobalBatchSampler(10, 4, seed=2))
    drawn = [batch.tolist() for (batch,) in islice(loader, 3)]
    assert drawn == take(GlobalBatchSampler(10, 4, seed=2), 3)
