"""Label sentences: what is known of a case in words, the target that tuning distils into it."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from modaltune.errors import CohortError, InputError
from modaltune.tables import is_missing, name_few

logger = logging.getLogger(__name__)

#: Cancer locations of the published study. Any other text is accepted as it stands.
SITES = (
    "breast",
    "bladder urothelial",
    "colorectal",
    "brain",
    "lung",
    "kidney",
    "stomach",
    "uterus",
)
#: Sentences in the order of the rows of a label embedding `[4, d]`.
ROWS = ("general", "diagnosis", "stage", "survival")
#: Rows that the three published task prompts (general, diagnosis, survival) are tuned towards.
TASK_ROWS = (0, 1, 3)

# Deletions and replacements in the published order (METHOD 4.13); the order matters: "Tis" is
# renamed before the last "i" goes, and " (mol+)" has to be gone before "m" is deleted.
_SUBSTAGE = (" (i+)", " (i-)")
_CLEANING: dict[str, tuple[tuple[str, str], ...]] = {
    "stage": tuple((part, "") for part in (*"AB", *"bCcDd", *_SUBSTAGE, "m", "i")),
    "t": (*((part, "") for part in (*"AaBbCcDd", *_SUBSTAGE, "m")), ("is", "0"), ("i", "")),
    "n": tuple((part, "") for part in (*"AaBbCcDd", *_SUBSTAGE, " (mol+)", "m", "i")),
    "m": tuple((part, "") for part in (*"AaBbCcDd", *_SUBSTAGE, "m", "i")),
}
_CODE_TEXT: dict[str, dict[str, str]] = {
    "stage": {
        "Stage I": "stage one",
        "Stage II": "stage two",
        "Stage III": "stage three",
        "Stage IV": "stage four",
        "Stage X": "stage cannot be determined",
    },
    "t": {
        "T0": "no tumor detected",
        "T1": "tumor stage one",
        "T2": "tumor stage two",
        "T3": "tumor stage three",
        "T4": "tumor stage four",
        "TX": "tumor stage cannot be assessed",
    },
    "n": {
        "N0": "cancer has not spread to lymph nodes",
        "N1": "node stage one",
        "N2": "node stage two",
        "N3": "node stage three",
        "NX": "node spread cannot be assessed",
    },
    "m": {
        "M0": "no metastasis detected",
        "M1": "cancer has spread to distant organs",
        "MX": "metastasis status cannot be assessed",
    },
}
_NUM_BINS = 4
# Keeps the smallest and the largest duration inside the outer bins (METHOD 4.14).
_EDGE_MARGIN_MONTHS = 1e-6


class LabelSentences(NamedTuple):
    """The four sentences of one case; as a tuple, in the order of `ROWS`."""

    general: str
    diagnosis: str
    stage: str
    survival: str


def clean_code(field: str, value: object) -> str | None:
    """Reduce a stage, T, N or M code to its main group, as published: "T4b" to "T4".

    Args:
        field: "stage", "t", "n" or "m".
        value: The code as recorded. A stage may come with or without the word "Stage".

    Returns:
        The cleaned code, not checked against any list; None if `value` is missing.

    Source: METHOD 4.13.
    """
    if is_missing(value):
        return None
    code = str(value).strip()
    for part, replacement in _CLEANING[field]:
        code = code.replace(part, replacement)
    if field == "stage" and not code.startswith("Stage "):
        code = f"Stage {code}"
    return code


def is_known_code(field: str, value: object) -> bool:
    """Tell whether a stage, T, N or M code is missing or has a published wording."""
    code = clean_code(field, value)
    return code is None or code in _CODE_TEXT[field]


def check_duration(value: object, case_id: object) -> float:
    """Return a survival time in months, NaN where missing.

    Raises:
        InputError: The value is negative, infinite or no number; names the case.
    """
    if is_missing(value):
        return math.nan
    months = _number(value)
    if not 0 <= months < math.inf:
        raise InputError(
            f"survival_months of case {case_id} must be a number >= 0, got {value!r}; correct the "
            "dates it was computed from, or leave the cell empty"
        )
    return months


def check_event(value: object, case_id: object) -> float:
    """Return a vital status, 1.0 died or 0.0 censored, NaN where missing.

    Raises:
        InputError: The value is something else than 0, 1, true or false; names the case.
    """
    if is_missing(value):
        return math.nan
    words = {"true": 1.0, "false": 0.0}
    event = words.get(value.strip().lower()) if isinstance(value, str) else None
    event = _number(value) if event is None else event
    if event not in (0.0, 1.0):
        raise InputError(
            f"event of case {case_id} must be 0 (censored) or 1 (died), got {value!r}; recode it, "
            "or leave the cell empty"
        )
    return event


def _number(value: object) -> float:
    """Read a number; anything else becomes NaN, which no check accepts."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


