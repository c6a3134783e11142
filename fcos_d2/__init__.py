"""FCOS for detectron2, with everything that is not a convolution as fused ops.

Importing it registers the model, its backbones and the built-in datasets with detectron2, and does
nothing else. Without detectron2 the ops still work: ``fcos_d2.ops`` needs only torch.
"""

import warnings
from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("detectron2") is None:

    def __getattr__(name: str):
        if name.startswith("__") or name == "ops":  # imported as a submodule then
            raise AttributeError(name)
        raise ImportError(
            f"fcos_d2.{name} needs detectron2, which is not installed; install it with: "
            "python tools/install_detectron2.py"
        )

else:
    with warnings.catch_warnings():
        # Importing detectron2 and fvcore scripts functions.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        import detectron2.modeling  # noqa: F401

    from . import data, model_zoo
    from .config import CONVENTIONS, add_fcos_config, resolve_convention
    from .errors import InputError
    from .modeling import FCOS

    __all__ = [
        "CONVENTIONS",
        "FCOS",
        "InputError",
        "Predictor",
        "add_fcos_config",
        "data",
        "model_zoo",
        "resolve_convention",
    ]

    def __getattr__(name: str):
        if name != "Predictor":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .predictor import Predictor  # imports matplotlib

        return Predictor
