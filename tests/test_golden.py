"""The golden runner: green on the shared files, red on any change to them."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from modaltune.errors import InputError
from modaltune.golden import (
    Comparison,
    find_cases,
    is_zero_gradient,
    largest_error,
    relative_error,
    run_case,
    run_folder,
)
from modaltune.golden_report import render, to_json

pytestmark = pytest.mark.shared
Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]


@pytest.fixture
def copy(shared_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy one case into a folder of its own, changed."""

    def make(case: str, edit: Edit | None = None) -> Path:
        source = shared_dir / "golden" / f"{case}.json"
        meta = json.loads(source.read_text(encoding="utf-8"))
        tensors = source.with_suffix(".safetensors")
        stored = load_file(tensors) if tensors.exists() else {}
        if edit is not None:
            edit(stored, meta)
        (tmp_path / source.name).write_text(json.dumps(meta), encoding="utf-8")
        if stored:
            save_file(stored, tmp_path / tensors.name)
        return tmp_path / source.name

    return make


def missed(rows: list[Comparison]) -> set[str]:
    return {row.tensor for row in rows if not row.is_ok}


def test_every_shared_case_is_green(shared_dir: Path) -> None:
    rows = run_folder(shared_dir / "golden")
    assert missed(rows) == set()
    assert len({row.case for row in rows}) == 25
    assert {row.case for row in rows} == {p.stem for p in (shared_dir / "golden").glob("*.json")}
    assert sum(row.tensor == "float32 against our float64" for row in rows) == 22


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    "case", ["case3_clinical_sum_avg", "case4b_long_explicit_segments_train", "case5_injector"]
)
def test_each_implementation_is_green(shared_dir: Path, case: str, impl: str) -> None:
    rows = run_case(shared_dir / "golden" / f"{case}.json", impl)
    assert missed(rows) == set()
    assert not any("ran the reference" in row.note for row in rows)


@pytest.mark.parametrize(("impl", "noted"), [("cpu", True), ("reference", False), ("auto", False)])
def test_what_an_implementation_does_not_cover_is_said(
    shared_dir: Path, impl: str, noted: bool
) -> None:
    path = shared_dir / "golden" / "case5_dilated_e_quirk_misaligned.json"
    rows = run_case(path, impl)
    assert missed(rows) == set()
    said = [
        row.note.startswith("ran the reference:") and "no multiple of its dilation" in row.note
        for row in rows[:-1]
    ]
    assert said == [noted] * len(said)


def flip(name: str, by: float) -> Edit:
    """Move the largest entry of one stored tensor, relative to its size."""

    def edit(stored: dict[str, Tensor], meta: dict[str, Any]) -> None:
        flat = stored[name].flatten()
        at = int(flat.abs().nan_to_num().argmax())
        flat[at] = flat[at] + (1 if not flat.is_floating_point() else by * float(flat[at].abs()))
        stored[name] = flat.reshape(stored[name].shape)

    return edit


FLIPS = [
    ("case1_sum_avg_train", "out/logits", 1e-3),
    ("case1_sum_avg_train", "out/loss", 1e-2),
    ("case1_sum_avg_train", "mid/longnet.2", 1e-3),
    ("case1_sum_avg_train", "mid/interaction.1.cls", 1e-3),
    ("case1_sum_avg_train", "grad/gene_pe", 1e-2),
    ("case1_sum_avg_train", "step/final_project.weight", 1e-3),
    ("case1_sum_avg_train", "out/logits_after_step", 1e-3),
    ("case1_sum_avg_train", "weights/encoder.layers.3.ffn.fc2.weight", 0.5),
    ("case5_extractor", "out/y", 1e-3),
    ("case5_extractor", "grad_in/feat", 1e-2),
    ("case5_dilated_a", "mid/pre_subln", 1e-3),
    ("case5_pos_embed", "out/pos", 0),
    ("case5_pos_embed", "out/rows", 1e-3),
    ("case6_projector_kl", "out/loss", 1e-2),
    ("case6_projector_kl", "in/text", 0.1),
    ("case7_eval_binary", "out/0.lr_coef", 1e-2),
    ("case7_eval_binary", "out/1.lr_pred", 0),
    ("case7_eval_3class", "out/2.cox_params", 1e-2),
]


