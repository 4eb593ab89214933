"""Published checkpoints as files: imported, embedded with, exported again, refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.checkpoint import load_run
from modaltune.errors import CheckpointError, InputError
from modaltune.imported_runs import export_checkpoint, import_checkpoint, read_state

pytestmark = pytest.mark.shared
CASES = ["case1_sum_avg_train", "case2_cat_cls", "case3_clinical_sum_avg"]


def golden(shared_dir: Path, case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = shared_dir / "golden" / f"{case}.json"
    return json.loads(path.read_text(encoding="utf-8")), load_file(path.with_suffix(".safetensors"))


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "weights/"
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@pytest.fixture
def files(shared_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A published state_dict and its options, as files."""
    meta, tensors = golden(shared_dir, CASES[0])
    return write(tmp_path, meta, weights(tensors))


def write(folder: Path, meta: dict[str, Any], state: dict[str, Tensor]) -> tuple[Path, Path]:
    save_file(state, folder / "published.safetensors")
    keys = ("interaction_indexes", "num_heads", "slide_ngrids", "longnet")
    (folder / "config.json").write_text(json.dumps({k: meta[k] for k in keys}), encoding="utf-8")
    return folder / "published.safetensors", folder / "config.json"


@pytest.mark.parametrize("case", CASES)
def test_an_imported_run_gives_the_published_numbers(
    shared_dir: Path, tmp_path: Path, case: str
) -> None:
    meta, tensors = golden(shared_dir, case)
    path, config = write(tmp_path, meta, weights(tensors))
    import_checkpoint(path, tmp_path / "run", options=config)
    run = load_run(tmp_path / "run")
    assert run.model.config.position_convention == "reference"
    assert run.info == {"imported_from": "published.safetensors", "layout": "published"}
    genes = [tensors[f"in/genes.{i}"] for i in range(len(meta["pathway_sizes"]))]
    modalities = {"genes": torch.cat(genes, dim=1)}
    if meta["clinical"]:
        modalities["clinical"] = tensors["in/clinical"]
    tiles = tensors["in/x"][0]
    batch = CaseBatch(tiles, tensors["in/coords"][0], torch.tensor([0, len(tiles)]), modalities)
    with torch.no_grad():
        got = run.model(batch)[0]
    want = tensors["out/logits"]
    assert float((got - want).norm() / want.norm()) < 1e-5
    out = tmp_path / "again.safetensors"
    export_checkpoint(tmp_path / "run", out)
    again = load_file(out)
    assert again.keys() == weights(tensors).keys()
    for name, tensor in weights(tensors).items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name


def test_torch_files_come_through_the_child_process(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = load_file(files[0])
    torch.save(state, tmp_path / "model.pt")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load must not run in this process")

    monkeypatch.setattr(torch, "load", forbidden)
    read = read_state(tmp_path / "model.pt")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], t) for name, t in state.items())


class Malicious:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"gene_pe": Malicious(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil.pt must be a readable file of named tensors"):
        import_checkpoint(tmp_path / "evil.pt", tmp_path / "run")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("absent.pt", None), ("text.pt", b"no"), ("cut.safetensors", b"\x09")]
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} must be"):
        import_checkpoint(tmp_path / name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def mutilate(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    if what.startswith("-"):
        return {n: t for n, t in state.items() if n != what[1:]}
    if what.startswith("+"):
        return {**state, what[1:]: torch.ones(3)}
    name = what[1:]
    changed = {
        "t": lambda t: t.flatten()[:-1].clone(),
        "n": lambda t: torch.full_like(t, torch.nan),
        "d": lambda t: t.double(),
    }[what[0]](state[name])
    return {**state, name: changed}


@pytest.mark.parametrize(
    "what",
    [
        "-gene_pe",
        "-final_project.weight",
        "-encoder.layers.2.ffn.fc1.bias",
        "-encoder.layers.0.ffn.fc1.weight",
        "-gene_encoder.gene_networks.3.0.0.weight",
        "-gene_encoder.mlp_mixer.2.0.fn.0.weight",
        "-interactions.0.injector.attn.q_proj.weight",
        "-interactions.1.extra_extractors.1.ffn.norm.bias",
        "-prompt_selfattention.1.norm.weight",
        "+gene_cls_token",
        "tinteractions.1.injector.gamma",
        "ttask_weight.0.weight",
        "ncls_token",
        "dfinal_norm.weight",
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    files: tuple[Path, Path], tmp_path: Path, what: str
) -> None:
    path, config = files
    save_file(mutilate(load_file(path), what), tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(tmp_path / "bad.safetensors", tmp_path / "run", options=config)
    assert what[1:] in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be readable JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"interaction_indexes": [[0, 3]]}', "interaction_indexes must name 2 ranges"),
        ('{"interaction_indexes": [0, 1]}', "config must hold valid values"),
        ('{"interaction_indexes": [[1, 0], [2, 3]]}', "rising block ranges"),
        ('{"interaction_indexes": [[0, 1], [2, 3]], "num_heads": 5}', "heads must divide"),
        ('{"interaction_indexes": [[0, 1], [2, 3]], "num_heads": "x"}', "config must hold valid"),
    ],
)
def test_bad_options_are_refused(
    files: tuple[Path, Path], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        import_checkpoint(files[0], tmp_path / "run", options=tmp_path / "bad.json")
    assert not (tmp_path / "run").exists()


def test_a_pathway_table_gives_genes_their_names(
    files: tuple[Path, Path], tmp_path: Path, shared_dir: Path
) -> None:
    sizes = golden(shared_dir, CASES[0])[0]["pathway_sizes"]
    lines = [
        "\t".join([f"P{p}", "-", *(f"G{(7 * p + i) % 23}" for i in range(size))])
        for p, size in enumerate(sizes)
    ]
    table = tmp_path / "pathways.gmt"
    table.write_text("\n".join(lines), encoding="utf-8")
    named = import_checkpoint(files[0], tmp_path / "named", pathways=table, options=files[1])
    plain = import_checkpoint(files[0], tmp_path / "plain", options=files[1])
    rng = torch.Generator().manual_seed(0)
    values = {f"G{i}": float(v) for i, v in enumerate(torch.randn(23, generator=rng))}
    spread = {
        f"pathway{p}/{i}": values[f"G{(7 * p + i) % 23}"]
        for p, size in enumerate(sizes)
        for i in range(size)
    }
    first = named.embed([named.case("P", genes=values)])
    second = plain.embed([plain.case("P", genes=spread)])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    table.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"\(7 pathways\), got 6 pathways"):
        import_checkpoint(files[0], tmp_path / "no", pathways=table, options=files[1])
    assert not (tmp_path / "no").exists()


def test_we_write_no_pickle(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out must end in .safetensors, got out.pt"):
        export_checkpoint(tmp_path, tmp_path / "out.pt")
