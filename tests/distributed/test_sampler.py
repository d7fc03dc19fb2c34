"""Global batches: every example once per epoch, a sequence that depends on (n, batch, seed) only, exact resume, fair shares."""

import json
from itertools import chain, islice

import pytest
import torch

from conjugo.distributed import GlobalBatchSampler, micro_batches, share


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


class Growing:
    """A batch size that is decided when the epoch begins, by something outside."""

    def __init__(self, now: int = 2) -> None:
        self.now = now
        self.asked: list[int] = []

    def batch_at(self, epoch: int) -> int:
        self.asked.append(epoch)
        return self.now


def test_the_batch_may_change_where_an_epoch_begins():
    sizes = Growing()
    sampler = GlobalBatchSampler(10, sizes, seed=1)
    take(sampler, 3)
    sizes.now = 4
    assert [len(batch) for batch in take(sampler, 2)] == [2, 2]  # to the end of the epoch
    assert [len(batch) for batch in take(sampler, 3)] == [4, 4, 4]
    assert sizes.asked == [0, 1, 2]
    assert sampler.global_batch == 4
    sizes.now = 11
    take(sampler, 1)
    with pytest.raises(ValueError, match=r"global_batch must be in \[1, 10\] .*got 11"):
        next(sampler)
    assert (sampler.epoch, sampler.global_batch) == (2, 4)


@pytest.mark.parametrize("drawn", [0, 3, 5, 6, 8])
def test_a_saved_place_keeps_the_batch_of_its_epoch(drawn):
    sizes = Growing()
    whole = GlobalBatchSampler(10, sizes, seed=1)
    take(whole, min(drawn, 5))
    sizes.now = 4
    take(whole, drawn - min(drawn, 5))
    resumed = GlobalBatchSampler(10, Growing(4), seed=1)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert take(resumed, 9) == take(whole, 9)


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


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_shares_are_the_batch_in_order_and_differ_by_at_most_one(world):
    batch = torch.arange(100, 123)
    shares = [share(batch, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(shares), batch)
    sizes = [len(s) for s in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 23, None])
def test_all_ranks_get_equally_many_micro_batches_and_every_example_counts_once(world, size):
    batch = torch.arange(23)
    counted, counts = [], set()
    for rank in range(world):
        parts, weights = micro_batches(batch, rank, world, size=size)
        counts.add(len(parts))
        assert len(weights) == len(parts)
        assert all(1 <= len(part) <= (size or 23) for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(weight in (0, len(part)) for part, weight in zip(parts, weights))
        counted += [part for part, weight in zip(parts, weights) if weight]
    largest = -(-23 // world)
    assert counts == {-(-largest // (size or largest))}
    assert torch.equal(torch.cat(counted), batch)


def test_a_rank_without_an_example_left_takes_part_with_one_that_does_not_count():
    parts, weights = micro_batches(torch.arange(8), 2, 3, size=1)
    assert [part.tolist() for part in parts] == [[6], [7], [7]]
    assert weights == [1, 1, 0]


def test_the_sequence_of_global_batches_does_not_depend_on_the_number_of_workers():
    n, batch = 29, 9
    steps = 3 * (n // batch)
    expected = take(GlobalBatchSampler(n, batch, seed=5), steps)

    def seen(worlds):
        """Global batches put together from shares; *worlds*: the number of workers in each step."""
        found: list[list[int]] = []
        states = [GlobalBatchSampler(n, batch, seed=5).state_dict()]
        for step, world in enumerate(worlds):
            if step == 0 or world != worlds[step - 1]:  # the job starts anew from what the last one saved
                samplers = [GlobalBatchSampler(n, batch, seed=5) for _ in range(world)]
                for sampler in samplers:
                    sampler.load_state_dict(json.loads(json.dumps(states[0])))
            found.append(joined([share(next(s), rank, world).tolist() for rank, s in enumerate(samplers)]))
            states = [sampler.state_dict() for sampler in samplers]
            assert all(state == states[0] for state in states)
        return found

    for world in (1, 2, 3, 4):
        assert seen([world] * steps) == expected
    assert seen([2] * 4 + [4] * 3 + [3] * 2) == expected  # 3 steps are an epoch: both changes are in the middle of one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 2, 2), "rank must be in \\[0, 1\\] \\(world = 2\\), got 2"),
        ((10, -1, 2), "rank must be in \\[0, 1\\].*got -1"),
        ((10, 0, 0), "world must be >= 1, got 0"),
        ((3, 0, 4), "size of the batch must be >= 4, the number of ranks, got 3"),
    ],
)
def test_bad_shares(arguments, message):
    n, rank, world = arguments
    with pytest.raises(ValueError, match=message):
        share(torch.arange(n), rank, world)
    with pytest.raises(ValueError, match=message):
        micro_batches(torch.arange(n), rank, world)


def test_bad_size_of_micro_batches():
    with pytest.raises(ValueError, match="size must be >= 1 or None, got 0"):
        micro_batches(torch.arange(4), 0, 2, size=0)
