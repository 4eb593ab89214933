"""`modaltune export-encoder`: a tile encoder as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from modaltune.cli_parts import (
    AllowDownload,
    JsonFlag,
    TileEncoderName,
    TileEncoderWeights,
    TrustedRevision,
    out_console,
    print_json,
    reports_errors,
)


@reports_errors
def export_encoder(
    out: Annotated[Path, typer.Argument(help="ONNX file to write.", metavar="FILE")],
    tile_encoder: TileEncoderName = None,
    tile_encoder_weights: TileEncoderWeights = None,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustedRevision = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"], typer.Option(help="Type of weights and arithmetic.")
    ] = "fp32",
    preprocessing: Annotated[
        Literal["inside", "outside"],
        typer.Option(help="inside: takes uint8 tiles; outside: takes normalised images."),
    ] = "inside",
    tile_px: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the tiles in px.", show_default="the encoder's"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a tile encoder as ONNX, and check it in ONNX Runtime against eager PyTorch.

    The batch is dynamic; the file names encoder, hash of the weights, opset and versions. Weights
    of more than 2 GB go to a file beside it. Exits 1 where the features differ.
    """
    from modaltune.engine.encoders.export import export_encoder as export
    from modaltune.engine.encoders.loading import load_eager
    from modaltune.engine.encoders.registry import DEFAULT_ENCODER

    encoder = load_eager(
        tile_encoder or DEFAULT_ENCODER,
        weights=tile_encoder_weights,
        allow_download=allow_download,
        trust_remote_code=trust_remote_code,
    )
    report = export(encoder, out, precision=precision, preprocessing=preprocessing, tile_px=tile_px)
    if as_json:
        print_json(report.to_dict())
        return
    agreement = report.agreement
    if agreement is not None:
        out_console.print(
            f"{encoder.name}, {precision}: cosine {agreement.cosine:.7f} to eager PyTorch, "
            f"relative error {agreement.relative_error:.2g}",
            highlight=False,
        )
    for path in (report.path, report.data):
        if path is not None:
            out_console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)