@dataclass(frozen=True)
class SurvivalBins:
    """Four intervals of survival time, cut at the quartiles of the training cases.

    Attributes:
        edges: Five increasing edges in months: minimum - 1e-6, three quartiles, maximum + 1e-6.
        num_cases: Training cases that the quartiles were computed from.
    """

    edges: tuple[float, float, float, float, float]
    num_cases: int

    def __post_init__(self) -> None:
        edges = self.edges
        rising = all(low <= high for low, high in itertools.pairwise(edges))
        if len(edges) != _NUM_BINS + 1 or not rising or not all(map(math.isfinite, edges)):
            raise InputError(
                f"edges must be {_NUM_BINS + 1} finite, non-decreasing numbers, got {edges}; "
                "take them from SurvivalBins.fit"
            )

    @classmethod
    def fit(
        cls, durations_months: Iterable[float], case_ids: Sequence[object] | None = None
    ) -> SurvivalBins:
        """Compute the quartiles of the survival times of the training cases, censored included.

        Args:
            durations_months: One time in months per row, of the training split only; missing
                values are left out. A pandas Series brings its index as case ids.
            case_ids: The case of each row. A case that occurs several times (a row per slide)
                counts once; without ids, every row counts.

        Raises:
            InputError: A duration is negative or no number.
            CohortError: No duration is known, or rows of one case contradict each other.

        Source: METHOD 4.14; the training split only (REQUIREMENTS 31).
        """
        if case_ids is None and isinstance(durations_months, pd.Series):
            case_ids = list(durations_months.index)
        values = list(durations_months)
        ids: Sequence[object] = range(len(values)) if case_ids is None else case_ids
        if len(ids) != len(values):
            raise InputError(
                f"case_ids must have one id per duration ({len(values)}), got {len(ids)}; "
                "pass both from the same table"
            )
        known = _one_duration_per_case(values, ids)
        quartiles = np.quantile(known, [0.25, 0.5, 0.75])
        q1, q2, q3 = (float(q) for q in quartiles)
        low, high = min(known) - _EDGE_MARGIN_MONTHS, max(known) + _EDGE_MARGIN_MONTHS
        if len({low, q1, q2, q3, high}) <= _NUM_BINS:
            logger.warning("survival times have tied quartiles %s: some bins stay empty", quartiles)
        return cls(edges=(low, q1, q2, q3, high), num_cases=len(known))

    def index(self, months: float) -> int:
        """Return the bin 0..3 of a time in months; the left edge of a bin belongs to it.

        Times outside the range of the training cases fall into the first or the last bin.

        Raises:
            InputError: The time is negative or not a number.
        """
        if not 0 <= months < math.inf:
            raise InputError(
                f"months must be a number >= 0, got {months}; leave out cases without one"
            )
        inside = int(np.searchsorted(self.edges[:_NUM_BINS], months, side="right")) - 1
        return max(inside, 0)

    def text(self, index: int) -> str:
        """Describe bin 0..3 in words, its edges rounded to whole months.

        Raises:
            InputError: There is no such bin.
        """
        if not 0 <= index < _NUM_BINS:
            raise InputError(
                f"index must lie in 0..{_NUM_BINS - 1}, got {index}; use SurvivalBins.index"
            )
        if index == 0:
            return f"before {round(self.edges[1])} months"
        return f"between {round(self.edges[index])} and {round(self.edges[index + 1])} months"

    def to_dict(self) -> dict[str, Any]:
        """Return the bins as JSON values."""
        return {"edges_months": list(self.edges), "num_cases": self.num_cases}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SurvivalBins:
        """Rebuild bins from `to_dict`.

        Raises:
            InputError: The edges are not five increasing numbers.
        """
        edges = tuple(float(edge) for edge in state["edges_months"])
        return cls(edges=edges, num_cases=int(state["num_cases"]))  # type: ignore[arg-type]


