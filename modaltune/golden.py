"""Proof against tensors of the published implementation: every stored tensor, or a failure."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modaltune.errors import InputError
from modaltune.golden_cases import Answers, Inputs, run_kind
from modaltune.kernels import OutOfReachError

# Pass marks of the golden files' README, per group of tensors. The absolute mark is for values
# near one: where a tensor reaches 80, its own float32 rounding in the stored file is larger (even a
# float64 run differs by 3e-5 there), so a few units in the last place of its largest value count.
OUT_RELATIVE, OUT_ABSOLUTE, OUT_ULPS = 1e-5, 2e-5, 8
LOSS_ABSOLUTE = 2e-5
GRAD_ALL, GRAD_EACH = 1e-5, 1e-4
STEP_ABSOLUTE, STEP_MIN_GRAD = 2e-6, 1e-5
PROBE_ABSOLUTE, C_INDEX_ABSOLUTE = 1e-4, 1e-6
SCHEDULE_ABSOLUTE = 1e-12
SELF_RELATIVE = 1e-5  # our float64 run against our float32 run
ZERO_GRAD = 1e-5  # what rounding may leave of a gradient that is zero analytically

_EXACT = ("lr_pred", "pos")
# The output bias of a token mixer adds a constant per token, which every later LayerNorm removes:
# METHOD 3.4. Cases of whole models list such tensors themselves.
_ALWAYS_ZERO = re.compile(r"(^|\.)mlp_mixer\.\d+\.0\.fn\.3\.bias$")
_INPUT_GROUPS = ("in", "weights", "projector")


@dataclass(frozen=True)
class Comparison:
    """One stored tensor (or figure) against ours.

    Attributes:
        case: Name of the golden case.
        tensor: Stored name.
        error: The error, in the measure that `rule` names; NaN where nothing was compared.
        limit: Largest error that passes.
        rule: What was measured.
        note: Why nothing was compared, or what else a reader should know.
    """

    case: str
    tensor: str
    error: float
    limit: float
    rule: str
    note: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the error is within its limit (a NaN never is)."""
        return self.error <= self.limit


def find_cases(folder: Path) -> list[Path]:
    """Return the JSON files of all cases in a folder and the folders below it, sorted.

    Raises:
        InputError: There is none.
    """
    cases = []
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else []:
        if path.with_suffix(".safetensors").exists() or _may_be_case(path):
            cases.append(path)
    if not cases:
        raise InputError(
            f"{folder} must hold golden cases (<name>.json, with <name>.safetensors), got none; "
            "give the folder they lie in"
        )
    return cases


def _may_be_case(path: Path) -> bool:
    """Whether a JSON file without tensors beside it says that it is a case, or can't be read."""
    try:
        meta = _read_meta(path)
    except InputError:
        return True  # running it reports what is wrong
    return isinstance(meta, dict) and "kind" in meta


def _read_meta(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"golden case {path} must be readable JSON, got: {error}") from error


def run_case(path: Path, impl: str = "auto") -> list[Comparison]:
    """Recompute one case and compare every tensor it stores.

    Args:
        path: The case's JSON; its tensors lie beside it.
        impl: Implementation of the kernels. What it does not cover runs the reference, and says so.

    Raises:
        InputError: A file is unreadable, incomplete or of an unknown kind.
    """
    meta = _read_meta(path)
    if not isinstance(meta, dict):
        raise InputError(f"golden case {path} must be a JSON object, got {type(meta).__name__}")
    meta = {"name": path.stem, **meta}
    stored = _stored_tensors(path, meta)
    try:
        answers, inputs, note = _answers(meta, stored, impl)
        rows = list(_compare(meta, stored, answers))
        rows += _untouched(meta["name"], inputs) + _absent(meta, stored)
        if meta["kind"] not in ("evaluation", "lr_schedule"):
            # Kernels compute in float32 at most: their float64 is the reference's.
            exact = "reference" if note or impl == "triton" else impl
            double = run_kind(Inputs(stored, torch.float64), meta, exact)
            rows.append(_self_check(meta["name"], answers, double))
    except KeyError as error:
        raise InputError(
            f"golden case {path} must hold all that its kind {meta.get('kind')!r} needs, got no "
            f"{error}; copy the case again"
        ) from error
    return [replace(row, note=row.note or note) for row in rows]


def device_for(impl: str) -> str:
    """Return where an implementation runs here: the GPU for Triton, unless it interprets.

    Raises:
        InputError: Triton was asked for, and neither is possible.
    """
    if impl != "triton" or os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        raise InputError(
            "impl='triton' must have a GPU, or TRITON_INTERPRET=1 in the environment to interpret "
            "the kernels on the CPU, got neither; set it, or use impl='auto'"
        )
    return "cuda"


