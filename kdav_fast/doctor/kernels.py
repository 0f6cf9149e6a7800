"""What compiles and runs kernels: Triton, torch.compile, DeepSpeed's and apex's operations."""

import importlib
import os
import shutil

import torch

from kdav_fast.doctor.probing import Answer, Off, capability, compiler, need_capability, version_of
from kdav_fast.runtime.apex import APEX_BUILD, APEX_CLASSES


def triton() -> Answer:
    """Whether our kernels run."""
    version = version_of("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        found = f"{version}, interpreted (TRITON_INTERPRET=1): right results on any tensor, slowly"
        if torch.cuda.is_available():
            raise Off(found, "unset TRITON_INTERPRET")
        return "info", found
    if not torch.cuda.is_available():
        remedy = "a GPU; to run the kernels on the CPU for their results alone: TRITON_INTERPRET=1"
        raise Off(f"{version} can compile for a GPU, but there is none to run on", remedy)
    need_capability((7, 0), "Triton", "the V100")
    compiler()  # for the launchers of its kernels
    return "on", "{}, target sm_{}{}".format(version, *capability("Triton"))


def torch_compile() -> Answer:
    """Whether torch's compiler does."""
    if not torch.cuda.is_available():
        return "on", f"for the CPU, with {compiler()}"
    need_capability((7, 0), "Triton", "the V100")
    return "on", f"for the GPU, with Triton {version_of('triton')} and {compiler()}"


def deepspeed_operations() -> Answer:
    """Whether DeepSpeed's can be built."""
    built_by = compiler()
    if not shutil.which("ninja"):
        raise Off("no ninja on PATH", "pip install ninja, with the environment's bin folder on PATH")
    if torch.cuda.is_available() and not shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        found = "no nvcc for the GPU operations (torch's own optimizers do not need it)"
        raise Off(found, f"install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME")
    return "on", f"can be built with {built_by} and ninja"


def apex() -> Answer:
    """Which of its optimizers are there, and whether their kernels are."""
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError as error:
        raise Off(f"apex.optimizers cannot be imported: {error}", APEX_BUILD) from None
    present = ", ".join(name for name in APEX_CLASSES.values() if hasattr(optimizers, name))
    if not present:
        raise Off(f"this apex has none of {', '.join(APEX_CLASSES.values())}", APEX_BUILD)
    try:
        importlib.import_module("amp_C")
    except ImportError as error:
        raise Off(f"{present} are present, but not their CUDA kernels: {error}", APEX_BUILD) from None
    capability(f"{present} are built but run on a GPU only")
    return "on", present
