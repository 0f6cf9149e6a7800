"""What follows from the rounds of benchmarks/training_step.py: rows, parts of a step, quotients, targets, a table."""

from step_contenders import CACHED, CEILING, FULL, PLAIN, REFERENCES, SLOW, STUDENT, TEACHER
from timing import quantiles, warn_if_noisy, widest_spread

from kdav_fast.train.step import PARTS

SPEED_TARGET = {"cuda": 4.0, "cpu": 1.5}
ALLOWED, ALLOWED_FP32 = 2e-2, 1e-4
"""Relative differences of the first loss from the plain reference's, in half precision and in float32."""


def check(measured: list[dict]) -> list[dict]:
    """Whether all began with the same step; the speed of one that did not means nothing."""
    losses = {
        one["contender"]: one for one in measured if one.get("first_loss") is not None
    }  # a student alone has none
    if PLAIN not in losses:
        return []
    plain, rows = losses[PLAIN]["first_loss"], []
    for name, one in losses.items():
        difference = abs(one["first_loss"] - plain) / abs(plain)
        allowed = ALLOWED_FP32 if one["exact"] else ALLOWED
        row = {"contender": name, "first_loss": one["first_loss"], "relative_difference": difference}
        rows.append(row | {"allowed": allowed, "equal": difference <= allowed})
    return rows


def make_row(start: dict, rounds: list[dict], batch_size: int, on_gpu: bool) -> dict[str, object]:
    """What was measured of one contender."""
    rates = [one["steps"] * batch_size / one["seconds"] for one in rounds]
    resident, extra = start["resident_bytes"] / 2**20, start["step_bytes"] / 2**20
    return {
        "contender": start["contender"],
        **quantiles(rates, "images_per_s"),
        **quantiles([one["seconds"] / one["steps"] for one in rounds], "step_s"),
        "images": sum(one["steps"] for one in rounds) * batch_size,
        "seconds": sum(one["seconds"] for one in rounds),
        "start_up_s": start["start_up_s"],
        "compiled_graphs": start["compiled_graphs"],
        "step_memory_mib": extra,
        "peak_memory_mib": resident + extra if on_gpu else None,
        "rounds_images_per_s": rates,
    }


def breakdown(rounds: list[dict]) -> dict[str, float | None]:
    """Medians over the rounds, in seconds a step."""
    names = [name for name in PARTS if name in rounds[0]["parts"]]
    values = {
        name: quantiles([one["parts"][name] / one["steps"] for one in rounds])["median_s"] for name in names
    }
    others = [(one["seconds"] - sum(one["parts"].values())) / one["steps"] for one in rounds]
    # Of several processes, a profiler would tell it.
    return {**values, "other": quantiles(others)["median_s"], "communication": None}


