"""Measures training and inference, as a whole and part by part.

    fcos-d2 benchmark --config-file FILE [--batch N] [--seconds S] [KEY VALUE ...]
    fcos-d2 benchmark --config-file FILE --size 800 1344      random images: no data needed

Prints a Markdown table that says what each time includes. Times are medians after a warm-up. Set
MODEL.WEIGHTS to trained weights to measure post-processing: an untrained model has no candidates.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch.utils.benchmark import Timer

from ..collect_env import cpu_name
from ..config_file import choose_device, read_cfg
from ..engine import Trainer
from ..engine.step import amp_dtype
from ..errors import InputError, exit_status
from ..inference import accelerated, load_detector
from ..modeling import FCOS
from ..modeling.acceleration import keep_freed_memory
from ..ops import backend
from .arguments import DEFAULT, check_fcos, make_config_parser

BOXES_PER_IMAGE = 7  # in random images; the average of COCO


def parts(
    cfg: CfgNode, model: FCOS, options: argparse.Namespace
) -> Iterator[tuple[str, str, Callable]]:
    """Yields the name, the contents and a call of each part of training and inference.

    Raises:
        InputError: a dataset cannot be read.
    """
    workers, synthetic = f"{cfg.DATALOADER.NUM_WORKERS} workers", options.size is not None
    training = testing = _random_batches(options) if synthetic else None
    if not synthetic:
        training, testing = iter(Trainer.build_train_loader(cfg)), _test_batches(cfg, options.batch)
        reading = f"training: read, augment, batch; {workers}"
        yield "data loading", reading, lambda: next(training)
    step = _training_step(cfg, model, next(training))
    yield "training step", "copy to the device, forward, losses, backward, optimizer", step
    accelerated(cfg, model.eval())
    batch, infer = next(testing), torch.no_grad()(model.__call__)
    network = torch.no_grad()(lambda: model.dense_predictions(batch))
    yield "network", "copy to the device, normalization, backbone, head", network
    outputs = network()
    yield "post-processing", "candidates, decoding, NMS", lambda: model.detect(*outputs)
    yield "inference", "network, post-processing, instances on the host", lambda: infer(batch)
    if not synthetic:
        reading = f"read, resize, inference; {workers}"
        yield "end to end", reading, lambda: infer(next(testing))


def _test_batches(cfg: CfgNode, size: int) -> Iterator[list[dict]]:
    """Yields batches of the first test set, endlessly."""
    if not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST is empty; set it, or pass --size for random images")
    loader = itertools.repeat(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]))
    images = itertools.chain.from_iterable(itertools.chain.from_iterable(loader))
    while True:
        yield list(itertools.islice(images, size))


def _random_batches(options: argparse.Namespace) -> Iterator[list[dict]]:
    """Yields a batch of noise with random boxes of class 0, endlessly."""
    height, width = options.size
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(options.batch, BOXES_PER_IMAGE, 2, 2, generator=generator).sort(dim=2)
    boxes = (corners.values * torch.tensor([width, height])).flatten(2)
    shape = (options.batch, options.channels, height, width)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    batch = [
        {"image": image, "instances": Instances(
            (height, width), gt_boxes=Boxes(box), gt_classes=torch.zeros(len(box)).long()
        )}
        for image, box in zip(images, boxes, strict=True)
    ]  # fmt: skip
    return itertools.repeat(batch)


def _training_step(cfg: CfgNode, model: FCOS, batch: list[dict]) -> Callable:
    model.train()
    amp, device = cfg.SOLVER.AMP, model.device.type
    dtype = amp_dtype(amp.PRECISION, device) if amp.ENABLED else None
    cast = torch.autocast(device, dtype, enabled=dtype is not None)
    optimizer = Trainer.build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # keep the weights, so that every run does the same work

    def step():
        with cast:
            losses = model(batch)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def benchmark(options: argparse.Namespace) -> None:
    """Prints the measurements.

    Raises:
        InputError: the config, the data or the sizes are invalid.
    """
    keep_freed_memory()
    cfg = read_cfg(options.config_file, options.opts)
    choose_device(cfg)
    options.batch = options.batch or cfg.SOLVER.IMS_PER_BATCH
    if options.batch < 1 or options.size is not None and min(options.size) < 1:
        raise InputError(
            f"--batch and --size must be positive, got {options.batch}, {options.size}"
        )
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.GRADIENT_ACCUMULATION = options.batch, 1
    model = load_detector(cfg)
    check_fcos(cfg, model)
    options.channels = len(model.pixel_mean)
    for line in _describe_setup(cfg, options):
        print(line)
    print("\n| part | ms per batch | images per second | includes |\n|---|---|---|---|")
    for name, includes, run in parts(cfg, model, options):
        milliseconds = _milliseconds(run, options.seconds)
        speed = options.batch / milliseconds * 1e3
        print(f"| {name} | {milliseconds:.2f} | {speed:.1f} | {includes} |", flush=True)


def _milliseconds(run: Callable, seconds: float) -> float:
    """Returns the median time of a call; Timer warms up and synchronizes."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    run()
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def _describe_setup(cfg: CfgNode, options: argparse.Namespace) -> Iterator[str]:
    """Yields lines on what the measurements depend on."""
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    kinds = sorted({kernels[device.type.upper()] for kernels in backend().values()})
    yield f"device      {name}"
    yield f"software    torch {torch.__version__}, ops {' and '.join(kinds)}"
    training = f"{cfg.SOLVER.AMP.PRECISION} autocast" if cfg.SOLVER.AMP.ENABLED else "float32"
    yield f"batch       {options.batch} images"
    yield f"precision   {training} (training), {cfg.MODEL.INFERENCE.DTYPE} (inference)"
    if options.size is not None:
        yield f"resolution  {options.size[0]} x {options.size[1]}, random images"
    else:
        train, test = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST
        train = " to ".join(map(str, dict.fromkeys((min(train), max(train)))))
        yield (
            f"resolution  short side {train}, at most {cfg.INPUT.MAX_SIZE_TRAIN} (training); "
            f"{test}, at most {cfg.INPUT.MAX_SIZE_TEST} (testing)"
        )
    yield f"weights     {cfg.MODEL.WEIGHTS or 'random'}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_config_parser(__doc__)
    add = parser.add_argument
    add("--batch", type=int, metavar="N", help="batch size (default: SOLVER.IMS_PER_BATCH)")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="size of random images")
    add("--seconds", type=float, default=5.0, help=f"minimum time of each part {DEFAULT}")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return exit_status(benchmark, parse(arguments))
