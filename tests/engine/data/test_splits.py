"""The order of the batches, what is held out, and a split that lies in memory."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from bncli.engine.data.splits import Dataset, InMemory, chunk_count, evaluation_order, holdout_split, order
from bncli.errors import DataError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- order and what is held out -----------------------------------------------------------------------------------


def test_an_epoch_holds_every_example_once_but_for_its_incomplete_last_batch():
    indices = order(10, 3, seeded(0))
    for _ in range(4):
        epoch = torch.cat(list(islice(indices, 3)))
        assert len(epoch.unique()) == 9


def test_epochs_are_shuffled_anew():
    indices = order(20, 20, seeded(0))
    assert not torch.equal(next(indices), next(indices))


def test_the_order_follows_from_the_seed():
    first, again, other = (list(islice(order(50, 10, seeded(seed)), 12)) for seed in (3, 3, 4))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("start", [0, 1, 3, 4, 11])
def test_the_order_goes_on_after_any_number_of_batches(start: int):
    whole = list(islice(order(10, 3, seeded(5)), 15))
    assert all(map(torch.equal, islice(order(10, 3, seeded(5), start=start), 15 - start), whole[start:]))


def test_a_batch_larger_than_the_training_set_is_refused_at_once():
    with pytest.raises(DataError, match=r"train\.batch_size: 60 is more than the 59 training examples; write 59"):
        order(59, 60, seeded(0))
    assert len(next(order(60, 60, seeded(0)))) == 60


def test_carving_parts_the_examples_and_depends_on_the_split_seed_alone():
    train, held_out = holdout_split(100, 30, 0)
    assert len(held_out) == 30
    assert sorted(train.tolist() + held_out.tolist()) == list(range(100))
    assert torch.equal(holdout_split(100, 30, 0)[1], held_out)
    assert not torch.equal(holdout_split(100, 30, 1)[1], held_out)


def test_holding_everything_out_is_refused():
    with pytest.raises(
        DataError, match=r"data\.held_out: 100 leaves nothing to train on, the data set has 100 examples"
    ):
        holdout_split(100, 100, 0)


def test_the_order_of_evaluation_holds_every_example_and_depends_on_its_arguments_alone():
    found = evaluation_order(50, 3)
    assert sorted(found.tolist()) == list(range(50))
    assert found.tolist() != list(range(50))
    torch.manual_seed(99)
    assert torch.equal(evaluation_order(50, 3), found)
    assert not torch.equal(evaluation_order(50, 4), found)


# --- splits -------------------------------------------------------------------------------------------------------


def test_batches_are_the_rows_of_the_indices_and_nothing_else():
    x, y = torch.randn(10, 4, generator=seeded(0)), torch.arange(10)
    indices = list(islice(order(10, 4, seeded(1)), 5))
    for index, (batch_x, batch_y) in zip(indices, InMemory(x, y).batches(indices), strict=True):
        assert torch.equal(batch_x, x[index])
        assert torch.equal(batch_y, y[index])


@pytest.mark.parametrize("size", [1, 2, 3, 60, 1000])
@pytest.mark.parametrize("examples", [2, 3, 7, 61, 121, 1001])
def test_chunks_are_even_of_about_the_size_and_never_of_one_example(examples, size):
    split = InMemory(torch.zeros(examples, 1), torch.arange(examples))
    labels = [y for _, y in split.chunks(size)]
    sizes = [len(y) for y in labels]
    assert torch.equal(torch.cat(labels), split.y)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 1
    assert max(sizes) <= max(size, 3)
    assert len(sizes) == chunk_count(examples, size) <= -(-examples // size)


def test_training_batches_alone_are_augmented_and_both_are_converted():
    x, y = torch.rand(6, 1, 4, 4, generator=seeded(0)), torch.arange(6)
    split = InMemory(x, y, convert=lambda stored: stored + 100, augment=True)
    ((batch, _),) = split.batches([y], seeded(1))
    ((chunk, _),) = split.chunks(6)
    assert torch.equal(chunk, x + 100)
    assert not torch.equal(batch, chunk)
    # a crop is cut out of the image with zeros around it, so no number is a new one
    assert set(batch.unique().tolist()) <= {100.0, *chunk.unique().tolist()}


def test_a_data_set_evaluates_its_held_out_examples():
    train, held_out = InMemory(torch.zeros(4, 2), torch.zeros(4).long()), InMemory(torch.ones(3, 2), torch.arange(3))
    found = Dataset("made up", train, held_out, (2,), 3)
    ((x, y),) = found.held_out_batches(10)
    assert torch.equal(x, held_out.x)
    assert torch.equal(y, held_out.y)
