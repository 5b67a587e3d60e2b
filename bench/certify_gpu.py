"""Certification on a GPU: precisions, torch.compile, the reference and the bare network, and that the host never waits.

    python bench/certify_gpu.py                          # LeNet, ResNet-20, ResNet-110; some minutes
    python bench/certify_gpu.py --networks resnet50 --seconds 5

Without a GPU it runs on the CPU, in the precisions that it has, which shows only that it works.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from certify_throughput import NETWORKS, Case, Way, bare, build_case, chosen, maker, measure, ours, profile, ratio, usual

from rscli.runtime.devices import device_name, pick_device
from rscli.sampling.autotune import Choice
from rscli.sampling.sampler import Sampler


def compare(case: Case, *, target: float, rounds: int, compiled: bool) -> dict[str, Any]:
    """All figures of one network: samples per second, ratios to the reference and to the bare network, and a profile."""
    precisions = ("fp32", "tf32", "bf16") if case.device.type == "cuda" else ("fp32", "bf16")
    choices: dict[str, Choice] = {p: chosen(case, p) for p in precisions}
    engines: dict[str, Sampler] = {f"ours {p}": maker(case, p)(choices[p]) for p in precisions}
    if compiled:
        engines |= {f"ours {p} compiled": maker(case, p)(replace(choices[p], compiled=True)) for p in precisions}
    ways: dict[str, Way] = {"usual fp32": usual(case)} | {name: ours(case, engine) for name, engine in engines.items()}
    ways |= {f"bare {p}": bare(case, choices[p], p) for p in precisions}
    speeds = measure(ways, target=target, rounds=rounds)
    plain = "ours fp32"
    return {
        "network": case.name,
        "choice": {p: str(choice) for p, choice in choices.items()},
        "samples_per_second": {name: median(values) for name, values in speeds.items()},
        "over_usual": {name: ratio(speeds, name, "usual fp32") for name in engines},
        "over_bare": {name: ratio(speeds, name, f"bare {name.split()[1]}") for name in engines},
        "microseconds_per_sample": profile(case, choices["fp32"], "fp32", max(4096, int(speeds[plain][0] * target))),
        "host_waits_inside_a_look": waits(case, engines[plain]),
    }


def waits(case: Case, sampling: Sampler) -> str:
    """Runs with torch's check for synchronisation around every batch; "none", or what waited."""
    if case.device.type != "cuda":
        return "not a GPU"
    vars(sampling)["_launch"] = partial(_watched, sampling._launch)
    try:
        ours(case, sampling)(4 * sampling.batch)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        del vars(sampling)["_launch"]
    return "none"


def _watched(launch: Callable[..., Any], *arguments: Any) -> Any:
    torch.cuda.set_sync_debug_mode("error")
    try:
        return launch(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def show(found: dict[str, Any]) -> None:
    """Prints the figures of one network."""
    print(f"\n{found['network']}: {found['choice']}")
    for name, speed in found["samples_per_second"].items():
        over = "".join(f"{found[key][name]:8.2f} x {text}" for key, text in OVER.items() if name in found[key])
        print(f"  {name:20} {speed:14,.0f} samples/s{over}")
    parts = ", ".join(f"{part} {value:.3f} us" for part, value in found["microseconds_per_sample"].items())
    print(f"  a sample (each part waited for): {parts}")
    print(f"  host waits inside a look: {found['host_waits_inside_a_look']}")


OVER = {"over_usual": "the usual way", "over_bare": "the bare network"}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["lenet", "resnet20", "resnet110"])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = pick_device()
    if not arguments.json:
        print(f"{device_name(device)}, torch {torch.__version__}")
        if device.type != "cuda":
            print("there is no GPU: these figures are of the CPU")
    found = []
    for name in arguments.networks:
        case = build_case(name, device)
        found.append(compare(case, target=arguments.seconds, rounds=arguments.rounds, compiled=arguments.compile))
        if not arguments.json:
            show(found[-1])
    if arguments.json:
        print(json.dumps({"device": device_name(device), "networks": found}, indent=2))


if __name__ == "__main__":
    main()
