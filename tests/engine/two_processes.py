"""Compares training in two processes of torchrun with training in a single process.

Each process first trains alone, then with the other. Prints "agreed" and the rank.
"""

import copy
import logging
import os

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from fcos_d2.engine.distributed import broadcast_buffers, init_torchrun, wrap_ddp
from fcos_d2.engine.step import StepTrainer
from fcos_d2.errors import InputError
from tests.modeling.tiny import sample, tiny_fcos

STEPS, IMAGES = 20, 8
BOXES = [[8.0, 8, 40, 48], [20.0, 4, 60, 30]]


def batches(objects=lambda image: True) -> list[list[dict]]:
    """Returns STEPS batches of IMAGES images, with objects only where ``objects`` is true."""
    torch.manual_seed(5)
    return [
        [
            {**sample(64, 96, BOXES[: 1 + n % 2] if objects(n) else []), "file_name": f"{n}.png"}
            for n in range(IMAGES)
        ]
        for _ in range(STEPS)
    ]


def local_part(whole: list[list[dict]]) -> list[list[dict]]:
    """Returns the images of this process."""
    return [batch[comm.get_rank() :: comm.get_world_size()] for batch in whole]


def train(model, data, accumulation: int = 1, steps: int = STEPS, **options):
    """Returns the losses of every step, gradients of the first, final weights, and the trainer."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.002, momentum=0.9)
    wrapped = wrap_ddp(model, broadcast_buffers=False)
    trainer = StepTrainer(wrapped, data, optimizer, accumulation=accumulation, **options)
    losses, gradients = [], []
    with EventStorage() as storage:
        for trainer.iter in range(steps):
            storage.iter = trainer.iter
            trainer.run_step()
            losses.append({k: v for k, (v, _) in storage.latest().items() if "loss" in k})
            gradients = gradients or [p.grad.clone() for p in model.parameters()]
    return losses, gradients, dict(model.named_parameters()), trainer


def assert_same(together, alone) -> None:
    if comm.is_main_process():  # which logs the losses of both
        for ours, theirs in zip(together[0], alone[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(together[1], alone[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[2], alone[2], rtol=1e-5, atol=1e-5)


def check_nonfinite_images(model) -> None:
    """Checks that both processes report the non-finite images of one."""
    data = local_part(batches())
    if comm.get_rank() == 1:
        data[2][0]["image"] = data[2][0]["image"] * float("inf")
    with pytest.raises(InputError) as caught:
        train(model, data, steps=4)
    message = str(caught.value)
    assert message.startswith("iteration 2: loss_fcos_"), message
    assert "is nan" in message and "process 1" in message and "process 0" not in message
    assert "1.png, 3.png, 5.png, 7.png" in message
    trainer = train(model, data, steps=4, max_skipped=1)[3]
    assert trainer._skipped == 1


def main() -> None:
    """Runs all comparisons."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    torch.manual_seed(1)
    model = tiny_fcos()
    with_objects, without_objects = batches(), batches(lambda image: False)
    even = batches(lambda image: image % 2 == 0)  # those of rank 0
    alone = {"all": train(model, with_objects), "even": train(model, even, steps=4)}

    init_torchrun()
    rank = comm.get_rank()
    assert (comm.get_world_size(), comm.get_local_rank()) == (2, rank)
    assert_same(train(model, local_part(with_objects)), alone["all"])
    assert_same(train(model, local_part(even), steps=4), alone["even"])
    nothing = train(model, local_part(without_objects), steps=2)
    assert comm.is_main_process() is (nothing[0][0].get("loss_fcos_loc") == 0)
    # Accumulating over the same batch twice does not change the result.
    halved = [batch[:4] * 2 for batch in with_objects]
    twice = [batch for batch in halved for _ in range(2)]
    assert_same(
        train(model, local_part(twice), accumulation=2, steps=4),
        train(model, local_part(halved), steps=4),
    )
    check_nonfinite_images(model)

    trainer = train(model, local_part(with_objects), steps=1)[3]
    trainer.stop_requested = rank == 1
    with EventStorage():
        trainer.run_step()
    assert trainer.stopping, "a stop request reaches both processes"
    trainer.gather_rng_states()
    assert len(trainer._rng_states) == (2 if rank == 0 else 0)

    model.pixel_mean.fill_(rank)
    broadcast_buffers(model)
    assert model.pixel_mean.eq(0).all()
    with pytest.raises(InputError, match="SyncBN needs GPUs"):
        wrap_ddp(tiny_fcos(NORM="SyncBN"))
    comm.synchronize()
    dist.destroy_process_group()
    os.write(1, f"agreed {rank}\n".encode())  # a single write, since the other process writes too


if __name__ == "__main__":
    main()
