"""Scaling of expression: clipped at training quantiles, standardised, aligned by gene name."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from modaltune.errors import CohortError, InputError
from modaltune.tables import check_choice, name_few, repeated

logger = logging.getLogger(__name__)

MissingGenes = Literal["error", "mean"]


@dataclass(frozen=True, eq=False)
class GeneScaler:
    """Clips genes at training quantiles, then standardises them; saved with the model.

    Attributes:
        genes: The `G` genes, in the order of the output.
        low, high: `[G]` float64 clipping bounds; infinite where clipping is off.
        mean, std: `[G]` float64 of the clipped training values (population deviation); `std` is 1
            for a gene that does not vary in training, whose output is 0 under clipping.
        clip_quantiles: The quantiles behind the bounds, None where clipping is off.
        nan_policy: "error", or "mean": a gap becomes the training mean, 0 after scaling.
        num_cases: Training cases it was fitted on.
    """

    genes: tuple[str, ...]
    low: np.ndarray[Any, np.dtype[np.float64]]
    high: np.ndarray[Any, np.dtype[np.float64]]
    mean: np.ndarray[Any, np.dtype[np.float64]]
    std: np.ndarray[Any, np.dtype[np.float64]]
    clip_quantiles: tuple[float, float] | None
    nan_policy: Literal["error", "mean"]
    num_cases: int

    @classmethod
    def fit(
        cls,
        train: pd.DataFrame,
        clip_quantiles: tuple[float, float] | None = (0.001, 0.999),
        nan_policy: Literal["error", "mean"] = "error",
    ) -> GeneScaler:
        """Fit on the training cases, and on nothing else.

        Args:
            train: Case x gene, `[N, G]`, of the training split only.
            clip_quantiles: Lower and upper quantile to clip at; None for no clipping.
            nan_policy: "error" refuses gaps; "mean" leaves them out here and fills them later.

        Raises:
            CohortError: There is no case, a gene is repeated, or a gap breaks the policy.
            InputError: The quantiles or the policy are invalid.

        Source: REQUIREMENTS 31, 38; METHOD 4.8.
        """
        check_choice("nan_policy", nan_policy, ("error", "mean"))
        if clip_quantiles is not None and not 0 <= clip_quantiles[0] < clip_quantiles[1] <= 1:
            raise InputError(
                f"clip_quantiles must be two rising numbers in 0..1, got {clip_quantiles}; "
                "use None for no clipping"
            )
        genes = tuple(map(str, train.columns))
        values = _values(train, genes, nan_policy)
        if not len(values) or repeated(genes) or np.isnan(values).all(axis=0).any():
            raise CohortError(
                "train must have a case, and every gene once with a known value, got "
                f"{len(values)} cases, repeated: {name_few(repeated(genes)) or 'none'}; "
                "check the split and drop empty genes"
            )
        low = np.full(len(genes), -np.inf)
        high = np.full(len(genes), np.inf)
        if clip_quantiles is not None:
            low, high = np.nanquantile(values, clip_quantiles, axis=0)
        clipped = np.clip(values, low, high)
        # Decided by equality, not by a small deviation: rounding gives constants one, too.
        constant = np.nanmin(clipped, axis=0) == np.nanmax(clipped, axis=0)
        std = np.where(constant, 1.0, np.nanstd(clipped, axis=0))
        mean = np.where(constant, np.nanmin(clipped, axis=0), np.nanmean(clipped, axis=0))
        if constant.any():
            logger.info("%d genes do not vary in training", int(constant.sum()))
        return cls(genes, low, high, mean, std, clip_quantiles, nan_policy, len(values))

    def transform(self, table: pd.DataFrame, missing_genes: MissingGenes = "error") -> pd.DataFrame:
        """Scale any cases; genes are matched by name, others of the table left out.

        Args:
            table: Case x gene, `[N, any]`.
            missing_genes: "error", or "mean" to give a gene that the table lacks its training
                mean, 0 after scaling.

        Returns:
            float32 `[N, G]`, columns `genes`, index that of the table.

        Raises:
            CohortError: A gene is missing or repeated, or a value is a gap against the policy.
        """
        names = list(map(str, table.columns))
        self.check_genes(names, missing_genes)
        present = set(names)
        if missing := len(set(self.genes) - present):
            logger.warning("%d genes missing, taken at their training mean", missing)
        known = [gene for gene in self.genes if gene in present]
        where = [k for k, gene in enumerate(self.genes) if gene in present]
        values = np.clip(
            _values(table.set_axis(names, axis=1), known, self.nan_policy),
            self.low[where],
            self.high[where],
        )
        scaled = np.zeros((len(table), len(self.genes)), dtype=np.float32)
        scaled[:, where] = np.nan_to_num((values - self.mean[where]) / self.std[where])
        return pd.DataFrame(scaled, index=table.index, columns=pd.Index(self.genes))

    def check_genes(self, names: Collection[str], missing_genes: MissingGenes = "error") -> None:
        """Refuse a table whose columns lack a gene, unless it is to be filled, or repeat one.

        Raises:
            CohortError: Names genes that are missing or repeated.
        """
        check_choice("missing_genes", missing_genes, get_args(MissingGenes))
        own, present = set(self.genes), set(names)
        missing = [gene for gene in self.genes if gene not in present]
        twice = [gene for gene in repeated(names) if gene in own]
        if twice or (missing and missing_genes == "error"):
            raise CohortError(
                f"table must hold the {len(self.genes)} genes of the model once each, got "
                f"{len(missing)} missing ({name_few(missing) or 'none'}), {len(twice)} repeated "
                f"({name_few(twice) or 'none'}); missing_genes='mean' fills missing ones"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the scaler as JSON values."""
        clip = self.clip_quantiles
        return {
            "genes": list(self.genes),
            "low": None if clip is None else self.low.tolist(),
            "high": None if clip is None else self.high.tolist(),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "clip_quantiles": None if clip is None else list(clip),
            "nan_policy": self.nan_policy,
            "num_cases": self.num_cases,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> GeneScaler:
        """Rebuild a scaler from `to_dict`."""
        size, clip = len(state["genes"]), state["clip_quantiles"]
        return cls(
            genes=tuple(state["genes"]),
            low=np.full(size, -np.inf) if clip is None else np.asarray(state["low"], np.float64),
            high=np.full(size, np.inf) if clip is None else np.asarray(state["high"], np.float64),
            mean=np.asarray(state["mean"], np.float64),
            std=np.asarray(state["std"], np.float64),
            clip_quantiles=None if clip is None else (float(clip[0]), float(clip[1])),
            nan_policy=state["nan_policy"],
            num_cases=int(state["num_cases"]),
        )


def _values(
    table: pd.DataFrame, genes: tuple[str, ...] | list[str], nan_policy: Literal["error", "mean"]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Take genes of a table by name as float64 `[N, G]`, under a policy for gaps."""
    if len(set(genes)) == len(genes):
        table = table.loc[:, list(genes)]
    # One memory layout, whatever pandas holds: the order of a sum shows in its last bits.
    values = np.ascontiguousarray(table.to_numpy(dtype=np.float64))
    bad = np.isinf(values) | (np.isnan(values) & (nan_policy == "error"))
    if bad.any():
        cases = list(table.index[bad.any(axis=1)])
        raise CohortError(
            f"genes must be finite numbers, got NaN or infinity in {int(bad.any(axis=0).sum())} "
            f"genes of {len(cases)} cases ({name_few(cases)}); remove them, or fit with "
            "nan_policy='mean'"
        )
    return values
