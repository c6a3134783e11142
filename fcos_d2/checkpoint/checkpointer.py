"""Loads the weights of any FCOS implementation; refuses a misfit before changing the model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.layers import CNNBlockBase
from torch import nn

from ..config import CONVENTIONS
from ..errors import InputError, format_value, one_line_cause
from ..modeling import FCOS
from .adjustments import CLASS_LAYER, Weights
from .conversion import Recognized, adapt_weights, extract_weights, import_weights
from .reading import check_url, load_safely
from .requirements import Requirements
from .saving import AtomicSaving

MOST_SHOWN = 5  # tensors named in an error; the others are counted
# State that does not affect detections.
NEGLIGIBLE = ("losses.moving_fg", "num_batches_tracked", "pixel_mean", "pixel_std", "cell_anchors")

logger = logging.getLogger(__name__)


Misfit = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, shape in the file, in the model


class Checkpointer(AtomicSaving, DetectionCheckpointer):
    """DetectionCheckpointer that reads any FCOS implementation and refuses weights that do not fit.

    It never runs code from a file. Weights of other implementations are recognized, renamed and
    converted, and one log line reports the config settings that they require.

    With ``reset_class_layer``, the weights initialize a training run: they may be those of a
    backbone alone, or of a detector with another number of classes; the model's class layer then
    keeps its initial values. Otherwise they must match the model completely.

    With ``averaged``, the EMA (MODEL_EMA) is loaded from checkpoints that contain one.
    """

    reset_class_layer = False
    averaged = False
    _recognized: Recognized | None = None

    def load(self, path: str, *args, **kwargs) -> dict:
        """Loads a file or URL; see DetectionCheckpointer.

        Raises:
            InputError: the file is missing, is not a checkpoint, or does not fit. The model stays
                unchanged.
        """
        self._source = path
        check_url(path)
        try:
            return super().load(path, *args, **kwargs)
        except (AssertionError, OSError) as error:
            cause = one_line_cause(error)
            cause = "no such file" if "not found" in cause else cause
            raise InputError(
                f"cannot load weights from {path}: {cause}; set MODEL.WEIGHTS to an existing file"
            ) from error

    def _load_file(self, filename: str) -> dict:
        checkpoint = load_safely(filename)
        layer = self.model.state_dict().get(f"{CLASS_LAYER}weight")
        with self._naming_the_file():
            self._recognized = import_weights(checkpoint, None if layer is None else len(layer))
            if self._recognized:
                return {"model": self._recognized.weights}
            if self.averaged and "ema" in checkpoint:
                return {"model": checkpoint["ema"]}
            if filename.endswith(".pkl") and not {"model", "__author__"} <= set(checkpoint):
                blobs, _ = extract_weights(checkpoint)
                blobs = {key: blob for key, blob in blobs.items() if not key.endswith("_momentum")}
                return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
            if filename.endswith(".pyth"):  # pycls
                return {"model": extract_weights(checkpoint)[0], "matching_heuristics": True}
            return (
                checkpoint if "model" in checkpoint else {"model": extract_weights(checkpoint)[0]}
            )

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(f"weights of {self._source} cannot be used: {error}") from error

    def _load_model(self, checkpoint: dict):
        state = self.model.state_dict()
        with self._naming_the_file():
            weights = extract_weights(checkpoint["model"])[0]
        wrong: list[Misfit] = []
        if checkpoint.pop("matching_heuristics", False) is True:
            caffe2 = checkpoint.get("__author__") == "Caffe2"
            weights = align_and_update_state_dicts(state, weights, c2_conversion=caffe2)
            wrong = _unplaced_by_shape(weights, state)
        weights = adapt_weights(weights, state)
        reset = self._check(weights, state, wrong)
        checkpoint["model"] = {k: v for k, v in weights.items() if k not in reset}
        incompatible = super()._load_model(checkpoint)
        missing = incompatible.missing_keys
        missing[:] = [k for k in missing if k not in reset and not _negligible(k)]
        if self._recognized:
            count = sum(k in state for k in self._recognized.weights) - len(reset)
            line, agrees = self._describe_recognized(f"{count} tensors loaded")
            logger.log(logging.INFO if agrees else logging.WARNING, f"{self._source}: {line}")
        return incompatible

    def _check(self, weights: Weights, state: Weights, wrong: list[Misfit]) -> list[str]:
        """Refuses weights that do not fit; returns the class layer's names if it is reset."""
        names = [name for name, _ in self.model.named_parameters()]
        if names and not set(names) & set(weights) and not wrong:
            found = ", ".join(map(format_value, list(weights)[:2]))
            raise InputError(
                f"{self._source} holds nothing for this model: it has no {names[0]}, but "
                f"{found or 'nothing'}; set MODEL.WEIGHTS to weights of this architecture"
            )
        wrong = wrong + [
            (name, tuple(value.shape), tuple(state[name].shape))
            for name, value in weights.items()
            if name in state and value.shape != state[name].shape
        ]
        reset = self._accept_other_classes(wrong) if self.reset_class_layer else []
        misfits = [
            f"{n} expected {model}, got {file}" for n, file, model in wrong if n not in reset
        ]
        missing = [name for name in state if name not in weights and not _negligible(name)]
        unexpected = [name for name in weights if name not in state and not _negligible(name)]
        faults = [_shorten(misfits)] if misfits else []
        if not misfits and not self.reset_class_layer:
            faults += [f"they lack {_shorten(missing)}"] if missing else []
            faults += [f"they contain unexpected {_shorten(unexpected)}"] if unexpected else []
        if faults:
            advice = (
                "use the config they were trained with, or change MODEL.FCOS.NUM_CLASSES, "
                "MODEL.RESNETS or MODEL.FPN to match"
            )
            if self._recognized:
                advice = self._describe_recognized("and refused")[0]
            raise InputError(
                f"weights of {self._source} do not fit the model: {' and '.join(faults)}; {advice}"
            )
        return reset

    def _accept_other_classes(self, wrong: list[Misfit]) -> list[str]:
        other = [
            (name, file[0], model[0])
            for name, file, model in wrong
            if CLASS_LAYER in name and len(file) == len(model) and file[1:] == model[1:]
        ]
        if other:
            logger.warning(
                f"{self._source} has {other[0][1]} classes and the model {other[0][2]}: "
                f"{CLASS_LAYER}* starts from its initial values, everything else is loaded"
            )
        return [name for name, _, _ in other]

    def _describe_recognized(self, what: str) -> tuple[str, bool]:
        """Returns one line about the weights, and whether the model meets their requirements."""
        name, _, required = self._recognized
        text = f"recognized as {name}, convention {' or '.join(required.conventions)}, {what}; "
        convention, different = differences(self.model, required)
        if self.reset_class_layer:  # reported already
            different.pop("MODEL.FCOS.NUM_CLASSES", None)
        if not different:
            return f"{text}the config agrees with it", True
        changes = {key: f"{a} instead of {b}" for key, (a, b) in different.items()}
        ours = [key for key in changes if key not in required.settings]
        if ours:  # one key sets them all
            whole = ", ".join(f"{key.rpartition('.')[2]} {changes.pop(key)}" for key in ours)
            changes = {"MODEL.FCOS.CONVENTION": f"{convention} ({whole})", **changes}
        return f"{text}set {', '.join(f'{k} {v}' for k, v in changes.items())}", False


