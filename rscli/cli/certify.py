"""`rscli certify`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rscli.cli import options as opt


def certify(
    model: Annotated[Path, typer.Argument(help="A model file (model.safetensors), or its run folder.", readable=False)],
    n: Annotated[int, typer.Option("--n", min=1, max=10**12, help="Monte Carlo samples per image.")] = 100_000,
    n0: Annotated[
        int | None,
        typer.Option("--n0", min=1, max=10**12, help="Selection samples per image.  [default: the certifier's; of cohen, 100]"),
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha", help="Failure probability of a certificate, at most.")] = 0.001,
    certifier: Annotated[
        str | None, typer.Option("--certifier", help="See `rscli plugins`.  [default: cohen, CERTIFY with fixed n]")
    ] = None,
    radii: Annotated[
        str | None,
        typer.Option(
            "--radii",
            help="Radii to decide, as 0.25,0.5 (certifiers that ask for them).  "
            "[default: 0, 0.25, ... as far as n samples can prove]",
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which images.")] = "test",
    start: Annotated[int, typer.Option("--start", min=0, help="Index of the first image.")] = 0,
    skip: Annotated[
        int, typer.Option("--skip", min=1, help="Take every K-th image (100 gives ImageNet's 500).", metavar="K")
    ] = 1,
    max: Annotated[int | None, typer.Option("--max", min=1, help="Certify at most so many images.", metavar="M")] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="K/N", help="Certify the K-th of N parts (job arrays); see above.")
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Test each image's label, not a class chosen first: certified accuracy only.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Result file.  [default: results.tsv beside the model]", readable=False)
    ] = None,
    resume: opt.Resume = False,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the noise.")] = 0,
    data_dir: opt.DataDir = opt.DATA_DIR,
    sets: opt.Sets = None,
    _plugin: opt.PluginFiles = None,
    download: opt.Download = False,
    device: opt.Device = "auto",
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, max=10**6, help="Batch size per forward pass.  [default: tried, or 256]")
    ] = None,
    precision: opt.Precision = "fp32",
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--contiguous", help="Memory layout.  [default: tried, or channels-last]")
    ] = None,
    autotune: Annotated[
        bool | None,
        typer.Option(
            "--autotune/--no-autotune",
            help="Try layouts, batch sizes and batches side by side first.  [default: in long runs without --batch]",
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile (CUDA graphs on a GPU).  "
            "[default: tried where a trial foresees over 10 minutes; not for sequential, bf16, --no-autotune]",
        ),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Certify a model: for each image a class and the L2 radius in which it provably cannot change, or an abstention.

    Writes one row an image (idx, label, predict, radius, correct, time, then counts) and, beside it, the protocol. A row is
    on disk as soon as its image is decided; --resume goes on after any interruption, and a larger --max extends a run.

    Examples:

        rscli certify runs/digits-cons-0.25/seed0/model.safetensors --n 10000

        rscli certify model.safetensors --n 100000 --max 500 --out results.tsv --resume

        rscli certify model.safetensors --certifier sequential --radii 0,0.5,1.0 --labels

        torchrun --nproc-per-node 8 -m -- rscli certify model.safetensors --n 100000

    With --shard 3/16, the third of sixteen jobs writes its part beside the result file; when all are done, the same command
    with --resume and without --shard puts them together.
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
