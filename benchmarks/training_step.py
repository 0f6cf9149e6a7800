"""How many images a second are distilled, from JPEG files to the optimizer's step: plain PyTorch and kdav_fast.

    python benchmarks/training_step.py [--root FOLDER] [--device cpu|cuda] [--json FILE] [--plot FILE]

The contenders run one recipe (KDAV; launch/imagenet_resnet34_resnet18.yaml at these sizes) on the same images and
cores, from the same weights: the reference three ways, kdav_fast in float32, kdav_fast with what makes it fast
(`FAST` in step_contenders.py), and the latter on one batch that lies on the device, the ceiling. A student that learns
from labels, and the teacher alone, show what distillation adds. Before anything is timed, all take their first step
on the same batch, and their losses must be equal.

They are measured in turn, a few seconds each. Nothing that lay ready counts, and no loader works in another's time:

- Between two rounds nobody asks for batches, so that every loader fills its queue and then stands still. The next
  round begins only when the process and its workers use no more processor time.
- A round begins by taking the batches that lay ready without training on them. Then it takes a few steps before the
  clock starts, in which a loader that is faster than the steps gets ahead again, as it would be in the middle of a
  long run, and one that is slower stays behind. Where the two are about equal, the queue is still filling while the
  clock runs: that errs against the contender, never in its favour.
- DataLoader's workers make a batch each, which come together: a round is a whole number of such groups.

Files come from the system's cache: they are read once beforehand. Without --root they are made: noise with the size
of photographs. The parts of a step are device time between events on a GPU, the host's on a CPU; "other" is what
lies between them: the training meter, and on a GPU waiting for the host. DALI's own memory is not in the figures of
memory. With --timm FOLDER, a checkout of huggingface/pytorch-image-models, its train.py runs afterwards, alone, on
the same files and networks (timm_peer.py). One process only: torchrun and the launchers of DeepSpeed are refused, and
the time of communication is null.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from command_line import Parser, check_device, default_device, positive, result_files
from data_pipeline import open_set, pin, read_once
from environment import describe
from step_contenders import (
    CEILING,
    CONTENDERS,
    FAST,
    FULL,
    PLAIN,
    REFERENCES,
    SLOW,
    STUDENT,
    TEACHER,
    Builder,
    Contender,
    run_round,
)
from step_images import link_tree, make_photographs, make_recipe, override_recipe
from step_plot import plot
from timing import quantiles, warn_if_noisy, widest_spread
from timm_peer import PEERS, run_peer, why_not

from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_whole
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.train.step import PARTS

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "triton", "numpy")
FEWEST = 3
"""Rounds of each contender."""
PRESETS = {
    "cuda": {
        "teacher": "timm:resnet34",
        "student": "timm:resnet18",
        "image_size": 224,
        "batch_size": 256,
        "classes": 1000,
        "memory_length": 16384,
        "posterior": "ids",
        "images": 500,
        "seconds": 16.0,
        "round_seconds": 2.0,
    },
    "cpu": {
        "teacher": "cifar:resnet14",
        "student": "cifar:resnet8",
        "image_size": 64,
        "batch_size": 32,
        "classes": 100,
        "memory_length": 4096,
        "posterior": "dense",
        "images": 300,
        "seconds": 15.0,
        "round_seconds": 3.0,
    },
}
PEER_STEPS = 500
"""Of an epoch of timm's train.py, more than are measured: its workers start anew with every epoch."""
SPEED_TARGET = {"cuda": 4.0, "cpu": 1.5}
ALLOWED, ALLOWED_FP32 = 2e-2, 1e-4
"""Relative differences of the first loss from the plain reference's, in half precision and in float32."""


def check(losses: dict[str, float], exact: set[str]) -> list[dict]:
    """That all began with the same step, of which `exact` took it in float32.

    Raises:
        AssertionError: one did not, which makes its speed meaningless.
    """
    rows = []
    for name, loss in losses.items():
        difference = abs(loss - losses[PLAIN]) / abs(losses[PLAIN])
        allowed = ALLOWED_FP32 if name in exact else ALLOWED
        rows.append(
            {"contender": name, "first_loss": loss, "relative_difference": difference, "allowed": allowed}
        )
        if not difference <= allowed:
            raise AssertionError(
                f"{name} has loss {loss:.6f} on the first batch and {PLAIN} has {losses[PLAIN]:.6f}: relative "
                f"difference {difference:.1e}, allowed {allowed:.0e}; they do not train the same"
            )
    return rows


def measure(contenders: list[Contender], options: argparse.Namespace, builder: Builder) -> None:
    """Rounds of all in turn."""
    rounds = max(FEWEST, round(options.seconds / options.round_seconds))
    for number in range(1, rounds + 1):
        for contender in contenders:
            contender.rounds.append(run_round(contender, options.round_seconds, builder))
        rates = ", ".join(f"{c.name} {_rates(c, options.batch_size)[-1]:.0f}" for c in contenders)
        print(f"round {number} of {rounds}: {rates} images/s", flush=True)


