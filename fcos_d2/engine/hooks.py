"""Training hooks: statistics, images, EMA, checkpoints, evaluation, preemption."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..checkpoint.saving import AtomicSaving
from ..errors import InputError
from .distributed import broadcast_buffers, unwrap_ddp
from .rng import fork_rng
from .step import unwrap_trainer


class ProgressBar(HookBase):
    """Shows tqdm's progress bar, with rate and remaining time, if stderr is a terminal."""

    def before_train(self):
        """Opens the bar."""
        trainer = self.trainer
        self._bar = tqdm(total=trainer.max_iter, initial=trainer.start_iter, disable=None)

    def after_step(self):
        """Advances the bar."""
        self._bar.update()

    def after_train(self):
        """Closes the bar."""
        self._bar.close()


class AssignmentStatistics(HookBase):
    """Logs target assignment: positives per level, ambiguous points, boxes without points.

    The model keeps these statistics on the GPU, and the host waits for it only to read them, every
    ``period`` iterations.
    """

    def __init__(self, period: int = 20):
        self._period = period

    def after_step(self):
        """Logs the statistics of the last batch if due."""
        iteration = self.trainer.iter + 1
        if iteration % self._period and iteration != self.trainer.max_iter:
            return
        stats = getattr(getattr(unwrap_ddp(self.trainer.model), "losses", None), "stats", {})
        if stats:
            values = torch.stack([value.detach().float() for value in stats.values()]).tolist()
            self.trainer.storage.put_scalars(
                **dict(zip(stats, values, strict=True)), smoothing_hint=False
            )


class TrainingPanels(HookBase):
    """Draws the batch of every ``period``-th iteration, starting with the first, for TensorBoard.

    Args:
        period: number of iterations.
        class_names: K names, or None for numbers.
    """

    def __init__(self, period: int, class_names: Sequence[str] | None = None):
        self._period, self._class_names = period, class_names

    def after_step(self):
        """Draws the batch of this step if due."""
        if self.trainer.iter % self._period:
            return
        from ..visualization.assignment import training_panels  # imports matplotlib

        model, batch = unwrap_ddp(self.trainer.model), unwrap_trainer(self.trainer).batches[-1]
        for name, panel in training_panels(model, batch, class_names=self._class_names).items():
            image = np.ascontiguousarray(np.moveaxis(panel, -1, 0))
            self.trainer.storage.put_image(f"training/{name}", image)


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """Builds the exponential moving average of ``model``; returns None if ``decay`` is 0.

    Each update keeps a fraction ``decay``, in (0, 1), of the average. Batch norm statistics are
    averaged too: those of the last weights would not fit.
    """
    if not 0 <= decay < 1:
        raise InputError(f"MODEL_EMA.DECAY must be in (0, 1), got {decay}; 0.999 is common")
    if not decay:
        return None
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return ema.requires_grad_(False)


class EMAHook(HookBase):
    """Updates the EMA, and saves it as ``model_final_ema.pth`` after the last iteration.

    Args:
        ema: average of the model in training.
        checkpointer: saves ``ema``.
    """

    def __init__(self, ema: AveragedModel, checkpointer: AtomicSaving):
        self._ema, self._checkpointer = ema, checkpointer

    @torch.no_grad()
    def after_step(self):
        """Updates without waiting for the GPU, unlike update_parameters; saves at the end."""
        models = self._ema.module, unwrap_ddp(self.trainer.model)
        ours, theirs = ([*model.parameters(), *model.buffers()] for model in models)
        if self._ema.n_averaged == 0:  # a CPU tensor
            torch._foreach_copy_(ours, theirs)
        else:
            pairs = [pair for pair in zip(ours, theirs, strict=True) if pair[0].is_floating_point()]
            self._ema.multi_avg_fn(*map(list, zip(*pairs, strict=True)), None)
        self._ema.n_averaged += 1
        if self.trainer.iter + 1 == self.trainer.max_iter:
            unwrap_trainer(self.trainer).flush()  # raises if that iteration must not be saved
            self._checkpointer.save_weights("model_final_ema", self._ema.module)


class LossWriter(hooks.PeriodicWriter):
    """PeriodicWriter for all processes that waits for the losses before it writes them.

    Args:
        writers: the writers of this process.
        periods: numbers of iterations, 0 for never: of losses, and of evaluations, whose results
            would be lost if the process were killed before the next losses are written.
    """

    def __init__(self, writers: Sequence[EventWriter], *periods: int):
        super().__init__(writers)
        self._periods = [period for period in periods if period]

    def after_step(self):
        """Writes metrics if due."""
        iteration = self.trainer.iter + 1
        is_last = iteration == self.trainer.max_iter
        if is_last or any(iteration % period == 0 for period in self._periods):
            unwrap_trainer(self.trainer).flush()
            for writer in self._writers:
                writer.write()


