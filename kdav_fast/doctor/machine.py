"""What this machine and this environment offer, which fast paths are on, and what would turn on the rest.

DeepSpeed, timm and torchvision are judged by their package metadata: importing them takes seconds.
"""

import contextlib
import ctypes
import importlib
import io
import os
import platform
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdav_fast.runtime.json_text import json_text
from kdav_fast.runtime.memory_format import SAFE_CHANNELS
from kdav_fast.runtime.precision import SMALLEST_BF16_IMAGE, cpu_has_bf16
from kdav_fast.train.optimizer import APEX_BUILD, APEX_CLASSES

State = Literal["on", "off", "info"]
GIB = 2**30
INSTALL = "pip install 'kdav_fast'"
TORCH_FROM_PYPI = "pip install 'torch>=2.11,<2.13' from PyPI, whose Linux builds have CUDA, nccl and gloo"
# NVIDIA's nvJPEG documentation: A100 and A30, Hopper and data-centre Blackwell have the decoder.
WITH_JPEG_DECODER = {(8, 0), (9, 0), (10, 0), (10, 3)}
# An 8 x 8 grey JPEG: small, and it takes the whole decoding path.
TINY_JPEG = bytes.fromhex(
    f"ffd8ffdb004300{'ff' * 64}ffc0000b080008000801011100ffc400140001{'00' * 16}"
    f"ffc400141001{'00' * 16}ffda0008010100003f003fffd9"
)


@dataclass(frozen=True)
class Finding:
    """One answer. `detail` says what was found, or why it is off; `remedy` what would turn it on."""

    area: str
    name: str
    state: State
    detail: str
    remedy: str = ""


class Off(Exception):  # noqa: N818 - an answer, not an error
    """Raised by a probe: why the thing is off, and what would turn it on."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def diagnose() -> list[Finding]:
    """Examine this process's machine and environment, in a few seconds and without leaving a trace.

    Never raises: a probe that fails is itself a finding that is off, with the exception as its reason.
    """
    findings = []
    for (area, name), probe in PROBES.items():
        remedy = ""
        try:
            with _quiet():
                state, detail = probe()
        except Off as off:
            state, detail, remedy = "off", str(off), off.remedy
        except Exception as error:
            state, detail = "off", f"the check failed: {type(error).__name__}: {_one_line(error)}"
            remedy = f"repair or reinstall what the message names: {INSTALL}"
        findings.append(Finding(area, name, state, detail, remedy))
    return findings


def print_diagnosis(findings: list[Finding], console: Console) -> None:
    """A table on a terminal, one plain line a finding elsewhere."""
    if not console.is_terminal:
        for finding in findings:
            remedy = f" | to turn on: {finding.remedy}" if finding.remedy else ""
            line = f"{finding.state:4} {finding.area} / {finding.name}: {finding.detail}{remedy}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table("area", "what", "state", "found, and what would turn it on", show_lines=True)
    colours = {"on": "green", "off": "yellow", "info": "cyan"}
    for finding in findings:
        remedy = f"\n[bold]to turn on:[/bold] {escape(finding.remedy)}" if finding.remedy else ""
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.area, finding.name, state, escape(finding.detail) + remedy)
    console.print(table)


def diagnosis_json(findings: list[Finding]) -> str:
    """The findings as a JSON list of objects with the fields of `Finding`."""
    return json_text([asdict(finding) for finding in findings], indent=2)


Answer = tuple[State, str]  # what a probe returns: "on" or "info", and the detail


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        yield


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise Off(f"{package} is not installed", INSTALL) from None


def _command(command: str, use: str, package: str) -> Answer:
    path = shutil.which(command)
    if not path:
        raise Off(f"no {command} on PATH; {use}", f"apt-get install {package}")
    return "on", path


def _capability(consequence: str) -> tuple[int, int]:
    """The first GPU's compute capability; where there is none, off with that consequence."""
    if not torch.cuda.is_available():
        raise Off(f"there is no GPU that torch can use; {consequence}", "a GPU; see the finding 'GPU'")
    return torch.cuda.get_device_capability(0)


def _need_capability(least: tuple[int, int], what: str, model: str) -> None:
    found = _capability(what)
    if found < least:
        needed = f"compute capability {least[0]}.{least[1]}"
        raise Off(
            f"{what} needs {needed}, this GPU has {found[0]}.{found[1]}", f"a GPU like {model} or newer"
        )


def _cpu() -> Answer:
    # A container's quota limits the time on the cores; the affinity mask still names all of them.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cgroup_cores()
    limit = f"cgroup limit {quota:.3g} cores" if quota else "no cgroup limit"
    kind = torch.backends.cpu.get_cpu_capability()
    return "info", f"{allowed} of {os.cpu_count()} cores may be used by this process, {limit}; {kind}"


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").split()
    except OSError:
        return []


