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
    step = _by_file(results).get(("training_step", "cuda"))
    targets = design_targets(results)
    for result in results:
        if result.benchmark not in ("accuracy", "reading") and result is not step:
            targets += _stated(result)
    return targets


def design_targets(results: list[Result]) -> list[Target]:
    """A line for every row of the design's figures, measured or not."""
    by_file = _by_file(results)
    kernel_gpu, checked = by_file.get(("loss_kernel", "cuda")), by_file.get(("check", "cuda"))
    targets = [
        *_kernel(kernel_gpu, "shape A", SHAPE_A, eager=EAGER_A, compiled=1.5, roofline=2.5),
        *_kernel(kernel_gpu, "large shape", SHAPE_B, eager=EAGER_B, compiled=1.0, memory=0.1),
        _kernel_error(kernel_gpu),
        _same_bits(kernel_gpu),
        _checks(checked, "loss: every check against float64", False),
        _chunked_time(by_file.get(("loss_kernel", "cpu"))),
        _loader(by_file.get(("data_pipeline", "cpu")), "cpu", 2.0),
        _loader(by_file.get(("data_pipeline", "cuda")), "gpu", 5.0),
    ]
    step = by_file.get(("training_step", "cuda"))
    if step is not None:
        targets += _stated(step)
    else:
        targets += [_missing(*line, GPU_MISSING) for line in STEP_TARGETS]
    targets.append(_checks(checked, "steps without waiting for the device", True))
    reading = [result for result in results if result.benchmark == "reading"]
    for result in reading:
        targets += _stated(result)
    if not reading:
        targets.append(_missing(*READING_TARGET))
    accuracy = [result for result in results if result.benchmark == "accuracy"]
    for result in accuracy:
        targets += _stated(result)
    if not accuracy:
        targets += [_missing(*line) for line in ACCURACY_TARGETS]
    targets.append(
        _method_costs(by_file.get(("method_costs", "cuda")) or by_file.get(("method_costs", "cpu")))
    )
    targets.append(Target("restart equals never stopped", "bitwise on a CPU", "tests/train", "tested"))
    return targets


def _by_file(results: list[Result]) -> dict[tuple[str, str], Result]:
    return {(result.benchmark, result.device): result for result in results}


EAGER_A, EAGER_B = {"ids": 3.0, "dense": 3.0}, {"ids": 2.0, "dense": 1.3}
"""Wanted over eager torch in bf16. At the large shape, 2x of dense posteriors would contradict the memory bound."""
METHODS_TARGET = ("every method: time and memory beside KD's, in one run", "stated")
STEP_TARGETS = [
    ("training step over the plain PyTorch reference, from JPEGs", ">= 4x"),
    ("the same over the step on resident data", ">= 90 %"),
    ("loss and memory: share of the step", "<= 3 %"),
    ("step over student step + teacher forward", "<= 1.05"),
    ("step with a cached teacher over student step", "<= 1.05"),
]
READING_TARGET = ("files read beside a busy main thread, images/s", ">= 15,000")
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
    """Rows of forward and backward together that were measured: posterior, then implementation."""
    found: dict[str, dict[str, dict]] = {}
    for row in result.data["rows"]:
        if row["pass"] == "full" and row["shape"].startswith(shape) and "error" not in row:
            found.setdefault(row["posterior"], {})[row["implementation"]] = row
    return found


def _best(rows: dict[str, dict]) -> dict | None:
    return min((rows[name] for name in FUSED if name in rows), key=lambda row: row["median_s"], default=None)