def summarise(
    measured: list[dict], lacking: dict[str, str], batch_size: int, device: str
) -> dict[str, object]:
    """All that follows.

    Args:
        measured: what was recorded: a start of each contender and its rounds, a finished row, or an error.
        lacking: why others are not measured, by name.
    """
    starts = {one["contender"]: one for one in measured if "first_loss" in one}
    rounds: dict[str, list[dict]] = {}
    for one in measured:
        if "steps" in one:
            rounds.setdefault(one["contender"], []).append(one)
    names = [name for name in starts if name in rounds]
    rows = [make_row(starts[name], rounds[name], batch_size, device == "cuda") for name in names]
    rows += [one for one in measured if "rounds_images_per_s" in one]  # of timm's own program
    by_name = {row["contender"]: row for row in rows}

    def quotient(what: str, over: str, under: str) -> float | None:
        if over not in by_name or under not in by_name:
            return None
        return by_name[over][what] / by_name[under][what]

    parts = {name: breakdown(rounds[name]) for name in (SLOW, FULL, CEILING) if name in by_name}
    loss_share = overhead = overhead_cached = None
    if FULL in by_name:
        loss_share = parts[FULL]["loss"] / by_name[FULL]["median_step_s"]
    if {CEILING, STUDENT, TEACHER} <= by_name.keys():
        without = by_name[STUDENT]["median_step_s"] + by_name[TEACHER]["median_step_s"]
        overhead = by_name[CEILING]["median_step_s"] / without
    if {CACHED, STUDENT} <= by_name.keys():
        overhead_cached = by_name[CACHED]["median_step_s"] / by_name[STUDENT]["median_step_s"]
    ratios = {name: quotient("median_images_per_s", FULL, name) for name in (*REFERENCES, SLOW)}
    share = quotient("median_images_per_s", FULL, CEILING)
    errors = {one["contender"]: one["error"] for one in measured if "error" in one}
    not_measured = lacking | errors
    targets = [
        ("end to end, over reference fp32", ">=", SPEED_TARGET[device], ratios[PLAIN], (FULL, PLAIN)),
        ("share of the synthetic ceiling", ">=", 0.9, share, (FULL, CEILING)),
        ("loss and memory, share of the step", "<=", 0.03, loss_share, (FULL,)),
        ("step over student only and teacher", "<=", 1.05, overhead, (CEILING, STUDENT, TEACHER)),
        (
            "step with the teacher's answers at hand, over student only",
            *("<=", 1.05, overhead_cached, (CACHED, STUDENT)),
        ),
    ]

    def reason(name: str, needed: tuple[str, ...]) -> dict[str, str]:
        why = [f"{who}: {not_measured.get(who, 'not yet')}" for who in needed if who not in by_name]
        return {"reason": "; ".join(why)} if why else _reason(name, device)

    return {
        "first_step": check(measured),
        "rows": rows,
        "not_measured": not_measured,
        "breakdown_s": parts,
        "ratios_kdav_fast_over": ratios,
        "share_of_ceiling": share,
        "loss_share": loss_share,
        "distillation_overhead": overhead,
        "distillation_overhead_with_answers_at_hand": overhead_cached,
        "targets": [judge(*target) | reason(target[0], needed) for *target, needed in targets],
        "noise": widest_spread(rows, "images_per_s"),
    }


def judge(name: str, sign: str, target: float, measured: float | None) -> dict[str, object]:
    """A target's row; of what was not measured, it is not known whether it is met."""
    met = None
    if measured is not None:
        met = measured >= target if sign == ">=" else measured <= target
    return {"name": name, "target": f"{sign} {target:g}", "measured": measured, "met": met}


def _reason(name: str, device: str) -> dict[str, str]:
    """What is known to stand in a target's way."""
    short = "a step of so small networks is short, the loss does not shrink with them"
    known = {
        "share of the synthetic ceiling": "images are decoded on the cores that train",
        "loss and memory, share of the step": short,
        "step over student only and teacher": short,
        "step with the teacher's answers at hand, over student only": short,
    }
    if device == "cpu" and name in known:
        return {"reason": known[name]}
    return {}


def print_table(result: dict) -> None:
    warn_if_noisy(result["noise"])
    for target in result["targets"]:
        measured = "not measured" if target["measured"] is None else f"{target['measured']:.3f}"
        met = {True: "yes", False: "no", None: "-"}[target["met"]]
        print(f"{target['name']:60}{target['target']:>9}{measured:>14}  met: {met}")
    rows = result["rows"]
    wrong = {one["contender"]: one for one in result["first_step"] if not one["equal"]}
    print(
        f"{'contender':56}{'images/s':>10}{'p20':>8}{'p80':>8}{'ratio':>8}{'step ms':>10}{'memory MiB':>12}"
    )
    for row in rows:
        memory = row["step_memory_mib"] if row["peak_memory_mib"] is None else row["peak_memory_mib"]
        memory = "-" if memory is None else f"{memory:.0f}"
        print(
            f"{row['contender']:56}{row['median_images_per_s']:10.1f}{row['p20_images_per_s']:8.1f}"
            f"{row['p80_images_per_s']:8.1f}{row['median_images_per_s'] / rows[0]['median_images_per_s']:8.2f}"
            f"{1e3 * row['median_step_s']:10.1f}{memory:>12}"
        )
        if row["contender"] in wrong:
            print(f"    {said_of(wrong[row['contender']])}")
    for name, reason in result["not_measured"].items():
        print(f"{name:56}not measured: {reason}")


def said_of(first: dict) -> str:
    """Of a row of `check` that is not equal."""
    return (
        f"does not train the same: its first loss is {first['first_loss']:.6f}, the plain reference's differs by "
        f"{first['relative_difference']:.1e}, allowed {first['allowed']:.0e}"
    )
