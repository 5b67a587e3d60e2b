"""What sampling costs: the trial that chooses batch and layout, the preview of a long run, memory, and waits for a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from rscli.api import Question
from rscli.cli.app import app
from rscli.errors import RscliError, Stopped
from rscli.models.modelfile import load_model
from rscli.registry import installed
from rscli.results.protocol import protocol_path
from rscli.runtime.progress import Silent
from rscli.runtime.seeds import block_generator
from rscli.runtime.signals import StopRequest
from rscli.sampling import autotune as tune
from rscli.sampling import options as sampling
from rscli.sampling.autotune import Choice
from rscli.sampling.blocks import BLOCK
from rscli.sampling.requests import CertifierRequest
from rscli.sampling.sampler import Sampler
from rscli.smoothing import certify as certifying
from rscli.smoothing.certify import CertifyOptions, SamplingOptions, certify
from rscli.smoothing.cost import at_most
from rscli.smoothing.task import CertificationTask
from rscli.smoothing.work_queue import Alone, Together
from runs import COLUMNS, Listening, rows

CPU = torch.device("cpu")
SHAPE = (2, 4, 4)


# --- the trial ---------------------------------------------------------------------------------------------------------------


class Priced(nn.Module):
    """A network whose forwards take known times, on a clock of its own; larger batches than `most` do not fit."""

    def __init__(self, price, most: int = 10**9) -> None:
        super().__init__()
        self.price, self.most, self.now, self.tried = price, most, 0.0, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("pretended")
        layout = images.is_contiguous(memory_format=torch.channels_last)
        self.tried.append((len(images), layout))
        self.now += self.price(len(images), layout)
        return torch.zeros(len(images), 3)

    def sampler(self, choice: Choice) -> Sampler:
        gaussian = installed().build("noises", {"name": "gaussian", "sigma": 0.5})
        return Sampler(
            self,
            gaussian,
            3,
            seed=0,
            batch=choice.batch,
            device=CPU,
            channels_last=choice.channels_last,
            parallel=choice.parallel,
        )

    def tuned(self, monkeypatch, *, batch=None, channels_last=None, parallel=1) -> Choice:
        monkeypatch.setattr(tune, "time", SimpleNamespace(perf_counter=lambda: self.now))
        return tune.tune(self.sampler, CPU, SHAPE, batch=batch, channels_last=channels_last, parallel=parallel)


def a_batch_costs(fixed: float, channels_last: float, contiguous: float):
    """Seconds a forward: so much for any, and so much a sample."""
    return lambda batch, layout: fixed + batch * (channels_last if layout else contiguous)


PRICES = {
    "channels-last-and-large": (a_batch_costs(0.01, 1e-5, 2e-5), 10**9, Choice(512, True, speed=512 / (0.01 + 512e-5))),
    "contiguous-and-large": (a_batch_costs(0.01, 2e-5, 1e-5), 10**9, Choice(512, False, speed=512 / (0.01 + 512e-5))),
    "small": (lambda batch, layout: 1e-6 * batch**2 * (1 if layout else 2), 10**9, Choice(8, True, speed=1e6 / 8)),
    "larger-do-not-fit": (a_batch_costs(0.01, 1e-5, 2e-5), 300, Choice(256, True, speed=256 / (0.01 + 256e-5))),
    "only-the-smallest-fits": (a_batch_costs(0.01, 1e-5, 2e-5), 64, Choice(64, True, speed=64 / (0.01 + 64e-5))),
    "slow": (lambda batch, layout: 0.02 * batch * (1 if layout else 2) + 0.001, 10**9, Choice(32, True, speed=32 / 0.641)),
    "very-slow": (a_batch_costs(0.0, 2.0, 4.0), 10**9, Choice(8, True, speed=0.5)),
}


@pytest.mark.parametrize(("price", "most", "wanted"), PRICES.values(), ids=PRICES)
def test_the_fastest_that_fits_is_chosen(price, most, wanted, monkeypatch):
    chosen = Priced(price, most).tuned(monkeypatch)
    assert (chosen.batch, chosen.channels_last, chosen.parallel) == (wanted.batch, wanted.channels_last, 1)
    assert chosen.speed == pytest.approx(wanted.speed)


def test_those_near_the_fastest_are_measured_again(monkeypatch):
    """Batch 256 seems the fastest once, and is not; those much slower are not asked again."""
    speeds = {64: [100.0, 100.0, 100.0], 128: [110.0, 112.0, 108.0], 256: [115.0, 104.0, 105.0], 512: [90.0]}
    asked = []

    def speed_of(make, choice: Choice, shape, stop) -> float:
        asked.append(choice.batch)
        return 1000 * speeds.get(choice.batch, [1.0]).pop(0)

    monkeypatch.setattr(tune, "speed_of", speed_of)
    chosen = tune.tune(lambda choice: None, CPU, SHAPE, batch=None, channels_last=True, parallel=1)
    assert chosen == Choice(128, True, speed=110_000)
    assert asked == [8, 64, 128, 256, 512, 128, 256, 128, 256]


def test_nothing_that_fits_is_no_measurement(monkeypatch):
    assert Priced(lambda batch, layout: 1.0, most=1).tuned(monkeypatch).speed is None


@pytest.mark.parametrize(
    ("seconds", "tried"),
    [(1e-5, {8, 64, 128, 256, 512}), (0.012, {8, 16, 32, 64}), (3.0, {8})],
    ids=["fast", "slow", "very slow"],
)
def test_a_network_is_not_tried_at_sizes_that_take_more_than_a_second(seconds, tried, monkeypatch):
    network = Priced(a_batch_costs(0.0, seconds, 2 * seconds))
    network.tuned(monkeypatch)
    assert {batch for batch, _ in network.tried} == tried
    if seconds > 1:
        assert len(network.tried) <= 2 * 4, "one batch to warm up, one that counts, and those under way"


def test_a_trial_can_be_stopped(monkeypatch):
    network = Priced(a_batch_costs(0.1, 1e-5, 2e-5))
    chosen = tune.tune(
        network.sampler, CPU, SHAPE, batch=None, channels_last=None, parallel=1, stop=lambda: len(network.tried) >= 3
    )
    assert len(network.tried) == 3
    assert chosen.speed is None


@pytest.mark.parametrize(
    ("kept", "tried"),
    [
        ({"batch": 100}, {(100, True), (100, False)}),
        ({"channels_last": False}, {(size, False) for size in (8, 16, 32, 64)}),
        ({"batch": 7, "channels_last": True}, {(7, True)}),
    ],
    ids=["batch", "layout", "both"],
)
def test_what_is_given_is_kept(kept, tried, monkeypatch):
    network = Priced(a_batch_costs(0.1, 1e-5, 2e-5))  # a probe of 8 says 80 a second
    network.tuned(monkeypatch, **kept)
    assert set(network.tried) == tried


@pytest.mark.parametrize(("threads", "tried"), [(1, [1]), (3, [3, 1]), (4, [4, 1]), (16, [16, 1, 4])])
@pytest.mark.parametrize("best", [0, -1])
def test_one_at_a_time_or_as_many_as_there_are_threads_or_some(threads, tried, best, monkeypatch):
    """How fast each is, is pretended: real threads share the clock."""
    asked = []

    def speed_of(make, choice, shape, stop):
        asked.append(choice)
        return 2000.0 if choice.parallel == tried[best] else 1000.0

    monkeypatch.setattr(tune, "speed_of", speed_of)
    chosen = tune.tune(lambda choice: None, CPU, SHAPE, batch=64, channels_last=True, parallel=threads)
    assert (chosen.parallel, chosen.speed) == (tried[best], 2000.0)
    assert [choice.parallel for choice in asked] == tried


@pytest.mark.parametrize(("gain", "kept"), [(1.04, False), (1.06, True), (None, False)], ids=["barely", "clearly", "no-memory"])
def test_compiling_must_pay(gain, kept, monkeypatch):
    plain = Choice(64, True, parallel=2, speed=1000.0)
    monkeypatch.setattr(tune, "speed_of", lambda make, choice, shape, stop: gain and gain * 1000.0)
    chosen = tune.try_compiled(lambda choice: None, plain, SHAPE)
    assert chosen == (Choice(64, True, parallel=2, compiled=True, speed=1060.0) if kept else plain)


def test_the_trial_of_several_workers_measures_them_together():
    assert tune.speed_of(Priced(lambda batch, layout: 0.0).sampler, Choice(64, True, parallel=2), SHAPE) > 0


# --- in a run ----------------------------------------------------------------------------------------------------------------


def options(model: Path, out: Path, **changes) -> CertifyOptions:
    certifier = {"name": "cohen", "n": 200, "n0": 20, "alpha": 0.01}
    made = CertifyOptions(model, out, out.parent, certifier, skip=30, max=6, sampling=SamplingOptions(device="cpu"))
    return replace(made, **changes)


def sampled_with(out: Path) -> tuple[int, bool]:
    info = json.loads(protocol_path(out).read_text())["info"]
    return info["batch"], info["channels_last"]


@pytest.fixture
def trials(monkeypatch) -> list[Choice]:
    """Every run is long; a trial always finds batch 96, contiguous. The choices that were made."""
    made: list[Choice] = []

    def found(*arguments, **named) -> Choice:
        made.append(Choice(96, False, speed=1e6))
        return made[-1]

    monkeypatch.setattr(sampling, "tune", found)
    monkeypatch.setattr(certifying, "LONG_RUN", 1)
    return made


def test_a_long_run_begins_with_a_trial_and_a_short_one_does_not(model, tmp_path, trials, monkeypatch):
    certify(options(model, tmp_path / "long.tsv"), Silent())
    assert sampled_with(tmp_path / "long.tsv") == (96, False)
    monkeypatch.setattr(certifying, "LONG_RUN", 10**9)
    certify(options(model, tmp_path / "short.tsv"), Silent())
    assert sampled_with(tmp_path / "short.tsv") == (sampling.BATCH, True)
    assert len(trials) == 1


def test_a_resumed_run_goes_on_with_the_batch_and_layout_of_its_beginning(model, tmp_path, trials):
    out, heard = tmp_path / "r.tsv", Listening()
    certify(options(model, out, max=3), Silent())
    certify(options(model, out, resume=True), heard)
    assert len(trials) == 1
    assert sampled_with(out) == (96, False)
    assert not [text for text in heard.notes if "batch was" in text]


def test_flags_decide_without_a_trial(model, tmp_path, trials):
    out, chosen = tmp_path / "r.tsv", SamplingOptions(device="cpu", batch=32, channels_last=True)
    certify(options(model, out, sampling=chosen), Silent())
    certify(options(model, tmp_path / "s.tsv", sampling=SamplingOptions(device="cpu", autotune=False)), Silent())
    assert trials == []
    assert sampled_with(out) == (32, True)


@pytest.mark.parametrize("flags", [{"batch": 32}, {"autotune": False}], ids=["batch", "no trial"])
def test_a_long_run_without_a_trial_says_what_it_will_cost_too(model, tmp_path, trials, monkeypatch, flags):
    monkeypatch.setattr(sampling, "speed_of", lambda *arguments: 11.0)
    heard = Listening()
    certify(options(model, tmp_path / "r.tsv", sampling=SamplingOptions(device="cpu", **flags)), heard)
    assert trials == []
    assert heard.notes[0].endswith("11 samples/s")
    assert heard.notes[1] == "6 images, at most 1,320 samples: about 0:02:00 at this speed"


@pytest.mark.parametrize(
    ("before", "parallel"),
    [
        ({}, 4),
        ({"lanes": 1, "threads": 4, "trial": True}, 1),
        ({"lanes": 1, "threads": 4}, 1),
        ({"lanes": 1, "threads": 4, "trial": False}, 4),
        ({"lanes": None, "threads": None}, 4),
    ],
)
def test_a_run_that_goes_on_has_few_parallel_batches_only_if_a_trial_found_so(model, monkeypatch, before, parallel):
    monkeypatch.setattr(sampling, "parallel_batches", lambda device: 4)
    work = sampling.Work(10**6)
    _, choice = SamplingOptions("cpu", batch=8).sampler(load_model(model), work, before, Silent(), lambda: False)
    assert choice.parallel == parallel


def test_the_cost_of_a_long_run_is_said_before_it_begins(model, tmp_path, trials):
    heard = Listening()
    tally = certify(options(model, tmp_path / "r.tsv"), heard)
    trial, price = heard.notes
    assert trial == "trial: batch size 96, contiguous: 1,000,000 samples/s"
    assert price == "6 images, at most 1,320 samples: about 0:00:00 at this speed"
    assert tally.samples == 1320


def test_with_labels_there_are_no_selection_samples_in_the_cost(model, tmp_path, trials):
    heard, wanted = Listening(), {"certifier": {"name": "sequential", "n": 5_000}, "radii": (0.0, 0.25)}
    for labels, most in ((False, 5_100), (True, 5_000)):
        certify(options(model, tmp_path / f"{labels}.tsv", **wanted, labels=labels), heard)
        assert heard.notes[-1].startswith(f"6 images, at most {6 * most:,} samples: about 0:00:00 at this speed")


def test_hours_are_shown_as_hours_and_divided_among_processes(model):
    images = CertificationTask(load_model(model), installed().build("certifiers", {"name": "cohen"}), lambda index: None)
    said = at_most(images, 0, 500, 1_000.0, 2)
    assert said == "500 images, at most 50,050,000 samples: about 6:57:05 at this speed"


def test_a_trial_changes_no_row(model, tmp_path, trials, monkeypatch):
    certify(options(model, tmp_path / "a.tsv"), Silent())
    certify(options(model, tmp_path / "b.tsv", sampling=SamplingOptions("cpu", 96, channels_last=False)), Silent())
    assert len(trials) == 1
    assert rows(tmp_path / "a.tsv") == rows(tmp_path / "b.tsv")


def test_a_certifier_has_its_own_number_of_selection_samples(model, tmp_path):
    for certifier, wanted in (("two-stage", 1000), ("cohen", 100)):
        out = tmp_path / f"{certifier}.tsv"
        command = ["certify", str(model), "--out", str(out), "--data-dir", str(tmp_path), "--max", "1", "--n", "200", "-q"]
        found = CliRunner().invoke(app, [*command, "--device", "cpu", "--certifier", certifier])
        assert found.exit_code == 0, found.output
        assert json.loads(protocol_path(out).read_text())["n0"] == wanted


@pytest.fixture
def hours(trials, monkeypatch) -> None:
    """Every long run takes hours, too."""
    monkeypatch.setattr(sampling, "COMPILE_SECONDS", 0.0)


def pretend_to_compile(monkeypatch, speed_of) -> list[dict]:
    """torch.compile changes nothing but is counted; a trial of it finds the speed of `speed_of`."""
    calls: list[dict] = []

    def compile(network, **how):
        calls.append(how)
        return network

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(tune, "speed_of", speed_of)
    monkeypatch.setattr(sampling, "speed_of", speed_of)
    return calls


def compiled(out: Path) -> bool:
    return json.loads(protocol_path(out).read_text())["info"]["compile"]


def faster(make, choice, shape, stop) -> float:
    make(choice)
    return 2e6 if choice.compiled else 1e6


def test_a_run_of_hours_tries_torch_compile_and_its_continuation_keeps_it(model, tmp_path, hours, monkeypatch):
    calls, heard, out = pretend_to_compile(monkeypatch, faster), Listening(), tmp_path / "r.tsv"
    certify(options(model, out, max=3), heard)
    assert heard.notes[0] == "trial: batch size 96, contiguous, compiled: 2,000,000 samples/s"
    assert compiled(out)
    assert calls == [{"mode": "default", "dynamic": False}]
    certify(options(model, out, resume=True), Silent())
    assert len(calls) == 2
    assert compiled(out)


def test_the_preview_is_for_the_beginning_of_a_run(model, tmp_path, hours, monkeypatch):
    """A run that goes on measures torch.compile again, but most of its images may be done."""
    pretend_to_compile(monkeypatch, faster)
    first, again, out = Listening(), Listening(), tmp_path / "r.tsv"
    certify(options(model, out), first)
    certify(options(model, out, resume=True), again)
    assert len(first.notes) == 2
    assert again.notes == first.notes[:1]


@pytest.mark.parametrize(("world", "tried"), [(1, True), (8, False)])
def test_whether_a_run_takes_hours_is_asked_of_each_process(world, tried, model, tmp_path, trials, monkeypatch):
    class Several(Alone):
        """One process that believes in others."""

    monkeypatch.setattr(Several, "world", world)
    monkeypatch.setattr(certifying, "join", lambda *_: Several())
    monkeypatch.setattr(sampling, "COMPILE_SECONDS", 1000 / 1e6)  # 1,200 samples in all, at 1e6 a second
    pretend_to_compile(monkeypatch, faster)
    certify(options(model, tmp_path / "r.tsv"), Silent())
    assert compiled(tmp_path / "r.tsv") == tried


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_for_the_trial_or_the_start_of_another_can_be_stopped(rank, model, tmp_path):
    stop = StopRequest()
    stop.requested = True
    with pytest.raises(Stopped, match="waiting for the other"):
        certifying._certify(
            options(model, tmp_path / "r.tsv"), Silent(), stop, Together(torch.distributed.HashStore(), rank, 2)
        )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sampling": SamplingOptions(device="cpu", compile=False)}, "asked not to"),
        ({"sampling": SamplingOptions(device="cpu", precision="bf16")}, "it would round elsewhere: more than ties"),
        ({"certifier": {"name": "sequential", "n": 200, "n0": 20, "alpha": 0.01}, "radii": (0.0,)}, "it may soon be over"),
    ],
    ids=["no-compile", "bf16", "sequential"],
)
def test_runs_that_do_not_try_torch_compile(changes, why, model, tmp_path, hours, monkeypatch):
    assert pretend_to_compile(monkeypatch, faster) == []
    certify(options(model, tmp_path / "r.tsv", **changes), Silent())
    assert not compiled(tmp_path / "r.tsv"), why


def no_compiler(make, choice, shape, stop) -> float:
    if choice.compiled:
        raise OSError("no C++ compiler\nand much more")
    return 1e6


def test_where_torch_compile_does_not_work_a_long_run_does_without(model, tmp_path, hours, monkeypatch):
    pretend_to_compile(monkeypatch, no_compiler)
    heard = Listening()
    certify(options(model, tmp_path / "r.tsv"), heard)
    assert heard.notes[0] == "trial: torch.compile does not work here and is left out (no C++ compiler)"
    assert not compiled(tmp_path / "r.tsv")


def test_where_torch_compile_does_not_work_and_was_asked_for_nothing_is_written(model, tmp_path, monkeypatch):
    pretend_to_compile(monkeypatch, no_compiler)
    chosen = options(model, tmp_path / "r.tsv", sampling=SamplingOptions(device="cpu", compile=True))
    with pytest.raises(RscliError, match="cannot compile this model here: no C") as caught:
        certify(chosen, Silent())
    assert "--no-compile" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


class Compiling:
    """As torch.compile does, compiles whatever is not compiled when it is called, be it that another thread just does so."""

    def __init__(self) -> None:
        self.known, self.compiled = set(), []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape not in self.known:
            time.sleep(0.02)  # the other threads arrive meanwhile
            self.compiled.append(len(images))
            self.known.add(images.shape)
        return images.flatten(1)[:, :3]


def test_workers_compile_a_kind_of_batch_once():
    gaussian, compiling = installed().build("noises", {"name": "gaussian", "sigma": 0.5}), Compiling()
    network = sampling.OnceCompiled(compiling)
    for batch in (32, 16, 32):
        assert len(counts_of(Sampler(network, gaussian, 3, seed=0, batch=batch, device=CPU, parallel=4))) == 5
    assert compiling.compiled == [32, 16]


@pytest.mark.slow
def test_compiled_rows_are_those_of_the_network_but_for_ties(model, tmp_path):
    """torch.compile itself, on two threads; needs a C++ compiler."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        certify(options(model, tmp_path / "plain.tsv"), Silent())
        try:
            certify(options(model, tmp_path / "c.tsv", sampling=SamplingOptions(device="cpu", compile=True)), Silent())
        except RscliError as error:
            pytest.skip(error.message)
    finally:
        torch.set_num_threads(before)
    assert compiled(tmp_path / "c.tsv")
    plain, other = rows(tmp_path / "plain.tsv"), rows(tmp_path / "c.tsv")
    count = COLUMNS.index("count")
    assert sum(abs(int(a[count]) - int(b[count])) for a, b in zip(plain, other, strict=True)) <= 2


