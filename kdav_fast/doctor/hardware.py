"""Cores, memory, GPUs, and what number formats and layouts they are fast in."""

import ctypes
import os
from pathlib import Path

import torch

from kdav_fast.doctor.probing import TORCH_FROM_PYPI, Answer, Off, need_capability
from kdav_fast.errors import one_line
from kdav_fast.runtime.memory_format import SAFE_CHANNELS
from kdav_fast.runtime.precision import SMALLEST_BF16_IMAGE, cpu_has_bf16

_GIB = 2**30


def cpu() -> Answer:
    """How many cores this process may use."""
    # A container's quota limits the time on the cores; the affinity mask still names all of them.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cgroup_cores()
    limit = f"cgroup limit {quota:.3g} cores" if quota else "no cgroup limit"
    kind = torch.backends.cpu.get_cpu_capability()
    return "info", f"{allowed} of {os.cpu_count()} cores may be used by this process, {limit}; {kind}"


def memory() -> Answer:
    """What is free, and the container's limit."""
    words = words_of("/proc/meminfo")
    total, free = (int(words[words.index(key) + 1]) * 1024 for key in ("MemTotal:", "MemAvailable:"))
    limit = words_of("/sys/fs/cgroup/memory.max") or words_of("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    # Without a limit, version 1 names a number far above the machine's memory.
    limited = limit and limit[0] != "max" and int(limit[0]) < total
    end = f"cgroup limit {int(limit[0]) / _GIB:.1f} GiB" if limited else "no cgroup limit"
    return "info", f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB available, {end}"


def gpu() -> Answer:
    """What torch sees, or what is in its way."""
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        listed = [f"{g.name}, {g.total_memory / _GIB:.0f} GiB, compute {g.major}.{g.minor}" for g in gpus]
        return "on", f"{len(gpus)}: " + "; ".join(listed)
    if torch.version.cuda is None:
        raise Off(f"torch {torch.__version__} is built without CUDA", TORCH_FROM_PYPI)
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        remedy = f"an NVIDIA GPU and its driver for CUDA {torch.version.cuda}; in a container: --gpus all"
        raise Off("no NVIDIA driver here (libcuda.so.1 is absent)", remedy) from None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        torch.cuda.init()
        reason = "no reason given"
    except RuntimeError as error:
        reason = one_line(error)
    if hidden is not None and "No CUDA GPUs" in reason:
        raise Off(f"CUDA_VISIBLE_DEVICES is '{hidden}', which leaves no GPU", "unset CUDA_VISIBLE_DEVICES")
    remedy = f"a driver for CUDA {torch.version.cuda} and a GPU given to this process; see nvidia-smi"
    raise Off(f"torch cannot use the driver: {reason}", remedy)


def bf16() -> Answer:
    """Whether bf16 is arithmetic here or emulation."""
    if torch.cuda.is_available():
        need_capability((8, 0), "bf16 on the matrix units", "the A100")
        return "on", "the GPU's matrix units take bf16"
    if cpu_has_bf16():
        kind = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512"
        return "on", (
            f"the CPU has bf16 instructions ({kind}); train.precision=auto takes bf16 for images of "
            f"{SMALLEST_BF16_IMAGE} pixels or more, where it was faster (docs/precision.md), and fp32 below"
        )
    raise Off(
        "this CPU has no bf16 instructions and would emulate it", "a GPU; until then train.precision=fp32"
    )


def channels_last() -> Answer:
    """Where networks train in NHWC."""
    if torch.cuda.is_available():
        return "on", "on the GPU's matrix units (data.layout)"
    return "on", (
        f"but strided 1x1 convolutions of fewer than {SAFE_CHANNELS} input channels train in NCHW: in NHWC, oneDNN's "
        "backward pass crashes (docs/upstream.md); data.layout=contiguous puts all in NCHW"
    )


def words_of(path: str) -> list[str]:
    """Of a file of the system; none if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").split()
    except OSError:
        return []


def _cgroup_cores() -> float | None:
    words = words_of("/sys/fs/cgroup/cpu.max")
    if not words:  # cgroup version 1
        words = [
            *words_of("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
            *words_of("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
        ]
    unlimited = len(words) != 2 or words[0] in ("max", "-1")
    return None if unlimited else int(words[0]) / int(words[1])
