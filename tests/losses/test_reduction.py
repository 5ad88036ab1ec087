"""Reductions computed by hand, and the compaction of labels."""

import pytest
import torch

from transformers_parakeet.losses import compact_labels, reduce_loss


def test_reductions_equal_values_computed_by_hand():
    losses, label_lengths = torch.tensor([6.0, 8.0, 5.0]), torch.tensor([3, 2, 0])
    assert reduce_loss(losses, label_lengths, "none").tolist() == [6.0, 8.0, 5.0]
    assert float(reduce_loss(losses, label_lengths, "sum")) == 19.0
    # a clip without labels counts as one label
    assert float(reduce_loss(losses, label_lengths, "mean")) == pytest.approx((2 + 4 + 5) / 3)
    assert float(reduce_loss(losses, label_lengths, "mean_batch")) == pytest.approx(19 / 3)
    assert float(reduce_loss(losses, label_lengths, "mean_volume")) == pytest.approx(19 / 5)
    with pytest.raises(ValueError, match="must be one of none, sum, mean, mean_batch, mean_volume, got 'average'"):
        reduce_loss(losses, label_lengths, "average")


def test_compact_labels_keeps_the_order():
    labels = torch.tensor([[-100, 5, -100, 3, 5], [1, 2, 3, 4, 5], [-100] * 5])
    compacted, label_lengths = compact_labels(labels, labels >= 0)
    assert compacted.tolist() == [[5, 3, 5, 0, 0], [1, 2, 3, 4, 5], [0] * 5]
    assert label_lengths.tolist() == [3, 5, 0]