def _rates(contender: Contender, batch_size: int) -> list[float]:
    return [one.steps * batch_size / one.seconds for one in contender.rounds]


def make_row(contender: Contender, batch_size: int, on_gpu: bool) -> dict[str, object]:
    """What was measured of one contender."""
    steps = [one.seconds / one.steps for one in contender.rounds]
    rates = _rates(contender, batch_size)
    resident = contender.resident_bytes / 2**20
    extra = contender.step_bytes / 2**20
    return {
        "contender": contender.name,
        **quantiles(rates, "images_per_s"),
        **quantiles(steps, "step_s"),
        "images": contender.total("steps") * batch_size,
        "seconds": contender.total("seconds"),
        "start_up_s": contender.start_up_s,
        "compiled_graphs": contender.compiled_graphs,
        "step_memory_mib": extra,
        "peak_memory_mib": resident + extra if on_gpu else None,
        "rounds_images_per_s": rates,
    }


def breakdown(contender: Contender) -> dict[str, float | None]:
    """Medians over the rounds, in seconds a step."""
    rounds = contender.rounds
    names = [name for name in PARTS if name in rounds[0].parts]
    values = {name: quantiles([one.parts[name] / one.steps for one in rounds])["median_s"] for name in names}
    others = [(one.seconds - sum(one.parts.values())) / one.steps for one in rounds]
    # Of several processes, a profiler would tell it.
    return {**values, "other": quantiles(others)["median_s"], "communication": None}


def summarise(contenders: list[Contender], options: argparse.Namespace) -> dict[str, object]:
    """Rows, parts of a step, quotients of medians and targets."""
    on_gpu = options.device == "cuda"
    rows = [make_row(contender, options.batch_size, on_gpu) for contender in contenders]
    by_name = {row["contender"]: row for row in rows}

    def quotient(what: str, over: str, under: str) -> float | None:
        if over not in by_name or under not in by_name:
            return None
        return by_name[over][what] / by_name[under][what]

    parts = {c.name: breakdown(c) for c in contenders if c.name in (SLOW, FULL, CEILING)}
    loss_share = overhead = None
    if FULL in by_name:
        loss_share = parts[FULL]["loss"] / by_name[FULL]["median_step_s"]
    if CEILING in by_name:
        without = by_name[STUDENT]["median_step_s"] + by_name[TEACHER]["median_step_s"]
        overhead = by_name[CEILING]["median_step_s"] / without
    ratios = {name: quotient("median_images_per_s", FULL, name) for name in (*REFERENCES, SLOW)}
    share = quotient("median_images_per_s", FULL, CEILING)
    targets = [
        ("end to end, over reference fp32", ">=", SPEED_TARGET[options.device], ratios[PLAIN]),
        ("share of the synthetic ceiling", ">=", 0.9, share),
        ("loss and memory, share of the step", "<=", 0.03, loss_share),
        ("step over student only and teacher", "<=", 1.05, overhead),
    ]
    return {
        "rows": rows,
        "breakdown_s": parts,
        "ratios_kdav_fast_over": ratios,
        "share_of_ceiling": share,
        "loss_share": loss_share,
        "distillation_overhead": overhead,
        "targets": [judge(*target) | _reason(target[0], options.device) for target in targets],
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
    }
    if device == "cpu" and name in known:
        return {"reason": known[name]}
    return {}


