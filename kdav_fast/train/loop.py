"""The training loop: one for every method, one process or many. It reads from top to bottom."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import torch

from kdav_fast.checkpoint.folders import CheckpointFolders
from kdav_fast.config import Config
from kdav_fast.data import Batch, Loader
from kdav_fast.distillers import Target
from kdav_fast.errors import InputError
from kdav_fast.inference.evaluate import Accuracy, evaluate
from kdav_fast.runtime.processes import Cluster, say, start_cluster
from kdav_fast.runtime.progress_bar import ProgressBar
from kdav_fast.runtime.run_lock import RunLock
from kdav_fast.runtime.stopping import StopRequest
from kdav_fast.student.file import CHECKPOINTS, FILE_NAME, read_student, write_student
from kdav_fast.tracking.class_results import ClassTally, write_class_results
from kdav_fast.tracking.meter import TrainMeter
from kdav_fast.tracking.metrics_log import MetricsLog
from kdav_fast.tracking.report import PAGE, write_report
from kdav_fast.tracking.status import StatusLine
from kdav_fast.train.checkpoints import begin_checkpoint, restore_checkpoint
from kdav_fast.train.extension import check_extension, extension_line, is_complete
from kdav_fast.train.run_data import write_run_data
from kdav_fast.train.run_folder import check_run_folder, config_facts, precision_of_run, write_run_config
from kdav_fast.train.setup import Parts, set_up
from kdav_fast.train.skipped_steps import SkippedSteps, not_finite
from kdav_fast.train.step import take_step

REPORT = "report"


def run_training(config: Config, extend: bool = False) -> Accuracy | None:
    """Train as a config says, or continue in its run folder where an earlier attempt left off.

    Args:
        config: of the run.
        extend: `train.epochs` may be more than those that the folder's run was begun with, finished or not.

    Returns:
        The final accuracy, or None if a signal stopped the run early, its state saved.

    Raises:
        InputError: anything the user can put right: before the first step, or where a checkpoint cannot be written or
            too many steps in a row are not finite.
        RankLostError: another process of the run does not answer any more.
    """
    lock = RunLock(config.run_dir)
    if os.environ.get("RANK", "0") == "0":
        lock.acquire()  # before the processes meet: the other run may have their port as well
    try:
        cluster = start_cluster(config.device, config.train.comm_timeout, config_facts(config))
        with cluster.liveness.naming_lost_ranks():
            return _run_in_folder(config, cluster, lock, extend)
    finally:
        lock.release()


def _run_in_folder(config: Config, cluster: Cluster, lock: RunLock, extend: bool) -> Accuracy | None:
    parts, extended = prepare(config, cluster, extend)
    config = parts.config
    cluster.on_first(lambda: write_run_config(config))
    cluster.on_first(lambda: write_run_data(config.run_dir, parts.data))
    if cluster.on_first(lambda: is_complete(config)):
        student, card = read_student(config.run_dir)
        cluster.say(f"{config.run_dir} is complete: {card.step} steps, {card.epoch:g} epochs")
        if cluster.is_first and not (config.run_dir / REPORT / PAGE).exists():
            _write_own_report(config.run_dir)
        return evaluate(student.to(cluster.device), parts.loaders.evaluation, cluster, parts.dtype)
    checkpoints = CheckpointFolders(
        config.run_dir / CHECKPOINTS,
        cluster,
        config.train.keep_checkpoints,
        config.train.keep_best,
        before_write=lock.check,
    )
    with StopRequest(cluster) as stop:
        step = restore_checkpoint(checkpoints, parts)
        if step is None and parts.distiller.needs_measuring:
            if not measure_teacher(parts, stop):
                return None
            begin_checkpoint(checkpoints, parts, 0, None)
            checkpoints.finish()
        if step and extended:
            cluster.say(extension_line(config, extended, step, parts.steps))
        accuracy = train(parts, step or 0, checkpoints, stop, lock)
    if accuracy is not None:
        write_results(parts, lock)
    return accuracy


def prepare(config: Config, cluster: Cluster, extend: bool) -> tuple[Parts, float | None]:
    """The parts of a run that its folder allows, and the epochs that it had if this start extends them.

    The parts' config says which precision `auto` stands for.
    """

    def check() -> float | None:
        extended = check_run_folder(config, extend)
        check_extension(config)
        return extended

    # The first process decides: others may have other processors.
    precision = cluster.on_first(lambda: precision_of_run(config, cluster.device))
    train = config.train.model_copy(update={"precision": precision})
    config = config.model_copy(update={"train": train})
    extended = cluster.on_first(check)
    return set_up(config, cluster), extended


def train(
    parts: Parts, step: int, checkpoints: CheckpointFolders, stop: StopRequest, lock: RunLock
) -> Accuracy | None:
    """Take the optimizer steps from `step` on; returns the final accuracy, None if a signal came first."""
    config, cluster, engine = parts.config.train, parts.cluster, parts.engine
    batches = _endless(parts.loaders.train)
    meter = TrainMeter(cluster)
    guard = SkippedSteps(config.max_skipped_steps)
    progress = StatusLine(cluster, step, parts.steps)
    if step:
        progress.say(f"continuing {parts.run_dir} after step {step}")
    with ExitStack() as stack:
        log = stack.enter_context(
            MetricsLog(parts.run_dir, step or None) if cluster.is_first else nullcontext()
        )
        stack.callback(progress.close)

        def record(values: dict[str, float]) -> None:
            if log is not None:
                lock.check()
                log.write(step, {"epoch": parts.epoch(step), **values})
                progress.show(step, values)

        accuracy = None
        parts.student.train()
        while step < parts.steps:
            lr = parts.lr(step)
            step += 1
            taken, seen = take_step(parts, batches, lr, meter.phase)
            if taken:
                for micro in seen:
                    meter.update(micro.logits, micro.losses, micro.target)
                if parts.average is not None:
                    with engine.whole_weights():
                        parts.average.update_parameters(parts.student)
                guard.taken()
            else:
                parts.skipped_steps += 1
                blamed = sum(cluster.gather(not_finite(micro.answers for micro in seen)))
                reason = f" (the teacher's answers to {blamed} images are not)" if blamed else ""
                progress.say(f"step {step}: loss or gradient not finite, skipped{reason}")
                guard.skipped(step)
            progress.advance()

            if step % config.log_every == 0 or step == parts.steps:
                if parts.first_answers is not None:
                    parts.first_answers.tell()
                record({**meter.read(), "lr": lr, **_irregular(parts)})
            evaluating = _due(step, config.evaluate_every, parts) or step == parts.steps
            stopping, writing = stop.agreed(checkpoints.writing)
            stopping = stopping and step < parts.steps
            saving = stopping or _due(step, config.save_every, parts)
            if evaluating:
                accuracy = evaluate_student(parts)
                record(accuracy.logged())
            if saving:
                begin_checkpoint(checkpoints, parts, step, accuracy.top1 if evaluating else None)
                if stopping or not config.async_checkpoints:
                    checkpoints.finish()
            elif checkpoints.pending is not None and not writing and checkpoints.pending < step - 1:
                checkpoints.finish()
            if stopping:
                progress.say(f"stopped at step {step}/{parts.steps}, state saved; the same command continues")
                return None
            if evaluating or saving:
                meter.restart_clock()
        checkpoints.finish()
    if remark := guard.conclude(parts.skipped_steps, parts.steps):
        cluster.say(remark)
    # A run that was killed after its last checkpoint takes no more steps, hence has no accuracy yet.
    return accuracy or evaluate_student(parts)


@torch.no_grad()
def measure_teacher(parts: Parts, stop: StopRequest) -> bool:
    """One pass of the teacher over the training images for what the distiller measures before training.

    Returns whether it was completed; False if a signal came first.
    """
    loader, cluster = parts.loaders.measure(), parts.cluster
    for batch in ProgressBar(
        loader, "measure teacher", loader.steps_per_epoch, disable=None if cluster.is_first else True
    ):
        answers, target = parts.teacher(batch.images), Target(batch.target, batch.valid)
        parts.first_answers.see(batch.images, answers, target)
        parts.distiller.measure(answers, target)
        stopping, _ = stop.agreed()
        if stopping:
            cluster.say("stopped before the first step; the same command begins anew")
            return False
    parts.first_answers.tell()
    cluster.average_buffers(parts.student)
    parts.distiller.finish_measuring()
    return True


def write_results(parts: Parts, lock: RunLock) -> None:
    """The student, then the report of a complete run."""
    run_dir = parts.run_dir
    with parts.savable():
        weights = parts.evaluated_student.weights()
    by_class = parts.tally.results(parts.loaders.classes, parts.cluster)

    def write() -> None:
        lock.check()
        _require_finite(weights, run_dir)
        _try("table of the classes", lambda: write_class_results(run_dir, by_class, parts.steps))
        with suppress(OSError):
            (
                run_dir / REPORT / PAGE
            ).unlink()  # of fewer epochs: that there is none says that one is to be written
        try:
            write_student(run_dir / FILE_NAME, weights, parts.card(parts.steps))
        except OSError as error:
            raise InputError(
                f"run_dir {run_dir}: the student could not be written ({error.strerror}); put that right, then the "
                "same command writes it"
            ) from None
        _write_own_report(run_dir)

    parts.cluster.on_first(write)


def _write_own_report(run_dir: Path) -> None:
    what = f"report, which 'kdav report {run_dir}' makes later,"
    _try(what, lambda: write_report({run_dir.name: run_dir}, run_dir / REPORT, title=str(run_dir)))


def _try(what: str, write: Callable[[], object]) -> None:
    """Write what a run can do without: whatever goes wrong with it takes nothing from the student."""
    try:
        write()
    except Exception as error:  # a plotting library fails in as many ways as there are fonts and numbers
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"warning: the {what} could not be written ({reason}); the student is not affected")


def _require_finite(weights: dict[str, torch.Tensor], run_dir: Path) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"run_dir {run_dir}: {name} of the trained student is not finite, so it is not written; train with a "
                "lower optimizer.lr or train.clip_grad_norm in another run_dir"
            )


def evaluate_student(parts: Parts) -> Accuracy:
    """Accuracy of the student, or of its average, at this moment."""
    with parts.evaluable():
        parts.tally = ClassTally()
        network, loader = parts.evaluated_student, parts.loaders.evaluation
        return evaluate(network, loader, parts.cluster, parts.dtype, parts.tally)


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def _due(step: int, every_epochs: float, parts: Parts) -> bool:
    """Whether a multiple of `every_epochs` lies between the last step and this one; 0 means never."""
    interval = every_epochs * parts.steps_per_epoch
    return interval > 0 and int(step / interval) > int((step - 1) / interval)


def _irregular(parts: Parts) -> dict[str, float]:
    """What a run logs only where there is something to tell."""
    values = {"skipped_steps": parts.skipped_steps} if parts.skipped_steps else {}
    if parts.engine.loss_scale.active:
        values["loss_scale"] = parts.engine.loss_scale.value
    return values