@pytest.mark.parametrize(("case", "name", "by"), FLIPS)
def test_one_flipped_value_is_a_miss(
    copy: Callable[..., Path], case: str, name: str, by: float
) -> None:
    found = missed(run_case(copy(case, flip(name, by))))
    assert found
    if not name.startswith(("in/", "weights/")):
        group = {name, "grad (all)"} if name.startswith("grad") else {name}
        assert name in found
        assert found <= group


def test_a_flipped_figure_of_the_json_is_a_miss(copy: Callable[..., Path]) -> None:
    def metric(_: Any, meta: dict[str, Any]) -> None:
        meta["metrics"]["1"]["test_c_index"] += 1e-4

    rows = run_case(copy("case7_eval_binary", metric))
    assert missed(rows) == {"metrics/1.test_c_index"}

    for version in ("lrs_torch_2_0", "lrs_torch_2_13"):

        def rate(_: Any, meta: dict[str, Any], version: str = version) -> None:
            meta[version]["25"][12] *= 1.001

        rows = run_case(copy("case8_lr_schedule", rate))
        assert missed(rows) == {f"{version}/25"}


@pytest.mark.parametrize(
    "name", ["out/new", "mid/new", "in/new", "weights/new", "other/new", "new"]
)
def test_a_tensor_nobody_compared_is_reported(copy: Callable[..., Path], name: str) -> None:
    def add(stored: dict[str, Tensor], _: Any) -> None:
        stored[name] = torch.ones(2)

    path = copy("case5_injector", add)
    if name == "weights/new":
        with pytest.raises(InputError, match="unexpected: new"):
            run_case(path)
        return
    rows = [row for row in run_case(path) if not row.is_ok]
    assert [(row.tensor, row.rule) for row in rows] == [(name, "not compared")]


def test_tensors_beside_a_schedule_are_reported(copy: Callable[..., Path]) -> None:
    def add(stored: dict[str, Tensor], _: Any) -> None:
        stored["out/rates"] = torch.ones(2)

    assert missed(run_case(copy("case8_lr_schedule", add))) == {"out/rates"}


def test_a_tensor_that_was_cut_out_is_reported(copy: Callable[..., Path]) -> None:
    def cut(stored: dict[str, Tensor], _: Any) -> None:
        del stored["out/y"]

    assert missed(run_case(copy("case5_injector", cut))) == {"out/y"}


def test_another_shape_is_a_miss(copy: Callable[..., Path]) -> None:
    def cut(stored: dict[str, Tensor], _: Any) -> None:
        stored["out/y"] = stored["out/y"][:, :-1].clone()

    (row,) = [row for row in run_case(copy("case5_injector", cut)) if not row.is_ok]
    assert "instead of" in row.note


def test_a_file_without_its_json_is_reported(copy: Callable[..., Path], tmp_path: Path) -> None:
    copy("case5_pos_embed")
    shutil.copy(tmp_path / "case5_pos_embed.safetensors", tmp_path / "orphan.safetensors")
    (row,) = [row for row in run_folder(tmp_path) if not row.is_ok]
    assert (row.case, row.rule) == ("orphan", "not compared")