class Preempted(SystemExit):
    """Ends a training run that received SIGTERM, after saving everything that --resume needs.

    The exit status is EX_TEMPFAIL of sysexits.h: retry the same command with --resume.
    """

    STATUS = 75

    def __init__(self):
        super().__init__(self.STATUS)


class CheckpointHook(hooks.PeriodicCheckpointer):
    """PeriodicCheckpointer for all processes that also saves and stops on SIGTERM.

    Args:
        checkpointer: saves everything that --resume needs.
        period: number of iterations.
        options: further arguments of PeriodicCheckpointer.

    Raises:
        InputError: ``period`` is below 1.
    """

    def __init__(self, checkpointer: AtomicSaving, period: int, **options):
        if period < 1:
            raise InputError(
                f"SOLVER.CHECKPOINT_PERIOD must be at least 1, got {period}; set it to "
                "SOLVER.MAX_ITER to save only the last iteration"
            )
        super().__init__(checkpointer, period, **options)
        self._saved = -1  # last iteration with a checkpoint
        self._evaluating = False

    @contextmanager
    def handle_sigterm(self) -> Iterator[None]:
        """Makes SIGTERM save and stop in this block, which contains a whole training run."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Keeps the block from changing any saved state, so that SIGTERM can abort it at once."""
        trainer = unwrap_trainer(self.trainer)
        trainer.gather_rng_states()
        try:
            with fork_rng():
                self._evaluating = True
                if trainer.stop_requested:
                    raise Preempted
                yield
        except (Exception, Preempted) as error:
            # The signal may have reached the data loader's workers first.
            if not trainer.stop_requested:
                raise
            self._save_now()
            raise Preempted from error
        finally:
            self._evaluating = False

    def after_step(self):
        """Saves if due; saves and ends training if any process received SIGTERM."""
        trainer, iteration = unwrap_trainer(self.trainer), self.trainer.iter
        is_last = iteration + 1 >= self.max_iter
        is_due = is_last or (iteration + 1) % self.period == 0
        stopping = trainer.stopping and not is_last
        if is_due or stopping:
            trainer.gather_rng_states()
        if is_due and comm.is_main_process():
            self.step(iteration)
            self._saved = iteration
        if stopping:
            self._save_now()
            comm.synchronize()  # launchers kill the others once one has exited
            raise Preempted

    def after_train(self):
        """Shuts down the data loader's workers before the last evaluation."""
        unwrap_trainer(self.trainer).close()

    def _save_now(self) -> None:
        iteration = self.trainer.iter
        if comm.is_main_process() and self._saved != iteration < self.max_iter:
            self.checkpointer.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration)
            self._saved = iteration

    def _on_signal(self, number: int, frame: object) -> None:
        unwrap_trainer(self.trainer).stop_requested = True
        if self._evaluating:
            self._evaluating = False  # a second signal must not interrupt saving
            raise Preempted


def build_evaluation(
    period: int,
    evaluate: Callable[[nn.Module], dict],
    model: nn.Module,
    checkpoints: CheckpointHook,
) -> hooks.EvalHook:
    """Builds an EvalHook that calls ``evaluate(model)`` without affecting training."""

    def evaluate_alone() -> dict:
        with checkpoints.evaluation():
            broadcast_buffers(model)
            return evaluate(model)

    return hooks.EvalHook(period, evaluate_alone)


def standard_hooks(
    checkpoints: CheckpointHook,
    ema: AveragedModel | None,
    writer: LossWriter,
    evaluations: Sequence[HookBase],
    *,
    scheduler: object = None,
    more: Sequence[HookBase | None] = (),
) -> list[HookBase | None]:
    """Returns the hooks of a training run in order; ``scheduler`` None is the trainer's."""
    is_main = comm.is_main_process()
    return [
        hooks.IterationTimer(),  # first, to time the step alone
        ProgressBar() if is_main else None,
        AssignmentStatistics() if is_main else None,
        hooks.LRScheduler(scheduler=scheduler),
        *more,
        # Before the checkpoints, which contain it.
        EMAHook(ema, checkpoints.checkpointer) if ema else None,
        # Before the evaluation, in case it fails.
        checkpoints,
        *evaluations,
        writer,
    ]
