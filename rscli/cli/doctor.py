"""`rscli doctor`"""

from __future__ import annotations

from dataclasses import asdict

from rscli.cli import options as opt


def doctor(data_dir: opt.DataDir = opt.DATA_DIR, json: opt.Json = False) -> None:
    """Check this installation: versions, devices and what they support, data sets, broken plugins, and how to fix problems.

    Examples:

        rscli doctor

        rscli doctor --data-dir /data --json
    """
    from rscli.cli.output import emit_json, stdout
    from rscli.doctor import examine

    findings = examine(data_dir)
    if json:
        emit_json({heading: [asdict(finding) for finding in found] for heading, found in findings.items()})
        return
    console = stdout()
    for heading, found in findings.items():
        console.print(heading, style="bold")
        for finding in found:
            mark, style = ("ok", "green") if finding.ok else ("--", "yellow")
            console.print(f"  {mark} ", style=style, end="")
            console.print(finding.text, highlight=False)
            if finding.hint:
                console.print(f"     {finding.hint}", style="dim", highlight=False)