def test_what_cannot_be_read_is_an_error(copy: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold golden cases"):
        find_cases(tmp_path)
    with pytest.raises(InputError, match="must hold golden cases"):
        find_cases(tmp_path / "absent")
    path = copy("case5_injector")
    tensors = path.with_suffix(".safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"case5_injector.safetensors must be a readable"):
        run_case(path)
    tensors.unlink()
    with pytest.raises(InputError, match=r"case5_injector.safetensors must be a readable"):
        run_case(path)
    path.write_text('{"kind": ', encoding="utf-8")
    with pytest.raises(InputError, match=r"case5_injector.json must be readable JSON"):
        run_case(path)


def test_a_case_that_cannot_run_is_a_miss_and_the_others_are_compared(
    copy: Callable[..., Path], tmp_path: Path
) -> None:
    copy("case5_injector")
    broken = copy("case5_pos_embed")
    broken.with_suffix(".safetensors").write_bytes(b"cut")
    (tmp_path / "torn.json").write_text('{"kind": ', encoding="utf-8")
    (tmp_path / "notes.json").write_text("{}", encoding="utf-8")  # no case
    rows = run_folder(tmp_path)
    bad = [row for row in rows if not row.is_ok]
    assert [(row.case, row.tensor, row.rule) for row in bad] == [
        ("case5_pos_embed", "*", "not run"),
        ("torn", "*", "not run"),
    ]
    assert "must be a readable safetensors" in bad[0].note
    assert sum(row.case == "case5_injector" for row in rows) > 10


def test_cases_in_folders_below_count(copy: Callable[..., Path], tmp_path: Path) -> None:
    path = copy("case5_injector", flip("out/y", 1e-3))
    (tmp_path / "more").mkdir()
    for name in (path.name, path.with_suffix(".safetensors").name):
        (tmp_path / name).rename(tmp_path / "more" / name)
    shutil.copy(
        tmp_path / "more" / "case5_injector.safetensors", tmp_path / "more" / "b.safetensors"
    )
    assert {row.tensor for row in run_folder(tmp_path) if not row.is_ok} == {"out/y", "*"}


def test_incomplete_cases_are_an_error(copy: Callable[..., Path]) -> None:
    def kind(value: str | None) -> Edit:
        def edit(_: Any, meta: dict[str, Any]) -> None:
            meta.pop("kind") if value is None else meta.update(kind=value)

        return edit

    with pytest.raises(InputError, match=r"kind must be one of .*got 'injectors'"):
        run_case(copy("case5_injector", kind("injectors")))
    path = copy("case5_injector", kind(None))
    (row,) = run_folder(path.parent)
    assert "kind must be one of" in row.note
    assert not row.is_ok

    def drop(stored: dict[str, Tensor], meta: dict[str, Any]) -> None:
        del stored["in/query"], meta["tensors"]["in/query"]

    with pytest.raises(InputError, match=r"must hold all that its kind 'injector' needs.*in/query"):
        run_case(copy("case5_injector", drop))
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(InputError, match="must be a JSON object, got list"):
        run_case(path)


def test_errors_are_measured_as_named() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])
    assert relative_error(a, a + 0) == 0
    assert relative_error(b, a) == 1
    assert relative_error(a, b) == 5
    nan = torch.tensor([math.nan, 1.0])
    assert largest_error(nan, nan) == 0
    assert largest_error(nan, a) == math.inf
    assert largest_error(a, nan) == math.inf
    assert not Comparison("c", "t", math.nan, 1.0, "abs").is_ok
    assert is_zero_gradient("gene_encoder.mlp_mixer.2.0.fn.3.bias", {})
    assert not is_zero_gradient("gene_encoder.mlp_mixer.2.0.fn.0.bias", {})


def test_a_nan_where_the_gradient_is_zero_is_a_miss(
    copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modaltune import golden

    name = "grad/mlp_mixer.0.0.fn.3.bias"
    real = golden.run_kind

    def broken(*args: Any) -> dict[str, Tensor]:
        answers = real(*args)
        return {**answers, name: answers[name] * math.nan}

    monkeypatch.setattr(golden, "run_kind", broken)
    assert name in missed(run_case(copy("case5_gene_encoder")))


def test_the_table_and_the_json_say_every_miss() -> None:
    rows = [
        Comparison("a", "out/y", 1e-7, 1e-5, "relative"),
        Comparison("a", "grad/w", 1e-2, 1e-4, "relative"),
        Comparison("b", "out/new", math.nan, 0.0, "not compared", "not computed"),
    ]
    text = io.StringIO()
    render(rows, Console(file=text, width=160))
    for part in ("MISS a grad/w", "MISS b out/new", "2 cases, 3 comparisons, 2 missed", "pass"):
        assert part in text.getvalue()
    every = io.StringIO()
    render([*rows, Comparison("[/b]", "out/z", 0.0, 1.0, "abs")], Console(file=every), every=True)
    for part in ("out/y (relative)", "grad/w (relative)", "[/b]: pass", "out/z (abs)"):
        assert part in every.getvalue()
    data = to_json(rows)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["total"], data["missed"], data["ok"]) == (3, 2, False)
    assert data["comparisons"][2]["error"] is None
    assert to_json(rows[:1])["ok"]