# --- memory ------------------------------------------------------------------------------------------------------------------

PEAKS = """
import resource, sys
import torch
from rscli.api import Question
from rscli.sampling.requests import CertifierRequest
from rscli.sampling.sampler import Sampler
from rscli.registry import installed

torch.set_num_threads(1)
noise = installed().build("noises", {"name": "gaussian", "sigma": 0.5})
sampler = Sampler(lambda x: x[:, 0, 0, :3], noise, 3, seed=0, batch=256, device=torch.device("cpu"))
for n in (10_000, 1_000_000):
    certifier = installed().build("certifiers", {"name": sys.argv[1], "n": n})
    question = Question(3, (0.5, 0.9) if certifier.grid else ())
    wanted = (CertifierRequest(certifier, question, key, lambda: torch.full((1, 4, 4), 0.5)) for key in range(2))
    assert len(list(sampler.run(wanted))) == 2
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource usage as POSIX has it")
@pytest.mark.parametrize("certifier", ["cohen", "sequential"])
def test_peak_memory_does_not_grow_with_n(certifier, tmp_path):
    """In one process, the peak after n = 10^4, and after n = 10^6 as well; most of either is torch itself."""
    command = [sys.executable, "-c", PEAKS, certifier]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=tmp_path)
    small, large = map(int, done.stdout.split())
    assert large <= 1.1 * small
    megabyte = 1024 if sys.platform == "linux" else 1024**2
    assert large - small < 4 * megabyte, "the predictions of a million samples would be larger"


# --- a GPU -------------------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()


def image(key: int) -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(key))


def on_gpu(classifier, batch: int = 512) -> Sampler:
    gaussian = installed().build("noises", {"name": "gaussian", "sigma": 0.5})
    return Sampler(classifier, gaussian, 3, seed=0, batch=batch, device=torch.device("cuda"))


def counts_of(sampler: Sampler) -> dict[int, list[int]]:
    certifier = installed().build("certifiers", {"name": "cohen", "n": 2000, "n0": 100})
    wanted = [CertifierRequest(certifier, Question(3), key, lambda key=key: image(key)) for key in range(5)]
    return {request.key: request.counts.tolist() for request in sampler.run(wanted)}


@pytest.mark.gpu
def test_counts_on_a_gpu_are_those_of_plain_counting():
    device = torch.device("cuda")
    model = network().to(device, memory_format=torch.channels_last)
    for key, counts in counts_of(on_gpu(model)).items():
        blocks = [torch.randn((BLOCK, *SHAPE), generator=block_generator(device, 0, key, b), device=device) for b in range(33)]
        with torch.inference_mode():
            votes = model(torch.cat(blocks) * 0.5 + image(key).to(device)).argmax(-1).cpu().numpy()
        plain = np.bincount(votes[100:2100], minlength=3)
        assert np.abs(plain - counts).sum() <= 4  # last bits of other batches


@pytest.mark.gpu
def test_the_host_never_waits_for_a_gpu_inside_a_look(monkeypatch):
    launch = Sampler._launch

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    sampler = on_gpu(network().to("cuda", memory_format=torch.channels_last))
    plain = counts_of(sampler)
    monkeypatch.setattr(Sampler, "_launch", watched)
    assert counts_of(sampler) == plain


@pytest.mark.gpu
@pytest.mark.slow
def test_compiled_counts_on_a_gpu_differ_by_ties_at_most():
    model = network().to("cuda", memory_format=torch.channels_last)
    plain = counts_of(on_gpu(model))
    compiled = counts_of(on_gpu(torch.compile(model, mode="reduce-overhead", dynamic=False)))
    assert all(np.abs(np.subtract(plain[key], compiled[key])).sum() <= 4 for key in plain)
