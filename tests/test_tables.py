"""Opening of user tables: compression, damage, headers, missing cells."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from modaltune.errors import CohortError, InputError
from modaltune.tables import check_choice, is_missing, name_few, open_text, read_header, repeated

KIND = "a readable table"


@pytest.mark.parametrize(
    "value", [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, "", "  ", "NaN", "'--", "N/A"]
)
def test_missing_values_are_recognised(value: object) -> None:
    assert is_missing(value)


@pytest.mark.parametrize("value", [0, 0.0, "0", "none of these", False, "-1", np.int64(0)])
def test_known_values_are_not_missing(value: object) -> None:
    assert not is_missing(value)


def test_plain_gzip_and_zip_give_the_same_text_without_the_byte_order_mark(tmp_path: Path) -> None:
    content = "\ufeffcase_id,äge\na,1\n".encode()
    plain, packed, archive = tmp_path / "t.csv", tmp_path / "t.csv.gz", tmp_path / "t.csv.zip"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("folder/", b"")
        file.writestr("folder/t.csv", content)
    for path in (plain, packed, archive):
        with open_text(path, KIND) as text:
            assert text.read() == "case_id,äge\na,1\n"


def test_every_kind_of_damage_names_the_file(tmp_path: Path) -> None:
    truncated, no_gzip, no_zip, binary = (
        tmp_path / name for name in ("cut.gz", "no.gz", "no.zip", "bin.csv")
    )
    noise = np.random.default_rng(0).bytes(4000)
    truncated.write_bytes(gzip.compress(noise.hex().encode())[:-500])
    no_gzip.write_text("a,b\n")
    no_zip.write_text("a,b\n")
    binary.write_bytes(noise)
    for path in (truncated, no_gzip, no_zip, binary, tmp_path / "absent.csv", tmp_path):
        with pytest.raises(CohortError, match=KIND) as caught, open_text(path, KIND) as text:
            text.read()
        assert str(path) in str(caught.value)


def test_a_zip_of_two_tables_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.csv", "1")
        file.writestr("b.csv", "2")
    with (
        pytest.raises(CohortError, match=r"exactly one file, got 2 \(a.csv, b.csv\)"),
        open_text(path, KIND),
    ):
        pass


def test_header_finds_the_delimiter_and_leaves_the_handle_at_line_two() -> None:
    text = io.StringIO('case_id\t"a,b"\tc\n1\t2\t3\n')
    assert read_header(text, Path("t.tsv")) == (["case_id", "a,b", "c"], "\t")
    assert text.readline() == "1\t2\t3\n"
    with pytest.raises(CohortError, match=r"t\.tsv must begin with .* an empty file"):
        read_header(io.StringIO(""), Path("t.tsv"))


def test_small_helpers() -> None:
    assert repeated(["a", "b", "a", "c", "b", "a"]) == ["a", "b"]
    assert name_few(["a", "b"]) == "a, b"
    assert name_few(list("abcdefg")) == "a, b, c, d, e and 2 more"
    with pytest.raises(InputError, match="mode must be one of x, y, got 'z'"):
        check_choice("mode", "z", ("x", "y"))
