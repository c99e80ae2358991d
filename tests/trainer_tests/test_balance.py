import dataclasses
import sys
from typing import Any

import pytest
import torch

from trainer.balance import balanced_order, class_weights, with_smote
from trainer.batches import order_of
from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset, Split
from trainer.data.folds import cut_folds
from trainer.device import DevicePlan
from trainer.features import FeatureSplit
from trainer.folds import fold_config, train_folds
from trainer.loop import train

CROOKED = torch.tensor([0, 0, 0, 0, 3] * 100).where(torch.arange(500) % 61 != 7, 1)
"""500 images of four classes, one of which has none."""


def test_weights_are_inverse_to_the_class_s_size_and_one_on_average() -> None:
    weights = class_weights(CROOKED, 5)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[CROOKED].mean(), torch.tensor(1.0))
    totals = weights * torch.tensor([CROOKED.tolist().count(label) for label in range(5)])
    torch.testing.assert_close(totals, 500 / 3 * torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]))


def test_classes_of_equal_size_weigh_one() -> None:
    torch.testing.assert_close(class_weights(torch.arange(12) % 4, 4), torch.ones(4))


def test_an_epoch_draws_as_many_images_as_there_are_and_each_class_as_often() -> None:
    counts = torch.zeros(4, dtype=torch.int64)
    times = torch.zeros(500, dtype=torch.int64)
    for epoch in range(60):
        order = balanced_order(0, epoch, CROOKED)
        assert order.shape == (500,)
        counts += CROOKED[order].bincount(minlength=4)
        times += order.bincount(minlength=500)
    assert counts.sum() == 60 * 500
    assert counts[2] == 0
    assert bool((counts[[0, 1, 3]].float() / 30_000 - 1 / 3).abs().max() < 0.02)
    # within a class all images are equally likely
    rare = times[CROOKED == 1].float()
    assert len(rare) == 9
    assert float((rare / rare.mean() - 1).abs().max()) < 0.1


def test_each_epoch_draws_anew_and_the_same_epoch_the_same() -> None:
    assert torch.equal(balanced_order(3, 1, CROOKED), balanced_order(3, 1, CROOKED))
    assert not torch.equal(balanced_order(3, 1, CROOKED), balanced_order(3, 2, CROOKED))
    assert not torch.equal(balanced_order(3, 1, CROOKED), balanced_order(4, 1, CROOKED))


def test_only_balanced_sampling_draws_with_replacement() -> None:
    for balance in ("none", "loss"):
        order = order_of(TrainConfig.from_dict({"balance": balance}), 0, CROOKED)
        assert sorted(order.tolist()) == list(range(500))
    order = order_of(TrainConfig(balance="sampling"), 0, CROOKED)
    assert len(set(order.tolist())) < 400


def crooked_noise() -> ImageDataset:
    """Two classes, 20 to 1, told apart by a little light in much noise."""
    labels = torch.tensor([0] * 400 + [1] * 20 + [0, 1] * 100)
    noise = torch.randint(160, (620, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images = (noise + 12 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    split = Split(images, labels)
    return ImageDataset(
        name="noise",
        train=split.take(range(420)),
        val=split.take(range(420, 620)),
        class_names=("many", "few"),
        mean=(0.32,),
        std=(0.18,),
        fingerprint="0" * 64,
        flips=True,
        open_test=lambda: split.take([]),
    )


def test_both_ways_find_the_rare_class_where_a_plain_loss_does_not() -> None:
    data = crooked_noise()
    config = TrainConfig(backbone="smallcnn", epochs=4, batch_size=32, lr=3e-3)
    found = {}
    for balance in ("none", "loss", "sampling"):
        chosen = dataclasses.replace(config, balance=balance)
        *_, last = train(chosen, data, DevicePlan(device="cpu"))
        found[balance] = last.val_balanced_accuracy
    assert found["loss"] > found["none"] + 0.1
    assert found["sampling"] > found["none"] + 0.1


def features_of(labels: list[int]) -> ImageDataset:
    source = torch.Generator().manual_seed(0)
    made = torch.randn(len(labels), 6, 1, 1, generator=source)
    few = FeatureSplit(made, torch.tensor(labels))
    return ImageDataset(
        name="features", train=few, val=FeatureSplit(made[:0], few.labels[:0]), flips=False,
        class_names=("a", "b", "c", "d"), mean=(0.0,) * 6, std=(1 / 255,) * 6,
        fingerprint=64 * "0", open_test=lambda: few,
    )  # fmt: skip


def test_smote_fills_small_classes_with_points_between_their_own() -> None:
    data = features_of([0] * 30 + [1] * 4 + [3] * 9)
    train_split = with_smote(data, seed=1).train
    assert train_split.labels.bincount().tolist() == [30, 30, 0, 30]
    assert torch.equal(train_split.images[:43], data.train.images)
    own = data.train.images[30:34].flatten(1)
    between = [
        (own[i] + share * (own[j] - own[i]))
        for i in range(4) for j in range(4) for share in torch.linspace(0, 1, 401)
    ]  # fmt: skip
    made = train_split.images[43:][train_split.labels[43:] == 1].flatten(1)
    assert len(made) == 26
    assert float(torch.cdist(made, torch.stack(between)).min(dim=1).values.max()) < 0.02


def test_smote_is_the_same_for_the_same_seed_and_copies_an_image_that_is_alone() -> None:
    data = features_of([0] * 5 + [1])
    once, again = with_smote(data, seed=1).train, with_smote(data, seed=1).train
    assert torch.equal(once.images, again.images)
    copies = once.images[once.labels == 1]
    assert len(copies) == 5
    assert torch.allclose(copies, data.train.images[5].expand_as(copies))


def test_smote_takes_any_seed_and_folds_have_large_ones() -> None:
    data = features_of([0] * 30 + [1] * 4)
    made = [with_smote(data, seed=seed).train.images for seed in (0, 7, 2**32 + 7, 2**63 - 1)]
    assert torch.equal(made[1], made[2])
    assert not torch.equal(made[0], made[1])
    config = TrainConfig(
        backbone="smallcnn", trainable="head", balance="smote", batch_size=20, epochs=1
    )
    folds = cut_folds(crooked_noise(), 2, seed=0)
    *_, last = train_folds(config, folds, DevicePlan(device="cpu"))
    assert all(fold_config(config, index).seed > 2**32 for index in (0, 1))
    assert last.finished


def test_an_epoch_with_smote_has_as_many_batches_as_one_without() -> None:
    data = crooked_noise()
    few = dataclasses.replace(data, val=data.val.take(range(20)))
    config = TrainConfig(
        backbone="smallcnn", trainable="head", balance="smote", batch_size=20, epochs=1
    )
    (*_, last) = train(config, few, DevicePlan(device="cpu"))
    assert last.images_seen == len(few.train)


@pytest.mark.parametrize(
    "fields", [{}, {"trainable": "last1"}, {"trainable": "head", "flip": True}]
)
def test_smote_without_features_that_stay_is_refused(fields: dict[str, Any]) -> None:
    config = TrainConfig.from_dict({"balance": "smote", **fields})
    with pytest.raises(ConfigError, match="balance smote needs features that stay the same"):
        next(train(config, crooked_noise(), DevicePlan(device="cpu")))


def test_without_imbalanced_learn_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imblearn.over_sampling", None)
    with pytest.raises(ConfigError, match=r"pip install 'hpo-vision\[smote\]'"):
        with_smote(features_of([0, 0, 1, 1]), seed=0)
