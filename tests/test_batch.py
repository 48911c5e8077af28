from __future__ import annotations

import torch

from uvit.data.batch import Batch, read_all

ONE = Batch(torch.ones(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([1, 2]), [["a"], ["b", "c"]], skipped=["x"])
OTHER = Batch(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.tensor([3]), [["d"]])


def test_batches_are_joined():
    both = ONE + OTHER
    assert both.images.shape == (3, 1, 4, 4) and both.labels.tolist() == [1, 2, 3]
    assert both.captions == [["a"], ["b", "c"], ["d"]] and both.skipped == ["x"]
    assert both.context is None and both.empty_context is None


def test_features_of_captions_are_joined_and_the_empty_ones_are_shared():
    context, empty = torch.randn(3, 5, 6), torch.randn(1, 5, 6)
    one = ONE._replace(context=context[:2], empty_context=empty)
    other = OTHER._replace(context=context[2:], empty_context=empty)
    both = one + other
    assert torch.equal(both.context, context) and torch.equal(both.empty_context, empty)


def test_a_batch_moves_to_a_device():
    moved = ONE._replace(context=torch.randn(2, 5, 6)).to(torch.device("meta"))
    assert moved.images.is_meta and moved.labels.is_meta and moved.context.is_meta
    assert (moved.captions, moved.empty_context, moved.skipped) == (ONE.captions, None, ["x"])


def test_a_whole_data_set_is_read_in_its_order():
    class Numbers:
        def __len__(self):
            return 5

        def read(self, indices, rng):
            return list(indices)

    assert read_all(Numbers()) == [0, 1, 2, 3, 4]
