"""Errors a user can act on: each names the input, the rule it broke and the way out."""

from __future__ import annotations

from collections.abc import Mapping


class InputError(ValueError):
    """Something given by the user can't be used as it is; the message says why and what to do."""


class SlideError(InputError):
    """A slide can't be opened, read or measured."""


class MissingMppError(SlideError):
    """A slide carries no usable base resolution (microns per pixel)."""


class FeatureFileError(InputError):
    """A feature file is partial, foreign, damaged or of the wrong shape."""


class WeightsError(InputError):
    """Weights are missing, or do not belong to the architecture they were given to."""


class DiskFullError(InputError, OSError):
    """A disk, a quota or the limit of a file's size has no room for an output."""


class DeviceMemoryError(InputError):
    """The memory of a device is full with a single tile, which is no slide's fault."""


class LedgerError(InputError):
    """The ledger of an output folder can't be opened, read or written."""


class RecipeChangedError(LedgerError):
    """Finished slides were made by other settings than this run's.

    Attributes:
        differences: Setting to (stored, asked).
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[object, object]]) -> None:
        super().__init__(message)
        self.differences = dict(differences)


class LeaseLostError(RuntimeError):
    """A slide was taken over by another worker, since this one's lease had run out.

    Nothing is wrong with the slide: leave it to the other worker and go on with the next.
    """


class DecodeError(RuntimeError):
    """The decoder itself can't work on: its processes don't start."""
