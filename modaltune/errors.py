"""Errors of the whole package under one roof; those of slides and files come from the engine."""

from modaltune.engine.errors import (
    DeviceMemoryError,
    DiskFullError,
    FeatureFileError,
    InputError,
    LeaseLostError,
    LedgerError,
    MissingMppError,
    RecipeChangedError,
    SlideError,
    WeightsError,
)


class CheckpointError(InputError):
    """A checkpoint does not belong to this architecture, or is damaged."""


class CohortError(InputError):
    """Tables, labels or records of a cohort contradict each other or the rules of the format."""


__all__ = [
    "CheckpointError",
    "CohortError",
    "DeviceMemoryError",
    "DiskFullError",
    "FeatureFileError",
    "InputError",
    "LeaseLostError",
    "LedgerError",
    "MissingMppError",
    "RecipeChangedError",
    "SlideError",
    "WeightsError",
]
