"""One iteration of training: batches in, one step of the optimizer out."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Mapping

import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from ..errors import InputError
from .distributed import bare, gather_rows
from .random_state import random_state, set_random_state

SMOOTHING = 20  # iterations over which detectron2's writers take the median of a loss
MOST_SHOWN = 4  # parameters or images named in a message; the others are counted

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

logger = logging.getLogger(__name__)


class StepTrainer(TrainerBase):
    """Takes the place of detectron2's SimpleTrainer and AMPTrainer.

    Beyond these it accumulates gradients, runs under autocast of either type on every device,
    answers for numbers that are not finite, and has a state from which all of it continues. All
    processes decide alike, because they exchange losses before each step.

    Args:
        model: returns a dict of losses; DistributedDataParallel where several processes train.
        data_loader: iterable of batches; if it has a ``state_dict``, that is saved too.
        optimizer: over the parameters of ``model``.
        accumulation: batches per step. The step is that of their losses' mean.
        amp_dtype: of autocast: "float16" (with loss scaling), "bfloat16", or None for float32.
        max_skipped: so many iterations with losses or gradients that are not finite are skipped;
            the next one ends the training.

    Attributes:
        stop_requested: set it (a signal handler does) to ask this process to stop.
        stopping: whether any process was asked, and all know: true on all of them at once.

    Raises:
        InputError: a loss or gradient that is not finite, too often.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        *,
        accumulation: int = 1,
        amp_dtype: str | None = None,
        max_skipped: int = 0,
    ):
        super().__init__()
        self.model, self.data_loader, self.optimizer = model.train(), data_loader, optimizer
        self._accumulation, self._max_skipped = accumulation, max_skipped
        self._device = next(model.parameters()).device
        self._dtype = AMP_DTYPES[amp_dtype] if amp_dtype else None
        self.grad_scaler = torch.amp.GradScaler(
            self._device.type, enabled=self._dtype is torch.float16
        )
        self.stop_requested = self.stopping = False
        self._skipped = 0
        self._batches = None
        self._resumed: dict = {}
        self._random_states: list[dict] = []

    def run_step(self) -> None:
        """Reads batches, computes gradients, and steps if everything is finite."""
        if not self.model.training:
            raise RuntimeError("StepTrainer: a hook left the model in evaluation mode")
        self._start()
        start = time.perf_counter()
        batches = [next(self._batches) for _ in range(self._accumulation)]
        data_time = time.perf_counter() - start
        buffers = self._copy_buffers() if self._max_skipped else []
        self.optimizer.zero_grad()
        losses = self._backward(batches)
        # Nothing below waits for the device a second time, save loss scaling.
        rows = self._exchange(losses, data_time)
        if not all(map(math.isfinite, sum(rows, []))):
            self._skip_or_end(list(losses), rows, batches)
            for buffer, copy in buffers:
                buffer.copy_(copy)
            return
        self._write(list(losses), rows)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def after_train(self) -> None:
        """Ends the workers of the data loader, after the hooks."""
        super().after_train()
        self.close()

    def close(self) -> None:
        """Ends the workers of the data loader."""
        self._batches = None

    def collect_random_states(self) -> None:
        """Makes the states of all processes part of ``state_dict``; all must call it."""
        self._random_states = comm.gather(random_state())

    def state_dict(self) -> dict:
        """Everything that decides how training goes on, besides the model."""
        state = {**super().state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        if hasattr(self.data_loader, "state_dict"):
            state["data_loader"] = self.data_loader.state_dict()
        return {
            **state,
            "skipped": self._skipped,
            "random_states": self._random_states,
            "losses": _recent_losses(get_event_storage()),
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes what ``state`` has; main's SimpleTrainer and AMPTrainer save a part of it."""
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.grad_scaler.is_enabled() and state.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        if "data_loader" in state and hasattr(self.data_loader, "load_state_dict"):
            self.data_loader.load_state_dict(state["data_loader"])
        else:
            logger.warning("the position in the training data is unknown: it is shuffled anew")
        self._skipped = state.get("skipped", 0)
        self._resumed = state

    def _start(self) -> None:
        if self._batches is None:
            self._batches = iter(self.data_loader)
        resumed, self._resumed = self._resumed, {}
        if resumed:
            _restore_losses(get_event_storage(), resumed.get("losses", {}))
            states = resumed.get("random_states", [])
            if len(states) == comm.get_world_size():
                set_random_state(states[comm.get_rank()])

    def _backward(self, batches: list[list[dict]]) -> dict[str, Tensor]:
        """Gradients of the mean of all batches' losses; returns the losses of the mean."""
        mean: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            # Processes exchange gradients once, with the last batch.
            alone = contextlib.nullcontext() if last or self._is_bare() else self.model.no_sync()
            with alone:
                with torch.autocast(
                    self._device.type, self._dtype, enabled=self._dtype is not None
                ):
                    losses = self.model(batch)
                losses = {name: loss / len(batches) for name, loss in losses.items()}
                self.grad_scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                mean[name] = mean.get(name, 0) + loss.detach().float()
        return mean

    def _exchange(self, losses: Mapping[str, Tensor], data_time: float) -> list[list[float]]:
        """One row per process: losses, largest gradient, data time; agrees on stopping, too."""
        facts = torch.tensor([data_time, float(self.stop_requested)], device=self._device)
        row = torch.stack((*losses.values(), self._largest_gradient()))
        rows = gather_rows(torch.cat((row, facts)))
        self.stopping = any(row.pop() for row in rows)
        return rows

    def _largest_gradient(self) -> Tensor:
        """Largest absolute value in all gradients, or what is not finite in them.

        float16's overflow now and then; loss scaling looks after that, until it is at its end.
        """
        scaling = self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() >= 1
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if scaling or not gradients:
            return torch.zeros((), device=self._device)
        return torch.nn.utils.get_total_norm(gradients, math.inf).float()

    def _write(self, names: list[str], rows: list[list[float]]) -> None:
        """Losses, averaged over processes, under the names that SimpleTrainer uses."""
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(row[-1] for row in rows))
        columns = zip(*rows, strict=True)
        means = {name: sum(c) / len(c) for name, c in zip(names, columns, strict=False)}
        storage.put_scalar("total_loss", sum(means.values()))
        if len(means) > 1:
            storage.put_scalars(**means)

    def _skip_or_end(self, names: list[str], rows: list[list[float]], batches: list) -> None:
        """All processes come here at once.

        Raises:
            InputError: one iteration more than may be skipped.
        """
        files = [str(image.get("file_name", "?")) for batch in batches for image in batch]
        all_files = comm.all_gather(files)
        message = f"iteration {self.iter}: {self._describe(names, rows, all_files)}"
        self._skipped += 1
        if self._skipped > self._max_skipped:
            before = f", after {self._max_skipped} skipped ones" if self._max_skipped else ""
            raise InputError(
                f"{message}{before}; look at these images and their boxes, try a lower "
                "SOLVER.BASE_LR, more SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED True, "
                "or allow for some with SOLVER.MAX_SKIPPED_ITERS"
            )
        logger.warning(f"{message}; skipped, {self._skipped} of {self._max_skipped}")
        if comm.is_main_process():
            get_event_storage().put_scalar(
                "skipped_iterations", self._skipped, smoothing_hint=False
            )

    def _describe(self, names: list[str], rows: list[list[float]], files: list[list[str]]) -> str:
        """Which losses of which process and images, or else which gradients."""
        parts = []
        for rank, row in enumerate(rows):
            losses = dict(zip(names, row, strict=False))
            bad = [f"{name} is {v}" for name, v in losses.items() if not math.isfinite(v)]
            if bad:
                good = [f"{name} is {v:.4g}" for name, v in losses.items() if math.isfinite(v)]
                where = f" of process {rank}" if len(rows) > 1 else ""
                parts.append(f"{_list([*bad, *good])} for images{where} {', '.join(files[rank])}")
        if parts:
            return "; ".join(parts)
        bad = [
            name
            for name, parameter in bare(self.model).named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        return f"gradient of {_list(bad)} is not finite for images {', '.join(sum(files, []))}"

    def _copy_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """What a forward pass changes, and what must not keep a NaN: statistics of BN."""
        return [(b, b.clone()) for b in bare(self.model).buffers() if b.is_floating_point()]

    def _is_bare(self) -> bool:
        return bare(self.model) is self.model


def usable_precision(precision: str | None, device: str) -> str | None:
    """``precision`` of autocast if training on ``device`` can use it, else None.

    Raises:
        InputError: it is neither None nor one of AMP_DTYPES.
    """
    if precision is not None and precision not in AMP_DTYPES:
        raise InputError(
            f"the precision of AMP must be one of {', '.join(AMP_DTYPES)}, got {precision!r}; set "
            "SOLVER.AMP.PRECISION"
        )
    if precision == "float16" and device == "cpu":
        logger.warning("AMP is off: float16 is for GPUs; bfloat16 is for GPUs and CPUs")
        return None
    return precision


def stepper(trainer: TrainerBase) -> StepTrainer:
    """The StepTrainer of a trainer: the one that a DefaultTrainer has, or itself."""
    return getattr(trainer, "_trainer", trainer)


def _is_loss(name: str) -> bool:
    return name == "total_loss" or name.startswith("loss_")


def _recent_losses(storage: EventStorage) -> dict[str, list[tuple[float, float]]]:
    """(value, iteration) of the iterations that the next report takes its medians of."""
    return {
        name: [(float(value), int(iteration)) for value, iteration in history.values()[-SMOOTHING:]]
        for name, history in storage.histories().items()
        if _is_loss(name)
    }


def _restore_losses(storage: EventStorage, losses: dict[str, list[tuple[float, float]]]) -> None:
    now = storage.iter
    for name, values in losses.items():
        for value, storage.iter in values:
            storage.put_scalar(name, value)
    storage.iter = now


def _list(names: list[str]) -> str:
    more = len(names) - MOST_SHOWN
    return ", ".join(names[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")
