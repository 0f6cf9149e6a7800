"""The targets of the design, and whether what was measured meets them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

from summary_results import VERDICTS, Result, malformed, number

GPU_MISSING = "no GPU"
SHAPE_A, SHAPE_B = "B256 d512 L16384 K1000", "B1024 d2048 L65536 K1000"
FUSED = ("triton", "chunked")


@dataclass(frozen=True)
class Target:
    name: str
    target: str
    measured: str
    state: str
    """met, missed, "not measured (why)" or "tested"."""


def all_targets(results: list[Result]) -> list[Target]:
    """Every target of the design in its order; then those that a result states about itself on another device."""
    by_file = {(result.benchmark, result.device): result for result in results}
    kernel_gpu = by_file.get(("loss_kernel", "cuda"))
    kernel_cpu = by_file.get(("loss_kernel", "cpu"))
    targets = [
        *_kernel(kernel_gpu, "shape A", SHAPE_A, speed=3.0, compiled=1.5, roofline=2.5),
        *_kernel(kernel_gpu, "large shape", SHAPE_B, speed=2.0, compiled=1.0, memory=0.1),
        _kernel_error(kernel_gpu),
        _chunked_time(kernel_cpu),
        _loader(by_file.get(("data_pipeline", "cpu")), "cpu", 2.0),
        _loader(by_file.get(("data_pipeline", "cuda")), "gpu", 5.0),
    ]
    step = by_file.get(("training_step", "cuda"))
    if step is not None:
        targets += _stated(step)
    else:
        targets += [_missing(*line, GPU_MISSING) for line in STEP_TARGETS]
    accuracy = [result for result in results if result.benchmark == "accuracy"]
    for result in accuracy:
        targets += _stated(result)
    if not accuracy:
        targets += [_missing(*line) for line in ACCURACY_TARGETS]
    targets.append(Target("restart equals never stopped", "bitwise on a CPU", "tests/train", "tested"))
    for result in results:
        if result.benchmark != "accuracy" and result is not step:
            targets += _stated(result)
    return targets


STEP_TARGETS = [
    ("training step over the plain PyTorch reference, from JPEGs", ">= 4x"),
    ("the same over the step on resident data", ">= 90 %"),
    ("loss and memory: share of the step", "<= 3 %"),
    ("step over student step + teacher forward", "<= 1.05"),
]
ACCURACY_TARGETS = [("KDAV over KD, top-1", ">= 2.0 points"), ("KDAV over SimKD, top-1", ">= 0 points")]


def _missing(name: str, target: str, reason: str = "") -> Target:
    return Target(name, target, "-", f"not measured ({reason})" if reason else "not measured")


def _judged(name: str, target: str, measured: str, met: bool) -> Target:
    return Target(name, target, measured, "met" if met else "missed")


def _stated(result: Result) -> list[Target]:
    """What a result says about its own targets. Of a step on a CPU they are other targets than the design's."""
    judges_design = (result.benchmark, result.device) == ("training_step", "cuda")
    targets = []
    for one in result.data.get("targets") or []:
        measured, target = one["measured"], one["target"]
        measured = (
            number(measured) if isinstance(measured, int | float) or measured is None else str(measured)
        )
        target = f">= {target:g}" if isinstance(target, int | float) else str(target)
        reason = f" ({one['reason']})" if one.get("reason") else ""
        state = VERDICTS[None if one["measured"] is None else one["met"]]
        name = one["name"] if judges_design else f"{one['name']} ({result.name})"
        targets.append(Target(name, target, measured, state if state == "met" else state + reason))
    return targets


def _names_the_file(judge: Callable) -> Callable:
    """Around a function whose first argument is a result or None: what the result lacks becomes an InputError."""

    @wraps(judge)
    def judged(result: Result | None, *arguments, **named):
        try:
            return judge(result, *arguments, **named)
        except (KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise malformed(result.name, result.benchmark, error) from None

    return judged


def _by_shape(result: Result, shape: str) -> dict[str, dict[str, dict]]:
    """Rows of forward and backward together: posterior, then implementation."""
    found: dict[str, dict[str, dict]] = {}
    for row in result.data["rows"]:
        if row["pass"] == "full" and row["shape"].startswith(shape):
            found.setdefault(row["posterior"], {})[row["implementation"]] = row
    return found


def _best(rows: dict[str, dict]) -> dict:
    return min((rows[name] for name in FUSED if name in rows), key=lambda row: row["median_s"])


@_names_the_file
def _kernel(
    result: Result | None,
    label: str,
    shape: str,
    *,
    speed: float,
    compiled: float,
    roofline: float | None = None,
    memory: float | None = None,
) -> list[Target]:
    """The better of the fused implementations against eager torch in the same dtype; the worse of the posteriors."""
    wanted: list[tuple[str, Callable[[dict], float], bool, float]] = [
        ("over eager bf16", lambda r: r["eager bf16"]["median_s"] / _best(r)["median_s"], True, speed),
        ("over torch.compile", lambda r: r["compile"]["median_s"] / _best(r)["median_s"], True, compiled),
    ]
    if roofline is not None:
        wanted.append(("over its roofline", lambda r: _best(r)["times_roofline"], False, roofline))
    if memory is not None:
        share = "peak extra memory over eager's"
        wanted.append((share, lambda r: _best(r)["extra_mib"] / r["eager bf16"]["extra_mib"], False, memory))
    posteriors = _by_shape(result, shape) if result else {}
    targets = []
    for what, value_of, larger, bound in wanted:
        name = f"loss, {label}, {what}"
        text = f"{'>=' if larger else '<='} {bound:g}x"
        if not posteriors:
            targets.append(_missing(name, text, GPU_MISSING if result is None else "shape not in the result"))
            continue
        values = [value_of(rows) for rows in posteriors.values()]
        worst = min(values) if larger else max(values)
        targets.append(_judged(name, text, f"{worst:.2f}x", worst >= bound if larger else worst <= bound))
    return targets


@_names_the_file
def _kernel_error(result: Result | None) -> Target:
    name, text = "loss, bf16 error over eager bf16's", "<= 0.001"
    if result is None:
        return _missing(name, text, GPU_MISSING)
    groups = [rows for shape in (SHAPE_A, SHAPE_B) for rows in _by_shape(result, shape).values()]
    if not groups:
        return _missing(name, text, "shapes not in the result")
    worst = max(_best(r)["gradient_error"] - r["eager bf16"]["gradient_error"] for r in groups)
    return _judged(name, text, f"{worst:+.1e}", worst <= 1e-3)


@_names_the_file
def _chunked_time(result: Result | None) -> Target:
    name, text = "loss on a CPU, chunked over eager, L 65,536", ">= 1x"
    posteriors = _by_shape(result, "B256 d512 L65536") if result else {}
    if not posteriors:
        return _missing(name, text)
    speeds = [rows["eager fp32"]["median_s"] / rows["chunked"]["median_s"] for rows in posteriors.values()]
    extra = max(rows["chunked"]["extra_mib"] for rows in posteriors.values())
    return _judged(name, text, f"{min(speeds):.2f}x ({extra:.0f} MiB extra)", min(speeds) >= 1)


@_names_the_file
def _loader(result: Result | None, decoder: str, bound: float) -> Target:
    name, text = f"DALI decoding on the {decoder.upper()}, over torchvision", f">= {bound:g}x"
    ratio = result and result.data[f"ratio_dali_{decoder}_over_torchvision"]
    if ratio is None:
        return _missing(name, text, GPU_MISSING if decoder == "gpu" else "")
    return _judged(name, text, f"{ratio:.2f}x", ratio >= bound)
