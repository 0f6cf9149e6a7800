import ctypes
import importlib.metadata
import io
import json
import os
import shutil
import sys
import sysconfig
import types

import pytest
import torch
from rich.console import Console

from kdav_fast.doctor import Finding, decoding, diagnose, diagnosis_json, hardware, print_diagnosis
from kdav_fast.doctor.machine import PROBES


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No GPU, Python's headers and none of the variables that the doctor reads, wherever the tests run."""
    for key in ("TRITON_INTERPRET", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "Python.h").write_text("")
    get_path = sysconfig.get_path
    headers = str(tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: headers if name == "include" else get_path(name))


def found(name):
    [finding] = [finding for finding in diagnose() if finding.name == name]
    return finding


def fake_gpu(monkeypatch, major, minor, name="Fake GPU"):
    properties = types.SimpleNamespace(name=name, total_memory=80 * 2**30, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (major, minor))
    monkeypatch.setattr(decoding, "decode_with_dali", lambda device: None)


def hide_commands(monkeypatch, *hidden):
    monkeypatch.setattr(shutil, "which", lambda command: None if command in hidden else f"/bin/{command}")


def hide_packages(monkeypatch, *hidden):
    original = importlib.metadata.version

    def version(package):
        if package in hidden:
            raise importlib.metadata.PackageNotFoundError(package)
        return original(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


def assert_complete(findings):
    assert len({(finding.area, finding.name) for finding in findings}) == len(findings) == len(PROBES)
    for finding in findings:
        assert finding.state in ("on", "off", "info")
        assert finding.detail.strip(), finding
        assert "\n" not in finding.detail + finding.remedy, finding
        assert bool(finding.remedy) == (finding.state == "off"), finding


def test_a_machine_without_gpu_gets_a_reason_and_a_remedy_for_everything_off(capfd):
    findings = diagnose()
    assert_complete(findings)
    states = {finding.name: finding.state for finding in findings}
    assert states["GPU"] == states["DALI on the GPU"] == states["nccl"] == states["Triton"] == "off"
    assert states["torch"] == states["gloo"] == states["DALI on the CPU"] == states["DeepSpeed"] == "on"
    assert not [finding for finding in findings if "the check failed" in finding.detail]
    assert capfd.readouterr() == ("", "")
    assert "accelerator cpu (detected), backend gloo" in found("DeepSpeed").detail


@pytest.mark.parametrize("capability", [(6, 0), (7, 0), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_findings_are_complete_on_every_gpu(monkeypatch, capability):
    fake_gpu(monkeypatch, *capability)
    assert_complete(diagnose())


def test_hopper_turns_everything_on(monkeypatch):
    fake_gpu(monkeypatch, 9, 0, "NVIDIA H100")
    hide_commands(monkeypatch)
    assert found("GPU").detail == "2: NVIDIA H100, 80 GiB, compute 9.0; NVIDIA H100, 80 GiB, compute 9.0"
    for name in (
        "GPU",
        "bf16",
        "DALI on the GPU",
        "hardware JPEG decoder",
        "Triton",
        "torch.compile",
        "nccl",
    ):
        assert found(name).state == "on", found(name)
    assert "sm_90" in found("Triton").detail
    assert "accelerator cuda (detected), backend nccl" in found("DeepSpeed").detail


def test_volta_has_neither_bf16_nor_a_jpeg_engine(monkeypatch):
    fake_gpu(monkeypatch, 7, 0)
    assert found("bf16").state == "off"
    assert "needs compute capability 8.0, this GPU has 7.0" in found("bf16").detail
    assert "no JPEG engine" in found("hardware JPEG decoder").detail
    assert found("DALI on the GPU").state == "on"


def test_a_jpeg_engine_that_depends_on_the_model_is_not_promised(monkeypatch):
    fake_gpu(monkeypatch, 8, 9)
    assert found("hardware JPEG decoder").state == "info"
    fake_gpu(monkeypatch, 8, 6)
    assert found("hardware JPEG decoder").state == "off"


@pytest.mark.parametrize(("version", "state"), [("13.3.2.43", "on"), ("13.2.0", "on"), ("13.0.1.86", "off")])
def test_an_old_nvjpeg_leaves_random_crops_to_a_slower_decoder(monkeypatch, version, state):
    monkeypatch.setattr(decoding, "version_of", lambda package: version)
    assert found("nvJPEG").state == state
    assert version in found("nvJPEG").detail
    assert ("data.fancy_upsampling=false" in found("nvJPEG").remedy) == (state == "off")


def test_pascal_is_too_old_for_triton_and_so_for_torch_compile(monkeypatch):
    fake_gpu(monkeypatch, 6, 0)
    assert "7.0" in found("Triton").detail
    assert found("torch.compile").state == "off"


def test_without_gpu_it_tells_build_driver_and_hidden_devices_apart(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert "no NVIDIA driver" in found("GPU").detail
    assert "driver" in found("GPU").remedy

    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    message = "The NVIDIA driver on your system is too old\n(found version 11040)."
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError(message)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "too old (found version 11040)" in found("GPU").detail

    monkeypatch.setattr(
        torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("No CUDA GPUs are available"))
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert found("GPU").remedy == "unset CUDA_VISIBLE_DEVICES"

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in found("GPU").detail
    assert "torch>=" in found("GPU").remedy


def test_no_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for name in ("DALI on the CPU", "DALI on the GPU"):
        assert found(name).state == "off"
        assert "cannot be imported" in found(name).detail
        assert "pip install" in found(name).remedy
    assert "data.loader=torchvision" in found("DALI on the CPU").remedy


def test_dali_that_imports_but_does_not_decode(monkeypatch):
    monkeypatch.setattr(decoding, "TINY_JPEG", b"no image at all")
    finding = found("DALI on the CPU")
    assert finding.state == "off"
    assert "cannot decode a JPEG" in finding.detail
    assert "\n" not in finding.detail


def test_no_compiler(monkeypatch):
    hide_commands(monkeypatch, "g++")
    for name in ("torch.compile", "DeepSpeed's compiled operations"):
        assert found(name).state == "off"
        assert "no C++ compiler" in found(name).detail
    monkeypatch.setenv("CXX", "ccache-c++ -pthread")
    assert found("torch.compile").state == "on"
    assert "/bin/ccache-c++" in found("torch.compile").detail


def test_no_ninja_no_nvcc(monkeypatch):
    hide_commands(monkeypatch, "ninja")
    assert "ninja" in found("DeepSpeed's compiled operations").detail
    assert found("torch.compile").state == "on"
    hide_commands(monkeypatch, "nvcc")
    assert found("DeepSpeed's compiled operations").state == "on"
    fake_gpu(monkeypatch, 9, 0)
    assert "nvcc" in found("DeepSpeed's compiled operations").detail
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert found("DeepSpeed's compiled operations").state == "on"


def test_no_python_headers(monkeypatch, tmp_path):
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in found("torch.compile").detail
    assert "-dev" in found("torch.compile").remedy


def test_launcher_commands(monkeypatch):
    hide_commands(monkeypatch, "pdsh", "numactl", "ssh")
    assert "other nodes" in found("pdsh").detail
    assert found("ssh").remedy == "apt-get install openssh-client"
    assert "--bind_cores_to_rank" in found("numactl").detail


def test_triton_states(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert found("Triton").state == "info"
    fake_gpu(monkeypatch, 9, 0)
    assert found("Triton").remedy == "unset TRITON_INTERPRET"
    hide_packages(monkeypatch, "triton")
    assert found("Triton").detail == found("torch.compile").detail == "triton is not installed"


def test_apex_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    assert found("apex").state == "off"
    assert "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install" in found("apex").remedy


def test_apex_present_in_part(monkeypatch):
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedLAMB = optimizers.FusedNovoGrad = object
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert found("apex").detail.startswith("FusedLAMB, FusedNovoGrad are present, but not their CUDA kernels")
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    assert "run on a GPU only" in found("apex").detail
    fake_gpu(monkeypatch, 9, 0)
    assert (found("apex").state, found("apex").detail) == ("on", "FusedLAMB, FusedNovoGrad")
    del optimizers.FusedLAMB, optimizers.FusedNovoGrad
    assert "none of FusedLAMB" in found("apex").detail


def test_packages(monkeypatch):
    hide_packages(monkeypatch, "onnxscript", "timm", "tensorboard", "deepspeed", "torchvision")
    assert found("ONNX export") == Finding(
        "output", "ONNX export", "off", "onnxscript is not installed", "pip install 'kdav_fast[onnx]'"
    )
    for name in ("timm", "TensorBoard", "DeepSpeed", "torchvision"):
        assert found(name).state == "off"
        assert "is not installed" in found(name).detail


def test_torchvision_of_another_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: ["numpy", "torch==2.12.1"])
    assert "built for torch 2.12.1, but torch is 2.11.0+cu130" in found("torchvision").detail
    assert "torch==2.12.1" in found("torchvision").remedy
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    assert found("torchvision").state == "on"


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    assert "NCCL_SOCKET_IFNAME=eth0" in found("NCCL environment").detail
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert "accelerator cuda (by DS_ACCELERATOR), backend nccl" in found("DeepSpeed").detail
    monkeypatch.setenv("DS_ACCELERATOR", "hpu")
    assert found("DeepSpeed").remedy == "unset DS_ACCELERATOR"


@pytest.mark.parametrize(
    ("files", "detail"),
    [
        ({"/sys/fs/cgroup/cpu.max": ["150000", "100000"]}, "cgroup limit 1.5 cores"),
        ({"/sys/fs/cgroup/cpu.max": ["max", "100000"]}, "no cgroup limit"),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": ["400000"],
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": ["100000"],
            },
            "cgroup limit 4 cores",
        ),
        ({}, "no cgroup limit"),
    ],
)
def test_cores_of_a_container(monkeypatch, files, detail):
    monkeypatch.setattr(hardware, "words_of", lambda path: files.get(path, []))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 4}, raising=False)
    assert found("CPU").detail.startswith("3 of ")
    assert detail in found("CPU").detail


