"""A run from its present epoch to its last: callbacks are called, figures are logged, and a request to stop is heard."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rscli.api import Callback, Certificate, Certifier, Logger, LogWriter, Run
from rscli.data.splits import HOLDOUT, Split
from rscli.errors import Stopped
from rscli.models.modelfile import save_model
from rscli.registry import installed
from rscli.runtime.guard import broken, calling
from rscli.runtime.progress import Progress
from rscli.runtime.signals import StopRequest
from rscli.smoothing.classifier import SmoothedClassifier
from rscli.training.model_card import model_card
from rscli.training.profiling import profiled
from rscli.training.ramps import ramp_values
from rscli.training.run_folder import RunFolder
from rscli.training.trainer import Trainer


class TrainingRun(Run):
    """One run, as the host drives it and as loggers and callbacks see it."""

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder,
        open_images: Callable[[str], Split],
        progress: Progress,
        stop: StopRequest,
        holdout: Split | None = None,
    ) -> None:
        self.trainer, self.progress, self.stopping, self._folder = trainer, progress, stop, folder
        self._open_images, self._splits = open_images, {"train": trainer.split}
        if holdout is not None:
            self._splits[HOLDOUT] = holdout
        self.spec = trainer.split.spec
        self.folder, self.model, self.noise = folder.path, trainer.classifier, trainer.resolved.noise
        self.epochs, self.config = trainer.config.epochs, trainer.resolved.as_dict()
        self.callbacks: dict[str, Callback] = trainer.resolved.callbacks if trainer.processes.first else {}
        self.states: dict[str, dict[str, Any]] = {name: {} for name in self.callbacks}
        """What callbacks keep, by their names."""
        self._means: dict[str, Any] = {}
        self._line: dict[str, Any] = {}
        self._save_wanted = False
        self.profile: Path | None = None
        """Where a profile of a few steps is to go, if one is wanted."""
        self.ended: str | None = None
        """Why training is finished before its last epoch, if it is."""

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """Finished epochs."""
        return self.trainer.epoch

    @property
    def batch(self) -> int:  # type: ignore[override]
        """Finished batches of the current epoch."""
        return self.trainer.batch

    @property
    def batches(self) -> int:  # type: ignore[override]
        """Batches in an epoch."""
        return self.trainer.batches

    @property
    def figures(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The means of the last finished epoch, and what has been logged."""
        return {**self._means, **self._line}

    def _split(self, name: str) -> Split:
        """A split, opened once."""
        return self._splits.get(name) or self._splits.setdefault(name, self._open_images(name))

    def images(self, split: str, indices: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """Images (n, channel, height, width) of a split under the test transform, and their labels (n,); it is opened once."""
        found = self._split(split)
        return torch.stack([found.image(int(index)) for index in indices]), found.labels[list(indices)]

    def labels(self, split: str) -> NDArray[np.int64]:
        """The labels (n,) of a split, which is opened once."""
        return self._split(split).labels

    def certify(self, images: Tensor, **options: Any) -> Sequence[Certificate]:
        """Certificates of `images` (n, channel, height, width) by the present weights.

        The random numbers, layout and modes of the run stay as they are.
        """
        found = installed()
        if not cast(type[Certifier], found.load("certifiers", options.get("certifier") or found.default("certifiers"))).grid:
            options.pop("radii", None)
        model = SmoothedClassifier(self.model, noise=self.noise, class_names=self.spec.class_names, input_shape=self.spec.shape)
        with torch.random.fork_rng(devices=[]):
            return model.certify(images, **options)

    def log(self, values: Mapping[str, Any]) -> None:
        """Adds to the line of this epoch."""
        self._line |= values

    def save(self) -> None:
        """Asks for a checkpoint: at the next moment that a run can go on from, after this batch or after this epoch's line."""
        self._save_wanted = True

    def save_model(self, name: str) -> Path:
        """Writes the present weights beside the model file. Raises `ValueError` for a name that is none."""
        if not re.fullmatch(r"[\w-]{1,100}", name):
            raise ValueError(f"{name!r} is no name for a model file: letters, digits, - and _ are")
        path = self.folder / f"model-{name}.safetensors"
        self.write_model(path)
        return path

    def write_model(self, path: Path) -> None:
        """Writes the present weights as a model file."""
        trainer, classifier = self.trainer, self.trainer.classifier
        card = model_card(trainer.resolved, classifier.spec, trainer.loss_state, self.epoch)
        save_model(path, classifier, card.model_copy(update={"origin": classifier.start.origin}))

    def stop(self, reason: str) -> None:
        """Makes this epoch the last: it is saved, and training is finished. The first reason counts."""
        self.ended = self.ended or reason
        self.save()

    def note(self, text: str) -> None:
        """A line for the user."""
        self.progress.note(text)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what callbacks had kept; the trainer has taken its part."""
        self.states |= {name: dict(kept) for name, kept in state.get("callbacks", {}).items() if name in self.states}
        self._line = dict(state.get("line", {}))
        self.ended = state.get("ended")

    def complete(self) -> None:
        """Trains to the end. Raises `Stopped` when asked to stop, in all processes; the state is saved, and logs are closed."""
        try:
            self._train()
        except Stopped:
            self.trainer.processes.wait()  # for the first one, which may send the last of a log: who ends earlier would end it
            raise

    def _train(self) -> None:
        trainer = self.trainer
        with ExitStack() as open_logs:
            loggers = trainer.resolved.loggers.values() if trainer.processes.first else ()
            logs = [self._opened(logger, open_logs) for logger in loggers]
            if any(type(log).write_step is not LogWriter.write_step for _, log in logs):
                trainer.on_figures = partial(self._write_step, logs)
                trainer.meter = trainer.new_meter(trainer.meter.state())
            self._call("begin")
            self.ended = trainer.processes.share(self.ended)
            trainer.after_step = partial(self._call, "after_step")
            if self.profile is not None:
                trainer.after_step = open_logs.enter_context(profiled(self.profile, trainer.after_step, self.progress))
            total = self.batches * self.epochs
            self.progress.start("train", total, self.epoch * self.batches + self.batch, "batch")
            open_logs.callback(self.progress.finish)
            while not self._finished:
                line = self._one_epoch()
                for logger, log in logs:
                    with calling(logger, "write"):
                        log.write(line)
                self._heed(saving_only=self._finished)
            self._call("end")

    @property
    def _finished(self) -> bool:
        return self.epoch >= self.epochs or (self.ended is not None and self.batch == 0)

    def _one_epoch(self) -> dict[str, Any]:
        """The rest of the current epoch; its figures. Afterwards the next one is the current."""
        trainer, progress = self.trainer, self.progress
        began, first, speed = time.monotonic(), trainer.meter.images, 0.0
        with closing(trainer.epoch_batches()) as batches:
            for _ in batches:
                speed = (trainer.meter.images - first) / max(time.monotonic() - began, 1e-9)
                done = trainer.epoch * trainer.batches + trainer.batch
                figures = {"epoch": str(trainer.epoch + 1), **trainer.meter.figures(), "images/s": f"{speed:.0f}"}
                progress.update(done, figures)
                if trainer.batch < trainer.batches:
                    self._heed()
        moved = ramp_values(trainer.resolved, trainer.epoch + 1 - 1 / trainer.batches)
        self._means = {"epoch": trainer.epoch + 1, "lr": trainer.last_lr, **moved, **trainer.meter.means()}
        trainer.epoch, trainer.batch, trainer.meter = trainer.epoch + 1, 0, trainer.new_meter()
        self._call("after_epoch")
        self._call("after_figures")
        self.ended = trainer.processes.share(self.ended)
        if self.ended is not None:
            self.log({"ended": self.ended})
            self.note(f"training ends after epoch {self.epoch} of {self.epochs}: {self.ended}")
        line, self._line = self.figures, {}
        return {**line, "images_per_s": round(speed, 1), "seconds": round(time.monotonic() - began, 3)}

    def _write_step(self, logs: Sequence[tuple[Logger, LogWriter]], line: Mapping[str, Any]) -> None:
        for logger, log in logs:
            with calling(logger, "write_step"):
                log.write_step(line)

    def _opened(self, logger: Logger, open_logs: ExitStack) -> tuple[Logger, LogWriter]:
        with calling(logger, "open"):
            log = logger.open(self)
        if not isinstance(log, LogWriter):
            raise broken(logger, "open", f"returned {log!r:.80}, which is no LogWriter")
        open_logs.callback(log.close)
        return logger, log

    def _call(self, moment: str) -> None:
        for name, callback in self.callbacks.items():
            with calling(callback, moment):
                getattr(callback, moment)(self, self.states[name])

    def _heed(self, saving_only: bool = False) -> None:
        """Saves, or stops, if that was asked of any process. Raises `Stopped`; the state is saved."""
        processes = self.trainer.processes
        stop, save = processes.any([self.stopping.requested and not saving_only, self._save_wanted])
        if stop or save:
            self._save()
        if stop:
            processes.wait()  # for the first one to have written
            self._end_here()

    def _save(self) -> None:
        self.trainer.meter.flush()
        self.trainer.check_loss_state()
        if self.trainer.processes.first:
            ended = {} if self.ended is None else {"ended": self.ended}
            self._folder.save({**self.trainer.state(), "callbacks": self.states, "line": self._line, **ended})
        self._save_wanted = False

    def _end_here(self) -> None:
        where = f"epoch {self.epoch + 1}, batch {self.batch}"
        hint = "The same command with --resume goes on from there."
        raise Stopped(f"stopped as asked, at {where}; saved in {self.folder}", hint, exit_code=self.stopping.exit_code)
