"""Tests train_net.py with runs of a few iterations on six tiny images, in this process."""

import json
import re
import sys

import pytest
import torch
from detectron2.engine import default_argument_parser

import fcos_d2.commands.train
import train_net
from fcos_d2.data import load_dataset

from .engine.kill_and_resume import find_differences
from .tiny_training import CONFIG, ROOT

pytest_plugins = ["tests.script"]

LAZY_CONFIG = """
from detectron2.config import LazyConfig

cfg = LazyConfig.load("FILE")
model, dataloader, optimizer, lr_multiplier, train = (
    cfg[key] for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train")
)
del cfg
bottom_up = model.backbone.bottom_up
bottom_up.stages.depth, bottom_up.freeze_at, bottom_up.out_features = 18, 0, ["res2", "res3"]
bottom_up.stages.norm = bottom_up.stem.norm = "BN"
del bottom_up.stages.stride_in_1x1, bottom_up
model.backbone.out_channels, model.backbone.top_block = 32, None
model.head_in_features = ["p2", "p3"]
model.head.strides, model.head.num_classes = [4, 8], 2
model.losses.sizes_of_interest = [16]
for part in (dataloader.train, dataloader.test):
    part.dataset.names, part.num_workers, part.mapper.augmentations = "tiny_shapes", 0, []
del part
dataloader.train.total_batch_size = 2
dataloader.evaluator.dataset_name = "tiny_shapes"
optimizer.lr = 0.001
train.output_dir, train.init_checkpoint, train.max_iter = "output", "", 2
train.eval_period, train.log_period = 0, 2
""".replace("FILE", str(ROOT / "configs/lazy/fcos_R_50_FPN_1x.py"))


