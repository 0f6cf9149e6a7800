"""The training loop: one for every method, one process or many. It reads from top to bottom."""

import os
from contextlib import ExitStack
from itertools import chain, repeat

from kdav_fast.config import Config
from kdav_fast.inference.evaluate import Accuracy, evaluate
from kdav_fast.runtime.processes import Cluster, start_cluster
from kdav_fast.runtime.run_lock import RunLock
from kdav_fast.runtime.stopping import StopRequest
from kdav_fast.tracking.class_results import ClassTally
from kdav_fast.tracking.meter import TrainMeter
from kdav_fast.train.checkpoints import Checkpoints, Position
from kdav_fast.train.folder.beginning import complete_accuracy, settled_config, write_beginning
from kdav_fast.train.folder.config import config_facts
from kdav_fast.train.folder.extension import extension_line, is_complete
from kdav_fast.train.folder.record import Record
from kdav_fast.train.folder.results import write_missing_report, write_results
from kdav_fast.train.phases import PhasePosition, run_phases
from kdav_fast.train.run import Run
from kdav_fast.train.schedule import due
from kdav_fast.train.setup import naming_sizes, set_up
from kdav_fast.train.skipped_steps import Outcomes
from kdav_fast.train.step import take_step


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
        with naming_sizes(config.distiller), cluster.liveness.naming_lost_ranks():
            return _run_in_folder(config, cluster, lock, extend)
    finally:
        lock.release()


def _run_in_folder(config: Config, cluster: Cluster, lock: RunLock, extend: bool) -> Accuracy | None:
    config, extended = settled_config(config, cluster, extend)
    if cluster.on_first(lambda: is_complete(config)):
        cluster.on_first(lambda: write_missing_report(config.run_dir))
        return complete_accuracy(config, cluster)
    run = set_up(config, cluster)
    write_beginning(run)
    checkpoints = Checkpoints(run, before_write=lock.check)
    with StopRequest(cluster) as stop, ExitStack() as stack:
        position = checkpoints.restore()
        record = stack.enter_context(Record(run, position, lock))
        if position is None or position.step is None:
            position = position or Position()
            if not before_distillation(run, position.phases, checkpoints, stop, record):
                return None
        if position.step and extended:
            cluster.say(extension_line(config, extended, position.step, run.steps))
        accuracy = train(run, position.step or 0, checkpoints, stop, record)
    if accuracy is not None:
        write_results(run, lock)
    return accuracy


def before_distillation(
    run: Run, position: PhasePosition, checkpoints: Checkpoints, stop: StopRequest, record: Record
) -> bool:
    """Go through the method's phases and start the engine; False if a signal came first, the state saved."""

    def after_batch(position: PhasePosition, save_due: bool, values: dict[str, float]) -> bool:
        if values:
            record.phase(position, values)
        stopping, _ = stop.agreed()
        if stopping or save_due:
            checkpoints.save_phase(position)
        if stopping:
            run.cluster.say("stopped before the first step, state saved; the same command continues")
        return stopping

    phases = tuple(run.distiller.phases())
    if position.step:
        name = phases[position.number].name
        run.cluster.say(
            f"continuing {run.run_dir} before its first step: {name}, after batch {position.step}"
        )
    if not run_phases(run, position, after_batch):
        return False
    run.start_engine()
    if phases:
        checkpoints.save(0)
        checkpoints.finish()
    return True


def train(
    run: Run, step: int, checkpoints: Checkpoints, stop: StopRequest, record: Record
) -> Accuracy | None:
    """Take the optimizer steps from `step` on; returns the final accuracy, None if a signal came first."""
    config, cluster = run.config.train, run.cluster
    batches = chain.from_iterable(repeat(run.loaders.train))
    meter = TrainMeter(cluster)
    outcomes = Outcomes(run, record.say)
    record.begin_training(step)
    accuracy = None
    run.trainee.train()
    while step < run.steps:
        lr = run.lr(step)
        taken, seen = take_step(run, batches, step, meter.phase)
        step += 1
        for micro in seen:
            answer = micro.answer
            meter.update(answer.logits, micro.batch, answer.total, answer.parts, taken)
        outcomes.add(step, taken, seen)
        record.advance()

        logging = step % config.log_every == 0 or step == run.steps
        evaluating = due(step, config.evaluate_every * run.steps_per_epoch) or step == run.steps
        stopping, writing = stop.agreed(checkpoints.writing)
        stopping = stopping and step < run.steps
        saving = stopping or due(step, config.save_every * run.steps_per_epoch)
        if logging or evaluating or saving:
            outcomes.hear()
        if logging:
            if run.first_answers is not None:
                run.first_answers.tell()
            record.metrics(step, {**meter.read(), "lr": lr, **_irregular(run)})
        if evaluating:
            accuracy = evaluate_student(run)
            record.metrics(step, accuracy.logged())
        score = accuracy.top1 if evaluating else None
        checkpoints.after_step(step, due=saving, wait=stopping, writing=writing, score=score)
        if stopping:
            record.say(f"stopped at step {step}/{run.steps}, state saved; the same command continues")
            return None
        if evaluating or saving:
            meter.restart_clock()
    checkpoints.finish()
    if remark := outcomes.guard.conclude(run.skipped_steps, run.steps):
        cluster.say(remark)
    # A run that was killed after its last checkpoint takes no more steps, hence has no accuracy yet.
    return accuracy or evaluate_student(run)


def evaluate_student(run: Run) -> Accuracy:
    """Accuracy of the student, or of its average, at this moment."""
    with run.evaluable():
        run.tally = ClassTally()
        network, loader = run.evaluated_student, run.loaders.evaluation
        return evaluate(network, loader, run.cluster, run.dtype, run.tally)


def _irregular(run: Run) -> dict[str, float]:
    """What a run logs only where there is something to tell."""
    values = {"skipped_steps": run.skipped_steps} if run.skipped_steps else {}
    if run.engine.loss_scale.active:
        values["loss_scale"] = run.engine.loss_scale.value
    return values
