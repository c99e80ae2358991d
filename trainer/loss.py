"""The loss of a batch: smoothed, weighted and mixed as a training asks for."""

from torch import Tensor
from torch.nn import functional

from trainer.mixing import Partners


def summed_loss(
    logits: Tensor,
    labels: Tensor,
    partners: Partners | None = None,
    weights: Tensor | None = None,
    *,
    smoothing: float,
) -> Tensor:
    """Cross-entropy summed over the images, 0-d, float.

    logits: (N,classes) float; labels: (N,). partners: the loss is linear in the target, so a mixed
    image has its own label's by its share and its partner's by the rest. weights: (classes,); an
    image counts with its class's, smoothed share included, as if it came that often (torch's own
    weights would pull every image's smoothed share towards the rare classes).
    """
    own = _summed(logits, labels, weights, smoothing)
    if partners is None:
        return own
    theirs = _summed(logits, partners.labels, weights, smoothing)
    return partners.share * own + (1 - partners.share) * theirs


def _summed(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    if weights is None:
        return functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    each = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return (weights[labels] * each).sum()
