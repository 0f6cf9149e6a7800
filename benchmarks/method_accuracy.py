"""How good every method's student is, from one teacher, after as many epochs, each at the learning rate that suits it.

    python benchmarks/method_accuracy.py --root FOLDER [--teacher RUN] [--work FOLDER] [--methods NAME ...]

The set-up is that of `accuracy.py`: FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg, and what is finished is kept
in --work. Three steps: every method is trained briefly at each learning rate, and takes the one whose student is best
on held-out training images; it is then trained with another seed, and its last epoch is evaluated; the best on held-out
images are trained with further seeds. No choice looks at the evaluation images. Settings are the methods' published
ones for CIFAR-100, but for what `CHANGED` says.

The teacher's maps are kept on the disk: about 6 GB for 25,000 images of CIFAR-10.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial

import accuracy_data
import torch
from accuracy import PACKAGES, chosen_preset, student_config, train_all, train_teacher
from accuracy import make_parser as accuracy_parser
from accuracy_methods import KDAV, SIMKD, Task
from command_line import Parser, check_device, draw, positive, result_files
from environment import describe
from method_accuracy_results import plot, print_table, summarize

from kdav_fast.config.method import method_names
from kdav_fast.errors import InputError
from kdav_fast.runtime.files import write_whole

RATES = (0.05, 0.1, 0.3)
TUNING_SEED = 100
_UNLIMITED = 1e4  # minutes
BEST = 5
"""Methods that are trained with more than one seed."""
CHANGED = {
    "kdav": KDAV.distiller,
    "simkd": SIMKD.distiller,
    # The paper's form hardly distils at the published settings, which are its code's.
    "tfkd": {"name": "tfkd", "form": "code"},
}


def task(method: str, seed: int, init: str, lr: float, epochs: int) -> Task:
    return Task(method, seed, CHANGED.get(method, {"name": method}), init, lr, epochs)


def best_rates(results: list[dict]) -> dict[str, float]:
    """Of each method that was tried at every rate: that of the best student on held-out images."""
    tries = defaultdict(dict)
    for result in results:
        tries[result["task"]["method"]][result["task"]["lr"]] = result["held_out_top1"]
    return {method: max(found, key=found.get) for method, found in tries.items() if len(found) == len(RATES)}


def best_methods(results: list[dict], count: int = BEST) -> list[str]:
    """Those whose first seed is best on held-out images."""
    first = [result for result in results if result["task"]["seed"] == 0]
    ordered = sorted(first, key=lambda result: -result["held_out_top1"])
    return [result["task"]["method"] for result in ordered[:count]]


def make_parser() -> Parser:
    parser = accuracy_parser()
    parser.description = __doc__
    for action in parser._actions:
        if action.dest == "methods":
            action.choices = method_names()
    parser.add_argument(
        "--tuning-epochs", type=positive(int), default=2, help="at each learning rate (%(default)s)"
    )
    return parser


def compare(options: argparse.Namespace) -> None:
    """Raises InputError for what the user can mend."""
    device = check_device(options.device)
    path, picture = result_files(options, "method_accuracy")
    options.settings = replace(chosen_preset(options), minutes=options.minutes or _UNLIMITED)
    options.work.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or train_teacher(options)
    config = student_config(options, options.settings, teacher)
    file = accuracy_data.prepare(config, device, options.work, everything=True)
    data = accuracy_data.load(file, torch.device("cpu"))
    if not len(data.held_out_labels):
        raise InputError(
            "--train-subset takes all training images; leave some out to choose learning rates by"
        )
    environment = describe(device, PACKAGES)
    if device.type == "cpu":
        environment["threads"] = options.threads  # of each student
    methods, init, preset = options.methods or method_names(), config.model.init, options.settings
    preset_told = asdict(preset) | {"rates": RATES, "tuning_epochs": options.tuning_epochs}
    record = {
        "environment": environment,
        "preset": preset_told,
        "networks": {"student": config.model.model_dump(mode="json"), "teacher": config.teacher.name},
        "teacher_top1": data.teacher_top1,
    }

    def write(tried: list[dict], trained: list[dict]) -> None:
        record["rows"] = summarize(tried, trained)
        write_whole(path, json.dumps(record, indent=1) + "\n")

    train = partial(train_all, file=file, config=config, options=options, everything=True)
    listed = [
        task(method, TUNING_SEED, init, lr, options.tuning_epochs) for method in methods for lr in RATES
    ]
    tried = train(listed, show=lambda results: None)
    rates = best_rates(tried)
    trained = train(
        [task(method, 0, init, lr, preset.epochs) for method, lr in rates.items()], show=partial(write, tried)
    )
    best = best_methods(trained)
    more = [
        task(method, seed, init, rates[method], preset.epochs)
        for seed in range(1, preset.seeds)
        for method in best
    ]
    trained += train(more, show=lambda results: write(tried, trained + results))
    write(tried, trained)
    draw(partial(plot, record, picture))
    print_table(record)


def main() -> None:
    make_parser().run(compare, goes_on=True)


if __name__ == "__main__":
    main()