def differences(
    model: nn.Module, required: Requirements
) -> tuple[str, dict[str, tuple[object, object]]]:
    """Returns how ``model`` differs from the requirements: convention, {key: (required, in use)}.

    If the weights may follow several conventions, the one closest to the model's is compared.
    """
    if not isinstance(model, FCOS):
        return required.conventions[0], {}
    used = _settings_in_use(model)
    found = []
    for name in required.conventions:
        convention = {f"MODEL.FCOS.{key}": value for key, value in CONVENTIONS[name].items()}
        wanted = {**convention, **required.settings}
        different = {
            key: (wanted[key], used[key])
            for key in sorted(wanted.keys() & used.keys())
            if not _equal(wanted[key], used[key])
        }
        found.append((name, different))
    return min(found, key=lambda pair: len(pair[1]))


def _settings_in_use(model: FCOS) -> dict[str, object]:
    """Reads the settings that affect detections from the model itself, by config key."""
    head, grid, post = model.head, model.grid, model.postprocess
    fcos = {
        "NUM_CLASSES": head.cls_logits.out_channels,
        "USE_RELU": head.use_relu,
        "NORM_REG_TARGETS": head.norm_reg_targets,
        "CENTERNESS_ON_REG": head.quality_on_box_tower,
        "LOCATION_OFFSET": grid.offset,
        "LOCATION_PITCH": grid.pitch,
        "SCORE_RULE": post.selection["score_rule"],
        "INFERENCE_TH_TEST": post.selection["score_threshold"],
        "THRESH_WITH_CTR": post.selection["threshold_with_quality"],
        "RANK_WITH_CTR": post.selection["rank_with_quality"],
        "CLIP_BEFORE_NMS": post.selection["clip"],
        "DROP_EMPTY": post.selection["drop_empty"],
        "PIXEL_EXTENT": post.suppression["pixel_extent"],
        "NMS_TH": post.suppression["iou_threshold"],
    }
    settings = {
        "INPUT.FORMAT": model.input_format,
        "MODEL.PIXEL_MEAN": [round(value, 4) for value in model.pixel_mean.flatten().tolist()],
        "MODEL.PIXEL_STD": [round(value, 4) for value in model.pixel_std.flatten().tolist()],
    }
    for module in model.backbone.modules():
        if isinstance(module, CNNBlockBase) and module.stride == 2 and hasattr(module, "conv3"):
            settings["MODEL.RESNETS.STRIDE_IN_1X1"] = max(module.conv1.stride) == 2
        if type(module).__name__ == "OsaBlock":  # timm's VoVNet; the last block decides
            options = ["residual=True"] if module.residual else []
            settings["MODEL.TIMM.OPTIONS"] = options
    return settings | {f"MODEL.FCOS.{key}": value for key, value in fcos.items()}


def _equal(wanted: object, used: object) -> bool:
    if isinstance(wanted, list) and all(isinstance(value, float) for value in wanted):
        return all(abs(a - b) < 1e-3 for a, b in zip(wanted, used, strict=True))
    return wanted == used


def _unplaced_by_shape(weights: Weights, state: Weights) -> list[Misfit]:
    """Finds tensors that detectron2's name matching skipped only because of their shape."""
    return [
        (name, tuple(value.shape), tuple(state[name].shape))
        for ending, value in weights.items()
        if ending not in state
        for name in state
        if name.endswith(f".{ending}") and name not in weights
    ]


def _negligible(name: str) -> bool:
    return any(part in name for part in NEGLIGIBLE)


def _shorten(names: list[str]) -> str:
    more = len(names) - MOST_SHOWN
    first = ", ".join(map(format_value, names[:MOST_SHOWN]))
    return f"{first}, and {more} more" if more > 0 else first
