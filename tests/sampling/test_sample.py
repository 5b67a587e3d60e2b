"""The sampler: whose noise is whose, what is counted, and how little the host waits."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from rscli.api import ABSTAIN, Certifier, Decision, Plan, Question
from rscli.errors import PluginError, RscliError
from rscli.registry import installed
from rscli.runtime.seeds import block_generator, derive
from rscli.sampling.blocks import BLOCK
from rscli.sampling.requests import CertifierRequest
from rscli.sampling.sampler import SPARE, Sampler

SHAPE = (1, 4, 4)
CLASSES = 3
CPU = torch.device("cpu")


def gaussian(sigma: float = 0.5):
    return installed().build("noises", {"name": "gaussian", "sigma": sigma})


def model(images: torch.Tensor) -> torch.Tensor:
    """Three classes by the mean pixel: elementwise arithmetic in a fixed order, so no batch can change its bits."""
    flat = images.reshape(len(images), -1)
    total = flat[:, 0]
    for column in range(1, flat.shape[1]):
        total = total + flat[:, column]
    mean = total / flat.shape[1]
    return torch.stack([-(mean - centre).abs() for centre in (0.2, 0.5, 0.8)], -1)


def sampler(batch: int, seed: int = 0, classifier=model, parallel: int = 1) -> Sampler:
    return Sampler(classifier, gaussian(), CLASSES, seed=seed, batch=batch, device=CPU, parallel=parallel)


def image(key: int) -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1000 + key))


class Looker(Certifier):
    """Looks at fixed counts, stops at the first with enough votes, and remembers nothing."""

    looks: tuple[int, ...] = (10, 70, 200)
    enough: int = 60

    def plan(self, counts, question: Question) -> Plan:
        return Plan(int(counts.argmax()), self.looks)

    def decide(self, counts, n: int, plan: Plan) -> Decision | None:
        assert counts.sum() == n
        if counts[plan.candidate] >= self.enough or n == self.looks[-1]:
            return Decision(plan.candidate, 0.6, 0.4, f"at-{n}")
        return None


def run(batch: int, keys, certifier=None, seed: int = 0, parallel: int = 1):
    certifier = certifier or Looker(n0=7)
    wanted = [CertifierRequest(certifier, Question(CLASSES), key, lambda key=key: image(key)) for key in keys]
    done = list(sampler(batch, seed, parallel=parallel).run(wanted))
    return {request.key: (request.n, request.counts.tolist(), request.plan.candidate) for request in done}


def brute_force(key: int, certifier: Looker, seed: int = 0):
    """All samples of one image, drawn block by block in the plainest way, counted by numpy."""
    total = certifier.n0 + certifier.looks[-1]
    blocks = [
        torch.randn((BLOCK, *SHAPE), generator=block_generator(CPU, seed, key, b)) * 0.5 for b in range(total // BLOCK + 1)
    ]
    votes = model(torch.cat(blocks)[:total] + image(key)).argmax(-1).numpy()
    candidate = int(np.bincount(votes[: certifier.n0], minlength=CLASSES).argmax())
    for n in certifier.looks:
        counts = np.bincount(votes[certifier.n0 : certifier.n0 + n], minlength=CLASSES)
        if counts[candidate] >= certifier.enough or n == certifier.looks[-1]:
            return n, counts.tolist(), candidate
    raise AssertionError


@pytest.mark.parametrize("parallel", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 13, 64, 256, 1000])
def test_counts_are_those_of_plain_counting_for_every_batch_size_and_number_of_parallel_batches(batch, parallel):
    assert run(batch, range(9), parallel=parallel) == {key: brute_force(key, Looker(n0=7)) for key in range(9)}


def test_a_worker_that_is_slow_changes_nothing():
    """Batches end in another order than they began; they are counted in the order in which they were filled."""
    source, lock = random.Random(0), threading.Lock()

    def slow(images: torch.Tensor) -> torch.Tensor:
        with lock:
            pause = source.random() * 0.01
        time.sleep(pause)
        return model(images)

    wanted = [CertifierRequest(Looker(n0=7), Question(CLASSES), key, lambda key=key: image(key)) for key in range(9)]
    done = [(request.key, request.counts.tolist()) for request in sampler(32, classifier=slow, parallel=3).run(wanted)]
    assert dict(done) == {key: brute_force(key, Looker(n0=7))[1] for key in range(9)}
    wanted = [CertifierRequest(Looker(n0=7), Question(CLASSES), key, lambda key=key: image(key)) for key in range(9)]
    assert done == [(i.key, i.counts.tolist()) for i in sampler(32, parallel=3).run(wanted)], "the order depends on the pauses"


def test_workers_share_the_threads_and_give_them_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    seen: set[tuple[str, int]] = set()

    def watching(images: torch.Tensor) -> torch.Tensor:
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        time.sleep(0.001)  # so that every worker gets a batch
        return model(images)

    try:
        wanted = [CertifierRequest(Looker(n0=7), Question(CLASSES), key, lambda key=key: image(key)) for key in range(9)]
        assert len(list(sampler(16, classifier=watching, parallel=2).run(wanted))) == 9
        assert seen == {("sampler_0", 2), ("sampler_1", 2)}
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sampler")]


def test_a_worker_that_fails_ends_the_run_and_no_thread_is_left():
    def failing(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(
            sampler(16, classifier=failing, parallel=3).run(
                [CertifierRequest(Looker(), Question(CLASSES), 0, lambda: image(0))]
            )
        )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sampler")]


def test_order_and_company_of_an_image_change_nothing():
    alone = {**run(64, [3]), **run(64, [5])}
    together = run(64, [8, 5, 1, 3, 0])
    assert {key: together[key] for key in (3, 5)} == alone


def test_another_seed_draws_other_noise():
    assert run(64, range(5), seed=0) != run(64, range(5), seed=1)


def test_selection_samples_are_never_counted_again():
    certifier = Looker(n0=50, looks=(50,), enough=1)
    (n, counts, _) = run(32, [0], certifier)[0]
    assert n == 50
    assert sum(counts) == 50
    assert counts == brute_force(0, certifier)[1]


@dataclass
class Counting:
    """Counts forwards and the shapes they got."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(images.shape))
        return model(images)


