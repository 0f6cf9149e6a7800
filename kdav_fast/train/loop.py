"""The training loop: one for every method, one process or many. It reads from top to bottom."""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext

import torch
from tqdm import tqdm

from kdav_fast.config import Config
from kdav_fast.data import Batch, Loader
from kdav_fast.distillers import Target
from kdav_fast.evaluate import Accuracy, evaluate
from kdav_fast.metrics_log import MetricsLog
from kdav_fast.report import write_report
from kdav_fast.student_file import FILE_NAME, read_student, write_student
from kdav_fast.train.checkpoint import restore_checkpoint, save_checkpoint
from kdav_fast.train.distributed import Cluster, start_cluster
from kdav_fast.train.engine import average_buffers
from kdav_fast.train.meter import TrainMeter
from kdav_fast.train.progress import Progress
from kdav_fast.train.run_folder import check_run_folder, write_run_config
from kdav_fast.train.setup import Parts, set_up
from kdav_fast.train.stopping import StopRequest


def run_training(config: Config) -> Accuracy | None:
    """Train as a config says, or continue in its run folder where an earlier attempt left off.

    Returns:
        The final accuracy, or None if a signal stopped the run early, its state saved.

    Raises:
        InputError: anything the user can put right, before the first step.
    """
    cluster = start_cluster(config.device)
    cluster.on_first(lambda: check_run_folder(config))
    parts = set_up(config, cluster)
    cluster.on_first(lambda: write_run_config(config))
    if (config.run_dir / FILE_NAME).exists():
        student, card = read_student(config.run_dir)
        cluster.say(f"{config.run_dir} is complete: {card.step} steps, {card.epoch:g} epochs")
        return evaluate(student.to(cluster.device), parts.loaders.evaluation, cluster, parts.dtype)
    step = restore_checkpoint(parts)
    if step == 0 and parts.distiller.needs_measuring:
        measure_teacher(parts)
    accuracy = train(parts, step)
    if accuracy is not None and cluster.is_first:
        write_results(parts)
    cluster.barrier()
    return accuracy


def train(parts: Parts, step: int) -> Accuracy | None:
    """Take the optimizer steps from `step` on; returns the final accuracy, None if a signal came first."""
    config, cluster, engine = parts.config.train, parts.cluster, parts.engine
    batches = _endless(parts.loaders.train)
    meter = TrainMeter(cluster)
    progress = Progress(cluster, step, parts.steps)
    if step:
        progress.say(f"continuing {parts.run_dir} after step {step}")
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(cluster))
        log = stack.enter_context(
            MetricsLog(parts.run_dir, step or None) if cluster.is_first else nullcontext()
        )
        stack.callback(progress.close)

        def record(values: dict[str, float]) -> None:
            if log is not None:
                log.write(step, {"epoch": parts.epoch(step), **values})
                progress.show(step, values)

        accuracy = None
        parts.student.train()
        while step < parts.steps:
            step += 1
            for _ in range(config.accumulate):
                with meter.waiting_for_data():
                    batch = next(batches)
                images, target = parts.mix(batch)
                teacher_outputs = parts.teacher(images) if parts.teacher else None
                student_outputs = engine(images)
                losses = parts.distiller(student_outputs, teacher_outputs, target)
                engine.backward(losses.total * _share_of_valid(target, cluster))
                lr = engine.get_lr()[0]
                engine.step()
                meter.update(student_outputs.logits, losses, target)
            if parts.average is not None:
                parts.average.update_parameters(parts.student)
            progress.advance()

            if step % config.log_every == 0 or step == parts.steps:
                record({**meter.read(), "lr": lr})
            evaluating = _due(step, config.evaluate_every, parts) or step == parts.steps
            stopping = stop.agreed() and step < parts.steps
            saving = stopping or _due(step, config.save_every, parts)
            if evaluating or saving:
                average_over_ranks(parts)
            if evaluating:
                accuracy = evaluate_student(parts)
                record(accuracy.logged())
            if saving:
                save_checkpoint(parts, step)
            if stopping:
                progress.say(f"stopped at step {step}/{parts.steps}, state saved; the same command continues")
                return None
            if evaluating or saving:
                meter.restart_clock()
    # A run that was killed after its last checkpoint takes no more steps, hence has no accuracy yet.
    return accuracy or evaluate_student(parts)


@torch.no_grad()
def measure_teacher(parts: Parts) -> None:
    """One pass of the teacher over the training images for what the distiller measures before training."""
    loader, cluster = parts.loaders.measure(), parts.cluster
    for batch in tqdm(
        loader, "measure teacher", loader.steps_per_epoch, disable=None if cluster.is_first else True
    ):
        parts.distiller.measure(parts.teacher(batch.images), Target(batch.target, batch.valid))
    average_buffers(parts.student, cluster.world)
    parts.distiller.finish_measuring()


def write_results(parts: Parts) -> None:
    """The student and the report of a complete run."""
    write_student(parts.run_dir / FILE_NAME, parts.evaluated_student.weights(), parts.card(parts.steps))
    write_report({parts.run_dir.name: parts.run_dir}, parts.run_dir / "report", title=str(parts.run_dir))


def evaluate_student(parts: Parts) -> Accuracy:
    """Accuracy of the student, or of its average, at this moment."""
    return evaluate(parts.evaluated_student, parts.loaders.evaluation, parts.cluster, parts.dtype)


def average_over_ranks(parts: Parts) -> None:
    """Before evaluating or saving: the same BatchNorm statistics on every rank."""
    for network in {parts.student, parts.evaluated_student}:
        average_buffers(network, parts.cluster.world)


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def _due(step: int, every_epochs: float, parts: Parts) -> bool:
    """Whether a multiple of `every_epochs` lies between the last step and this one; 0 means never."""
    interval = every_epochs * parts.steps_per_epoch
    return interval > 0 and int(step / interval) > int((step - 1) / interval)


def _share_of_valid(target: Target, cluster: Cluster) -> torch.Tensor | float:
    """Turns the mean over this rank's valid rows into its part of the mean over all ranks' valid rows."""
    if cluster.world == 1:
        return 1.0
    mine = target.valid.sum().float()
    total = cluster.sum(mine.clone())
    return mine * cluster.world / total
