"""ModalTune: whole-slide images, genes and clinical records into patient embeddings.

Names are resolved on first use, so that `import modaltune` costs milliseconds and imports neither
torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Case": "modaltune.cases",
    "CasesFolder": "modaltune.cases_folder",
    "Cohort": "modaltune.cases",
    "ModalTune": "modaltune.model",
    "ModalTuneConfig": "modaltune.config",
    "load_probes": "modaltune.probe_files",
    "load_run": "modaltune.checkpoint",
    "open_run": "modaltune.baseline_run",
    "open_slide": "modaltune.engine.readers",
    "predict_table": "modaltune.predict",
    "read_features": "modaltune.engine.store",
}

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from modaltune.baseline_run import open_run as open_run
    from modaltune.cases import Case as Case
    from modaltune.cases import Cohort as Cohort
    from modaltune.cases_folder import CasesFolder as CasesFolder
    from modaltune.checkpoint import load_run as load_run
    from modaltune.config import ModalTuneConfig as ModalTuneConfig
    from modaltune.engine.readers import open_slide as open_slide
    from modaltune.engine.store import read_features as read_features
    from modaltune.model import ModalTune as ModalTune
    from modaltune.predict import predict_table as predict_table
    from modaltune.probe_files import load_probes as load_probes


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'modaltune' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
