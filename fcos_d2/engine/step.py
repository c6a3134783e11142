"""One training iteration: from batches to an optimizer step, without waiting for the GPU."""

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
    """The metrics of an iteration, which may still be on their way from the GPU."""

    iteration: int
    batches: list[list[dict]]
    losses: dict[str, Tensor]  # of this process
    rows: Tensor  # per process: data time, whether to stop, loss scale, largest gradient, losses
    arrived: torch.cuda.Event | None  # None if rows are on the host


class StepTrainer(SimpleTrainer):
    """SimpleTrainer with mixed precision, gradient accumulation, NaN checks and a complete state.

    A non-finite loss or gradient never reaches the weights: GradScaler (with a constant scale of 1
    unless the precision is float16) skips the step. With a fused optimizer, the GPU decides this on
    its own; otherwise the host synchronizes in every iteration. The host reads the metrics of an
    iteration from the GPU after queueing the next one, so losses are written, skipped iterations
    counted and training ended one iteration late, but before anything is saved.

    Args:
        model: returns a dict of losses; DistributedDataParallel in distributed training.
        data_loader: iterable of batches; if it has a ``state_dict``, that is saved too.
        optimizer: updates the parameters of ``model``.
        accumulation: batches per step, whose losses are averaged.
        amp_dtype: torch.float16 (with loss scaling), torch.bfloat16, or None for float32.
        max_skipped: number of iterations with non-finite losses or gradients that are skipped; one
            more ends training.
        settings: settings of the run by config key; ``load_state_dict`` logs which have changed.

    Attributes:
        batches: the batches of the last iteration.
        stop_requested: set to True (by a signal handler) to ask this process to stop.
        stopping: whether any process was asked to stop; turns True on all of them at once.

    Raises:
        InputError: too many iterations are not finite, or batch norm gets a single value.
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
                "float16 weights lose small updates; train float32 weights with "
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
        # Batch norm statistics must not keep a NaN.
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
        # A fused SGD that skips its first step would keep uninitialized momenta.
        if (self._is_deferred and self.optimizer.state) or self.flush():
            self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update(None if self._is_scaled else 1.0)

    def flush(self) -> bool:
        """Writes the losses of the last iteration; returns whether it was finite.

        Waits until the GPU has computed them. All processes must call it together.

        Raises:
            InputError: it was not finite, and no more iterations may be skipped.
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
        # float16 gradients overflow now and then, which is an error only at a loss scale below 1.
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
        """Shuts down the data loader's workers."""
        getattr(self._data_loader_iter, "close", lambda: None)()

    def gather_rng_states(self) -> None:
        """Gathers the RNG states of all processes for ``state_dict``; calls ``flush`` first."""
        self.flush()
        self._rng_states = comm.gather(get_rng_state())

    def state_dict(self) -> dict:
        """Returns everything except the model that is needed to resume training."""
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
        """Loads ``state``, which may be the smaller one of a SimpleTrainer or AMPTrainer.

        Learning rate, weight decay and the like stay those of this run.

        Raises:
            InputError: the state belongs to another optimizer.
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
            logger.warning("the position in the training data is unknown: reshuffling")
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
        """Restores losses, which need an EventStorage, and RNG states, which setup advances."""
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
        """Copies batches to the GPU on a side stream, where they wait for nothing else."""
        if self._copies is None:
            return batches

        def move(sample: dict) -> dict:
            return {k: v.to(self._device) if hasattr(v, "to") else v for k, v in sample.items()}

        with torch.cuda.stream(self._copies):
            batches = [[move(sample) for sample in batch] for batch in batches]
        torch.cuda.current_stream().wait_stream(self._copies)
        return batches  # the report keeps them alive until they are no longer in use

    def _backward(self, batches: list[list[dict]]) -> dict[str, Tensor]:
        """Backpropagates the losses, averaged over the batches, and returns them."""
        mean: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            # Processes reduce gradients once, with the last batch.
            is_alone = number < len(batches) and unwrap_ddp(self.model) is not self.model
            with self.model.no_sync() if is_alone else contextlib.nullcontext():
                autocast = torch.autocast(self._device.type, self._dtype, self._dtype is not None)
                with autocast, batch_norm_errors():
                    losses = self.model(batch)
                losses = {name: loss / len(batches) for name, loss in losses.items()}
                total = sum(losses.values())
                # Times 1, or NaN if it is not finite, which makes all gradients NaN everywhere.
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
        """Starts to copy ``report`` to pinned memory."""
        if self._copies is None:
            return report
        rows = report.rows.to("cpu", non_blocking=True)
        return report._replace(rows=rows, arrived=torch.cuda.current_stream().record_event())

    def _skip_or_end(self, report: Report) -> None:
        """Skips the iteration or ends training; all processes must call it together."""
        found = zip(*comm.all_gather(_describe(report)), strict=True)
        losses, gradients = ("; ".join(filter(None, parts)) for parts in found)
        message = f"iteration {report.iteration}: {losses or gradients}"
        self._skipped += 1
        if self._skipped > self._max_skipped:
            before = f", after skipping {self._max_skipped}" if self._max_skipped else ""
            raise InputError(
                f"{message}{before}; look at these images and their boxes, try a lower "
                "SOLVER.BASE_LR, more SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED True, "
                "or allow some with SOLVER.MAX_SKIPPED_ITERS"
            )
        logger.warning(f"{message}; skipped, {self._skipped} of {self._max_skipped}")
        get_event_storage().put_scalar("skipped_iterations", self._skipped, smoothing_hint=False)


def amp_dtype(precision: str, device: str) -> torch.dtype | None:
    """Returns the autocast dtype for ``precision`` on ``device``; None if autocast stays off.

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
        logger.warning("AMP is off: float16 needs a GPU; bfloat16 also works on CPUs")
        return None
    return AMP_DTYPES[precision]


def unwrap_trainer(trainer: TrainerBase) -> StepTrainer:
    """Returns the StepTrainer inside a DefaultTrainer, or ``trainer`` itself."""
    return getattr(trainer, "_trainer", trainer)


@contextlib.contextmanager
def batch_norm_errors() -> Iterator[None]:
    """Rewords torch's error about batch norm over a single value per channel."""
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
    """Describes non-finite losses of this process ("" if none), and its gradients."""
    files = ", ".join(str(image.get("file_name", "?")) for b in report.batches for image in b)
    where = f" of process {comm.get_rank()}:" if comm.get_world_size() > 1 else ""
    values = {name: loss.item() for name, loss in report.losses.items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not isfinite(value)]
    good = [f"{name} is {value:.4g}" for name, value in values.items() if isfinite(value)]
    losses = f"{', '.join([*bad, *good])} for images{where} {files}" if bad else ""
    return losses, f"gradients are not finite for images{where} {files}"
