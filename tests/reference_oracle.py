"""kdav_fast and the plain reference on the same batches, from the same weights: the losses of both.

As a program (`python -m tests.reference_oracle FOLDER RUN_DIR [key=value ...]`) it is one rank of a group and prints
them as a line of JSON.
"""

import gc
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterable
from itertools import chain, islice, repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kdav_fast.config import Config, load_config
from kdav_fast.data.sources.digits import prepare_digits
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.tracking.metrics_log import read_metrics
from kdav_fast.train.loop import run_training
from kdav_fast.train.setup import set_up

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "reference_train.py"
STEPS = 50
OVERRIDES = [
    "device=cpu",
    "data.name=folder",
    "data.image_size=8",
    "data.crop=padded",
    "data.crop_padding=1",
    "data.flip=false",
    "data.workers=1",
    "model.name=cifar:resnet8",
    "model.width=0.25",
    "train.batch_size=32",
    "train.epochs=5",
    "train.log_every=1",
    "train.evaluate_every=0",
    "train.save_every=0",
]
"""10 steps an epoch, none with padding, of which the reference knows nothing."""


def save_digits(root: Path, digits: Path | None = None) -> Path:
    """A tree of class folders: 32 training and 20 evaluation images of each digit."""
    for split, count in (("train", 32), ("val", 20)):
        for folder in sorted((prepare_digits(digits) / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, root / split / folder.name)
    return root


def small_run(root: Path, run_dir: Path, overrides: Iterable[str] = ()) -> Config:
    """The config of 50 steps on such a tree, for both sides."""
    return load_config(None, [f"data.root={root}", f"run_dir={run_dir}", *OVERRIDES, *overrides])


def load_reference() -> ModuleType:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))  # for what stands beside it
    try:
        spec = importlib.util.spec_from_file_location("reference_train", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPT.parent))


def both(config: Config) -> dict[str, Any]:
    """Losses and accuracy of a run of kdav_fast and of the reference, which is handed that run's batches."""
    accuracy = run_training(config)
    lines = read_metrics(config.run_dir)
    # Built once more, the run has the initial weights and delivers the same batches.
    again = set_up(config, start_cluster("cpu"))
    batches = list(islice(chain.from_iterable(repeat(again.loaders.train)), STEPS))
    assert all(batch.valid.all() for batch in batches)
    network, head = again.student.network.stock_state_dict(), again.student.head
    network = {name: tensor.clone() for name, tensor in network.items()}
    del again
    gc.collect()  # the workers that are forked now must not collect what owns threads

    trainer = load_reference().Trainer(config)
    trainer.student.network.load_stock_state_dict(network)
    if head is not None:
        trainer.student.projector[0].load_state_dict(head.projector.state_dict())
        trainer.student.projector[1].load_state_dict(head.norm.state_dict())
    trainer.measure_teacher()
    losses = [trainer.step(batch.images, batch.labels) for batch in batches]
    losses = torch.stack(losses)
    if trainer.world > 1:
        torch.distributed.all_reduce(losses)
    top1 = trainer.evaluate()
    state = hashlib.sha256(b"".join(t.numpy().tobytes() for t in trainer.student.state_dict().values()))
    return {
        "kdav_fast": [line["train/loss"] for line in lines if "train/loss" in line],
        "reference": (losses / trainer.world).tolist(),
        "kdav_fast top1": accuracy.top1,
        "reference top1": top1,
        "weights": state.hexdigest(),
    }


if __name__ == "__main__":
    _, folder, run, *rest = sys.argv
    torch.set_num_threads(1)
    print("RESULT " + json.dumps(both(small_run(Path(folder), Path(run), rest))))
