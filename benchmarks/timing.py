"""Times, peak memory and the rates of the device, for every benchmark alike."""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

NOISE_LIMIT = 0.1


def quantiles(values: list[float], unit: str = "s") -> dict[str, float]:
    """Median with 20th and 80th percentiles, under keys that end with the unit."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        f"median_{unit}": statistics.median(ordered),
        f"p20_{unit}": ordered[round(0.2 * last)],
        f"p80_{unit}": ordered[round(0.8 * last)],
    }


def widest_spread(rows: list[dict[str, float]], unit: str = "s") -> float:
    """The largest (p80 - p20) / median among rows of `quantiles`: how noisy the machine was. 0 without rows."""
    measured = [row for row in rows if f"median_{unit}" in row]
    return max(
        ((row[f"p80_{unit}"] - row[f"p20_{unit}"]) / row[f"median_{unit}"] for row in measured), default=0.0
    )


def warn_if_noisy(noise: float) -> None:
    """A line on stderr if times spread so widely that a rerun's medians may differ by more than `NOISE_LIMIT`."""
    if noise > NOISE_LIMIT:
        print(
            f"warning: the machine is too noisy: repetitions of the same spread by {noise:.0%} of their median "
            f"({NOISE_LIMIT:.0%} is the limit); measure again on an idle machine",
            file=sys.stderr,
        )


def once(make: Callable[[], Callable[[], object]], device: torch.device) -> float:
    """Seconds of one call of what `make` returns: device events on a GPU, the host's clock elsewhere."""
    function = make()
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    makers: dict[str, Callable[[], Callable[[], object]]],
    device: torch.device,
    seconds: float,
    fewest: int = 7,
) -> dict[str, dict[str, float]]:
    """Times of all in turn, so that what else the machine does falls on each alike.

    Each maker returns the function to time; what the maker itself does is not in the time. What must be compiled or
    allocated first is up to the caller.
    """
    times: dict[str, list[float]] = {name: [] for name in makers}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < fewest:
        for name, make in makers.items():
            times[name].append(once(make, device))
    return {name: quantiles(values) for name, values in times.items()}


def cpu_seconds() -> float:
    """Processor time so far of this process and of its live children."""
    import psutil  # the kernels are also measured where it is not installed

    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children()):
        with suppress(psutil.NoSuchProcess):
            spent = process.cpu_times()
            total += spent.user + spent.system
    return total


def wait_until_idle(most: float = 120.0) -> None:
    """Return when neither this process's threads nor its children work any more.

    Raises:
        RuntimeError: they still do after `most` seconds.
    """
    stop, step = time.monotonic() + most, 0.2
    while time.monotonic() < stop:
        before = cpu_seconds()
        time.sleep(step)
        if cpu_seconds() - before < 0.1 * step:
            return
    raise RuntimeError(f"background work did not end within {most:.0f} s")


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes held during a call beyond those held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        anchor = torch.empty(64)  # so that the record starts with the bytes held before
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = [e["args"]["Total Allocated"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(held) - held[0] + anchor.nbytes


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> dict[str, float]:
    """Rates measured now: FLOP/s of a large matrix product in `dtype`, bytes/s (read plus written) of a copy."""
    size, length = (8192, 2**28) if device.type == "cuda" else (1536, 2**25)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    makers = {"product": lambda: lambda: a @ b, "copy": lambda: lambda: target.copy_(source)}
    for make in makers.values():
        make()()
    times = interleaved(makers, device, seconds, 5)
    return {
        "flops_per_s": 2 * size**3 / times["product"]["median_s"],
        "bytes_per_s": 2 * source.nbytes / times["copy"]["median_s"],
    }
