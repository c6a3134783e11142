"""One iteration of training: batches in, one optimizer step out, without waiting for the GPU."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from math import inf, isfinite
from typing import NamedTuple

import torch
from detectron2.engine import SimpleTrainer, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..errors import InputError
from ..modeling.acceleration import fastest_dtype
from .distributed import gather_rows, unwrap_ddp
from .rng import get_rng_state, set_rng_state

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SMOOTHING = 20  # iterations over which detectron2's writers take the median of a loss

logger = logging.getLogger(__name__)


class Report(NamedTuple):
    """The numbers of an iteration, which may still be on their way from the GPU."""

    iteration: int
    batches: list[list[dict]]
    losses: dict[str, Tensor]  # of this process
    rows: Tensor  # per process: data time, whether to stop, loss scale, largest gradient, losses
    arrived: torch.cuda.Event | None  # None: they are on the host


class StepTrainer(SimpleTrainer):
    """SimpleTrainer with mixed precision, gradient accumulation, NaN checks and a complete state.

    A loss or gradient that is not finite never reaches the weights: GradScaler (with a constant
    scale of 1 unless the precision is float16) leaves out the step. The GPU decides that by itself
    if the optimizer is fused; otherwise the host waits for it in every iteration. From a GPU, the
    host reads the numbers of an iteration when the next one is queued, so losses are written,
    iterations skipped and training ended one iteration late, but before anything is saved.

    Args:
        model: returns a dict of losses; DistributedDataParallel if several processes train.
        data_loader: iterable of batches; if it has a ``state_dict``, that is saved too.
        optimizer: over the parameters of ``model``.
        accumulation: batches per step, which is that of their losses' mean.
        amp_dtype: torch.float16 (with loss scaling), torch.bfloat16, or None for float32.
        max_skipped: number of iterations with losses or gradients that are not finite that are
            skipped; the next one ends training.
        settings: of the run, by config key; ``load_state_dict`` says which ones have changed.

    Attributes:
        batches: what the last iteration has read.
        stop_requested: set it (a signal handler does) to ask this process to stop.
        stopping: whether any process was asked to; becomes true on all of them at once.

    Raises:
        InputError: losses or gradients that are not finite, too often; batch norm of one value.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        *,
        accumulation: int = 1,
        amp_dtype: torch.dtype | None = None,
        max_skipped: int = 0,
        settings: Mapping[str, str] | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        if any(parameter.dtype is torch.float16 for parameter in model.parameters()):
            raise InputError(
                "float16 weights lose the updates of their steps; train float32 weights with "
                "SOLVER.AMP.ENABLED True"
            )
        self._accumulation, self._dtype = accumulation, amp_dtype
        self._max_skipped, self._skipped = max_skipped, 0
        self._settings = dict(settings or {})
        self._device = next(model.parameters()).device
        self._is_deferred = self._device.type == "cuda"
        self._copies = torch.cuda.Stream() if self._is_deferred else None
        self._is_scaled = amp_dtype is torch.float16
        scale = {} if self._is_scaled else {"init_scale": 1.0}
        self.grad_scaler = torch.amp.GradScaler(self._device.type, **scale)
        self.batches: list[list[dict]] = []
        self.stop_requested = self.stopping = False
        self._unread: Report | None = None
        self._resumed: dict = {}
        self._rng_states: list[dict] = []

    def run_step(self) -> None:
        """Reads batches, computes gradients, and steps if everything is finite."""
        if not self.model.training:
            raise RuntimeError("StepTrainer: a hook left the model in evaluation mode")
        self._restore()
        start = time.perf_counter()
        self.batches = [next(self._data_loader_iter) for _ in range(self._accumulation)]
        data_time = time.perf_counter() - start
        # Batch norm statistics, which must not keep a NaN.
        buffers = unwrap_ddp(self.model).buffers() if self._max_skipped else ()
        copies = [(buffer, buffer.clone()) for buffer in buffers if buffer.is_floating_point()]
        self.optimizer.zero_grad()
        batches = self._to_device(self.batches)
        losses = self._backward(batches)
        self.grad_scaler.unscale_(self.optimizer)
        report = self._report(batches, losses, data_time)
        is_finite = report.rows.isfinite().all()
        for buffer, before in copies:
            buffer.copy_(torch.where(is_finite, buffer, before))
        self.flush()  # the previous iteration
        self._unread = self._to_host(report)
        # A fused SGD whose first step is left out would keep momenta that nothing has written.
        if (self._is_deferred and self.optimizer.state) or self.flush():
            self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update(None if self._is_scaled else 1.0)

    def flush(self) -> bool:
        """Writes the losses of the last iteration; returns whether all its numbers are finite.

        Waits until the GPU has computed them. All processes must call it together.

        Raises:
            InputError: they are not finite, and no more iterations may be skipped.
        """
        report, self._unread = self._unread, None
        if report is None:
            return True
        if report.arrived:
            report.arrived.synchronize()
        times, stops, scales, gradients, *losses = zip(*report.rows.tolist(), strict=True)
        self.stopping = any(stops)
        has_losses, has_gradients = all(map(isfinite, chain(*losses))), isfinite(sum(gradients))
        storage = get_event_storage()
        now, storage.iter = storage.iter, report.iteration
        # float16's overflow now and then, until the loss scale is at its end.
        if not has_losses or not (has_gradients or self._is_scaled and scales[0] >= 1):
            self._skip_or_end(report)
        elif comm.is_main_process():  # under the names that SimpleTrainer uses
            means = [sum(values) / len(values) for values in losses]
            storage.put_scalars(data_time=max(times), total_loss=sum(means))
            if len(means) > 1:
                storage.put_scalars(**dict(zip(report.losses, means, strict=True)))
        storage.iter = now
        return has_losses and has_gradients

    def close(self) -> None:
        """Ends the workers of the data loader."""
        getattr(self._data_loader_iter, "close", lambda: None)()

    def gather_rng_states(self) -> None:
        """Makes the states of all processes part of ``state_dict``; see ``flush``."""
        self.flush()
        self._rng_states = comm.gather(get_rng_state())

    def state_dict(self) -> dict:
        """Everything that decides how training continues, besides the model."""
        state = super().state_dict()
        if self._is_scaled:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        if hasattr(self.data_loader, "state_dict"):
            state["data_loader"] = self.data_loader.state_dict()
        histories = get_event_storage().histories().items()
        losses = {name: h.values()[-SMOOTHING:] for name, h in histories if "loss" in name}
        kept = {"skipped": self._skipped, "settings": self._settings, "losses": losses}
        return {**state, **kept, "rng_states": self._rng_states}

    def load_state_dict(self, state: dict) -> None:
        """Loads what ``state`` has; that of SimpleTrainer and AMPTrainer has a part of it.

        Learning rate, weight decay and the like are those of this run, not those of the state.

        Raises:
            InputError: the state of another optimizer.
        """
        groups = self.optimizer.param_groups
        options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        # Adam-like and SGD-like states load into each other silently and fail a step later.
        saved = state["optimizer"]["param_groups"]
        same_kind = any("betas" in g for g in saved) == any("betas" in g for g in groups)
        try:
            if not same_kind:
                raise ValueError("it is the state of another kind of optimizer")
            super().load_state_dict(state)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"--resume: the checkpoint's optimizer does not fit ({error}); use the config that "
                "wrote it, or train without --resume and set MODEL.WEIGHTS to the checkpoint"
            ) from error
        for group, option in zip(self.optimizer.param_groups, options, strict=True):
            group.update({"initial_lr": option["lr"], **option})
        if self._is_scaled and "grad_scaler" in state:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        if "data_loader" in state and hasattr(self.data_loader, "load_state_dict"):
            self.data_loader.load_state_dict(state["data_loader"])
        else:
            logger.warning("the position in the training data is unknown: it is shuffled anew")
        self._skipped, self._resumed = state.get("skipped", 0), state
        ours, theirs = self._settings, state.get("settings", self._settings)
        changes = [
            f"{key} {ours.get(key)} (was {theirs.get(key)})"
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
        ]
        if changes:
            logger.warning(f"--resume: training continues with {', '.join(changes)}")

    def _restore(self) -> None:
        """What needs an EventStorage, and what building the trainer would have changed."""
        state, self._resumed = self._resumed, {}
        storage = get_event_storage()
        now = storage.iter
        for name, values in state.get("losses", {}).items():
            for value, storage.iter in values:
                storage.put_scalar(name, value)
        storage.iter = now
        rng_states = state.get("rng_states", [])
        if len(rng_states) == comm.get_world_size():
            set_rng_state(rng_states[comm.get_rank()])

    def _to_device(self, batches: list[list[dict]]) -> list[list[dict]]:
        """The batches on the GPU, by way of a stream whose copies wait for nothing else."""
        if self._copies is None:
            return batches

        def move(sample: dict) -> dict:
            return {k: v.to(self._device) if hasattr(v, "to") else v for k, v in sample.items()}

        with torch.cuda.stream(self._copies):
            batches = [[move(sample) for sample in batch] for batch in batches]
        torch.cuda.current_stream().wait_stream(self._copies)
        return batches  # which the report keeps from being freed too early

    def _backward(self, batches: list[list[dict]]) -> dict[str, Tensor]:
        """Gradients of the mean of all batches' losses; returns the losses of the mean."""
        mean: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            # Processes exchange gradients once, with the last batch.
            is_alone = number < len(batches) and unwrap_ddp(self.model) is not self.model
            with self.model.no_sync() if is_alone else contextlib.nullcontext():
                autocast = torch.autocast(self._device.type, self._dtype, self._dtype is not None)
                with autocast, batch_norm_errors():
                    losses = self.model(batch)
                losses = {name: loss / len(batches) for name, loss in losses.items()}
                total = sum(losses.values())
                # Times 1, or times NaN, so that every gradient is NaN, on all processes.
                total = total * (1 + 0 * total.detach())
                self.grad_scaler.scale(total).backward()
            for name, loss in losses.items():
                mean[name] = mean.get(name, 0) + loss.detach().float()
        return mean

    def _report(self, batches: list, losses: dict[str, Tensor], data_time: float) -> Report:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        numbers = (
            self.grad_scaler.scale(torch.ones((), device=self._device)),
            nn.utils.get_total_norm(gradients, inf).float(),
            *losses.values(),
        )
        host = torch.tensor([data_time, float(self.stop_requested)])
        host = host.to(self._device, non_blocking=True)
        rows = gather_rows(torch.cat((host, torch.stack(numbers))))
        return Report(self.iter, batches, losses, rows, None)

    def _to_host(self, report: Report) -> Report:
        """``report`` on its way to pinned memory."""
        if self._copies is None:
            return report
        rows = report.rows.to("cpu", non_blocking=True)
        return report._replace(rows=rows, arrived=torch.cuda.current_stream().record_event())

    def _skip_or_end(self, report: Report) -> None:
        """All processes come here together."""
        found = zip(*comm.all_gather(_describe(report)), strict=True)
        losses, gradients = ("; ".join(filter(None, parts)) for parts in found)
        message = f"iteration {report.iteration}: {losses or gradients}"
        self._skipped += 1
        if self._skipped > self._max_skipped:
            before = f", after {self._max_skipped} skipped ones" if self._max_skipped else ""
            raise InputError(
                f"{message}{before}; look at these images and their boxes, try a lower "
                "SOLVER.BASE_LR, more SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED True, "
                "or allow for some with SOLVER.MAX_SKIPPED_ITERS"
            )
        logger.warning(f"{message}; skipped, {self._skipped} of {self._max_skipped}")
        get_event_storage().put_scalar("skipped_iterations", self._skipped, smoothing_hint=False)