def _answers(
    meta: Mapping[str, Any], stored: Mapping[str, Tensor], impl: str
) -> tuple[Answers, Inputs, str]:
    """Return our answers, the inputs they read, and a note where they are not of `impl`."""
    device = device_for(impl)
    inputs = Inputs(stored, torch.float32, device)
    try:
        return run_kind(inputs, meta, impl), inputs, ""
    except OutOfReachError as error:
        inputs = Inputs(stored, torch.float32, device)
        return run_kind(inputs, meta, "reference"), inputs, f"ran the reference: {error}"


def _stored_tensors(path: Path, meta: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = path.with_suffix(".safetensors")
    if not tensors.exists() and not meta.get("tensors"):
        return {}  # a schedule lives in its JSON alone
    try:
        return load_file(tensors)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"golden tensors {tensors} must be a readable safetensors file, got: {error}"
        ) from error


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b| in the Frobenius norm; the plain |a - b| where b is zero."""
    difference, norm = float((a.double() - b.double()).norm()), float(b.double().norm())
    return difference / norm if norm > 0 else difference


def largest_error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference; infinite where one side is NaN and the other is not."""
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    same = torch.isnan(a) & torch.isnan(b)
    gap = torch.where(same, torch.zeros_like(a), (a - b).abs())
    return math.inf if bool(torch.isnan(gap).any()) else float(gap.max())


def _compare(
    meta: Mapping[str, Any], stored: Mapping[str, Tensor], answers: Answers
) -> Iterable[Comparison]:
    case = meta["name"]
    if meta["kind"] == "lr_schedule":
        yield from _compare_schedule(meta, answers)
    for name, want in stored.items():
        if name.split("/")[0] in _INPUT_GROUPS:
            continue
        got = answers.get(name)
        if got is None or got.numel() != want.numel():
            shape = "" if got is None else f"shape {list(got.shape)} instead of {list(want.shape)}"
            yield Comparison(case, name, math.nan, 0.0, "not compared", shape or "not computed")
            continue
        got = got.reshape(want.shape)
        yield from _compare_one(case, name, got, want, meta, stored)
    yield from _all_gradients(case, meta, stored, answers)
    yield from _compare_metrics(meta, answers)


def _compare_one(
    case: str,
    name: str,
    got: Tensor,
    want: Tensor,
    meta: Mapping[str, Any],
    stored: Mapping[str, Tensor],
) -> Iterable[Comparison]:
    group, leaf = name.split("/", 1)
    if group == "step":
        yield _compare_step(case, leaf, got, want, meta, stored)
    elif group.startswith("grad"):
        if is_zero_gradient(leaf, meta):
            yield Comparison(
                case, name, largest_error(got, torch.zeros_like(got)), ZERO_GRAD, "max abs, true 0"
            )
        else:
            yield Comparison(case, name, relative_error(got, want), GRAD_EACH, "relative")
    elif meta["kind"] == "evaluation":
        exact = leaf.endswith(_EXACT)
        yield Comparison(
            case, name, largest_error(got, want), 0.0 if exact else PROBE_ABSOLUTE, "max abs"
        )
    elif leaf.startswith("loss"):
        yield Comparison(case, name, largest_error(got, want), LOSS_ABSOLUTE, "max abs")
    elif not want.is_floating_point():
        yield Comparison(case, name, largest_error(got, want), 0.0, "equal")
    else:
        yield Comparison(case, name, relative_error(got, want), OUT_RELATIVE, "relative")
        ulps = OUT_ULPS * torch.finfo(torch.float32).eps * float(want.abs().max())
        yield Comparison(case, name, largest_error(got, want), max(OUT_ABSOLUTE, ulps), "max abs")


def is_zero_gradient(leaf: str, meta: Mapping[str, Any]) -> bool:
    """Whether the true gradient of a tensor is zero, so that only rounding noise is stored."""
    return leaf in meta.get("grad_analytically_zero", []) or bool(_ALWAYS_ZERO.search(leaf))


def _compare_step(
    case: str,
    leaf: str,
    got: Tensor,
    want: Tensor,
    meta: Mapping[str, Any],
    stored: Mapping[str, Tensor],
) -> Comparison:
    """AdamW's first step is sign-like: entries with a tiny gradient may go either way."""
    name = f"step/{leaf}"
    grad = stored.get(f"grad/{leaf}")
    if is_zero_gradient(leaf, meta):
        # Rounding noise decides the direction; the length of the step does not depend on it.
        limit = 2.0 * meta["lr"] * (1 + STEP_ABSOLUTE) + STEP_ABSOLUTE
        return Comparison(case, name, largest_error(got, want), limit, "max abs", "true gradient 0")
    if grad is None:
        return Comparison(
            case, name, largest_error(got, want), STEP_ABSOLUTE, "max abs", "no gradient"
        )
    clear = grad.abs() > STEP_MIN_GRAD
    return Comparison(case, name, largest_error(got[clear], want[clear]), STEP_ABSOLUTE, "max abs")


