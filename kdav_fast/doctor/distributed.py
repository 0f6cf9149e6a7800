"""What carries messages between processes, and starts those on other machines."""

import os
from importlib import util

import torch

from kdav_fast.doctor.probing import TORCH_FROM_PYPI, Answer, Off, capability, version_of


def deepspeed() -> Answer:
    """Which device and which backend it takes."""
    version = version_of("deepspeed")
    # The rule of deepspeed.accelerator.get_accelerator() for the devices that this project runs on.
    asked = os.environ.get("DS_ACCELERATOR")
    accelerator = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    backend = {"cuda": "nccl", "cpu": "ccl" if util.find_spec("oneccl_bindings_for_pytorch") else "gloo"}
    if accelerator not in backend:
        raise Off(f"DS_ACCELERATOR is '{asked}'; kdav_fast runs on 'cuda' or 'cpu'", "unset DS_ACCELERATOR")
    source = "by DS_ACCELERATOR" if asked else "detected"
    return "on", f"{version}, accelerator {accelerator} ({source}), backend {backend[accelerator]}"


def backend(name: str) -> Answer:
    """Whether torch has "gloo" or "nccl"."""
    distributed = torch.distributed
    if not distributed.is_available() or not getattr(distributed, f"is_{name}_available")():
        raise Off(f"this torch is built without {name}", TORCH_FROM_PYPI)
    if name == "nccl":
        capability("processes on the CPU use gloo")
    return "on", "built into torch"


def nccl_environment() -> Answer:
    """What is set of NCCL's variables."""
    found = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("NCCL_")]
    return "info", ", ".join(found) or "no NCCL_* variable is set; NCCL chooses by itself"
