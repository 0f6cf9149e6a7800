"""Which image a turned one is of, and where the teacher is listened to (Xu et al., ECCV 2020)."""

from torch import Tensor

from kdav_fast.distillers.terms.unit import unit

_NEVER = -1e9
"""Similarity to an image of padding: with minus infinity its gradients would be no numbers."""


def similarities(embedding: Tensor, valid: Tensor) -> Tensor:
    """Cosines of each turned image with each plain one, 3B x B; -1e9 with images of padding.

    Args:
        embedding: B x 4 x d, the plain image first.
        valid: B booleans.
    """
    plain, turned = unit(embedding[:, 0]), unit(embedding[:, 1:].flatten(0, 1))
    return (turned @ plain.T).masked_fill(~valid, _NEVER)


def trusted(scores: Tensor, answer: Tensor, valid: Tensor, ratio: float) -> Tensor:
    """On which rows the teacher is listened to, B booleans: where its best answer is right, and on some others.

    Of the wrong rows int(ratio * their number), those first where the right answer ranks highest; of equal ranks the
    first rows.

    Args:
        scores: the teacher's, B x K.
        answer: B right answers, of K.
        valid: B booleans; others are never trusted.
    """
    rank = (scores > scores.gather(1, answer[:, None])).sum(1)
    wrong = valid & (rank > 0)
    place = rank.where(wrong, scores.shape[1]).argsort(stable=True).argsort()
    count = (ratio * wrong.sum().double()).floor()
    return valid & ((rank == 0) | (wrong & (place < count)))
