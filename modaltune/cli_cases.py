"""`modaltune cases`: put a cohort together, look at it, and hand its split on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from modaltune.cli_parts import (
    JsonFlag,
    err_console,
    out_console,
    print_json,
    reports_errors,
)

cases_app = typer.Typer(
    help="Join clinical records, expression and tile features of a cohort by case.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="A cases folder.", metavar="DIR")]
INPUTS, JOINING, GENES, SLIDES, SPLITTING = (
    "What there is",
    "How cases are joined",
    "Genes",
    "Slides",
    "New splits",
)


def _option(
    text: str, panel: str, *names: str, metavar: str | None = None, least: int | None = None
) -> Any:
    """Declare an option under a heading of --help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, min=least)


@cases_app.command("build")
@reports_errors
def build(
    out: Annotated[Path, typer.Option(help="The cases folder to write.")],
    clinical: Annotated[
        list[Path] | None,
        _option("Clinical table: the GDC's clinical.tsv or JSON, or a CSV with case_id, age, sex, "
                "survival_months, event, primary_class ... Of several, the first that knows "
                "something is believed.", INPUTS),
    ] = None,
    follow_up: Annotated[
        list[Path] | None,
        _option("The GDC's follow_up.tsv, from the same download as clinical.tsv: the days of "
                "follow-up, which newer clinical.tsv lack.", INPUTS),
    ] = None,
    expression: Annotated[
        list[Path] | None,
        _option("Expression: UCSC Xena TSV, case x gene CSV, cBioPortal-style CSV, Parquet or "
                "h5ad. Several tables must be of one source: they differ in scale.", INPUTS),
    ] = None,
    pathways: Annotated[
        Path | None, _option("Gene sets: GMT, gene x pathway 0/1 CSV, or wide CSV.", INPUTS)
    ] = None,
    features: Annotated[
        list[Path] | None,
        _option("Folder of tile features: of `modaltune embed`, TRIDENT, CLAM, STAMP, AtlasPatch, "
                "slide2vec or LazySlide.", INPUTS),
    ] = None,
    slides: Annotated[
        Path | None,
        _option("CSV that says whose each slide is: slide, case_id, and mpp where features lack "
                "it. Not needed for TCGA barcodes.", INPUTS),
    ] = None,
    labels: Annotated[
        Path | None,
        _option("CSV with your own classes: case_id and label (text) or primary_class (number).",
                INPUTS),
    ] = None,
    published_split: Annotated[
        tuple[Path, Path, Path] | None,
        _option("A published split, with its clinical records: three JSON files.", INPUTS,
                metavar="TRAIN VAL TEST"),
    ] = None,
    split: Annotated[
        Path | None,
        _option("Your own split: CSV with case_id, split (train, val, test) and, for several, "
                "fold; or splits.json of another cases folder.", INPUTS),
    ] = None,
    classes: Annotated[
        Literal["file", "published"],
        _option("file: the classes that the tables have; published: from project and diagnosis, "
                "as in the paper.", JOINING),
    ] = "file",
    death_without_date: Annotated[
        Literal["censor", "drop", "published"],
        _option("Patients of the GDC who died on an unrecorded day: censored at the last "
                "follow-up, left out, or taken as died at the last follow-up.", JOINING),
    ] = "censor",
    require: Annotated[
        list[str] | None,
        _option("Leave out cases without: inputs (expression or slides), genes, slides, class, "
                "survival (default: inputs). May be given again; nothing: keep all.", JOINING),
    ] = None,
    exclude: Annotated[
        list[str] | None, _option("Leave this case out; may be given again.", JOINING, metavar="ID")
    ] = None,
    layout: Annotated[
        Literal["auto", "cases", "cbioportal", "xena"],
        _option("Layout of text tables of expression; auto: by their header.", GENES),
    ] = "auto",
    duplicate_cases: Annotated[
        Literal["error", "first", "mean"],
        _option("A case with differing rows of expression: refuse, take the first, or the mean.",
                GENES),
    ] = "error",
    nan_policy: Annotated[
        Literal["error", "keep"],
        _option("Missing values in expression: refuse, or keep, to be filled in training by the "
                "training mean.", GENES),
    ] = "error",
    drop_constant_genes: Annotated[
        bool,
        _option("Drop genes of a Xena table that are the same in all cases, test included, as "
                "published.", GENES, "--drop-constant-genes"),
    ] = False,
    genes: Annotated[
        Literal["auto", "pathways", "all"],
        _option("Which genes to store; auto: those of the pathways, all without pathways.", GENES),
    ] = "auto",
    gene_aliases: Annotated[
        str,
        _option("Old names and aliases of genes: hgnc (the packaged table), none, the file "
                "hgnc_complete_set.txt, or auto: the packaged table where it is installed.", GENES),
    ] = "auto",
    encoder: Annotated[
        str | None, _option("Which features, where files hold those of several encoders.", SLIDES)
    ] = None,
    base_mpp: Annotated[
        float | None,
        _option("Microns per level-0 pixel of slides whose files do not say it.", SLIDES),
    ] = None,
    target_mpp: Annotated[
        float | None,
        _option("Microns per pixel of the tiles, where files do not say it (CLAM, .pt).", SLIDES),
    ] = None,
    import_pt: Annotated[
        bool,
        _option("Read .pt features, which may carry code, in child processes, and store them as "
                "HDF5 in the cases folder.", SLIDES, "--import-pt"),
    ] = False,
    folds: Annotated[
        int, _option("1: one split; k: k splits, each case in one test part.", SPLITTING, least=1)
    ] = 1,
    test_share: Annotated[
        float, _option("Share of cases in the test part of a single split.", SPLITTING)
    ] = 0.2,
    val_share: Annotated[
        float, _option("Share of the other cases in the validation part.", SPLITTING)
    ] = 0.15,
    stratify: Annotated[
        Literal["class+event", "class", "event", "none"],
        _option("What every part holds in the same proportions.", SPLITTING),
    ] = "class+event",
    by_site: Annotated[
        bool,
        _option("No hospital (source site of the TCGA barcode) is in two parts.", SPLITTING,
                "--by-site"),
    ] = False,
    unclassified: Annotated[
        Literal["split", "train"],
        _option("Cases without a class: split like others, or all in training, as published.",
                SPLITTING),
    ] = "split",
    seed: Annotated[int, _option("Of new splits.", SPLITTING, least=0)] = 0,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a cases folder that is there.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Join a cohort by case id and write one validated folder for training and evaluation.

    Everything is joined by patient, never by row. What could not be joined is left out and listed
    with the reason, on screen and in DIR/report.md. The folder appears whole or not at all.

    modaltune cases build --clinical clinical.tsv --expression HiSeqV2.gz --pathways sets.gmt
    --features cohort/features_efficientnet-lite0 --classes published --out cases
    """
    from modaltune.cases_build import build_cases
    from modaltune.cases_request import CasesRequest

    wanted = tuple(one for one in require or ["inputs"] if one != "nothing")
    request = CasesRequest.checked(
        clinical=clinical or (),
        follow_up=follow_up or (),
        expression=expression or (),
        pathways=pathways,
        features=features or (),
        slides=slides,
        labels=labels,
        published_split=published_split,
        split=split,
        classes=classes,
        death_without_date=death_without_date,
        require=wanted,
        exclude=exclude or (),
        layout=layout,
        duplicate_cases=duplicate_cases,
        nan_policy=nan_policy,
        drop_constant_genes=drop_constant_genes,
        genes=genes,
        gene_aliases=gene_aliases,
        encoder=encoder,
        base_mpp=base_mpp,
        target_mpp=target_mpp,
        import_pt=import_pt,
        folds=folds,
        test_share=test_share,
        val_share=val_share,
        stratify=stratify,
        by_site=by_site,
        unclassified=unclassified,
        seed=seed,
    )
    cases = build_cases(request, out, replace=replace)
    if as_json:
        print_json({"out": str(out), "sha256": cases.sha256, "report": cases.report})
        return
    from modaltune.build_report import BuildReport

    BuildReport.from_dict(cases.report).render(out_console)
    out_console.print(
        f"wrote {out}: {len(cases.case_ids)} cases, {cases.num_folds} split(s); what was left out, "
        f"case by case: {out / 'report.json'}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


@cases_app.command("show")
@reports_errors
def show(folder: Folder, as_json: JsonFlag = False) -> None:
    """Show a cases folder: how many cases by part, class and modality, and what it was built from.

    The files are compared with their checksums first.
    """
    from modaltune.build_report import folder_parts, render_parts
    from modaltune.cases_folder import CasesFolder

    cases = CasesFolder.open(folder)
    # Counted anew: folders that Python wrote (planted ones) say neither counts nor sources.
    parts = folder_parts(cases)
    if as_json:
        facts = {"counts": parts, **cases.description}
        print_json({"path": str(folder), "sha256": cases.sha256, **facts})
        return
    render_parts(parts, out_console)
    for group, names in cases.description.get("classes", {}).get("names", {}).items():
        shown = ", ".join(f"{number} = {name}" for number, name in sorted(names.items()))
        out_console.print(f"classes {group}: {shown}", highlight=False, soft_wrap=True)
    for source in cases.description.get("sources", ()):
        line = f"{source['role'].replace('_', ' ')}: {source['path']}"
        out_console.print(line, highlight=False, soft_wrap=True, markup=False)
    out_console.print(f"content {cases.sha256[:16]}", highlight=False)


@cases_app.command("export-split")
@reports_errors
def export_split(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Folder for train.json, val.json and test.json.")],
    fold: Annotated[int, typer.Option(min=0, help="Which split.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Write a split with its clinical records as the JSON files of the published layout."""
    from modaltune.cases_folder import CasesFolder
    from modaltune.cases_join import feature_names
    from modaltune.published_splits import write_published_split

    cases = CasesFolder.open(folder)
    genes = () if cases.expression is None else tuple(cases.expression.index)
    split, features = cases.split(fold), feature_names(cases)
    written = write_published_split(out, split, cases.clinical, with_genes=genes, features=features)
    if as_json:
        print_json({"written": [str(path) for path in written]})
        return
    for path in written:
        err_console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)
