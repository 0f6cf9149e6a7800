"""What a start finds in its run folder, and what it leaves there before anything is trained."""

from kdav_fast.config import Config
from kdav_fast.inference.evaluate import Accuracy, evaluate
from kdav_fast.runtime.precision import autocast_dtype
from kdav_fast.runtime.processes import Cluster
from kdav_fast.student.file import read_student
from kdav_fast.train.folder.config import check_run_folder, precision_of_run, write_run_config
from kdav_fast.train.folder.data import write_run_data
from kdav_fast.train.folder.extension import check_extension
from kdav_fast.train.run import Run
from kdav_fast.train.setup import build_run_loaders, find_data


def settled_config(config: Config, cluster: Cluster, extend: bool) -> tuple[Config, float | None]:
    """The config that the run's folder allows, and the epochs that its run had if this start extends them.

    It says which precision `auto` stands for.

    Raises:
        InputError: the folder belongs to another run, or this one cannot be extended.
    """

    def check() -> float | None:
        extended = check_run_folder(config, extend)
        check_extension(config)
        return extended

    # The first process decides: others may have other processors.
    precision = cluster.on_first(lambda: precision_of_run(config, cluster.device))
    train = config.train.model_copy(update={"precision": precision})
    config = config.model_copy(update={"train": train})
    return config, cluster.on_first(check)


def write_beginning(run: Run) -> None:
    """Make the folder, and write what the run is and what it is trained on."""
    run.cluster.on_first(lambda: write_run_config(run.config))
    run.cluster.on_first(lambda: write_run_data(run.run_dir, run.data))


def complete_accuracy(config: Config, cluster: Cluster) -> Accuracy:
    """Of the student that a complete run has left; nothing that trains is built."""
    student, card = read_student(config.run_dir)
    cluster.say(f"{config.run_dir} is complete: {card.step} steps, {card.epoch:g} epochs")
    splits = find_data(config, cluster).splits
    loaders = build_run_loaders(config, splits, cluster, card.normalization)
    dtype = autocast_dtype(config.train.precision, cluster.device)
    return evaluate(student.to(cluster.device), loaders.evaluation, cluster, dtype)
