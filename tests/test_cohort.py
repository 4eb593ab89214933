"""Manifests: what is read, and every rule by its message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modaltune.engine.cohort import items_from_paths, read_manifest
from modaltune.engine.errors import InputError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"slide")


def manifest(folder: Path, text: str) -> Path:
    path = folder / "manifest.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_slides_cases_and_mpp(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "deep/b.tiff", "c.svs")
    items = read_manifest(
        manifest(tmp_path, "slide,case_id,mpp\na.svs,P1,0.25\ndeep/b.tiff,P1,\nc.svs,,\n"),
        base_mpp=0.5,
    )
    assert [(i.slide_id, i.case_id, i.base_mpp) for i in items] == [
        ("a", "P1", 0.25),
        ("b", "P1", 0.5),
        ("c", "c", 0.5),
    ]
    assert items[1].path == tmp_path / "deep" / "b.tiff"


def test_root_option_and_absolute_paths(tmp_path: Path) -> None:
    touch(tmp_path, "slides/a.svs")
    path = manifest(tmp_path, f"slide\n{tmp_path / 'slides' / 'a.svs'}\n")
    assert read_manifest(path, root=tmp_path / "slides")[0].slide_id == "a"
    other = tmp_path / "elsewhere"
    other.mkdir()
    with pytest.raises(InputError, match=r"must lie below .*elsewhere"):
        read_manifest(path, root=other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id\nP\n", "must have a column 'slide'"),
        ("slide,colour\na.svs,red\n", "no columns but slide, case_id, mpp, got colour"),
        ("slide\n", "at least one slide"),
        ("slide\n../a.svs\n", r"line 2: slide must lie below .* got \.\./a\.svs"),
        ("slide\nsub/../../a.svs\n", "must lie below"),
        ("slide\nmissing.svs\n", "existing files; missing, got 1: .*missing.svs"),
        ("slide\na.svs\nsub/a.tif\n", "distinct names.* got 1: a "),
        ("slide,mpp\na.svs,fine\n", "mpp of a.svs must be a number, got 'fine'"),
        ("slide,mpp\na.svs,nan\n", "mpp of a.svs must lie in"),
        ("slide\n\n ,\n", "must"),
        ("slide,mpp\na.svs,0.25,P1\n", "line 2: row must have no more cells than columns, got P1"),
    ],
)
def test_rules_by_message(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "a.svs", "sub/a.tif")
    with pytest.raises(InputError, match=message):
        read_manifest(manifest(tmp_path, text))


def test_every_bad_row_is_named_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    path = manifest(tmp_path, "slide,mpp\na.svs,x\n../b.svs,\n")
    with pytest.raises(InputError, match=r"got 2: line 2: .*; line 3: "):
        read_manifest(path)


def test_links_that_leave_the_root_are_refused(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    touch(outside, "secret.svs")
    inside.mkdir()
    (inside / "a.svs").symlink_to(outside / "secret.svs")
    with pytest.raises(InputError, match="must lie below"):
        read_manifest(manifest(inside, "slide\na.svs\n"))


def test_nul_in_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"readable CSV|must be a file name"):
        read_manifest(manifest(tmp_path, "slide\na\0.svs\n"))


def test_paths_from_the_command_line(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "x/a.svs")
    assert items_from_paths([tmp_path / "a.svs"], 0.25)[0].base_mpp == 0.25
    with pytest.raises(InputError, match="slides must be given"):
        items_from_paths([])
    with pytest.raises(InputError, match="distinct names"):
        items_from_paths([tmp_path / "a.svs", tmp_path / "x" / "a.svs"])
    with pytest.raises(InputError, match="existing files"):
        items_from_paths([tmp_path / "none.svs"])


def test_names_that_are_no_text(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xff.svs")
    touch(tmp_path, odd.name)
    with pytest.raises(InputError, match=r"must have names in UTF-8; .*, got 1: .*udcff.svs"):
        items_from_paths([odd])