def amp_dtype(precision: str, device: str) -> torch.dtype | None:
    """The type for autocast in ``precision`` on ``device``; None, with a warning, if it has none.

    Raises:
        InputError: an unknown precision.
    """
    if precision == "auto":
        dtype = fastest_dtype(torch.device(device))
        logger.info(f"SOLVER.AMP.PRECISION auto: {str(dtype).removeprefix('torch.')} on {device}")
        return None if dtype is torch.float32 else dtype
    if precision not in AMP_DTYPES:
        raise InputError(
            f"SOLVER.AMP.PRECISION must be one of auto, {', '.join(AMP_DTYPES)}, got {precision!r}"
        )
    if precision == "float16" and device == "cpu":
        logger.warning("AMP is off: float16 is for GPUs; bfloat16 is for GPUs and CPUs")
        return None
    return AMP_DTYPES[precision]


def unwrap_trainer(trainer: TrainerBase) -> StepTrainer:
    """The StepTrainer inside a DefaultTrainer, or ``trainer`` itself."""
    return getattr(trainer, "_trainer", trainer)


@contextlib.contextmanager
def batch_norm_errors() -> Iterator[None]:
    """Rewords torch's error about batch norm of a single value per channel."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise InputError(
            "batch norm needs more than one value per channel, got one image with a feature map of "
            "1x1; raise SOLVER.IMS_PER_BATCH to 2 images per process and batch, or "
            "INPUT.MIN_SIZE_TRAIN, or set MODEL.{FCOS,FPN,RESNETS}.NORM to GN"
        ) from error


def _describe(report: Report) -> tuple[str, str]:
    """What is not finite in this process: losses with their images, if any; gradients."""
    files = ", ".join(str(image.get("file_name", "?")) for b in report.batches for image in b)
    where = f" of process {comm.get_rank()}" if comm.get_world_size() > 1 else ""
    values = {name: loss.item() for name, loss in report.losses.items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not isfinite(value)]
    good = [f"{name} is {value:.4g}" for name, value in values.items() if isfinite(value)]
    losses = f"{', '.join([*bad, *good])} for images{where} {files}" if bad else ""
    return losses, f"gradients are not finite for images{where} {files}"
