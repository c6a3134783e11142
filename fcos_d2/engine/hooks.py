"""What happens around iterations: statistics, pictures, averaged weights, checkpoints, stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..checkpoint.saving import AtomicSaving
from ..errors import InputError
from .distributed import bare, share_buffers
from .random_state import kept_random_state
from .step import stepper


class AssignmentStatistics(HookBase):
    """Writes how the last batch was assigned: positives per level, ambiguous points, lost boxes.

    The model leaves these numbers on the device; reading them here is the only time that anything
    but the report of losses waits for it.
    """

    def __init__(self, period: int = 20):
        self._period = period

    def after_step(self):
        """Writes the statistics, if it is time."""
        iteration = self.trainer.iter + 1
        if iteration % self._period and iteration != self.trainer.max_iter:
            return
        stats = getattr(getattr(bare(self.trainer.model), "losses", None), "stats", {})
        if stats:
            values = torch.stack([value.detach().float() for value in stats.values()]).tolist()
            self.trainer.storage.put_scalars(
                **dict(zip(stats, values, strict=True)), smoothing_hint=False
            )


class TrainingPanels(HookBase):
    """Draws the batch of every ``period``-th iteration, the first one included, for TensorBoard.

    Args:
        period: in iterations.
        class_names: K names, or None for numbers.
    """

    def __init__(self, period: int, class_names: Sequence[str] | None = None):
        self._period, self._class_names = period, class_names
        self._batch = self._handle = None

    def before_step(self):
        """Asks the model for its next batch, if that one is to be drawn."""
        if self.trainer.iter % self._period == 0:
            model = bare(self.trainer.model)
            self._handle = model.register_forward_pre_hook(self._keep_batch)

    def _keep_batch(self, module: nn.Module, inputs: tuple) -> None:
        self._batch = inputs[0]

    def after_step(self):
        """Draws the batch that the step has seen."""
        if self._handle is None:
            return
        from ..visualization.drawing import (
            training_panels,  # takes matplotlib along: only when it is needed
        )

        self._handle.remove()
        panels = training_panels(
            bare(self.trainer.model), self._batch, class_names=self._class_names
        )
        for name, panel in panels.items():
            image = np.ascontiguousarray(np.moveaxis(panel, -1, 0))
            self.trainer.storage.put_image(f"training/{name}", image)
        self._batch = self._handle = None


class WeightAveraging(HookBase):
    """Follows the weights with their average, and leaves it in ``model_final_ema.pth``.

    Args:
        averaged: of the detector that is trained.
        checkpointer: saves the average after the last iteration.
    """

    def __init__(self, averaged: AveragedModel, checkpointer: AtomicSaving):
        self._averaged, self._checkpointer = averaged, checkpointer

    def after_step(self):
        """Averages, and saves after the last iteration."""
        self._averaged.update_parameters(bare(self.trainer.model))
        if self.trainer.iter + 1 == self.trainer.max_iter:
            self._checkpointer.save_weights("model_final_ema", self._averaged.module)


class Preempted(SystemExit):
    """Ends a training that was told to stop and has saved all it needs to go on.

    Its status is EX_TEMPFAIL of sysexits.h: the same command with --resume will do better.
    """

    STATUS = 75

    def __init__(self):
        super().__init__(self.STATUS)


class CheckpointHook(hooks.PeriodicCheckpointer):
    """detectron2's PeriodicCheckpointer, for all processes, that also saves and stops on SIGTERM.

    Args:
        checkpointer: saves everything from which --resume continues.
        period: in iterations.
        options: further arguments of PeriodicCheckpointer.

    Raises:
        InputError: a period below 1.
    """

    def __init__(self, checkpointer: AtomicSaving, period: int, **options):
        if period < 1:
            raise InputError(
                f"SOLVER.CHECKPOINT_PERIOD must be at least 1, got {period}; set it to "
                "SOLVER.MAX_ITER for the last iteration alone"
            )
        super().__init__(checkpointer, period, **options)
        self._saved = -1  # the last iteration with a checkpoint
        self._evaluating = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A block, around a whole training, in which SIGTERM means to save and stop."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the business of the main thread
            return
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A block that changes nothing of what is saved: on SIGTERM it is left at once."""
        stepper(self.trainer).collect_random_states()
        try:
            with kept_random_state():
                self._evaluating = True
                if stepper(self.trainer).stop_requested:
                    raise Preempted
                yield
        except (Exception, Preempted) as error:
            # The signal may have reached the processes that read images first.
            if not stepper(self.trainer).stop_requested:
                raise
            self._save_now()
            raise Preempted from error
        finally:
            self._evaluating = False

    def after_step(self):
        """Saves if it is time or if any process was told to stop; then stops."""
        iteration = self.trainer.iter
        is_last = iteration + 1 >= self.max_iter
        is_due = is_last or (iteration + 1) % self.period == 0
        stopping = stepper(self.trainer).stopping and not is_last
        if is_due or stopping:
            stepper(self.trainer).collect_random_states()
        if is_due and comm.is_main_process():
            self.step(iteration)
            self._saved = iteration
        if stopping:
            self._save_now()
            comm.synchronize()  # whoever ends first makes launchers kill the others
            raise Preempted

    def _save_now(self) -> None:
        iteration = self.trainer.iter
        if comm.is_main_process() and self._saved != iteration < self.max_iter:
            self.checkpointer.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration)
            self._saved = iteration

    def _on_signal(self, number: int, frame: object) -> None:
        stepper(self.trainer).stop_requested = True
        if self._evaluating:
            self._evaluating = False  # a second signal must not disturb the saving
            raise Preempted


class EvaluationHook(hooks.EvalHook):
    """detectron2's EvalHook, of one model, which leaves no trace in the training.

    Args:
        period: in iterations.
        evaluate: model -> results.
        model: the one to evaluate.
        checkpoints: see ``CheckpointHook.evaluation``.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[nn.Module], dict],
        model: nn.Module,
        checkpoints: CheckpointHook,
    ):
        def evaluate_alone() -> dict:
            with checkpoints.evaluation():
                share_buffers(model)
                return evaluate(model)

        super().__init__(period, evaluate_alone)
