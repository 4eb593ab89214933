"""Errors a user can act on: each names the input, the rule it broke and the way out."""

from __future__ import annotations


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
