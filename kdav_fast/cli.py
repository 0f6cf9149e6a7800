"""The `kdav` command.

Exit codes: 0 done, 1 another process of the run was lost, 2 bad input, 75 stopped by a signal with the state saved,
130 ended at once by Ctrl-C, 141 nobody reads the output any more.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from kdav_fast.errors import InputError, RankLostError, lack_of_means, listed
from kdav_fast.runtime.interrupts import INTERRUPTED, STOPPED, Interrupts
from kdav_fast.runtime.json_text import json_text
from kdav_fast.runtime.say import say_once
from kdav_fast.runtime.versions import versions

# torch reads it when it is imported. Its stacks and warnings about a lost connection would come before the line that
# names the lost process.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

BAD_INPUT = 2
RANK_LOST = 1
NO_READER = 141


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Args:
        arguments: the command line; None takes the process's own, and the process then belongs to the command until
            its end, when Ctrl-C is concerned.
    """
    interrupts = Interrupts(speaks=_is_first())
    if arguments is None:
        interrupts.__enter__()
        code = _main(sys.argv[1:], interrupts)
        interrupts.finish(code)
        return code
    with interrupts:
        return _main(arguments, interrupts)


def _main(arguments: list[str], interrupts: Interrupts) -> int:
    try:
        code = _command(arguments, interrupts)
    except KeyboardInterrupt:  # where another handler than ours is in force
        print("kdav: interrupted", file=sys.stderr, flush=True)
        code = INTERRUPTED
    except BrokenPipeError:
        code = NO_READER
    try:
        sys.stdout.flush()
    except OSError:  # its reader is gone; else Python would say so once more, at the very end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _command(arguments: list[str], interrupts: Interrupts) -> int:
    try:
        options = _parse(arguments)
        if options.command in (_distill, _train, _demo):
            interrupts.expect_stops("the same command begins the run, or continues it from what is saved")
        return _within_the_means(options)
    except InputError as error:
        first = _is_first()
        if first:  # every rank has the same error; one line is enough
            print(f"kdav: error: {error}", file=sys.stderr, flush=True)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from kdav_fast.runtime.processes import tell_the_others

            tell_the_others(error)
            if not first and not error.told:
                print(f"kdav: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except RankLostError as error:  # each rank says it: the first may be the one that was lost
        print(f"kdav: error: {error}", file=sys.stderr, flush=True)
        return RANK_LOST


def _is_first() -> bool:
    """Whether this process says what all of a run's processes have to say."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def _within_the_means(options: argparse.Namespace) -> int:
    """Run a command; what the machine has too little of becomes an `InputError`."""
    try:
        code = options.command(options)
        if options.command not in (_distill, _train, _demo):  # whose results are files
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        lack = lack_of_means(error)
        if lack is None:
            raise
        raise lack from error


class _Parser(argparse.ArgumentParser):
    """Reports mistakes like any other bad input: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see '{self.prog} --help'")


class _Versions(argparse.Action):
    """Prints this package's version and those of what it stands on, a line each."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        for package, version in versions().items():
            print(f"{package} {version or 'not installed'}")
        parser.exit()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Overrides and images may stand before and after options, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    words = getattr(options, "overrides", getattr(options, "words", None))
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        words += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kdav", description="Distil a large image classifier into a small one.")
    parser.add_argument("--version", action=_Versions, nargs=0, help="print versions and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, summary: str, commands=commands) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(command=command)
        return sub

    def add_overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="key=value",
            help="config keys, such as train.epochs=3",
        )

    for name, command, summary in (
        ("distill", _distill, "Train a student from a teacher, or continue a run."),
        ("train", _train, "Train a plain model with labels only (a teacher), or continue a run."),
    ):
        sub = add(name, command, summary)
        sub.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; launch/ holds recipes")
        add_overrides(sub)
        sub.add_argument(
            "--extend",
            action="store_true",
            help="train the run of run_dir on to more train.epochs than it had",
        )
        sub.add_argument(
            "--check",
            action="store_true",
            help="do all that comes before the first step, then stop; writes nothing",
        )
        # The deepspeed launcher passes this; the environment says the same.
        sub.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    sub = add("evaluate", _evaluate, "Accuracy of a run, a checkpoint or an exported student, ONNX too.")
    sub.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument("--per-class", action="store_true", help="of each class too, the worst first")
    add_overrides(sub)

    sub = add("predict", _predict, "The classes of single images, as an evaluation sees them.")
    sub.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    sub.add_argument(
        "words",
        nargs="+",
        metavar="IMAGE_OR_FOLDER",
        help="or key=value, such as device=cpu or train.batch_size=512",
    )
    sub.add_argument("--top", type=_count, default=5, help="classes of each image (default: 5)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = add("export", _export, "Fold a student into its stock architecture and write it.")
    sub.add_argument("source", type=Path, metavar="RUN")
    sub.add_argument("--format", choices=("safetensors", "onnx"), help="default: as --output ends")
    sub.add_argument("--output", type=Path, help="file to write (default: RUN/export/student.FORMAT)")

    sub = add("report", _report, "Plot the curves of one run or of several, finished or not.")
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    sub.add_argument("--output", type=Path, help="folder to write (default: RUN/report of the first run)")

    sub = add("methods", _methods, "What a student can learn from: all methods, or one with its keys.")
    sub.add_argument("method", nargs="?", metavar="NAME", help="of the one to describe")

    sub = add("doctor", _doctor, "What is here, which fast paths are on, and what would turn on the others.")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--loss-shape", default="256,512,16384,1000", metavar="B,d,L,K", help="say what impl=auto takes"
    )
    sub.add_argument("--loss-dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    sub.add_argument("--posterior", choices=("dense", "ids"), default="dense")

    data = commands.add_parser("data", help="Look after data sets: see 'kdav data --help'.")
    data_commands = data.add_subparsers(required=True, metavar="COMMAND")
    sub = add("check", _check_data, "Examine every image of a data set, and its folders.", data_commands)
    sub.add_argument("folder", type=Path, metavar="FOLDER", help="data.root")
    add_overrides(sub)
    sub.add_argument(
        "--decode", action="store_true", help="decode every pixel, not only what files begin and end with"
    )
    sub.add_argument(
        "--quarantine", type=Path, metavar="FILE", help="write the defective images for data.skip_list"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument(
        "--workers", type=_count, help="threads (default: 16, or the number of cores with --decode)"
    )

    sub = add("demo", _demo, "Distil handwritten digits three ways in a few minutes.")
    sub.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    return parser


def _run(raw: dict[str, Any], options: argparse.Namespace) -> int:
    from kdav_fast.config import parse_config

    say_once("loading PyTorch")
    config = parse_config(raw)
    if options.check:
        from kdav_fast.train.check import check_training

        check_training(config, options.extend)
        return 0
    from kdav_fast.runtime.processes import say
    from kdav_fast.train.loop import run_training

    accuracy = run_training(config, options.extend)
    if accuracy is None:
        return STOPPED
    if os.environ.get("RANK", "0") == "0":
        say(f"{config.run_dir}: {accuracy}")
    return 0


def _distill(options: argparse.Namespace) -> int:
    from kdav_fast.config import parse_sections, read_config

    raw = read_config(options.config, options.overrides, say_once)
    parse_sections(raw)  # a mistake there need not wait for torch
    return _run(raw, options)


def _train(options: argparse.Namespace) -> int:
    from kdav_fast.config import parse_sections, read_config

    raw = read_config(options.config, options.overrides, say_once)
    method = parse_sections(raw).distiller.name
    if method != "none":
        raise InputError(
            f"distiller.name is '{method}', but 'kdav train' learns from labels only; "
            "use 'kdav distill', or set distiller.name=none"
        )
    return _run(raw, options)


def _evaluate(options: argparse.Namespace) -> int:
    from kdav_fast.inference.evaluate import evaluate_trained
    from kdav_fast.inference.trained import open_trained

    trained = open_trained(options.source)
    accuracy, classes = evaluate_trained(trained, options.overrides)
    if options.json:
        card = trained.card
        reached = {"step": card.step, "steps": card.steps, "epoch": card.epoch}
        print(json_text(accuracy._asdict() | reached | (classes.as_json() if options.per_class else {})))
        return 0
    if options.per_class:
        for line in classes.lines():
            print(line)
    print(f"{options.source}{trained.note and f' ({trained.note})'}: {accuracy}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from kdav_fast.inference.predict import predict, split_arguments
    from kdav_fast.inference.trained import open_trained

    paths, overrides = split_arguments(options.words)
    if not paths:
        raise InputError("no image is given; give files or folders of images")
    predictions = predict(open_trained(options.source), paths, overrides, options.top)
    answered, refused = [], []
    for prediction in predictions:
        (refused if prediction.problem else answered).append(prediction)
        if not options.json:
            print(prediction)
    if options.json:
        print(
            json_text(
                {"images": [one.as_json() for one in answered], "errors": [one.as_json() for one in refused]}
            )
        )
    if refused:
        raise InputError(
            f"{len(refused)} of {len(answered) + len(refused)} could not be classified: {listed(refused, 5, '; ')}"
        )
    return 0


def _export(options: argparse.Namespace) -> int:
    from kdav_fast.student.export import export

    written = export(options.source, options.output, options.format)
    said = f"wrote {written.output}"
    if written.difference is not None:
        said += (
            "; its scores differ from the trained student's by at most "
            f"{written.difference:.1e} of the largest"
        )
    print(said + (written.note and f"; {written.note}"))
    return 0


def _report(options: argparse.Namespace) -> int:
    from kdav_fast.tracking.report import write_report

    output = options.output or options.runs[0] / "report"
    page = write_report(
        {str(run): run for run in options.runs}, output, title=" and ".join(map(str, options.runs))
    )
    print(f"wrote {page}")
    return 0


def _methods(options: argparse.Namespace) -> int:
    from kdav_fast.config.method_help import describe_method, list_methods

    for line in describe_method(options.method) if options.method else list_methods():
        print(line)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from kdav_fast.doctor import diagnose, diagnosis_json, loss_finding, parse_loss_shape, print_diagnosis

    shape = parse_loss_shape(options.loss_shape)
    findings = [*diagnose(), loss_finding(shape, options.loss_dtype, options.posterior)]
    if options.json:
        print(diagnosis_json(findings))
    else:
        print_diagnosis(findings, Console())
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from kdav_fast.data.checks.survey import config_of, survey

    found = survey(config_of(options.folder, options.overrides), options.decode, options.workers)
    if options.quarantine:
        found.write_quarantine(options.quarantine)
    if options.json:
        print(json_text(found.as_json()))
    else:
        for line in found.lines():
            print(line)
    found.require_no_problems(options.folder, options.quarantine)
    if not options.json:
        print(f"{options.folder}: {found.summary()}")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _demo(options: argparse.Namespace) -> int:
    from kdav_fast.demo import run_demo

    return run_demo(options.run_dir)
