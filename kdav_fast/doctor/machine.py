"""What this machine and this environment offer, which fast paths are on, and what would turn on the rest."""

import contextlib
import io
import platform
import warnings
from collections.abc import Callable, Iterator

import torch

from kdav_fast.doctor import decoding, distributed, hardware, kernels, packages
from kdav_fast.doctor.findings import Finding
from kdav_fast.doctor.probing import INSTALL, Answer, Off, command, version_of
from kdav_fast.errors import named

_LAUNCHER = "the deepspeed launcher needs it to start other nodes; one machine or Slurm does not"
PROBES: dict[tuple[str, str], Callable[[], Answer]] = {
    ("hardware", "CPU"): hardware.cpu,
    ("hardware", "memory"): hardware.memory,
    ("hardware", "GPU"): hardware.gpu,
    ("hardware", "bf16"): hardware.bf16,
    ("hardware", "channels_last"): hardware.channels_last,
    ("libraries", "Python"): lambda: ("info", f"{platform.python_version()} on {platform.platform()}"),
    ("libraries", "torch"): lambda: ("on", f"{torch.__version__}, CUDA build {torch.version.cuda or 'none'}"),
    ("libraries", "torchvision"): packages.torchvision,
    ("libraries", "timm"): lambda: ("on", version_of("timm")),
    ("data", "DALI on the CPU"): lambda: decoding.dali("cpu", "until it works: data.loader=torchvision"),
    ("data", "DALI on the GPU"): lambda: decoding.dali(
        "mixed", "a driver for CUDA 13; until then data.decode=cpu"
    ),
    ("data", "hardware JPEG decoder"): decoding.jpeg_decoder,
    ("data", "nvJPEG"): decoding.nvjpeg,
    ("kernels", "Triton"): kernels.triton,
    ("kernels", "torch.compile"): kernels.torch_compile,
    ("kernels", "DeepSpeed's compiled operations"): kernels.deepspeed_operations,
    ("kernels", "apex"): kernels.apex,
    ("distributed", "DeepSpeed"): distributed.deepspeed,
    ("distributed", "gloo"): lambda: distributed.backend("gloo"),
    ("distributed", "nccl"): lambda: distributed.backend("nccl"),
    ("distributed", "NCCL environment"): distributed.nccl_environment,
    ("distributed", "pdsh"): lambda: command("pdsh", _LAUNCHER, "pdsh"),
    ("distributed", "ssh"): lambda: command("ssh", _LAUNCHER, "openssh-client"),
    ("distributed", "numactl"): lambda: command("numactl", "only --bind_cores_to_rank needs it", "numactl"),
    ("output", "ONNX export"): packages.onnx,
    ("output", "TensorBoard"): lambda: ("on", version_of("tensorboard")),
}
"""By area and name."""


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
            state, detail = "off", f"the check failed: {named(error)}"
            remedy = f"repair or reinstall what the message names: {INSTALL}"
        findings.append(Finding(area, name, state, detail, remedy))
    return findings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        yield