def _cgroup_cores() -> float | None:
    words = _read("/sys/fs/cgroup/cpu.max")
    if not words:  # cgroup version 1
        words = [
            *_read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
            *_read("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
        ]
    unlimited = len(words) != 2 or words[0] in ("max", "-1")
    return None if unlimited else int(words[0]) / int(words[1])


def _memory() -> Answer:
    words = _read("/proc/meminfo")
    total, free = (int(words[words.index(key) + 1]) * 1024 for key in ("MemTotal:", "MemAvailable:"))
    limit = _read("/sys/fs/cgroup/memory.max") or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    # Without a limit, version 1 names a number far above the machine's memory.
    limited = limit and limit[0] != "max" and int(limit[0]) < total
    end = f"cgroup limit {int(limit[0]) / GIB:.1f} GiB" if limited else "no cgroup limit"
    return "info", f"{free / GIB:.1f} of {total / GIB:.1f} GiB available, {end}"


def _gpu() -> Answer:
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        listed = [f"{g.name}, {g.total_memory / GIB:.0f} GiB, compute {g.major}.{g.minor}" for g in gpus]
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
        reason = _one_line(error)
    if hidden is not None and "No CUDA GPUs" in reason:
        raise Off(f"CUDA_VISIBLE_DEVICES is '{hidden}', which leaves no GPU", "unset CUDA_VISIBLE_DEVICES")
    remedy = f"a driver for CUDA {torch.version.cuda} and a GPU given to this process; see nvidia-smi"
    raise Off(f"torch cannot use the driver: {reason}", remedy)


def _nhwc() -> Answer:
    if torch.cuda.is_available():
        return "on", "on the GPU's matrix units (data.layout)"
    return "on", (
        f"but strided 1x1 convolutions of fewer than {SAFE_CHANNELS} input channels train in NCHW: in NHWC, oneDNN's "
        "backward pass crashes (docs/upstream.md); data.layout=contiguous puts all in NCHW"
    )


def _bf16() -> Answer:
    if torch.cuda.is_available():
        _need_capability((8, 0), "bf16 on the matrix units", "the A100")
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


def _torchvision() -> Answer:
    version = _version("torchvision")
    pins = [r.split(";")[0] for r in metadata.requires("torchvision") or [] if r.startswith("torch==")]
    wanted = pins[0].removeprefix("torch==").strip() if pins else None
    if wanted and wanted != torch.__version__.split("+")[0]:
        found = f"torchvision {version} is built for torch {wanted}, but torch is {torch.__version__}"
        raise Off(found, f"pip install 'torch=={wanted}' 'torchvision=={version}'")
    return "on", version


def _decode_with_dali(device: str) -> None:
    """Decode one image on "cpu" or "mixed" (GPU); raises what DALI raises."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None if device == "cpu" else 0)
    def pipeline():
        encoded = fn.external_source(lambda: [np.frombuffer(TINY_JPEG, np.uint8)])
        return fn.decoders.image(encoded, device=device)

    pipe = pipeline()
    pipe.build()
    pipe.run()


def _dali(device: str, remedy: str) -> Answer:
    try:
        dali = importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise Off(f"nvidia.dali cannot be imported: {error}", f"{INSTALL} on Linux; {remedy}") from None
    if device == "mixed":
        _capability("DALI decodes on the CPU")
    try:
        _decode_with_dali(device)
    except Exception as error:
        raise Off(f"DALI {dali.__version__} cannot decode a JPEG: {_one_line(error)}", remedy) from None
    return "on", f"DALI {dali.__version__} decoded a JPEG"


def _jpeg_decoder() -> Answer:
    found = _capability("it is a part of the GPU")
    written = f"compute capability {found[0]}.{found[1]}"
    if found in WITH_JPEG_DECODER:
        return "on", f"{written} has NVJPG engines, which DALI uses for baseline JPEGs"
    if found < (8, 0) or found == (8, 6):
        raise Off(
            f"{written} has no JPEG engine; the GPU's cores decode", "a GPU like the A100, A30, H100 or newer"
        )
    return "info", f"{written}: whether there is a JPEG engine depends on the model"


def _compiler() -> str:
    path = shutil.which((os.environ.get("CXX", "").split() or ["g++"])[0])
    if not path:
        raise Off("no C++ compiler (g++, or the one that CXX names)", "apt-get install g++, or set CXX")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        remedy = f"apt-get install python{sysconfig.get_python_version()}-dev"
        raise Off("Python's headers (Python.h), which compiled kernels need, are missing", remedy)
    return path


def _triton() -> Answer:
    version = _version("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        found = f"{version}, interpreted (TRITON_INTERPRET=1): right results on any tensor, slowly"
        if torch.cuda.is_available():
            raise Off(found, "unset TRITON_INTERPRET")
        return "info", found
    if not torch.cuda.is_available():
        remedy = "a GPU; to run the kernels on the CPU for their results alone: TRITON_INTERPRET=1"
        raise Off(f"{version} can compile for a GPU, but there is none to run on", remedy)
    _need_capability((7, 0), "Triton", "the V100")
    _compiler()  # for the launchers of its kernels
    return "on", "{}, target sm_{}{}".format(version, *_capability("Triton"))


def _torch_compile() -> Answer:
    if not torch.cuda.is_available():
        return "on", f"for the CPU, with {_compiler()}"
    _need_capability((7, 0), "Triton", "the V100")
    return "on", f"for the GPU, with Triton {_version('triton')} and {_compiler()}"


def _deepspeed_ops() -> Answer:
    compiler = _compiler()
    if not shutil.which("ninja"):
        raise Off("no ninja on PATH", "pip install ninja, with the environment's bin folder on PATH")
    if torch.cuda.is_available() and not shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        found = "no nvcc for the GPU operations (torch's own optimizers do not need it)"
        raise Off(found, f"install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME")
    return "on", f"can be built with {compiler} and ninja"


def _apex() -> Answer:
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
    _capability(f"{present} are built but run on a GPU only")
    return "on", present


def _deepspeed() -> Answer:
    version = _version("deepspeed")
    # The rule of deepspeed.accelerator.get_accelerator() for the devices that this project runs on.
    asked = os.environ.get("DS_ACCELERATOR")
    accelerator = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    backend = {"cuda": "nccl", "cpu": "ccl" if util.find_spec("oneccl_bindings_for_pytorch") else "gloo"}
    if accelerator not in backend:
        raise Off(f"DS_ACCELERATOR is '{asked}'; kdav_fast runs on 'cuda' or 'cpu'", "unset DS_ACCELERATOR")
    source = "by DS_ACCELERATOR" if asked else "detected"
    return "on", f"{version}, accelerator {accelerator} ({source}), backend {backend[accelerator]}"


def _backend(name: str) -> Answer:
    distributed = torch.distributed
    if not distributed.is_available() or not getattr(distributed, f"is_{name}_available")():
        raise Off(f"this torch is built without {name}", TORCH_FROM_PYPI)
    if name == "nccl":
        _capability("processes on the CPU use gloo")
    return "on", "built into torch"


def _nccl_environment() -> Answer:
    found = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("NCCL_")]
    return "info", ", ".join(found) or "no NCCL_* variable is set; NCCL chooses by itself"


def _onnx() -> Answer:
    try:
        return "on", ", ".join(f"{name} {_version(name)}" for name in ("onnx", "onnxscript", "onnxruntime"))
    except Off as off:
        raise Off(str(off), "pip install 'kdav_fast[onnx]'") from None


REMOTE = "the deepspeed launcher needs it to start other nodes; one machine or Slurm does not"
PROBES: dict[tuple[str, str], Callable[[], Answer]] = {
    ("hardware", "CPU"): _cpu,
    ("hardware", "memory"): _memory,
    ("hardware", "GPU"): _gpu,
    ("hardware", "bf16"): _bf16,
    ("hardware", "channels_last"): _nhwc,
    ("libraries", "Python"): lambda: ("info", f"{platform.python_version()} on {platform.platform()}"),
    ("libraries", "torch"): lambda: ("on", f"{torch.__version__}, CUDA build {torch.version.cuda or 'none'}"),
    ("libraries", "torchvision"): _torchvision,
    ("libraries", "timm"): lambda: ("on", _version("timm")),
    ("data", "DALI on the CPU"): lambda: _dali("cpu", "until it works: data.loader=torchvision"),
    ("data", "DALI on the GPU"): lambda: _dali("mixed", "a driver for CUDA 13; until then data.decode=cpu"),
    ("data", "hardware JPEG decoder"): _jpeg_decoder,
    ("kernels", "Triton"): _triton,
    ("kernels", "torch.compile"): _torch_compile,
    ("kernels", "DeepSpeed's compiled operations"): _deepspeed_ops,
    ("kernels", "apex"): _apex,
    ("distributed", "DeepSpeed"): _deepspeed,
    ("distributed", "gloo"): lambda: _backend("gloo"),
    ("distributed", "nccl"): lambda: _backend("nccl"),
    ("distributed", "NCCL environment"): _nccl_environment,
    ("distributed", "pdsh"): lambda: _command("pdsh", REMOTE, "pdsh"),
    ("distributed", "ssh"): lambda: _command("ssh", REMOTE, "openssh-client"),
    ("distributed", "numactl"): lambda: _command("numactl", "only --bind_cores_to_rank needs it", "numactl"),
    ("output", "ONNX export"): _onnx,
    ("output", "TensorBoard"): lambda: ("on", _version("tensorboard")),
}
