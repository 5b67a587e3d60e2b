"""`rscli certify`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rscli.cli import options as opt

CERTIFICATE = "Certificate"
"""The panel of `--help` for what a certificate rests on."""

Model = Annotated[Path, typer.Argument(help="A model file (model.safetensors), or its run folder.", readable=False)]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Result file.  [default: results.tsv beside the model]", readable=False),
]
CertifierName = Annotated[
    str | None,
    typer.Option(
        "--certifier",
        metavar="NAME",
        help="Statistical test; `rscli plugins` lists them.  [default: cohen, CERTIFY with fixed n]",
        rich_help_panel=CERTIFICATE,
    ),
]
N = Annotated[
    int,
    typer.Option(
        "--n",
        metavar="N",
        min=1,
        callback=opt.at_most(10**12),
        help="Monte Carlo samples per image.",
        rich_help_panel=CERTIFICATE,
    ),
]
N0 = Annotated[
    int | None,
    typer.Option(
        "--n0",
        metavar="N",
        min=1,
        callback=opt.at_most(10**12),
        help="Samples per image that select the class.  [default: the certifier's; of cohen, 100]",
        rich_help_panel=CERTIFICATE,
    ),
]
Alpha = Annotated[
    float,
    typer.Option("--alpha", metavar="P", help="Failure probability of a certificate, at most.", rich_help_panel=CERTIFICATE),
]
Radii = Annotated[
    str | None,
    typer.Option(
        "--radii",
        metavar="R,R,...",
        help="Radii to decide, as in 0.25,0.5 (for certifiers of given radii).  "
        "[default: 0, 0.25, ... up to what n samples can prove]",
        rich_help_panel=CERTIFICATE,
    ),
]
Labels = Annotated[
    bool,
    typer.Option(
        "--labels",
        help="Test the label of each image instead of a selected class: gives certified accuracy only.",
        rich_help_panel=CERTIFICATE,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", min=0, callback=opt.at_most(2**63 - 1), help="Seed of the noise.", rich_help_panel=CERTIFICATE
    ),
]
Split = Annotated[str, typer.Option("--split", metavar="NAME", help="Split of the data set.", rich_help_panel=opt.DATA)]
Start = Annotated[int, typer.Option("--start", metavar="I", min=0, help="Index of the first image.", rich_help_panel=opt.DATA)]
Skip = Annotated[
    int,
    typer.Option(
        "--skip",
        metavar="K",
        min=1,
        help="Certify every K-th image (100 gives the usual 500 of ImageNet).",
        rich_help_panel=opt.DATA,
    ),
]
Max = Annotated[
    int | None, typer.Option("--max", metavar="M", min=1, help="Certify at most M images.", rich_help_panel=opt.DATA)
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="K/N", help="Certify the K-th of N parts (job arrays); see above.", rich_help_panel=opt.DATA
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, certifier.KEY=VALUE or data.KEY=VALUE; repeatable.",
        rich_help_panel=opt.SETTINGS,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        callback=opt.at_most(10**6),
        help="Batch size per forward pass.  [default: by trial, or 256]",
        rich_help_panel=opt.SPEED,
    ),
]
ChannelsLast = Annotated[
    bool | None,
    typer.Option(
        "--channels-last/--contiguous",
        help="Memory layout.  [default: by trial, or channels-last]",
        rich_help_panel=opt.SPEED,
    ),
]
Autotune = Annotated[
    bool | None,
    typer.Option(
        "--autotune/--no-autotune",
        help="Try memory layouts, batch sizes and numbers of parallel batches first.  [default: in long runs without --batch]",
        rich_help_panel=opt.SPEED,
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="torch.compile (CUDA graphs on a GPU).  [default: by trial in runs of over 10 minutes, "
        "except for sequential, bf16 and --no-autotune]",
        rich_help_panel=opt.SPEED,
    ),
]


def certify(
    model: Model,
    out: Out = None,
    resume: opt.Resume = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    certifier: CertifierName = None,
    n: N = 100_000,
    n0: N0 = None,
    alpha: Alpha = 0.001,
    radii: Radii = None,
    labels: Labels = False,
    seed: Seed = 0,
    data_dir: opt.DataDir = opt.DATA_DIR,
    download: opt.Download = False,
    split: Split = "test",
    start: Start = 0,
    skip: Skip = 1,
    max: Max = None,
    shard: Shard = None,
    sets: Sets = None,
    _plugin: opt.PluginFiles = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "fp32",
    batch: Batch = None,
    channels_last: ChannelsLast = None,
    autotune: Autotune = None,
    compile: Compile = None,
) -> None:
    """Certify a model: each image gets a class and the radius within which it provably cannot change, or an abstention.

    Writes one row per image (idx, label, predict, radius, correct, time, then counts) and, beside the rows, the protocol. A row
    is on disk as soon as its image is decided. --resume continues after any interruption, and a larger --max extends a run.

    Examples:

        rscli certify runs/digits-cons-0.25/seed0/model.safetensors --n 10000

        rscli certify model.safetensors --n 100000 --max 500 --resume

        rscli certify model.safetensors --certifier sequential --radii 0,0.5,1.0 --labels

        torchrun --nproc-per-node 8 -m -- rscli certify model.safetensors --n 100000

    With --shard 3/16, the third of sixteen jobs writes its part beside the result file. When all are done, run the same command
    with --resume and without --shard to merge the parts.
    """
    from rscli.cli.output import emit_json, listener
    from rscli.registry import installed
    from rscli.report.tables import acr_text
    from rscli.runtime.torchrun import launched
    from rscli.sampling.options import SamplingOptions
    from rscli.smoothing.certify import CertifyOptions
    from rscli.smoothing.certify import certify as run

    path = model_path(model)
    name = certifier or installed().default("certifiers")
    settings = _settings(sets or [], name, path)
    selection = {} if n0 is None else {"n0": n0}
    first = launched().rank == 0  # of the processes that torchrun started; it speaks for all
    progress = listener(quiet or not first)
    tally = run(
        CertifyOptions(
            model=path,
            out=out or path.parent / "results.tsv",
            data_dir=data_dir,
            certifier={
                "name": name,
                "n": n,
                "alpha": alpha,
                **selection,
                **settings["certifier"],
            },
            data=settings["data"],
            split=split,
            start=start,
            skip=skip,
            max=max,
            shard=opt.fraction(shard, "--shard"),
            radii=opt.numbers(radii, "--radii"),
            labels=labels,
            resume=resume,
            download=download,
            sampling=SamplingOptions(device, batch, precision, channels_last, seed, autotune, compile),
        ),
        progress,
        listener(quiet).note,
    )
    at = f" (both at radius {tally.at_radius!r})" if tally.at_radius else ""
    progress.note(
        f"{tally.out}: {tally.images} images, {tally.abstained} abstained, "
        f"certified accuracy {100 * tally.certified_accuracy:.2f}%{at}, ACR {acr_text(tally)}; "
        f"{tally.samples:,} samples in {tally.seconds:.1f} s"
    )
    if json and first:
        emit_json(asdict(tally))


def model_path(path: Path) -> Path:
    """The model file at `path`, or in the run folder `path`."""
    return path / "model.safetensors" if path.is_dir() else path


def _settings(texts: list[str], certifier: str, model: Path) -> dict[str, dict[str, Any]]:
    """`--set data.KEY=VALUE` and `--set certifier.KEY=VALUE`, by section. Raises `InputError` for any other key."""
    from rscli.config.layers import read_sets
    from rscli.config.settings import Setting, Settings
    from rscli.errors import ConfigError

    lower: Settings = {("certifier", "name"): Setting(certifier, "--certifier")}
    if any(text.startswith("data.") for text in texts):
        from rscli.models.modelfile import read_card

        lower["data", "name"] = Setting(read_card(model).data["name"], "model file")
    chosen, problems = read_sets(texts, lower, {"data": "datasets", "certifier": "certifiers"})
    found: dict[str, dict[str, Any]] = {"data": {}, "certifier": {}}
    for key, setting in chosen.items():
        if len(key) == 2 and key[0] in found:
            found[key[0]][key[1]] = setting.value
        else:
            problems.append(
                f"--set {'.'.join(key)} is not a setting of certify: it takes data.KEY=VALUE and certifier.KEY=VALUE"
            )
    if problems:
        raise ConfigError(problems)
    return found
