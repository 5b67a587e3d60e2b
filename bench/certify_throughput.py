"""Samples per second of certification with fixed n: the usual way, our engine, and the bare network as the limit.

    python bench/certify_throughput.py                   # LeNet on MNIST's shape, ResNet-20 on CIFAR's; some minutes
    python bench/certify_throughput.py --networks lenet --seconds 1 --rounds 3

All ways are measured in turn, round after round, in one run (A B C A B C ...), so that whatever else the machine does meets all
of them; figures are medians over the rounds, ratios medians of each round's ratio. Weights are random: they do not matter for
the speed. The bare network classifies one batch of noise drawn beforehand, in the layout that our trial chose, and in whatever
batch size and number of parallel batches is fastest for it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
from reference import sample_counts, seconds, wait
from torch import Tensor, nn

from rscli.api import Architecture, Dataset, Noise, Question
from rscli.models.network import build_classifier
from rscli.registry import installed
from rscli.runtime.devices import device_name, memory_layout, pick_device, precision_scope
from rscli.sampling.autotune import BATCHES, Choice, Make, tune
from rscli.sampling.requests import CertifierRequest
from rscli.sampling.sampler import Sampler
from rscli.sampling.threads import parallel_batches, worker_threads

NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lenet": ({"name": "lenet"}, {"name": "mnist"}),
    "resnet20": ({"name": "cifar-resnet", "depth": 20}, {"name": "cifar10"}),
    "resnet110": ({"name": "cifar-resnet", "depth": 110}, {"name": "cifar10"}),
    "resnet50": ({"name": "timm", "model": "resnet50"}, {"name": "imagenet"}),
}
IMAGES = 4
"""Images that our engine certifies in one measurement."""


@dataclass
class Case:
    """A network with random weights, for images of its data set's shape."""

    name: str
    model: nn.Module
    shape: tuple[int, int, int]
    classes: int
    device: torch.device
    noise: Noise = field(default_factory=lambda: cast(Noise, installed().build("noises", {"name": "gaussian", "sigma": 0.5})))

    def network(self, channels_last: bool) -> nn.Module:
        """A copy of the network in a layout: every way has its own, so that none changes another's."""
        return deepcopy(self.model).to(memory_format=memory_layout(channels_last))

    def image(self, key: int = 0) -> Tensor:
        """Some image in [0, 1]."""
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(key))


def build_case(name: str, device: torch.device) -> Case:
    """The network `name` of `NETWORKS`."""
    architecture, data = NETWORKS[name]
    spec = cast(Dataset, installed().build("datasets", data)).spec(Path())
    torch.manual_seed(0)
    model = build_classifier(cast(Architecture, installed().build("architectures", architecture)), spec)
    return Case(name, model.eval().to(device), spec.shape, len(spec.class_names), device)


Way = Callable[[int], object]
"""Classifies so many noisy images."""


def usual(case: Case) -> Way:
    """The reference procedure, fp32."""
    image, model = case.image().to(case.device), case.network(channels_last=False)

    def run(samples: int) -> None:
        with precision_scope("fp32", case.device):
            sample_counts(model, image, samples, case.noise.sigma, case.classes)

    return run


def maker(case: Case, precision: str) -> Make:
    """What makes our engine, as `rscli certify` does."""

    def make(choice: Choice) -> Sampler:
        model: Any = case.network(choice.channels_last)
        if choice.compiled:
            model = torch.compile(model, mode="reduce-overhead" if case.device.type == "cuda" else "default", dynamic=False)
        return Sampler(
            model,
            case.noise,
            case.classes,
            seed=0,
            batch=choice.batch,
            device=case.device,
            precision=precision,
            channels_last=choice.channels_last,
            parallel=choice.parallel,
        )

    return make


def chosen(case: Case, precision: str) -> Choice:
    """What the trial of a long run chooses."""
    make = maker(case, precision)
    return tune(make, case.device, case.shape, batch=None, channels_last=None, parallel=parallel_batches(case.device))