def _one_duration_per_case(values: list[float], ids: Sequence[object]) -> list[float]:
    """Return the known durations, one per case."""
    by_case: dict[object, float] = {}
    for case, value in zip(ids, values, strict=True):
        months = check_duration(value, case)
        if math.isnan(months):
            continue
        if by_case.setdefault(case, months) != months:
            raise CohortError(
                f"durations of case {case} must agree, got {by_case[case]} and {months}; "
                "correct the table"
            )
    if not by_case:
        raise CohortError(
            "durations_months must hold at least one known survival time to fit survival bins, "
            "got none; leave the survival bins out for a cohort without follow-up"
        )
    return list(by_case.values())


def label_sentences(record: Mapping[str, Any], bins: SurvivalBins | None) -> LabelSentences:
    """Say in words what is known of a case; what is missing leaves its place empty.

    The sentences join their parts with single spaces, so that an empty part leaves a double or a
    trailing space: this is the published form, and text encoders were given exactly it.

    Args:
        record: Values under the names of `modaltune.clinical.read_clinical`: `case_id` (for
            messages), `site` (one of `SITES`, or any text, which is then used as it stands),
            `diagnosis`, `stage`, `t`, `n`, `m`, `survival_months`, `event` (0 censored, 1 died).
            Absent, None, NaN and empty mean missing.
        bins: Bins of the training split; None leaves survival out.

    Raises:
        InputError: A code is unknown, a duration negative or an event neither 0 nor 1; the message
            names case, field, value and what is allowed.

    Source: METHOD 4.14.
    """
    case = record.get("case_id", "without an id")
    where = _slot("Cancer location: {};", _plain(record, "site"))
    what = _slot("Cancer diagnosis: {};", _plain(record, "diagnosis"))
    spread = " ".join(
        _slot(form, _code_text(record, field, case))
        for field, form in (
            ("stage", "Overall stage: {};"),
            ("t", "Tumor stage status: {};"),
            ("n", "Lymph node status: {};"),
            ("m", "Distant metastasis status: {};"),
        )
    )
    survival = _slot("Survival status: The patient {}", _survival_text(record, bins, case))
    return LabelSentences(
        general=f"{where} {what} {spread} {survival}",
        diagnosis=f"{where} {what}",
        stage=f"{where} {spread}",
        survival=f"{where} {spread} {survival}",
    )


def label_cohort(clinical: pd.DataFrame, bins: SurvivalBins | None) -> dict[str, LabelSentences]:
    """Write the sentences of every case of a table from `modaltune.clinical.read_clinical`.

    Args:
        clinical: One row per case, indexed by case id.
        bins: Bins of the training split; None leaves survival out.

    Returns:
        Case id to sentences, in the order of the table.

    Raises:
        InputError: See `label_sentences`.
    """
    records: list[dict[Any, Any]] = clinical.to_dict(orient="records")
    sites = {str(record.get("site")) for record in records if not is_missing(record.get("site"))}
    unknown = sorted(sites - set(SITES))
    if unknown:
        logger.warning(
            "sites outside the published list go into the sentences as they stand: %s",
            name_few(unknown),
        )
    return {
        str(case): label_sentences({**record, "case_id": case}, bins)
        for case, record in zip(clinical.index, records, strict=True)
    }


def _slot(form: str, text: str | None) -> str:
    """Fill a part of a sentence, or leave its place empty."""
    return "" if text is None else form.format(text)


def _plain(record: Mapping[str, Any], field: str) -> str | None:
    """Return free text of a record, None where missing."""
    value = record.get(field)
    return None if is_missing(value) else str(value).strip()


def _code_text(record: Mapping[str, Any], field: str, case: object) -> str | None:
    """Put a stage, T, N or M code into words."""
    code = clean_code(field, record.get(field))
    if code is None:
        return None
    texts = _CODE_TEXT[field]
    if code not in texts:
        raise InputError(
            f"{field} of case {case} must be one of {', '.join(texts)} (subgroups such as "
            f"{list(texts)[1]}a are fine), got {record.get(field)!r}; correct it, or leave the "
            "cell empty"
        )
    return texts[code]


def _survival_text(
    record: Mapping[str, Any], bins: SurvivalBins | None, case: object
) -> str | None:
    """Put vital status and time into words; None unless both are known."""
    months = check_duration(record.get("survival_months"), case)
    event = check_event(record.get("event"), case)
    if bins is None or math.isnan(months) or math.isnan(event):
        return None
    return f"{'died' if event == 1.0 else 'was censored'} {bins.text(bins.index(months))}"
