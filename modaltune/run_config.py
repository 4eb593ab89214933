"""One configuration of a training run: cases, inputs, model, text, training, output.

Every knob is one field with default, unit and meaning. Layers, later ones win: defaults, the
preset, the TOML file, `--set key.sub=value`.
"""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modaltune.baselines.registry import BASELINES
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.labels import ROWS
from modaltune.learner_config import BaselineSection, LearnerSection, ModalTuneSection
from modaltune.tile_limit import TileLimit, TilePolicy
from modaltune.train_config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

PRESETS = ("prov-gigapath", "titan", "small", "genes")
_READ = {"image": "slides", "genes": "genes"}
# Names of choices between sections, which stand in a fault's place beside the fields.
_CHOICES = ("longnet", "titan", "modaltune", *BASELINES)
# Sections that say where and how often things are written: no figure depends on them.
FREE_SECTIONS = ("output",)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CasesSection(_Section):
    """Which cases are learned from."""

    folders: tuple[Path, ...] = Field(
        (), description="cases folders of `modaltune cases build`; several for pan-cancer"
    )
    features: Path | None = Field(None, description="folder of the feature files, if moved since")
    fold: int = Field(0, ge=0, description="which of the folders' splits")


class InputsSection(_Section):
    """What goes into the model, and how it is preprocessed."""

    image: bool = Field(True, description="tile features of the slides")
    genes: bool = Field(True, description="expression by pathways")
    clinical: Literal["none", "default", "published"] = Field(
        "none",
        description="clinical tokens: default takes age, sex and site; published takes age, "
        "stage, T, N, M, which stand in the target sentences, too",
    )
    tile_limit: TilePolicy = Field(
        "random",
        description="all: every tile; random: at most max_tiles of a case, drawn once per case "
        "and seed, in training and validation alike; every_epoch: at most max_tiles in training, "
        "drawn anew each epoch, and all in validation",
    )
    max_tiles: int = Field(
        25_000, gt=0, description="tiles of a case under the limit; published: 25,000, TITAN 15,000"
    )
    tile_seed: int = Field(0, ge=0, description="of the random tiles")
    fit_on: Literal["train", "published"] = Field(
        "train",
        description="cases that scalers, encoders and survival bins are fitted on; published: "
        "validation and test, too",
    )
    clip_quantiles: tuple[float, float] | None = Field(
        (0.001, 0.999), description="quantiles of a gene to clip at; none: no clipping, published"
    )
    gene_gaps: Literal["error", "mean"] = Field(
        "error", description="a missing expression value; mean: the gene's training mean"
    )
    empty_pathways: Literal["drop", "error"] = Field(
        "drop", description="a pathway none of whose genes was measured"
    )
    unseen_categories: Literal["own_code", "error"] = Field(
        "own_code", description="a clinical category that training cases do not have"
    )

    @property
    def limit(self) -> TileLimit:
        """How many tiles of a case are used."""
        return TileLimit(self.tile_limit, self.max_tiles, self.tile_seed)


class ModelSection(ModalTuneConfig):
    """The model's shape, and where its frozen weights come from."""

    weights: Path | None = Field(
        None,
        description="local weights of the slide encoder: slide_encoder.pth of Prov-GigaPath, or "
        "TITAN's safetensors",
    )
    start: Literal["published", "unit_gain"] = Field(
        "published",
        description="how new weights start: published: standard deviation 0.02, made for widths "
        "of 768; unit_gain: 1/sqrt(inputs), for small models with a random encoder",
    )
    feature_gain: float = Field(
        0.3, gt=0, description="size of embedded tiles at the start, under unit_gain"
    )

    def model_shape(self, *, clinical_features: int, has_genes: bool) -> ModalTuneConfig:
        """Return the model's own configuration for what the cases offer."""
        own = {name: getattr(self, name) for name in ModalTuneConfig.model_fields}
        own["clinical_features"] = clinical_features
        if not has_genes:
            own["genes"] = None
        return ModalTuneConfig.model_validate(own)


