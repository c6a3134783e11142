"""Builds csrc/ into shared libraries inside fcos_d2/; pyproject.toml has all other metadata.

    pip install -e .                      install the package with its libraries
    python setup.py build_ext --inplace   rebuild the libraries, only what changed

The libraries have no Python API: they register operators when `torch.ops.load_library` opens them.
docs/getting_started.md lists the environment variables.
"""

import os
import re
import shutil
import site
import sys
from glob import glob
from importlib.util import find_spec
from subprocess import getoutput

from setuptools import Extension, setup

COMPILER = os.environ.get("CXX", "c++")
# The libraries use the stable ABI of torch 2.10, so every later one loads them too.
# -Wno-psabi: vectors never cross the boundary of a file, so their calling convention is irrelevant.
FLAGS = ["-std=c++20", "-O3", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]

# pip hides the environment's packages. At the end of the path, they do not shadow its setuptools.
for packages in (*site.getsitepackages(), site.getusersitepackages()):
    if find_spec("torch") is None:
        site.addsitedir(packages)
if find_spec("torch") is None:
    raise SystemExit("""fcos_d2 builds against this environment's torch, which is missing. Type:

    pip install torch torchvision
    pip install -e .

If torch is installed but hidden by uv: uv pip install --no-build-isolation -e .""")

# nvcc from CUDA_HOME, from PATH, or from a toolkit that pip installed.
BINS = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
BINS += [os.environ["PATH"], *(b for path in sys.path for b in glob(f"{path}/nvidia/cu*/bin"))]
if NVCC := shutil.which("nvcc", path=os.pathsep.join(BINS)):
    # For cpp_extension, which reads it at import. Only nvcc knows: it may be a link or a wrapper.
    top = re.search(r"(?m)^#\$ TOP=(.+)$", getoutput(f"'{NVCC}' --dryrun -c x.cu"))
    os.environ["CUDA_HOME"] = os.path.realpath(top[1] if top else f"{NVCC}/../..")
os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)  # ninja of an inactive venv

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402


class BuildLibraries(cpp_extension.BuildExtension):
    """Keeps the object files of each library in build/, whichever tool starts the build."""

    def build_extension(self, ext: Extension) -> None:
        """Builds one library without the flags that Python was compiled with."""
        self.compiler.compiler_so = self.compiler.compiler_so_cxx = [COMPILER, "-fPIC"]
        self.compiler.linker_so = self.compiler.linker_so_cxx = [COMPILER, "-shared"]
        self.build_temp = os.path.join("build", ext.name)
        super().build_extension(ext)


def describe_library(name: str, device: str, *libraries: str) -> Extension:
    """Describes fcos_d2/<name>.so, which needs no rpath, as torch is loaded first."""
    return Extension(
        f"fcos_d2.{name}",
        sources=[f"csrc/bindings/{device}.cpp", *sorted(glob(f"csrc/{device}/*.c*"))],
        depends=sorted(glob("csrc/**/*.*", recursive=True)),  # all, for a source distribution
        include_dirs=cpp_extension.include_paths(device),
        library_dirs=cpp_extension.library_paths(device),
        libraries=["torch_cpu", *libraries],
        extra_compile_args={"cxx": FLAGS, "nvcc": ["-std=c++20", "-O3", f"-ccbin={COMPILER}"]},
    )


def cuda_obstacle() -> str | None:
    """Returns why the CUDA library cannot be built, or None if it can."""
    if (cuda := torch.version.cuda) is None:
        return f"torch {torch.__version__} has no CUDA"
    found = re.search(r"release ((\d+)\.\d+)", getoutput(f"'{NVCC}' --version"))
    if found is None:
        return f'nvcc is missing; type: pip install "cuda-toolkit[nvcc,cudart,cccl]=={cuda}.*"'
    difference = f"nvcc is CUDA {found[1]}, torch needs {cuda}; point CUDA_HOME to CUDA {cuda}"
    return None if found[2] == cuda.split(".")[0] else difference


def find_libraries() -> list[Extension]:
    """Lists the libraries that can be built here."""
    if shutil.which(COMPILER) is None:
        sys.stderr.write(f"fcos_d2: no C++ compiler ({COMPILER}): the reference ops will be used\n")
        return []
    libraries, choice = [describe_library("_C", "cpu")], os.environ.get("FCOS_D2_CUDA")
    if (obstacle := cuda_obstacle()) is None and choice != "0":
        if not (os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available()):
            # torch's default needs a GPU. These are all that torch and nvcc support.
            known = getoutput(f"'{NVCC}' --list-gpu-arch").split()
            built = re.findall(r"sm_(\d+)", torch._C._cuda_getArchFlags())
            names = [f"{n[:-1]}.{n[-1]}" for n in built if f"compute_{n}" in known]
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"
        runtime = ("torch_cuda", "cudart_static", "dl", "rt", "pthread")
        libraries.append(describe_library("_C_cuda", "cuda", *runtime))
    elif choice == "1":
        raise SystemExit(f"fcos_d2: no CUDA library: {obstacle}")
    elif choice != "0" and (NVCC or shutil.which("nvidia-smi")):
        sys.stderr.write(f"fcos_d2: no CUDA library: {obstacle}\n")
    return libraries


if __name__ == "__main__":
    build = BuildLibraries.with_options(no_python_abi_suffix=True)
    setup(ext_modules=find_libraries(), cmdclass={"build_ext": build})
