"""What training shows beside its losses: how targets were assigned, in numbers and in pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.engine import HookBase
from torch import nn


class AssignmentStatistics(HookBase):
    """Writes how the last batch was assigned: positives per level, ambiguous points, lost boxes.

    The model leaves these numbers on the device; reading them here is the only time that anything
    but detectron2's own loss report waits for it.
    """

    def __init__(self, period: int = 20):
        self._period = period

    def after_step(self):
        """Writes the statistics, if it is time."""
        iteration = self.trainer.iter + 1
        if iteration % self._period and iteration != self.trainer.max_iter:
            return
        stats = getattr(getattr(_bare(self.trainer.model), "losses", None), "stats", {})
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
            model = _bare(self.trainer.model)
            self._handle = model.register_forward_pre_hook(self._keep_batch)

    def _keep_batch(self, module: nn.Module, inputs: tuple) -> None:
        self._batch = inputs[0]

    def after_step(self):
        """Draws the batch that the step has seen."""
        if self._handle is None:
            return
        from ..visualize import training_panels  # takes matplotlib along: only when it is needed

        self._handle.remove()
        panels = training_panels(
            _bare(self.trainer.model), self._batch, class_names=self._class_names
        )
        for name, panel in panels.items():
            image = np.ascontiguousarray(np.moveaxis(panel, -1, 0))
            self.trainer.storage.put_image(f"training/{name}", image)
        self._batch = self._handle = None


def _bare(model: nn.Module) -> nn.Module:
    """The detector inside DistributedDataParallel."""
    return getattr(model, "module", model)