def test_memory_of_a_container(monkeypatch):
    files = {"/proc/meminfo": ["MemTotal:", "8388608", "kB", "MemAvailable:", "4194304", "kB"]}
    monkeypatch.setattr(hardware, "words_of", lambda path: files.get(path, []))
    assert found("memory").detail == "4.0 of 8.0 GiB available, no cgroup limit"
    files["/sys/fs/cgroup/memory.max"] = [str(2 * 2**30)]
    assert "cgroup limit 2.0 GiB" in found("memory").detail
    files["/sys/fs/cgroup/memory.max"] = ["9223372036854771712"]
    assert "no cgroup limit" in found("memory").detail


def test_a_probe_that_fails_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken():
        print("noise")
        raise KeyError("two\nlines")

    monkeypatch.setitem(PROBES, ("hardware", "CPU"), broken)
    findings = diagnose()
    assert_complete(findings)
    assert findings[0].state == "off"
    assert "the check failed: KeyError" in findings[0].detail


FINDINGS = [
    Finding("data", "A", "off", "why [not] a tag " + "long " * 40, "pip install 'kdav_fast[onnx]'"),
    Finding("data", "B", "on", "1.0"),
]


def test_plain_text_has_one_line_a_finding():
    file = io.StringIO()
    print_diagnosis(FINDINGS, Console(file=file, width=60))
    first, second = file.getvalue().splitlines()
    assert first.startswith("off  data / A: why [not] a tag long")
    assert first.endswith("| to turn on: pip install 'kdav_fast[onnx]'")
    assert second == "on   data / B: 1.0"


def test_a_terminal_gets_a_table_that_keeps_square_brackets():
    file = io.StringIO()
    print_diagnosis(FINDINGS, Console(file=file, width=160, force_terminal=True))
    assert "│" in file.getvalue()
    assert "why [not] a tag" in file.getvalue()
    assert "kdav_fast[onnx]" in file.getvalue()
    assert "\x1b[" in file.getvalue()


def test_json_has_every_field():
    assert json.loads(diagnosis_json(FINDINGS))[1] == {
        "area": "data",
        "name": "B",
        "state": "on",
        "detail": "1.0",
        "remedy": "",
    }
    assert len(json.loads(diagnosis_json(diagnose()))) == len(PROBES)