def _all_gradients(
    case: str, meta: Mapping[str, Any], stored: Mapping[str, Tensor], answers: Answers
) -> Iterable[Comparison]:
    names = [
        n
        for n in stored
        if n.startswith("grad") and n in answers and not is_zero_gradient(n.split("/", 1)[1], meta)
    ]
    if len(names) > 1:
        got = torch.cat([answers[n].double().flatten() for n in names])
        want = torch.cat([stored[n].double().flatten() for n in names])
        yield Comparison(case, "grad (all)", relative_error(got, want), GRAD_ALL, "relative")


def _compare_metrics(meta: Mapping[str, Any], answers: Answers) -> Iterable[Comparison]:
    """Figures of the JSON (evaluation): ours come under `metrics/<task>.<name>`."""
    about_the_reference = ("one_vs_rest_identical_predictions", "one_vs_rest_max_coef_diff")
    for task, figures in meta.get("metrics", {}).items():
        for name, want in figures.items():
            if name in about_the_reference:
                continue
            got = answers.get(f"metrics/{task}.{name}")
            limit = C_INDEX_ABSOLUTE if "c_index" in name else 1e-12
            error = math.nan if got is None else abs(float(got) - float(want))
            note = "not computed" if got is None else ""
            yield Comparison(meta["name"], f"metrics/{task}.{name}", error, limit, "abs", note)


def _compare_schedule(meta: Mapping[str, Any], answers: Answers) -> Iterable[Comparison]:
    """Every stored list of rates, under both versions of torch."""
    for version in ("lrs_torch_2_0", "lrs_torch_2_13"):
        for epochs, rates in meta.get(version, {}).items():
            want = torch.tensor(rates, dtype=torch.float64)
            got = answers[f"{version}/{epochs}"]
            error = largest_error(got, want) if got.shape == want.shape else math.nan
            name = f"{version}/{epochs}"
            yield Comparison(meta["name"], name, error, SCHEDULE_ABSOLUTE, "max abs")


def _untouched(case: str, inputs: Inputs) -> list[Comparison]:
    """Report stored inputs that nothing read."""
    return [
        Comparison(case, name, math.nan, 0.0, "not compared", "nothing read this input")
        for name in inputs
        if name.split("/")[0] in _INPUT_GROUPS and name not in inputs.read
    ]


def _absent(meta: Mapping[str, Any], stored: Mapping[str, Tensor]) -> list[Comparison]:
    """Report tensors that the JSON lists and the file does not hold: it was cut, or is another."""
    return [
        Comparison(meta["name"], name, math.nan, 0.0, "not compared", "listed, but not in the file")
        for name in meta.get("tensors", {})
        if name not in stored
    ]


def _self_check(case: str, single: Answers, double: Answers) -> Comparison:
    """Compare outputs and intermediates of our float32 run with our float64 run."""
    worst, where = 0.0, ""
    for name, want in double.items():
        if name.startswith(("out/", "mid/")) and not name.startswith("out/loss"):
            error = relative_error(single[name], want)
            if not error <= worst:
                worst, where = error, name
    note = f"worst: {where}"
    return Comparison(case, "float32 against our float64", worst, SELF_RELATIVE, "relative", note)


def run_folder(folder: Path, impl: str = "auto") -> list[Comparison]:
    """Run every case of a folder of this layout and of the folders below it.

    A case that can't be run (unreadable, incomplete, of an unknown kind, or weights that do not fit
    its options) is a miss that says why; the other cases are compared all the same.

    Raises:
        InputError: No case is there, or the implementation can't run on this machine.
    """
    device_for(impl)
    rows: list[Comparison] = []
    for path in find_cases(folder):
        try:
            rows += run_case(path, impl)
        except InputError as error:
            name = path.relative_to(folder).with_suffix("").as_posix()
            rows.append(Comparison(name, "*", math.nan, 0.0, "not run", str(error)))
    for path in sorted(folder.rglob("*.safetensors")):
        if not path.with_suffix(".json").exists():
            note = "no JSON beside the file says what it is"
            rows.append(Comparison(path.stem, "*", math.nan, 0.0, "not compared", note))
    return rows