def test_batches_have_one_static_shape_and_are_filled_across_images():
    counting = Counting()
    sampling = sampler(128, classifier=counting)
    wanted = [CertifierRequest(Looker(n0=7, looks=(21,)), Question(CLASSES), k, lambda k=k: image(k)) for k in range(64)]
    assert len(list(sampling.run(wanted))) == 64
    assert set(counting.shapes) == {(128, *SHAPE)}
    assert sampling.samples == 64 * 28
    assert len(counting.shapes) <= 64 * 28 // 128 + 3  # the end cannot be full: a look waits for what it asked for


class Drawing:
    """A noise that counts the blocks that are drawn."""

    def __init__(self) -> None:
        self.gaussian, self.blocks = gaussian(), 0

    def sample(self, shape, **where) -> torch.Tensor:
        self.blocks += 1
        return self.gaussian.sample(shape, **where)

    def apply(self, images, noise, **where) -> torch.Tensor:
        return self.gaussian.apply(images, noise, **where)


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_block_whose_samples_are_wanted_bit_by_bit_is_drawn_once(parallel):
    certifier = Looker(n0=7, looks=tuple(range(10, 200, 10)), enough=1000)
    for images, batch in ((1, 64), (4, 48)):
        noise = Drawing()
        sampling = Sampler(model, noise, CLASSES, seed=0, batch=batch, device=CPU, parallel=parallel)
        wanted = [CertifierRequest(certifier, Question(CLASSES), key, lambda key=key: image(key)) for key in range(images)]
        assert len(list(sampling.run(wanted))) == images
        assert noise.blocks == images * -(-197 // BLOCK)


def test_kept_noise_is_bounded_and_gone_in_the_end():
    certifier = Looker(n0=7, looks=(9, 12, 70), enough=1000)
    wanted = [CertifierRequest(certifier, Question(CLASSES), key, lambda key=key: image(key)) for key in range(200)]
    sampling = sampler(256)
    kept = [len(sampling._blocks) for _ in sampling.run(wanted)]
    assert 0 < max(kept) <= 2 * SPARE * 256 // BLOCK
    assert not sampling._blocks


def test_many_workers_draw_no_block_twice():
    """Each has images open whose looks are small: more in parallel keep more of the noise that is left over."""
    certifier = Looker(n0=30, looks=tuple(range(30, 160, 30)), enough=1000)
    noise = Drawing()
    sampling = Sampler(model, noise, CLASSES, seed=0, batch=64, device=CPU, parallel=8)
    wanted = [CertifierRequest(certifier, Question(CLASSES), key, lambda key=key: image(key)) for key in range(40)]
    assert len(list(sampling.run(wanted))) == 40
    assert noise.blocks == 40 * 3


class Small:
    """A device that runs out of memory above so many samples."""

    def __init__(self, most: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        self.most, self.error, self.shapes = most, error, []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise self.error("DefaultCPUAllocator: can't allocate memory")
        self.shapes.append(len(images))
        return model(images)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("parallel", [1, 3])
def test_out_of_memory_halves_the_batch_and_loses_nothing(parallel, error):
    small = Small(20, error)
    sampling = sampler(100, classifier=small, parallel=parallel)
    wanted = [CertifierRequest(Looker(n0=7), Question(CLASSES), key, lambda key=key: image(key)) for key in range(9)]
    done = {request.key: (request.n, request.counts.tolist(), request.plan.candidate) for request in sampling.run(wanted)}
    assert done == {key: brute_force(key, Looker(n0=7)) for key in range(9)}
    assert sampling.batch == 13
    assert set(small.shapes) == {13}


@pytest.mark.parametrize("parallel", [1, 3])
def test_batches_handed_out_before_another_worker_ran_out_of_memory_are_cut_too(parallel):
    certifier = Looker(n0=700, looks=(900,), enough=1)  # every worker has a full batch, and one more waits
    sampling = sampler(100, classifier=Small(20), parallel=parallel)
    wanted = [CertifierRequest(certifier, Question(CLASSES), key, lambda key=key: image(key)) for key in range(3)]
    done = {request.key: request.counts.tolist() for request in sampling.run(wanted)}
    assert done == {key: brute_force(key, certifier)[1] for key in range(3)}
    assert sampling.samples == 3 * 1600


def test_out_of_memory_with_a_single_sample_is_an_error():
    with pytest.raises(RscliError, match="the device cpu does not have enough memory for a single image"):
        list(sampler(4, classifier=Small(0)).run([CertifierRequest(Looker(n0=7), Question(CLASSES), 0, lambda: image(0))]))


@pytest.mark.parametrize("parallel", [1, 3])
def test_open_images_do_not_grow_with_the_number_of_images(parallel):
    opened, most = [0], [0]

    def requests():
        for key in range(500):
            opened[0] += 1
            most[0] = max(most[0], opened[0] - finished[0])
            yield CertifierRequest(Looker(n0=7), Question(CLASSES), key, lambda key=key: image(key))

    finished = [0]
    for _ in sampler(32, parallel=parallel).run(requests()):
        finished[0] += 1
    assert finished[0] == 500
    assert most[0] <= (parallel + 1) * (32 if parallel == 1 else 4 * 32) + 2  # a worker gets four small batches at a time


def test_stop_draws_nothing_more():
    sampling = sampler(16)
    calls = iter([False, False, True])
    wanted = [CertifierRequest(Looker(n0=7), Question(CLASSES), 0, lambda: image(0))]
    assert list(sampling.run(wanted, lambda: next(calls))) == []
    assert sampling.samples <= 32


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_run_knows_nothing_of_one_that_was_stopped_or_failed(parallel):
    sampling = sampler(32, parallel=parallel)
    certifier = Looker(n0=7)

    def wanted(keys):
        return [CertifierRequest(certifier, Question(CLASSES), key, lambda key=key: image(key)) for key in keys]

    calls = iter([False] * 4 + [True])
    list(sampling.run(wanted(range(5)), lambda: next(calls)))
    sampling.model = lambda images: model(images) * float("nan")
    with pytest.raises(RscliError, match="not finite"):
        list(sampling.run(wanted(range(5))))
    sampling.model = model
    next(closed := sampling.run(wanted(range(5))))
    closed.close()
    done = {request.key: request.counts.tolist() for request in sampling.run(wanted(range(3, 9)))}
    assert done == {key: brute_force(key, certifier)[1] for key in range(3, 9)}


def test_logits_of_half_precision_may_have_a_large_sum():
    large = sampler(16, classifier=lambda images: (model(images) - 5000).half())
    wanted = [CertifierRequest(Looker(n0=7), Question(CLASSES), 0, lambda: image(0))]
    assert len(list(large.run(wanted))) == 1


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_one_logit_that_is_not_finite_is_refused(bad):
    def spoilt(images):
        logits = model(images)
        logits[3, 1] = float(bad)
        return logits

    broken = sampler(16, classifier=spoilt)
    with pytest.raises(RscliError, match="not finite"):
        list(broken.run([CertifierRequest(Looker(n0=7), Question(CLASSES), 0, lambda: image(0))]))


def test_logits_of_another_shape_are_the_plugins_fault():
    broken = sampler(16, classifier=lambda images: model(images)[:, :2])
    with pytest.raises(PluginError, match=r"\(16, 2\).*\(16, 3\)"):
        list(broken.run([CertifierRequest(Looker(n0=7), Question(CLASSES), 0, lambda: image(0))]))


class Undecided(Looker):
    """Never decides."""

    def decide(self, counts, n, plan):
        return None


class Backwards(Looker):
    """Wants to look earlier and earlier."""

    def plan(self, counts, question):
        return Plan(0, (20, 10))


class Negative(Looker):
    """Wants fewer than no selection samples."""

    def selection(self, question):
        return -5


class Empty(Looker):
    """Decides from the selection samples that no more are needed."""

    def plan(self, counts, question):
        return Plan(0, ())

    def decide(self, counts, n, plan):
        return Decision(ABSTAIN, 0.0, 1.0, "hopeless")


@pytest.mark.parametrize(
    ("certifier", "message"),
    [
        (Undecided(n0=7), "did not decide"),
        (Backwards(n0=7), "do not increase"),
        (Negative(), "selection gave samples = -5"),
    ],
)
def test_certifiers_that_break_their_contract_are_named(certifier, message):
    with pytest.raises(PluginError, match=message) as error:
        run(16, [0], certifier)
    assert type(certifier).__name__ in error.value.message


def test_a_certifier_may_decide_with_the_selection_samples():
    request = CertifierRequest(Empty(n0=7), Question(CLASSES), 0, lambda: image(0))
    (done,) = sampler(16).run([request])
    assert done.decision.reason == "hopeless"
    assert done.n == 0


def test_keys_differ_between_parts_and_types():
    keys = {derive(0, "a", 1), derive(0, "a1"), derive(0, "a", "1"), derive(1, "a", 1), derive(0, 1, "a")}
    assert len(keys) == 5
    assert all(0 <= key < 2**63 for key in keys)
    assert derive(0, "sample", 3, 1) == 291971284412433088  # results on disk depend on it: never change it


def test_no_two_blocks_of_an_image_share_a_seed_in_the_32_bits_that_the_cpu_uses():
    seeds = {block_generator(CPU, 0, 17, block).initial_seed() % 2**32 for block in range(50_000)}
    assert len(seeds) == 50_000


def test_the_cpu_uses_the_low_32_bits_of_a_seed_only():
    """Why blocks are stepped and not hashed; if this fails, torch has mended it."""
    draw = [torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32)]
    assert torch.equal(*draw)


def test_out_of_memory_while_counting_counts_nothing_twice(monkeypatch):
    """The last allocation of a batch fails once; the batch is repeated in halves."""
    calls = iter([False, True] + [False] * 1000)
    true_sum = torch.Tensor.sum

    def failing(tensor, *args, **kwargs):
        if tensor.shape[-1:] == (CLASSES,) and next(calls):
            raise torch.OutOfMemoryError("pretended")
        return true_sum(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "sum", failing)
    assert run(64, range(5)) == {key: brute_force(key, Looker(n0=7)) for key in range(5)}