class TextSection(_Section):
    """The target sentences and what embeds them."""

    encoder: str = Field(
        "minilm", description="minilm, a local folder in transformers' layout, or a hub id"
    )
    pooling: Literal["mean", "cls"] = Field("mean", description="of the sentence's tokens")
    normalize: bool = Field(False, description="scale sentence embeddings to length one")
    allow_download: bool = Field(False, description="fetch a hub id")
    revision: str | None = Field(None, description="commit or tag of a hub id")
    embeddings: Path | None = Field(
        None, description="embeddings computed before (safetensors, npz, pt), instead of an encoder"
    )
    projector_seed: int = Field(0, ge=0, description="of the frozen projector, saved with the run")


class TrainingSection(TrainConfig):
    """The recipe of the loop, and what is done after each epoch."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is")
    validate_every: int = Field(1, gt=0, description="epochs between validations")
    early_stop: int = Field(
        0,
        ge=0,
        description="validations without a better one after which training ends; 0: never",
    )
    choose_by: Literal["balanced_accuracy", "c_index", "loss"] = Field(
        "balanced_accuracy",
        description="figure of validation that the epoch kept is best in, and that early_stop "
        "waits for; without it the first of balanced_accuracy, c_index that there is",
    )
    cases_per_batch: int = Field(1, gt=0, description="cases embedded at once in validation")


class OutputSection(_Section):
    """Where the run is written, and what of it."""

    folder: Path = Field(Path("modaltune-run"), description="run folder")
    checkpoint_minutes: float = Field(
        15.0, gt=0, description="minutes between checkpoints within an epoch"
    )
    checkpoint_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: by time only")
    keep_last: int = Field(2, gt=0, description="checkpoints kept, beside the best one")
    tensorboard: bool = Field(False, description="also write metrics for TensorBoard")
    wandb: str | None = Field(
        None, description="send metrics to this Weights & Biases project, too"
    )


class RunConfig(_Section):
    """Everything about a training run."""

    preset: str | None = Field(None, description=f"base of all else: {', '.join(PRESETS)}")
    cases: CasesSection = CasesSection()
    inputs: InputsSection = InputsSection()
    learner: LearnerSection = ModalTuneSection()
    model: ModelSection = ModelSection()
    text: TextSection = TextSection()
    training: TrainingSection = TrainingSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if not (self.inputs.image or self.inputs.genes):
            raise ValueError("inputs must have image or genes or both, got neither")
        strange = [task for task in self.model.tasks if task not in ROWS]
        if strange:
            raise ValueError(f"model.tasks must be among {', '.join(ROWS)}, got {strange}")
        self._check_learner()
        return self

    def _check_learner(self) -> None:
        """Refuse a baseline one of whose inputs is turned off."""
        if not isinstance(self.learner, BaselineSection):
            return
        kind = BASELINES[self.learner.kind]
        needed = {"image": kind.reads_tiles, "genes": kind.reads_genes}
        for name, is_read in needed.items():
            if is_read and not getattr(self.inputs, name):
                others = [
                    other
                    for other, one in BASELINES.items()
                    if not (one.reads_tiles if name == "image" else one.reads_genes)
                ]
                raise ValueError(
                    f"inputs.{name} must be true for learner.kind = {self.learner.kind}, which "
                    f"reads {_READ[name]}, got false; set it to true, or choose "
                    f"{' or '.join(others)}"
                )

    @property
    def read_inputs(self) -> InputsSection:
        """The inputs that the learner reads: a baseline has no clinical tokens."""
        if not isinstance(self.learner, BaselineSection):
            return self.inputs
        kind = BASELINES[self.learner.kind]
        read = {"image": kind.reads_tiles, "genes": kind.reads_genes, "clinical": "none"}
        return self.inputs.model_copy(update=read)

    @property
    def text_rows(self) -> list[int]:
        """Rows of a label embedding that the task prompts are tuned towards."""
        return [ROWS.index(task) for task in self.model.tasks]

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Name the fields, `a.b`, in which a dumped configuration differs, free sections aside."""
        try:  # fields that have come since have their defaults
            other = RunConfig.model_validate(dict(other)).model_dump(mode="json")
        except ValidationError:
            logger.debug("compared with a configuration of another form: %s", other)
        own, old = _flat(self.model_dump(mode="json")), _flat(other)
        return sorted(
            name
            for name in own.keys() | old.keys()
            if own.get(name) != old.get(name) and name.split(".")[0] not in FREE_SECTIONS
        )