def print_table(result: dict) -> None:
    warn_if_noisy(result["noise"])
    for target in result["targets"]:
        measured = "not measured" if target["measured"] is None else f"{target['measured']:.3f}"
        met = {True: "yes", False: "no", None: "-"}[target["met"]]
        print(f"{target['name']:38}{target['target']:>9}{measured:>14}  met: {met}")
    rows = result["rows"]
    print(
        f"{'contender':39}{'images/s':>10}{'p20':>8}{'p80':>8}{'ratio':>8}{'step ms':>10}{'memory MiB':>12}"
    )
    for row in rows:
        memory = row["step_memory_mib"] if row["peak_memory_mib"] is None else row["peak_memory_mib"]
        memory = "-" if memory is None else f"{memory:.0f}"
        print(
            f"{row['contender']:39}{row['median_images_per_s']:10.1f}{row['p20_images_per_s']:8.1f}"
            f"{row['p80_images_per_s']:8.1f}{row['median_images_per_s'] / rows[0]['median_images_per_s']:8.2f}"
            f"{1e3 * row['median_step_s']:10.1f}{memory:>12}"
        )


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, seconds = positive(int), positive(float)
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add(
        "--device",
        choices=tuple(PRESETS),
        default=default_device(),
        help="and the preset of sizes (%(default)s)",
    )
    add("--root", type=Path, help="data set with train/CLASS/IMAGE, or a folder of class folders")
    add("--contenders", nargs="+", metavar="NAME", default=CONTENDERS, help=f"of {', '.join(CONTENDERS)}")
    add("--fast", nargs="+", metavar="KEY=VALUE", default=(), help="besides FAST, or against it")
    add("--teacher", help="network, such as timm:resnet34; its weights are random")
    add("--student", help="network")
    add("--image-size", type=count, help="side of the square in pixels")
    add("--batch-size", type=count, help="images a step")
    add("--classes", type=count, help="over which the images are spread, whatever they show")
    add("--memory-length", type=count, help="of the objective")
    add("--posterior", choices=("dense", "ids"), help="what the memory keeps")
    add("--images", type=count, help="different files, or fewer where --root has no more")
    add("--timm", type=Path, help="checkout of huggingface/pytorch-image-models, whose train.py takes part")
    add("--cores", type=int, default=cores, help="for each contender, with as many workers (%(default)s)")
    add("--seconds", type=seconds, help=f"that each is measured, and {FEWEST} rounds at least")
    add("--round-seconds", type=seconds, help="of one contender's turn")
    add("--json", type=Path, help="result (benchmarks/results/training_step_DEVICE.json)")
    add("--plot", type=Path, help="picture (beside the result)")
    presets = (f"{device}: {', '.join(f'{k} {v}' for k, v in p.items())}" for device, p in PRESETS.items())
    parser.epilog = "presets:\n" + "\n".join(presets)
    return parser


def measure_peers(options: argparse.Namespace, tree: Path) -> list[dict[str, object]]:
    """Rows of timm's own program; none, and a line that says why, where it cannot take part."""
    reason = why_not(options.timm, options.teacher, options.student)
    if reason:
        print(reason, flush=True)
        return []
    sizes = {name: getattr(options, name) for name in PRESETS[options.device]}
    return [
        run_peer(name, options.timm, tree, sizes, options.device, options.cores, options.seconds)
        for name in PEERS
    ]


def check_options(options: argparse.Namespace) -> None:
    """Fill in the preset; raises InputError for what cannot be measured."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; this benchmark is one process: use python"
        )
    check_device(options.device)
    for name, value in PRESETS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in options.contenders:
        if name not in CONTENDERS:
            raise InputError(f"--contenders has '{name}'; allowed: {', '.join(map(repr, CONTENDERS))}")
    for override in options.fast:
        if "=" not in override:
            raise InputError(f"--fast has '{override}'; give KEY=VALUE, such as model.compile=false")
    why_not(options.timm, options.teacher, options.student)
    options.json, options.plot = result_files(options, "training_step")


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure and write; raises InputError for what the user can mend."""
    check_options(options)
    if options.root is None:
        print(f"making {options.images} photographs", flush=True)
    root = options.root or make_photographs(folder / "files", options.images)
    read = read_once(open_set(root, options.images))
    sizes = {name: getattr(options, name) for name in PRESETS[options.device]}
    tree = link_tree(folder / "tree", root, max(options.images, options.batch_size), options.classes)
    config = make_recipe(folder, tree, {**sizes, "device": options.device})
    fast = FAST | dict(override.split("=", 1) for override in options.fast)
    fast_config = override_recipe(config, fast)
    pin(options.cores)
    cluster = start_cluster(options.device)
    environment = describe(cluster.device, PACKAGES) | {"cores": options.cores}
    settings = {
        **sizes,
        **read,
        "source": "made: noise of the size of photographs" if options.root is None else options.root.name,
        "fast": fast,
        "memory": "peak"
        if options.device == "cuda"
        else "of one step; what lies between steps is not told apart",
    }
    print(json.dumps({"environment": environment, "settings": settings}, indent=1), flush=True)

    # The references come first: their workers are forks, which should not inherit DALI's threads.
    chosen = [name for name in CONTENDERS if name in options.contenders or name == PLAIN]
    builder = Builder(config, fast_config, cluster)
    contenders = [builder.build(name) for name in (*chosen, *((STUDENT, TEACHER) * (CEILING in chosen)))]
    equality = check(builder.losses, builder.exact)
    measure(contenders, options, builder)

    result = {"environment": environment, "settings": settings, "first_step": equality}
    result |= summarise(contenders, options)
    long = (
        link_tree(folder / "long", root, options.batch_size * PEER_STEPS, options.classes)
        if options.timm
        else tree
    )
    result["rows"] += measure_peers(options, long)
    write_whole(options.json, json.dumps(result, indent=1) + "\n")
    write_whole(options.plot, plot(result))
    print_table(result)


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="training_step_") as folder:
            run(options, Path(folder))
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was written\n")


if __name__ == "__main__":
    main()
