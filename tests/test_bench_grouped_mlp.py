"""The benchmark of the pathway networks: the rival is the published form, wrong answers refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modaltune.benchmarks.grouped_mlp import (
    CSV_NAME,
    Networks,
    draw_networks,
    gate,
    literal_networks,
    literal_pathways,
    main,
)
from modaltune.engine.errors import InputError
from modaltune.kernels import pathway_mlp
from modaltune.testing import normal, pack_offsets


@pytest.mark.shared
def test_the_rival_is_the_published_one(shared_dir: Path) -> None:
    stored = load_file(shared_dir / "golden" / "case5_gene_encoder.safetensors")
    genes = [stored[f"in/genes.{p}"] for p in range(8)]
    layers = [f"weights/gene_networks.{p}" for p in range(8)]
    networks = Networks(
        torch.arange(sum(g.shape[1] for g in genes)),
        torch.cat([stored[f"{name}.0.0.weight"].T for name in layers]),
        *(torch.stack([stored[f"{n}.{part}"] for n in layers]) for part in ("0.0.bias",)),
        *(torch.stack([stored[f"{n}.1.0.{p}"] for n in layers]) for p in ("weight", "bias")),
        offsets=pack_offsets([g.shape[1] for g in genes]),
    )
    out = literal_pathways(torch.cat(genes, dim=1), literal_networks(networks))
    # A rounding step of values of order one.
    torch.testing.assert_close(out, stored["mid/snn"], rtol=0, atol=1e-6)


def test_the_gate_refuses_a_wrong_answer() -> None:
    networks = draw_networks(torch.arange(7), pack_offsets([3, 4]), width=8)
    single = literal_networks(networks)
    double = literal_networks(networks.as_dtype(torch.float64))
    x = normal(3, 2, 7, dtype=torch.float32)

    def ours(x: Tensor) -> Tensor:
        return pathway_mlp(x, *networks[:-1], offsets=networks.offsets)

    def rival(x: Tensor) -> Tensor:
        return literal_pathways(x, single)

    def exact(x: Tensor) -> Tensor:
        return literal_pathways(x, double)

    gate(ours, rival, exact, x)
    with pytest.raises(InputError, match="a benchmark must time right answers, got an error of 0"):
        gate(lambda x: ours(x) + 1e-3, rival, exact, x)


def test_appends_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "pathways.gmt"
    table.write_text("first\t-\tA\tB\tC\nsecond\t-\tB\tD\n")
    threads = torch.get_num_threads()
    try:
        given = ["--cases", "2", "--runs", "2", "--json", "--pathways", str(table)]
        assert main([*given, "--results", str(tmp_path)]) == 0
        assert main([*given, "--results", str(tmp_path / "absent")]) == 1
    finally:
        torch.set_num_threads(threads)
    printed = json.loads(capsys.readouterr().out)
    (row,) = csv.DictReader((tmp_path / CSV_NAME).open())
    assert row == {name: str(value) for name, value in printed.items()}
    assert (row["pathways"], row["memberships"], row["cases"]) == ("2", "5", "2")
    assert float(row["ratio"]) > 0
