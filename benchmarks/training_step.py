"""How many images a second are distilled, from JPEG files to the optimizer's step: plain PyTorch and kdav_fast.

    python benchmarks/training_step.py [--root FOLDER] [--device cpu|cuda] [--json FILE] [--plot FILE]

The contenders run one recipe (KDAV; launch/imagenet_resnet34_resnet18.yaml at these sizes) on the same images and
cores, from the same weights: the reference three ways, kdav_fast in float32, kdav_fast with what makes it fast
(`FAST` in step_contenders.py), and the latter on one batch that lies on the device, the ceiling; that also without
DeepSpeed (step_variants.py). A student that learns from labels, and the teacher alone, show what distillation adds.
Before it is timed, each takes its first step on the same batch; a loss that is not the plain reference's is told in
the table. What cannot be measured here, for want of a package or memory, is told there too, and the others go on.

Every round is on the disk when it is over: the same command goes on from there.

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
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from command_line import Parser, check_device, default_device, draw, positive, result_files
from data_pipeline import DALI, open_set, pin, read_once
from environment import describe, version
from record import Record, failure, leave_if_broken
from step_contenders import (
    CEILING,
    CONTENDERS,
    FAST,
    PLAIN,
    STUDENT,
    TEACHER,
    Builder,
    Contender,
    obstacle,
    run_round,
)
from step_images import link_tree, make_photographs, make_recipe, override_recipe
from step_plot import plot
from step_results import print_table, summarise
from timm_peer import PEERS, run_peer, why_not

from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import start_cluster

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", DALI, "triton", "numpy")
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


def measure(
    names: list[str], options: argparse.Namespace, build: Callable[[], Builder], record: Record
) -> None:
    """A round of each as soon as it is started, then of all in turn; only what the record does not hold yet.

    Args:
        names: in the order in which they are started.
        build: called when there is something to measure.
    """
    rounds = max(FEWEST, round(options.seconds / options.round_seconds))
    at_work: dict[str, Contender] = {}
    builder = None
    for number in range(1, rounds + 1):
        for name in names:
            known = record.find(contender=name)
            if any("error" in one for one in known) or sum("steps" in one for one in known) >= number:
                continue
            builder = builder or build()
            try:
                with record.attempt(name):
                    if name not in at_work:
                        at_work[name] = builder.build(name)
                    one = run_round(at_work[name], options.round_seconds, builder)
            except Exception as error:  # whatever a library or the device raises costs this one only
                print(f"{name} failed: {failure(error)}", flush=True)
                record.add({"contender": name, "error": failure(error)})
                leave_if_broken(error)
                continue
            start = [] if any("first_loss" in row for row in known) else [facts(at_work[name], builder)]
            record.add(*start, {"contender": name, **one._asdict()})
            rate = one.steps * options.batch_size / one.seconds
            print(f"round {number} of {rounds}: {name} {rate:.0f} images/s", flush=True)


def facts(contender: Contender, builder: Builder) -> dict[str, object]:
    """What is known of one when it has been started."""
    name = contender.name
    return {
        "contender": name,
        "first_loss": builder.losses.get(name),
        "exact": name in builder.exact,
        "start_up_s": contender.start_up_s,
        "compiled_graphs": contender.compiled_graphs,
        "resident_bytes": contender.resident_bytes,
        "step_bytes": contender.step_bytes,
    }


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


def measure_peers(options: argparse.Namespace, tree: Callable[[], Path], record: Record) -> None:
    """timm's own program, if a checkout is given; a line that says why, where it cannot take part."""
    reason = why_not(options.timm, options.teacher, options.student)
    if reason:
        print(reason, flush=True)
        return
    sizes = {name: getattr(options, name) for name in PRESETS[options.device]}
    for name in PEERS:
        if record.find(contender=name):
            continue
        try:
            row = run_peer(name, options.timm, tree(), sizes, options.device, options.cores, options.seconds)
        except InputError as error:
            row = {"contender": name, "error": str(error)}
        record.add(row)


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
    # Without DALI, what needs no loader of its own still has one, from which nothing is taken.
    fast = ({} if version(DALI) else {"data.loader": "torchvision"}) | FAST
    fast |= dict(override.split("=", 1) for override in options.fast)
    config = make_recipe(folder, tree, {**sizes, "device": options.device})
    fast_config = override_recipe(config, fast)
    pin(options.cores)
    cluster = start_cluster(options.device)
    environment = describe(cluster.device, PACKAGES) | {"cores": options.cores}
    settings = {
        **sizes,
        **read,
        "source": "made: noise of the size of photographs" if options.root is None else options.root.name,
        "fast": FAST | dict(override.split("=", 1) for override in options.fast),
        "memory": "peak"
        if options.device == "cuda"
        else "of one step; what lies between steps is not told apart",
    }
    print(json.dumps({"environment": environment, "settings": settings}, indent=1), flush=True)

    # The references come first: their workers are forks, which should not inherit DALI's threads.
    chosen = [name for name in CONTENDERS if name in options.contenders or name == PLAIN]
    chosen += (STUDENT, TEACHER) * (CEILING in chosen)
    found = {name: obstacle(name, options.device) for name in chosen}
    lacking = {name: reason for name, reason in found.items() if reason}

    def derive(measured: list[dict]) -> dict[str, object]:
        return summarise(measured, lacking, options.batch_size, options.device)

    record = Record(options.json, environment, settings, derive, name="measured")
    names = [name for name in chosen if name not in lacking]
    measure(names, options, lambda: Builder(config, fast_config, cluster), record)
    count = options.batch_size * PEER_STEPS
    measure_peers(options, cache(lambda: link_tree(folder / "long", root, count, options.classes)), record)
    result = record.write()
    if result["rows"]:
        draw(partial(plot, result, options.plot))
    print_table(result)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="training_step_") as folder:
        make_parser().run(partial(run, folder=Path(folder)), goes_on=True)


if __name__ == "__main__":
    main()