def load_run_config(
    path: str | Path | None = None, *, preset: str | None = None, sets: Sequence[str] = ()
) -> RunConfig:
    """Read a configuration from its layers.

    Args:
        path: TOML file; its `preset` is used unless `preset` is given.
        preset: One of `PRESETS`.
        sets: `key.sub=value` each, the value as in TOML; bare words are strings, `none` is None.

    Raises:
        InputError: The file is absent or no TOML, or a value breaks a rule; fields are named.
    """
    given = {} if path is None else _read_toml(Path(path))
    for one in sets:
        _put(given, one)
    given = _nones(given, RunConfig)
    named = preset or given.get("preset")
    layers: dict[str, Any] = {}
    if named is not None:
        if named not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {named!r}")
        layers = tomllib.loads(_preset_text(named))
    merged = _merge(layers, {**given, **({} if named is None else {"preset": named})})
    encoder = (merged.get("model") or {}).get("slide_encoder")
    for section, kind in ((encoder, "longnet"), (merged.get("learner"), "modaltune")):
        if isinstance(section, dict):
            section.setdefault("kind", kind)
    try:
        return RunConfig.model_validate(_nones(merged, RunConfig))
    except ValidationError as error:
        raise InputError(_said(error)) from error


def _preset_text(name: str) -> str:
    return (files("modaltune") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"configuration must be a TOML file, got {path}: {error.strerror}; write one with: "
            "modaltune train --print-config --preset small"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be TOML, got: {error}") from error


def _put(target: dict[str, Any], assignment: str) -> None:
    """Write one `key.sub=value` into nested dictionaries."""
    key, sign, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise InputError(f"--set must be key.sub=value, got {assignment!r}")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise InputError(f"--set must name a field, got {assignment!r}: {part} is a value")
    target[parts[-1]] = value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        old = both.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            # A slide encoder of another kind shares no field with the one below it.
            other_kind = "kind" in value and value["kind"] != old.get("kind", value["kind"])
            both[key] = dict(value) if other_kind else _merge(old, value)
        else:
            both[key] = value
    return both


def _nones(value: Any, kind: Any) -> Any:
    """Turn the word `none` into None where a field may be None: TOML has no such value."""
    if not isinstance(value, Mapping):
        return value
    out = dict(value)
    for model in _models(kind):
        for name, field in model.model_fields.items():
            if name not in out:
                continue
            if out[name] == "none" and type(None) in get_args(field.annotation):
                out[name] = None
            else:
                out[name] = _nones(out[name], field.annotation)
    return out


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the configuration classes in an annotation."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    elif get_origin(kind) in (Union, types.UnionType) or hasattr(kind, "__metadata__"):
        for inner in get_args(kind):
            yield from _models(inner)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.loads(json.dumps(value))
    return found


def _said(error: ValidationError) -> str:
    """Say every fault of a configuration in one message: field, rule, value, what is allowed."""
    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"] if part not in _CHOICES)
        name = name or "configuration"
        if fault["type"] == "extra_forbidden":
            allowed = ", ".join(_fields_beside(fault["loc"]))
            lines.append(f"{name} must be a known field, got it; allowed here: {allowed}")
            continue
        if fault["type"] == "union_tag_invalid":
            known = fault["ctx"]["expected_tags"].replace("'", "")
            lines.append(f"{name}.kind must be one of {known}, got {fault['ctx']['tag']!r}")
            continue
        rule = fault["msg"].replace("Input should be", "be").replace("Value error, ", "")
        got = "" if fault["loc"] == () else f", got {fault['input']!r}"
        lines.append(f"{name} must {rule}{got}" if rule.startswith("be ") else f"{name}: {rule}")
    return "; ".join(lines) + "; see: modaltune train --print-config"


def _fields_beside(where: Sequence[int | str]) -> Iterable[str]:
    kinds: list[type[BaseModel]] = [RunConfig]
    for part in where[:-1]:
        if part in _CHOICES:
            kinds = [k for k in kinds if k.model_fields["kind"].default == part]
            continue
        fields = [k.model_fields[part].annotation for k in kinds if part in k.model_fields]
        kinds = [model for annotation in fields for model in _models(annotation)]
    return dict.fromkeys(name for kind in kinds for name in kind.model_fields)
