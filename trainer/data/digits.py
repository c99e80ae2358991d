"""scikit-learn's digits: 1,797 images of 1x8x8 in ten classes; they need no download."""

import numpy as np
import torch

from trainer.data.dataset import ImageDataset, Split, fingerprint
from trainer.data.splits import draw_test, make_dataset


def load(*, seed: int) -> ImageDataset:
    """The digits, values 0..16 times 255/16 rounded, with a fifth of them as test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    values = np.rint(digits.images * 255 / 16).astype(np.uint8)
    whole = Split(
        torch.from_numpy(values).unsqueeze(1),
        torch.from_numpy(digits.target.astype(np.int64)),
    )
    class_names = tuple(str(name) for name in digits.target_names)
    identity = fingerprint(whole, class_names)
    rest, test = draw_test(whole.labels, identity)
    return make_dataset(
        name="digits",
        training=whole.take(rest),
        class_names=class_names,
        fingerprint=identity,
        flips=False,
        open_test=lambda: whole.take(test),
        seed=seed,
    )
