"""A training with the compiled ops and one with the reference see the same losses."""

import json
import math

import pytest

from tests.ops import subprocesses

ITERATIONS = 100
DIGITS = subprocesses.ROOT / "configs" / "digits" / "fcos_R_18_FPN_digits.yaml"
TRAIN = """
import json, sys
import torch
from detectron2.engine import HookBase, default_argument_parser
from fcos_d2 import ops
from fcos_d2.engine import Trainer, setup_cfg

torch.set_num_threads(1)
trainer = Trainer(setup_cfg(default_argument_parser().parse_args(sys.argv[1:])))
curve = []


class Record(HookBase):
    def after_step(self):
        latest = self.trainer.storage.latest()
        curve.append({name: value for name, (value, _) in latest.items() if "loss" in name})


trainer.register_hooks([Record()])
trainer.train()
backend = {kind["CPU"] for kind in ops.backend().values()}
with open("curve.json", "w") as file:
    json.dump({"backend": sorted(backend), "losses": curve}, file)
"""


def losses(folder, library, backend) -> list[dict[str, float]]:
    """All losses of every iteration of a training on the digits."""
    subprocesses.make_package(folder, library, whole=True)
    options = ["SOLVER.MAX_ITER", str(ITERATIONS), "TEST.EVAL_PERIOD", "0", "VIS_PERIOD", "0"]
    done = subprocesses.run_python(
        folder, "-W", "ignore", "-c", TRAIN, "--config-file", str(DIGITS),
        "OUTPUT_DIR", str(folder), "DATASETS.TEST", "()", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((folder / "curve.json").read_text())
    assert result["backend"] == [backend]
    return result["losses"]


@pytest.mark.slow
@pytest.mark.skipif(not subprocesses.BUILT.exists(), reason="nothing is compiled")
def test_losses_of_a_training_do_not_depend_on_the_implementation(tmp_path):
    compiled = losses(tmp_path / "compiled", subprocesses.BUILT, "compiled")
    reference = losses(tmp_path / "reference", None, "reference")
    assert len(compiled) == len(reference) == ITERATIONS
    assert {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "total_loss"} <= set(compiled[0])
    differences = [
        abs(ours[name] - theirs[name]) / abs(theirs[name])
        for ours, theirs in zip(compiled, reference, strict=True)
        for name in ours
    ]
    print(f"largest relative difference of a loss: {max(differences):.2e}")
    assert max(differences) < 1e-4
    first, last = (math.fsum(row["total_loss"] for row in compiled[i : i + 20]) for i in (0, 80))
    assert last < first  # it learns