def ours(case: Case, sampling: Sampler) -> Way:
    """CERTIFY through the whole engine: selection, batches filled across images, counts, certificates."""

    def run(samples: int) -> None:
        certifier = installed().build("certifiers", {"name": "cohen", "n": max(1, samples // IMAGES - 100), "n0": 100})
        requests = (
            CertifierRequest(cast(Any, certifier), Question(case.classes), key, lambda key=key: case.image(key))  # type: ignore[misc]
            for key in range(IMAGES)
        )
        for _ in sampling.run(requests):
            pass

    return run


def bare(case: Case, choice: Choice, precision: str) -> Way:
    """The network alone, again and again on one batch drawn beforehand: no way of certifying with it can be faster."""
    images = torch.randn(choice.batch, *case.shape, device=case.device)
    images = images.contiguous(memory_format=memory_layout(choice.channels_last))
    model: Any = case.network(choice.channels_last)
    if choice.compiled:
        model = torch.compile(model, mode="reduce-overhead" if case.device.type == "cuda" else "default", dynamic=False)

    def batches(count: int) -> None:
        with torch.inference_mode(), precision_scope(precision, case.device):
            for _ in range(count):
                model(images)

    def run(samples: int) -> None:
        each = math.ceil(samples / choice.batch / choice.parallel)
        with worker_threads(choice.parallel) as pool:
            if pool is None:
                batches(each)
            else:
                list(pool.map(batches, [each] * choice.parallel))

    return run


def fastest_bare(case: Case, choice: Choice, precision: str) -> Choice:
    """The batch size and number of parallel batches that are fastest for the network alone, in the layout of `choice`."""
    if choice.compiled:
        return choice
    most = parallel_batches(case.device)
    several = {1, max(1, most // 4), most}  # as our trial
    candidates = [replace(choice, batch=b, parallel=k) for b in BATCHES[case.device.type] for k in several]
    speeds = measure({str(c): bare(case, c, precision) for c in candidates}, target=0.4, rounds=3)
    return max(candidates, key=lambda c: median(speeds[str(c)]))


def measure(ways: dict[str, Way], *, target: float, rounds: int) -> dict[str, list[float]]:
    """Samples per second of each way in each round; a measurement takes about `target` seconds."""
    sizes = {}
    for name, way in ways.items():
        way(2048)  # warm
        sizes[name] = max(4096, int(8192 / seconds(lambda way=way: way(8192)) * target))  # type: ignore[misc]
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            speeds[name].append(sizes[name] / seconds(lambda way=way, name=name: way(sizes[name])))  # type: ignore[misc]
    return speeds


def ratio(speeds: dict[str, list[float]], above: str, below: str) -> float:
    """The median over the rounds of one way's speed over another's."""
    return median(a / b for a, b in zip(speeds[above], speeds[below], strict=True))


def profile(case: Case, choice: Choice, precision: str, samples: int) -> dict[str, float]:
    """Microseconds a sample in each part of the engine, on one processor of a CPU; on a GPU every part is waited for."""
    before = torch.get_num_threads()
    if case.device.type == "cpu":
        torch.set_num_threads(1)  # as on a worker thread
    try:
        return _profile(case, maker(case, precision)(replace(choice, parallel=1)), samples)
    finally:
        torch.set_num_threads(before)


def _profile(case: Case, sampling: Any, samples: int) -> dict[str, float]:
    spent = {"noise": 0.0, "assembling": 0.0, "forward": 0.0, "counting": 0.0}

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            wait()
            start = time.perf_counter()
            out = call(*arguments, **named)
            wait()
            spent[part] += time.perf_counter() - start
            return out

        return run

    way = ours(case, sampling)
    way(8 * sampling.batch)  # warm
    sampling._blocks.noise = SimpleNamespace(sample=timed("noise", case.noise.sample), apply=case.noise.apply)
    sampling.model, sampling._count = timed("forward", sampling.model), timed("counting", sampling._count)
    sampling._assemble = timed("assembling", sampling._assemble)
    sampling.samples = 0
    whole = seconds(lambda: way(samples))
    spent["assembling"] -= spent["noise"]
    spent["rest"] = whole - sum(spent.values())
    return {part: 1e6 * value / sampling.samples for part, value in spent.items()}


def compare(case: Case, *, target: float, rounds: int, compiled: bool) -> dict[str, Any]:
    """All figures of one network."""
    choices = {f"ours {precision}": chosen(case, precision) for precision in ("fp32", "bf16")}
    if compiled:
        choices |= {f"{name} compiled": replace(choice, compiled=True) for name, choice in choices.items()}
    precisions = {name: name.split()[1] for name in choices}
    limits = {name: fastest_bare(case, choice, precisions[name]) for name, choice in choices.items()}
    ways = {"usual fp32": usual(case)}
    ways |= {name: ours(case, maker(case, precisions[name])(choice)) for name, choice in choices.items()}
    bares = {name: name.replace("ours", "bare") for name in choices}
    ways |= {bares[name]: bare(case, limit, precisions[name]) for name, limit in limits.items()}
    speeds = measure(ways, target=target, rounds=rounds)
    pairs = [(name, "usual fp32") for name in choices] + list(bares.items())
    return {
        "network": case.name,
        "choice": {name: str(choice) for name, choice in choices.items()}
        | {bares[name]: str(limit) for name, limit in limits.items()},
        "samples_per_second": {name: median(values) for name, values in speeds.items()},
        "ratios": {f"{a} / {b}": ratio(speeds, a, b) for a, b in pairs},
        "microseconds_per_sample": {
            name: profile(case, choice, precisions[name], max(4096, int(speeds[name][0] * target)))
            for name, choice in choices.items()
        },
    }


def show(found: dict[str, Any]) -> None:
    """Prints the figures of one network."""
    print(f"\n{found['network']}")
    for name, speed in found["samples_per_second"].items():
        print(f"  {name:20} {speed:12,.0f} samples/s   {found['choice'].get(name, '')}")
    for name, value in found["ratios"].items():
        print(f"  {name:40} {value:6.2f}")
    for name, parts in found["microseconds_per_sample"].items():
        whole = sum(parts.values())
        shares = ", ".join(f"{part} {value:.2f} us ({value / whole:.1%})" for part, value in parts.items())
        print(f"  {name}, one processor: {shares}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["lenet", "resnet20"])
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    if not arguments.json:
        print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    found = []
    for name in arguments.networks:
        case = build_case(name, device)
        found.append(compare(case, target=arguments.seconds, rounds=arguments.rounds, compiled=arguments.compile))
        if not arguments.json:
            show(found[-1])
    if arguments.json:
        print(json.dumps({"device": device_name(device), "threads": torch.get_num_threads(), "networks": found}, indent=2))


if __name__ == "__main__":
    main()
