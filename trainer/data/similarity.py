"""Which pictures are the same, or nearly so. Imports without torch.

The perceptual hash is written here, for the libraries that have one scale each picture down once
more, and a hash alone is not enough: pictures of one kind (a white background, one thing in the
middle) have near hashes. So a near hash makes two pictures candidates, and their thumbnails
decide.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.pictures import THUMBNAIL_SIDE

MAX_DISTANCE = 4
"""Bits of the hash in which near duplicates may differ."""
MIN_CORRELATION = 0.99
"""Of the thumbnails' pixels."""
MIN_CONTRAST = 3.0
"""Standard deviation of a thumbnail, in 0..255, below which a picture shows too little to tell."""
_SIDE = 16
"""Of the thumbnails that are kept and compared."""


def perceptual_hash(thumbnail: NDArray[np.uint8]) -> int:
    """64 bits that change little where the picture does (pHash; Zauner 2010, section 3.2.1).

    thumbnail: (32,32), gray. A bit says whether one of the 8 x 8 lowest frequencies of the
    cosine transform is above their median.
    """
    cosines = _cosines()
    low = (cosines @ thumbnail.astype(np.float64) @ cosines.T).ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines() -> NDArray[np.float64]:
    """(8,32): the lowest frequencies of the cosine transform."""
    steps = np.arange(THUMBNAIL_SIDE) + 0.5
    waves: NDArray[np.float64] = np.cos(np.pi / THUMBNAIL_SIDE * np.outer(np.arange(8), steps))
    return waves


def small_thumbnail(thumbnail: NDArray[np.uint8]) -> bytes:
    """16 x 16 means of a (32,32) thumbnail, a byte each."""
    factor = THUMBNAIL_SIDE // _SIDE
    means = thumbnail.reshape(_SIDE, factor, _SIDE, factor).mean(axis=(1, 3))
    rounded: NDArray[np.uint8] = np.rint(means).astype(np.uint8)
    return rounded.tobytes()


def group_duplicates(
    digests: Sequence[str], hashes: Sequence[int], thumbnails: Sequence[bytes]
) -> NDArray[np.int64]:
    """For each picture the number of its group: int64 (N,), a group's number is its first picture.

    Pictures are in one group if their digests are the same, or their hashes differ in at most
    MAX_DISTANCE bits and their thumbnails correlate; and so on from picture to picture.
    """
    parents = np.arange(len(digests))
    first: dict[str, int] = {}
    for index, digest in enumerate(digests):
        _unite(parents, first.setdefault(digest, index), index)
    pixels = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, _SIDE * _SIDE)
    contrasts = np.array([np.std(row) for row in pixels])
    clear = np.flatnonzero(contrasts >= MIN_CONTRAST)
    words = np.array(hashes, dtype=np.uint64)[clear]
    for left, right in _near_pairs(words):
        pairs = np.stack([clear[left], clear[right]])
        for one, other in pairs[:, _correlate(pixels, *pairs)].T:
            _unite(parents, int(one), int(other))
    return np.array([_root(parents, index) for index in range(len(parents))], dtype=np.int64)


def _near_pairs(words: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Pairs that differ in at most MAX_DISTANCE bits, some of them more than once.

    Such a pair has one of MAX_DISTANCE + 1 bands in common (multi-index hashing; Norouzi et al.
    2012), so only pairs with the same band are compared.
    """
    bounds = np.linspace(0, 64, MAX_DISTANCE + 2).astype(int)
    for low, high in itertools.pairwise(bounds.tolist()):
        band = (words >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band, kind="stable")
        for step in range(1, len(order)):
            left, right = order[:-step], order[step:]
            same = band[left] == band[right]
            if not same.any():
                break
            left, right = left[same], right[same]
            near = np.bitwise_count(words[left] ^ words[right]) <= MAX_DISTANCE
            yield left[near], right[near]


def _correlate(
    pixels: NDArray[np.uint8], left: NDArray[np.intp], right: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Whether the thumbnails of each pair correlate."""
    one, other = (pixels[side].astype(np.float32) for side in (left, right))
    one -= one.mean(axis=1, keepdims=True)
    other -= other.mean(axis=1, keepdims=True)
    scale = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    correlated: NDArray[np.bool_] = (one * other).sum(axis=1) >= MIN_CORRELATION * scale
    return correlated


def _root(parents: NDArray[np.intp], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = int(parents[index])
    return index


def _unite(parents: NDArray[np.intp], one: int, other: int) -> None:
    roots = sorted((_root(parents, one), _root(parents, other)))
    parents[roots[1]] = roots[0]