@_names_the_file
def _kernel(
    result: Result | None,
    label: str,
    shape: str,
    *,
    eager: dict[str, float],
    compiled: float,
    roofline: float | None = None,
    memory: float | None = None,
) -> list[Target]:
    """The better of the fused implementations for each kind of posterior, with its time."""
    wanted: list[tuple[str, str | None, Callable[[dict, dict | None], float], bool, dict[str, float]]] = [
        (
            "over eager bf16",
            "eager bf16",
            lambda best, base: base["median_s"] / best["median_s"],
            True,
            eager,
        ),
        (
            "over torch.compile",
            "compile",
            lambda best, base: base["median_s"] / best["median_s"],
            True,
            dict.fromkeys(eager, compiled),
        ),
    ]
    if roofline is not None:
        bounds = dict.fromkeys(eager, roofline)
        wanted.append(("over its roofline", None, lambda best, base: best["times_roofline"], False, bounds))
    if memory is not None:
        bounds, share = dict.fromkeys(eager, memory), "peak extra memory over eager's"
        wanted.append(
            (share, "eager bf16", lambda best, base: best["extra_mib"] / base["extra_mib"], False, bounds)
        )
    posteriors = _by_shape(result, shape) if result else {}
    targets = []
    for what, rival, value_of, larger, bounds in wanted:
        for posterior, bound in bounds.items():
            name, text = f"loss, {label}, {posterior}, {what}", f"{'>=' if larger else '<='} {bound:g}x"
            rows = posteriors.get(posterior, {})
            best = _best(rows)
            if best is None or (rival is not None and rival not in rows):
                lacking = "fused" if best is None else rival
                reason = GPU_MISSING if result is None else f"no figure of {lacking} in {result.name}"
                targets.append(_missing(name, text, reason))
                continue
            value = value_of(best, rows.get(rival))
            shown = f"{value:.2f}x ({number(1e6 * best['median_s'])} us)"
            targets.append(_judged(name, text, shown, value >= bound if larger else value <= bound))
    return targets


@_names_the_file
def _kernel_error(result: Result | None) -> Target:
    name, text = "loss, bf16 error over eager bf16's", "<= 0.001"
    if result is None:
        return _missing(name, text, GPU_MISSING)
    groups = [rows for shape in (SHAPE_A, SHAPE_B) for rows in _by_shape(result, shape).values()]
    worst = [
        rows[fused]["gradient_error"] - rows["eager bf16"]["gradient_error"]
        for rows in groups
        for fused in FUSED
        if fused in rows and "eager bf16" in rows
    ]
    if not worst:
        return _missing(name, text, "shapes not in the result")
    return _judged(name, text, f"{max(worst):+.1e}", max(worst) <= 1e-3)


@_names_the_file
def _same_bits(result: Result | None) -> Target:
    name, text = "loss: the same bits when called again", "all"
    if result is None:
        return _missing(name, text, GPU_MISSING)
    rows = [row for row in result.data["rows"] if row["implementation"] in FUSED and "same_bits_again" in row]
    same = sum(row["same_bits_again"] for row in rows)
    return _judged(name, text, f"{same} of {len(rows)}", same == len(rows) > 0)


@_names_the_file
def _checks(result: Result | None, name: str, of_steps: bool) -> Target:
    """Of check.py's rows, those of the loss or of training steps."""
    if result is None:
        return _missing(name, "all", GPU_MISSING)
    rows = [row for row in result.data["rows"] if row["what"].startswith("no wait") == of_steps]
    if not rows:
        return _missing(name, "all", "a package that it needs is not installed")
    right = sum(row["right"] for row in rows)
    return _judged(name, "all", f"{right} of {len(rows)}", right == len(rows))


@_names_the_file
def _method_costs(result: Result | None) -> Target:
    if result is None:
        return _missing(*METHODS_TARGET)
    stated, failed = len(result.data["rows"]), len(result.data["not_measured"])
    measured = f"{stated} of {stated + failed} ({result.device})"
    return _judged(*METHODS_TARGET, measured, stated > 1 and not failed)


@_names_the_file
def _chunked_time(result: Result | None) -> Target:
    name, text = "loss on a CPU, chunked over eager, L 65,536", ">= 1x"
    posteriors = _by_shape(result, "B256 d512 L65536") if result else {}
    posteriors = {kind: rows for kind, rows in posteriors.items() if {"eager fp32", "chunked"} <= rows.keys()}
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
        lacking = result.data.get("not_measured", {}).get(f"dali {decoder}", "") if result else ""
        return _missing(name, text, GPU_MISSING if decoder == "gpu" and result is None else lacking)
    return _judged(name, text, f"{ratio:.2f}x", ratio >= bound)
