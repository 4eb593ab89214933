"""Alpha dropout as the numbers that every path of this op applies."""

from __future__ import annotations

from typing import NamedTuple

DROPPED = -1.7580993408473766  # - lambda alpha of SELU, what a dropped unit is set to


class AlphaDropout(NamedTuple):
    """Alpha dropout as one affine map: a kept h becomes `scale h + shift`, a dropped one `dropped`.

    Attributes:
        threshold: A unit is dropped where its 32 random bits, as a number, lie below this.
        scale: Restores variance 1.
        shift: Restores mean 0.
        dropped: `scale DROPPED + shift`.
    """

    threshold: int
    scale: float
    shift: float
    dropped: float

    @classmethod
    def of(cls, p: float) -> AlphaDropout:
        """Return the map for a probability p to drop, 0 to 1.

        Source: Klambauer et al., "Self-Normalizing Neural Networks" (NeurIPS 2017), section 3.
        """
        scale = ((1 - p) * (1 + p * DROPPED**2)) ** -0.5
        shift = -scale * p * DROPPED
        return cls(int(p * 2**32), scale, shift, scale * DROPPED + shift)
