"""Prints information for issue reports: ``python -m fcos_d2.collect_env``.

Reports versions, and which implementation of each op is in use and how it was built. It must work
even if nothing else does, so a section that fails reports its error and does not affect the others.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path


def collect_env_info() -> str:
    """Returns the report as a multi-line string."""
    sections = (_detectron2_report, _package_report, _ops_report)
    return "\n".join(_attempt(section) for section in sections)


def cpu_name() -> str:
    """Returns the model name of the CPU, or its architecture outside Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _attempt(section: Callable[[], str]) -> str:
    try:
        return section().rstrip()
    except Exception as error:
        name = section.__name__.strip("_").replace("_", " ")
        return f"{name} failed: {type(error).__name__}: {error}"


def _detectron2_report() -> str:
    from detectron2.utils.collect_env import collect_env_info as detectron2_info

    return detectron2_info()


def _package_report() -> str:
    from . import __version__

    return f"fcos_d2  {__version__}"


def _ops_report() -> str:
    from . import ops

    lines = [f"fcos_d2.ops  {ops.build_info() or 'no compiled library'}"]
    for name, used in ops.backend().items():
        devices = ", ".join(f"{device} {kind}" for device, kind in used.items())
        lines.append(f"fcos_d2.ops.{name}  {devices}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(collect_env_info())
