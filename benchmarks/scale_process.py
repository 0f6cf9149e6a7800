"""One process of `scale.py`: it sets up a run as `kdav distill` does, then does what it is told, line by line.

    python benchmarks/scale_process.py CORES RECIPE [key=value ...]

Each line of its input is a JSON object: `do` names a function below, the rest are its arguments. Each answer is a
line of JSON that begins with "@", since libraries print to the same place.
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from itertools import islice, pairwise, repeat
from pathlib import Path

import torch
import torch.distributed as dist

from kdav_fast.config import load_config
from kdav_fast.data import Batch
from kdav_fast.runtime.processes import start_cluster
from kdav_fast.runtime.stopping import StopRequest
from kdav_fast.train.setup import set_up
from kdav_fast.train.step import PARTS, take_step


class Process:
    """A run of which only steps on one batch, which stays in memory, are taken."""

    def __init__(self, recipe: Path, overrides: list[str]) -> None:
        self.config = load_config(recipe, overrides)
        self.cluster = start_cluster(self.config.device, self.config.train.comm_timeout)
        self.run = set_up(self.config, self.cluster)
        self.run.start_engine()
        self.run.trainee.train()
        self.stop = StopRequest(self.cluster)
        self.batch = self.config.train.batch_size // self.cluster.world
        self.batches = repeat(self._batch())

    def _batch(self) -> Batch:
        side, device = self.config.data.image_size, self.cluster.device
        generator = torch.Generator(device).manual_seed(self.cluster.rank)
        images = torch.randn(self.batch, 3, side, side, generator=generator, device=device)
        target = torch.arange(self.batch, device=device) % len(self.run.loaders.classes)
        valid = torch.ones(self.batch, dtype=torch.bool, device=device)
        return Batch(images.contiguous(memory_format=torch.channels_last), target, valid, target)

    def _wait(self) -> float:
        if self.cluster.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _step(self, **clock: object) -> None:
        """What the training loop repeats, without its log."""
        take_step(self.run, self.batches, 0, **clock)
        self.stop.agreed()

    def facts(self) -> dict[str, object]:
        """What the collectives' sizes follow from."""
        memory = self.run.distiller.memory
        return {
            "batch": self.batch,
            "width": memory.width,
            "classes": memory.classes,
            "posterior": self.config.distiller.posterior,
            "value_bytes": memory.embedding.element_size(),
            "parameters": sum(p.numel() for p in self.run.student.parameters() if p.requires_grad),
        }

    def steps(self, count: int) -> list[float]:
        """Seconds of each step."""
        dist.barrier(group=self.cluster.control)
        times = [self._wait()]
        for _ in range(count):
            self._step()
            times.append(self._wait())
        return [after - before for before, after in pairwise(times)]

    def parts(self, count: int) -> dict[str, float]:
        """Mean seconds of each part of a step; on a GPU, waiting for it after each."""
        spent = dict.fromkeys(PARTS, 0.0)

        @contextmanager
        def clock(name: str):
            begin = self._wait()
            yield
            spent[name] += self._wait() - begin

        dist.barrier(group=self.cluster.control)
        for _ in range(count):
            self._step(clock=clock)
        return {name: seconds / count for name, seconds in spent.items()}

    def calls(self) -> list[tuple[str, int]]:
        """The collectives that one step really makes: kind and bytes that this process brings.

        But those of gradients, which torch adds up out of Python's sight.
        """
        made, originals = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor")}

        def recorded(name: str, place: int):
            def call(*arguments, **named):
                tensor = (
                    arguments[place] if len(arguments) > place else named[("tensor", "input_tensor")[place]]
                )
                made.append((name.removesuffix("_into_tensor"), tensor.nbytes))
                return originals[name](*arguments, **named)

            return call

        dist.all_reduce, dist.all_gather_into_tensor = (
            recorded(name, place) for place, name in enumerate(originals)
        )
        try:
            self._step()
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)
        return made

    def collective(self, kind: str, size: int, count: int) -> list[float]:
        """Seconds of each of `count` calls, each of `size` bytes from every process.

        A millisecond of work lies between two calls, as in a step: threads that wait for the network have gone to
        sleep by then, and waking them is a part of a call's latency.
        """
        tensor = torch.zeros(max(1, size // 4), device=self.cluster.device)
        times = []
        dist.barrier(group=self.cluster.control)
        for _ in range(count):
            end = time.perf_counter() + 1e-3
            while time.perf_counter() < end:
                pass
            begin = self._wait()
            if kind == "all_reduce":
                dist.all_reduce(tensor)
            else:
                dist.all_gather_into_tensor(tensor.new_empty(self.cluster.world * len(tensor)), tensor)
            times.append(self._wait() - begin)
        return times

    def loader(self, count: int) -> float:
        """Images a second of the run's own loader, `count` batches after as many to fill its queue."""
        batches = self._endless()
        for _ in islice(batches, count):
            pass
        begin = self._wait()
        images = sum(len(batch.images) for batch in islice(batches, count))
        return images / (self._wait() - begin)

    def _endless(self):
        while True:
            yield from self.run.loaders.train


def main() -> None:
    cores, recipe, *overrides = sys.argv[1:]
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
        torch.set_num_threads(len(cores.split(",")))
    process = Process(Path(recipe), overrides)
    print("@" + json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = getattr(process, order.pop("do"))(**order)
        print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