@pytest.fixture(scope="module")
def trained(tiny_shapes, tmp_path_factory):
    """Trains for two iterations with images for TensorBoard; returns the output folder."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(CONFIG)
    words = ["--config-file", str(folder / "tiny.yaml"), "OUTPUT_DIR", str(folder)]
    args = default_argument_parser().parse_args([*words, "VIS_PERIOD", "1"])
    train_net.main(args)
    return folder


def assert_refused(result, *parts):
    """Asserts that stderr is one line with all of ``parts``, and the status is 2."""
    assert result.status == 2, result.out + result.err
    # torch's remark on a machine with nvcc but no GPU, when detectron2 logs the environment.
    (line,) = [line for line in result.err.splitlines() if "No CUDA runtime is found" not in line]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert "Traceback" not in result.out + result.err


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_training_writes_weights_config_and_metrics(trained):
    assert (trained / "model_final.pth").is_file() and (trained / "config.yaml").is_file()
    last = metrics(trained)[-1]
    assert {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "total_loss", "bbox/AP"} <= {
        key for line in metrics(trained) for key in line
    }
    assert last["iteration"] == 2


def test_terminal_shows_progress_with_rate_and_remaining_time(script, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        result = script("DATASETS.TEST", "()")
    assert re.search(r"100%.*2/2 \[\d\d:\d\d<00:00, .*(it/s|s/it)\]", result.err)
    assert "Starting training from iteration 0" in result.out  # lines are still whole
    result = script("DATASETS.TEST", "()")
    assert result.status == 0 and "2/2" not in result.err


def test_metrics_contain_assignment_statistics(trained):
    (line,) = [line for line in metrics(trained) if "fcos/positives_p2" in line]
    assert line["fcos/positives_p2"] > 0 and line["fcos/positives_p3"] > 0
    assert line["fcos/boxes_without_points"] == 0 and line["fcos/ambiguous_points"] >= 0


def test_vis_period_writes_images_for_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    panels = {"training/ground_truth", "training/assignment", "training/detections"}
    assert panels <= set(tags["images"])
    assert [event.step for event in events.Images("training/assignment")] == [0, 1]
    assert {"total_loss", "fcos/positives_p3"} <= set(tags["scalars"])


def test_eval_only_prints_ap_and_does_not_change_metrics(script, trained):
    before = (trained / "metrics.json").read_text()
    result = script("--eval-only", "MODEL.WEIGHTS", trained / "model_final.pth")
    assert result.status == 0 and "AP50" in result.out
    assert set(result.results[0]["bbox"]) >= {"AP", "AP50", "AP-small"}
    assert (trained / "metrics.json").read_text() == before


@pytest.mark.parametrize(("expected", "status"), [(0.0, 0), (95.0, 1)])
def test_expected_results_determine_the_exit_status(script, trained, expected, status):
    expectation = f'[["bbox", "AP", {expected}, 5.0]]'
    result = script(
        *("--eval-only", "MODEL.WEIGHTS", trained / "model_final.pth"),
        *("TEST.EXPECTED_RESULTS", expectation),
    )
    assert result.status == status
    assert ("verification passed" if status == 0 else "verification failed") in result.out


def test_missing_gpu_is_reported_in_one_line(script, trained, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights = trained / "model_final.pth"
    result = script("--eval-only", "MODEL.WEIGHTS", weights, "SOLVER.AMP.ENABLED", True)
    lines = [line for line in result.out.splitlines() if "no GPU found" in line]
    assert len(lines) == 1
    assert lines[0].endswith("becomes cpu, SOLVER.AMP.ENABLED becomes False")


def test_resume_without_a_checkpoint_starts_from_the_weights(script, trained):
    result = script("--resume", "MODEL.WEIGHTS", trained / "model_final.pth")
    assert result.status == 0 and "Starting training from iteration 0" in result.out


def test_resuming_with_another_optimizer_is_refused(script):
    assert script("SOLVER.OPTIMIZER", "SGD", "SOLVER.MAX_ITER", 1).status == 0
    assert_refused(script("--resume"), "--resume: the checkpoint's optimizer", "MODEL.WEIGHTS")


def test_weights_of_other_classes_initialize_training(script, trained):
    weights = torch.load(trained / "model_final.pth")["model"]
    for name in ("head.cls_logits.weight", "head.cls_logits.bias"):
        weights[name] = weights[name][:1]
    torch.save({"model": weights}, script.folder / "one_class.pth")
    result = script("MODEL.WEIGHTS", "one_class.pth", "SOLVER.MAX_ITER", 1)
    assert result.status == 0
    (line,) = [line for line in result.out.splitlines() if "starts from its initial values" in line]
    assert "has 1 classes and the model 2" in line
    assert_refused(
        script("--eval-only", "MODEL.WEIGHTS", "one_class.pth"),
        *("one_class.pth", "head.cls_logits.weight expected (2, 32, 3, 3), got (1, 32, 3, 3)"),
    )


def test_weights_of_another_shape_are_listed(script, trained):
    result = script("MODEL.WEIGHTS", trained / "model_final.pth", "MODEL.FPN.OUT_CHANNELS", 64)
    assert_refused(result, "model_final.pth do not fit the model", "expected (64, ", "got (32, ")
    assert_refused(result, "more; use the config they were trained with")


def test_missing_weights_are_refused(script):
    result = script("MODEL.WEIGHTS", "nowhere/model_final.pth")
    assert_refused(result, "nowhere/model_final.pth: no such file; set MODEL.WEIGHTS")


def test_missing_config_file_is_refused(script):
    assert_refused(script(config="absent.yaml"), "absent.yaml does not exist", "--config-file")
    assert_refused(script(config="absent.py"), "absent.py does not exist", "--config-file")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("MODEL: {FCOS: {NUM_CLASES: 2}}", ("bad.yaml", "MODEL.FCOS.NUM_CLASES", "did you mean")),
        ("MODEL: {FPN_STRIDES: [8]}", ("MODEL.FPN_STRIDES", "did you mean MODEL.FCOS.FPN_STRIDES")),
        ("SOLVER: {BASE_LR: fast}", ("SOLVER.BASE_LR must be float, got str", "like 0.001")),
        ("SOLVER: {BASE_LR: 1}", ("SOLVER.BASE_LR must be float, got int",)),
        ("SOLVER: 3", ("SOLVER is a section, got int 3",)),
        ("DATASETS: {REGISTER: [1]}", ("DATASETS.REGISTER is a section, got list [1]", ".NAME")),
        ("MODEL: {FCOS: {CONVENTION: yolo}}", ("MODEL.FCOS.CONVENTION", "adelaidet")),
        ("SOLVER: {OPTIMIZER: LION}", ("SOLVER.OPTIMIZER must be SGD or ADAMW, got 'LION'",)),
        ("MODEL:\n  FCOS: [", ("bad.yaml line 2", "correct the YAML")),
        ("- a\n- b", ("bad.yaml", "not a mapping")),
        ("", ("bad.yaml", "not a mapping")),
        ("_BASE_: other.yaml", ("other.yaml", "_BASE_")),
        ("_BASE_: bad.yaml", ("bad.yaml has a circular _BASE_",)),
        ("[" * 3000, ("bad.yaml", "nested too deep")),
        ("OUTPUT_DIR: Wörter", ("bad.yaml: 'utf-8' codec can't decode", "_BASE_ as UTF-8")),
    ],
)
def test_invalid_config_file_is_refused(script, text, parts):
    (script.folder / "bad.yaml").write_text(text, encoding="latin-1")
    assert_refused(script("DATASETS.TRAIN", "('tiny_shapes',)", config="bad.yaml"), *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("SOLVER.BASE_LRR", "1.0"), ("on the command line", "did you mean SOLVER.BASE_LR")),
        (("COMPLETELY.WRONG", "1"), ("COMPLETELY.WRONG", "fcos_d2/config.py")),
        (("SOLVER.MAX_ITER",), ("on the command line", "pairs")),
        (
            ("DATASETS.TEST", "tiny_shapes"),
            ("DATASETS.TEST must be tuple, got str tiny_shapes", "like ('tiny_shapes',)"),
        ),
        (("DATASETS.TRAIN", "('tiny_shape',)"), ("tiny_shape", "did you mean tiny_shapes")),
        (("DATASETS.TRAIN", "()"), ("DATASETS.TRAIN is empty",)),
        (("MODEL.FCOS.NUM_CLASSES", "3"), ("has 2 classes", "MODEL.FCOS.NUM_CLASSES 2")),
        (("MODEL.FCOS.FPN_STRIDES", "[8, 16]"), ("MODEL.FCOS.FPN_STRIDES", "[4, 8]")),
        (("--num-gpus", "64"), ("--num-gpus is 64",)),
        (("OUTPUT_DIR", "tiny.yaml/output"), ("cannot create OUTPUT_DIR tiny.yaml/output",)),
        (("SOLVER.MAX_ITER", "0"), ("SOLVER.MAX_ITER must be at least 1, got 0",)),
        (
            ("SOLVER.BASE_LR", "0.1", "--resume"),
            ("--resume must come before the overrides, got it after SOLVER.BASE_LR",),
        ),
    ],
)
def test_invalid_arguments_are_refused(script, arguments, parts):
    assert_refused(script(*arguments), *parts)


def test_nonfinite_loss_is_reported_with_iteration_losses_and_images(script):
    result = script("SOLVER.BASE_LR", 1e30, "SOLVER.MAX_ITER", 20, "SOLVER.WARMUP_FACTOR", 1.0)
    assert_refused(result, "iteration 1: loss_fcos_", "is nan", ".png", "SOLVER.BASE_LR")


def test_internal_error_has_a_traceback(script, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("fcos_d2.modeling.losses.assign_targets", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        script()


def test_unreadable_image_is_reported(script, monkeypatch):
    def load_invalid_image(names, **options):
        (script.folder / "text.png").write_text("no image")
        return [record | {"file_name": "text.png"} for record in load_dataset(names, **options)]

    monkeypatch.setattr("fcos_d2.engine.trainer.load_dataset", load_invalid_image)
    for workers in (0, 1):
        assert_refused(script("DATALOADER.NUM_WORKERS", workers), "cannot read image", "text.png")


def test_interrupt_exits_without_a_traceback(script, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fcos_d2.commands.train, "setup_cfg", interrupt)
    result = script()
    assert result.status == 130 and "--resume" in result.err


def test_lazy_config_trains_resumes_and_evaluates(script, monkeypatch):
    (script.folder / "tiny.py").write_text(LAZY_CONFIG)
    longer = ("train.max_iter=4", "train.checkpointer.period=2", "train.max_skipped_iters=1")
    longer += ("train.gradient_accumulation=2", "train.model_ema={enabled: True, decay: 0.5}")
    assert script(*longer, config="tiny.py").status == 0
    output = script.folder / "output"
    assert {"loss_fcos_cls", "fcos/positives_p2"} <= {key for m in metrics(output) for key in m}
    first = torch.load(output / "model_final.pth")
    (output / "last_checkpoint").write_text("model_0000001.pth")
    result = script("--resume", *longer, config="tiny.py")
    assert "Starting training from iteration 2" in result.out
    assert find_differences(first, torch.load(output / "model_final.pth")) == []
    weights = "train.init_checkpoint=output/model_final_ema.pth"
    result = script("--eval-only", weights, config="tiny.py")
    assert result.status == 0 and "bbox" in result.results[0]
    weights, average = weights.replace("_ema", ""), "train.model_ema={enabled: True}"
    evaluated = "fcos_d2.engine.lazy._test"
    monkeypatch.setattr(evaluated, lambda cfg, model: model.head.cls_logits.bias.tolist())
    last, averaged = (torch.load(output / f"model_final{x}.pth")["model"] for x in ("", "_ema"))
    for state, options in ((last, ()), (averaged, (average,))):
        result = script("--eval-only", weights, *options, config="tiny.py")
        assert result.results == [state["head.cls_logits.bias"].tolist()]


def test_lazy_loader_without_a_state_resumes_with_a_warning(script):
    loader = "from detectron2.data import build_detection_train_loader\n"
    loader += "dataloader.train._target_ = build_detection_train_loader\n"
    (script.folder / "tiny.py").write_text(LAZY_CONFIG + loader)
    assert script(config="tiny.py").status == 0
    result = script("--resume", "train.max_iter=3", config="tiny.py")
    assert result.status == 0 and "position in the training data is unknown" in result.out


def test_invalid_lazy_config_is_refused(script):
    (script.folder / "bad.py").write_text("model = dict(")
    assert_refused(script(config="bad.py"), "bad.py line 1", "correct the Python")
    (script.folder / "bad.py").write_text("model = dict(a=1)")
    assert_refused(script(config="bad.py"), "bad.py does not define dataloader, lr_multiplier")
    assert_refused(script("train.seed=1", "--resume", config="bad.py"), "--resume must come before")
