"""What is planted in the synthetic cohort: latents, subtype, survival, clinical rows, expression.

Each case has a morphology m (how discohesive its tissue grows) and an activity g (how far one
programme of pathways is switched on). They are built from a score and a contrast,
m = (score + contrast) / 2 and g = (score - contrast) / 2: the subtype is the sign of the score
alone, so the contrast hides it from whoever sees only m or only g, and cancels for whoever sees
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modaltune.errors import CohortError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# The score is +-1 on average; a contrast of +-2.25 and 5 % changed labels make the best rule on m
# or g alone right in 0.5 + 0.9 * 0.5 / 2.25 = 0.70 of cases, and on both in 0.95.
SCORE_LOW, SCORE_HIGH = 0.75, 1.25
CONTRAST_HALF_WIDTH = 2.25
CHANGED_LABELS = 0.05
LATENT_MAX = (SCORE_HIGH + CONTRAST_HALF_WIDTH) / 2
ALONE_BALANCED_ACCURACY = 0.5 + (1 - 2 * CHANGED_LABELS) * 0.5 / CONTRAST_HALF_WIDTH
TOGETHER_BALANCED_ACCURACY = 1 - CHANGED_LABELS

# Risk weighs the two a little differently from the subtype, and age slightly.
RISK_MORPHOLOGY, RISK_ACTIVITY, RISK_AGE_PER_YEAR = 2.3, 1.9, 0.015
WEIBULL_SHAPE, WEIBULL_SCALE_MONTHS = 1.6, 55.0
CENSORED_SHARE = 0.40
ENROLMENT_MONTHS = 36.0
SURVIVAL_MONTHS = (1.0, 120.0)

# No word for what is drawn: the diagnosis follows from tissue and genes together.
DIAGNOSES = ("metabolic subtype carcinoma", "mesenchymal subtype carcinoma")
SITE = "colorectal"
# One programme, as an inflamed tumour switches on: its pathways rise and fall together, so that
# the activity is the main direction of the expression, as morphology is of the tiles.
PLANTED_PATHWAYS = (
    "SYNTHETIC_INTERFERON_RESPONSE",
    "SYNTHETIC_ANTIGEN_PRESENTATION",
    "SYNTHETIC_T_CELL_ACTIVATION",
    "SYNTHETIC_CHEMOKINE_SIGNALLING",
    "SYNTHETIC_INFLAMMATORY_RESPONSE",
    "SYNTHETIC_IMMUNE_CHECKPOINTS",
)
PATHWAYS: Mapping[str, tuple[str, ...]] = {
    f"SYNTHETIC_{name}": tuple(genes.split())
    for name, genes in (
        ("INTERFERON_RESPONSE", "STAT1 IRF1 IRF7 IFIT1 IFIT2 IFIT3 ISG15 MX1 OAS1 GBP1 RSAD2"),
        ("ANTIGEN_PRESENTATION", "HLA-A HLA-B HLA-DRA TAP1 TAP2 PSMB8 PSMB9 NLRC5 CIITA CD74"),
        ("T_CELL_ACTIVATION", "CD3D CD3E CD8A GZMA GZMB PRF1 IFNG LCK ZAP70 CD2"),
        ("CHEMOKINE_SIGNALLING", "CCL4 CCL5 CXCR3 CXCR6 CCR5 CXCL9 CXCL10 CXCL11 CXCL13"),
        ("INFLAMMATORY_RESPONSE", "IL6 TNF IL1B NFKBIA ICAM1 PTGS2 TNFAIP3 CXCL8 SOCS3"),
        ("IMMUNE_CHECKPOINTS", "PDCD1 CD274 CTLA4 LAG3 TIGIT HAVCR2 IDO1"),
        ("CELL_CYCLE", "MKI67 CCNB1 CCNE1 CDK1 AURKA AURKB PLK1 BUB1 TOP2A E2F1 MCM2"),
        ("OESTROGEN_RESPONSE", "ESR1 PGR GATA3 FOXA1 TFF1 XBP1 GREB1 BCL2"),
        ("MESENCHYMAL_SHIFT", "VIM ZEB1 ZEB2 SNAI1 SNAI2 TWIST1 FN1 CDH2 MMP2 TGFB1"),
        ("CELL_ADHESION", "CDH1 CTNNA1 CTNNB1 CLDN4 CLDN7 EPCAM OCLN TJP1"),
        ("HYPOXIA", "HIF1A VEGFA CA9 SLC2A1 LDHA PDK1 ADM BNIP3 ENO1"),
        ("P53_PATHWAY", "TP53 CDKN1A MDM2 BAX BBC3 GADD45A"),
        ("WNT_SIGNALLING", "CTNNB1 APC AXIN2 LEF1 TCF7 LGR5 MYC"),
        ("DNA_REPAIR", "BRCA1 BRCA2 RAD51 ATM ATR CHEK1 PARP1 MSH2 MLH1"),
    )
}
NOISE_GENES = (
    *("ACTB", "GAPDH", "TUBB", "RPLP0", "B2M", "HPRT1", "TBP", "PGK1", "PPIA", "GUSB", "ALB"),
    *("HBB", "INS", "GCG", "KRT5", "KRT14", "MUC5AC", "SFTPC", "KLK3", "TTR", "AFP", "CHGA"),
    *("SYP", "NEFL"),
)


@dataclass(frozen=True)
class Latents:
    """What the cohort is made from; every array is [cases].

    Attributes:
        morphology: m, about -1.8 to 1.8; growth is discohesive in the share `discohesive`.
        activity: g, about -1.8 to 1.8, of the planted pathways.
        subtype: int64, 0 or 1: score m + g > 0, unless the label was changed.
        is_changed: bool, the label was changed at random.
    """

    morphology: Floats
    activity: Floats
    subtype: NDArray[np.int64]
    is_changed: Bools

    @property
    def discohesive(self) -> Floats:
        """Share of the tissue that grows discohesively, 0-1."""
        return 0.5 + self.morphology / (2 * LATENT_MAX)


@dataclass(frozen=True)
class Outcomes:
    """Survival and clinical inputs; every array is [cases].

    Attributes:
        age: int64, years.
        log_hazard: relative to the baseline.
        survival_months: float64, to death or to the end of follow-up, one decimal.
        event: int64, 1 died, 0 censored.
    """

    age: NDArray[np.int64]
    log_hazard: Floats
    survival_months: Floats
    event: NDArray[np.int64]


def sample_latents(cases: int, rng: np.random.Generator) -> Latents:
    """Draw the latents, spread evenly so that small cohorts are like large ones.

    Half of the cases have a positive score, the contrast is stratified within each half, and a
    fixed share of the labels is changed.

    Args:
        cases: how many, at least 2.
        rng: source of randomness.

    Returns:
        The latents.

    Raises:
        CohortError: fewer than 2 cases.
    """
    if cases < 2:
        raise CohortError(f"cases must be at least 2, got {cases}")
    is_positive = rng.permutation(cases) % 2 == 0
    score = np.where(is_positive, 1, -1) * rng.uniform(SCORE_LOW, SCORE_HIGH, cases)
    contrast = np.empty(cases)
    for half in (is_positive, ~is_positive):
        count = int(half.sum())
        even = (rng.permutation(count) + rng.uniform(size=count)) / count
        contrast[half] = CONTRAST_HALF_WIDTH * (2 * even - 1)
    is_changed = np.zeros(cases, bool)
    is_changed[rng.permutation(cases)[: round(CHANGED_LABELS * cases)]] = True
    return Latents(
        morphology=(score + contrast) / 2,
        activity=(score - contrast) / 2,
        subtype=((score > 0) ^ is_changed).astype(np.int64),
        is_changed=is_changed,
    )


def sample_outcomes(latents: Latents, rng: np.random.Generator) -> Outcomes:
    """Draw ages and Weibull survival times, followed up until one common day.

    Cases enter over `ENROLMENT_MONTHS`; the day of analysis is when `CENSORED_SHARE` of them are
    still alive (administrative censoring, which knows nothing of the risk).

    Args:
        latents: of the same cases.
        rng: source of randomness.

    Returns:
        Ages, hazards, and survival within `SURVIVAL_MONTHS`.
    """
    cases = len(latents.morphology)
    age = np.clip(np.rint(rng.normal(65, 9, cases)), 38, 89).astype(np.int64)
    log_hazard = (
        RISK_MORPHOLOGY * latents.morphology
        + RISK_ACTIVITY * latents.activity
        + RISK_AGE_PER_YEAR * (age - 65)
    )
    draw = rng.exponential(size=cases) / np.exp(log_hazard)
    lifetime = np.maximum(WEIBULL_SCALE_MONTHS * draw ** (1 / WEIBULL_SHAPE), SURVIVAL_MONTHS[0])
    enrolled = rng.uniform(0, ENROLMENT_MONTHS, cases)
    analysis = float(np.quantile(enrolled + lifetime, 1 - CENSORED_SHARE))
    # Everyone is followed for a month at least, and nobody for longer than the table's limit.
    analysis = float(np.clip(analysis, ENROLMENT_MONTHS + 1, SURVIVAL_MONTHS[1]))
    followed = analysis - enrolled
    return Outcomes(
        age=age,
        log_hazard=log_hazard,
        survival_months=np.asarray(np.minimum(lifetime, followed).round(1), np.float64),
        event=(lifetime <= followed).astype(np.int64),
    )


def sample_expression(activity: Floats, rng: np.random.Generator) -> tuple[list[str], Floats]:
    """Draw log2(TPM + 1)-like expression in which the planted pathways follow the activity.

    Every other pathway has a factor of its own that means nothing, so that a pathway's members
    moving together is no sign of the planted one.

    Args:
        activity: float64 [cases], g.
        rng: source of randomness.

    Returns:
        Gene symbols, sorted, and float64 [cases, genes], >= 0.
    """
    genes = sorted({gene for members in PATHWAYS.values() for gene in members} | {*NOISE_GENES})
    cases = len(activity)
    column = {gene: i for i, gene in enumerate(genes)}
    signal = rng.normal(0, 1, (cases, len(genes)))
    for name, members in PATHWAYS.items():
        planted = name in PLANTED_PATHWAYS
        factor = activity / LATENT_MAX * 3**0.5 if planted else rng.normal(0, 1, cases)
        for gene in members:
            weight = rng.uniform(1.2, 1.8) if planted else rng.uniform(0.2, 0.6)
            signal[:, column[gene]] += weight * factor
    level, spread = rng.uniform(3.0, 9.0, len(genes)), rng.uniform(0.4, 0.9, len(genes))
    return genes, np.maximum(level + spread * signal, 0.0)


def sample_clinical(cases: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Draw sex, which knows nothing of subtype or risk, for a study of one site and one stage.

    Site and stage are words of the label sentences: were they drawn at random, the model would
    learn sixty-four random words.

    Args:
        cases: how many.
        rng: source of randomness.

    Returns:
        A row per case with sex, site, stage, t, n and m.
    """
    fixed = {"site": SITE, "stage": "Stage II", "t": "T3", "n": "N0", "m": "M0"}
    return [{"sex": str(rng.choice(["female", "male"])), **fixed} for _ in range(cases)]
