"""How long a training step takes on N processes, computed from pieces: what `scale.py` predicts with.

A step of the run is what one process computes, plus the collectives that all wait for. A collective is a ring's:
rounds of a latency each, and the bytes that one process sends over its bandwidth. Between nodes the rings are nested:
NCCL's rings over NVLink inside a node, and one ring a GPU between the nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

STUDENT, BACKWARD, NEXT = "student's forward", "backward", "next step"
"""What collectives are under way during."""
BUCKET = 8 * 2**20
"""Bytes of gradients that are sent together: the last of them when the backward pass is over."""
PIECES = ("compute", "teacher rows", "small sums", "gradients", "data")
REDUCE, GATHER = "all_reduce", "all_gather"


class Link(NamedTuple):
    """What a process sends through."""

    latency_s: float
    """Of one message."""
    bytes_per_s: float
    """In one direction, of one process."""


class Collective(NamedTuple):
    """One call of a step."""

    what: str
    piece: str
    kind: str
    """REDUCE or GATHER."""
    bytes: int
    """That each process brings."""
    under: str | None = None
    """The part of the step during which it is under way; None: all wait for it at once."""


class Point(NamedTuple):
    """One measured size of a collective."""

    bytes: int
    world: int
    seconds: float


def step_collectives(
    batch: int, width: int, classes: int, posterior: str, value_bytes: int, parameters: int
) -> list[Collective]:
    """All that a step of KDAV sends at stage 0, in the order in which it begins.

    Args:
        batch: images of one process.
        width: d, of the teacher's embedding.
        classes: K.
        posterior: "dense" or "ids", as in `TeacherMemory`.
        value_bytes: of a number in the memory.
        parameters: how many numbers are trained; their gradients are float32.
    """
    row = classes * value_bytes if posterior == "dense" else 8
    last = min(BUCKET, 4 * parameters)
    return [
        Collective("share of valid", "small sums", REDUCE, 4, STUDENT),
        # Embedding, posterior and whether the row is valid, in one message.
        Collective("teacher rows", "teacher rows", GATHER, batch * (width * value_bytes + row + 1), STUDENT),
        Collective("gradients", "gradients", REDUCE, 4 * parameters - last, BACKWARD),
        Collective("last gradients", "gradients", REDUCE, last),
        Collective("stop votes", "small sums", REDUCE, 16, NEXT),
    ]


def ring_rounds(kind: str, size: int, world: int) -> tuple[int, float]:
    """Messages one after another, and bytes that one process sends in all.

    All-reduce: reduce-scatter and all-gather of N pieces of size/N. All-gather: each process's rows pass through all.
    """
    steps = world - 1
    return (2 * steps, 2 * steps * size / world) if kind == REDUCE else (steps, steps * size)


def ring_seconds(kind: str, size: float, world: int, link: Link) -> float:
    rounds, sent = ring_rounds(kind, size, world)
    return rounds * link.latency_s + sent / link.bytes_per_s


def fit_link(kind: str, points: list[Point]) -> Link:
    """Latency and bandwidth with the least squares of relative errors; neither is below 0."""
    seconds = np.array([point.seconds for point in points])
    rows = np.array([ring_rounds(kind, point.bytes, point.world) for point in points]) / seconds[:, None]
    latency, per_byte = np.linalg.lstsq(rows, np.ones(len(points)), rcond=None)[0]
    if latency < 0 or per_byte < 0:  # then the best fit has one of them alone
        alone = [float(column.sum() / (column**2).sum()) for column in rows.T]
        latency, per_byte = (0.0, alone[1]) if latency < 0 else (alone[0], 0.0)
    return Link(float(latency), 1 / float(per_byte) if per_byte else float("inf"))


def assumed(value: float, source: str):
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True)
class GpuCluster:
    """What is assumed of GPUs and their network: nothing of it is measured here."""

    gpus_per_node: int = assumed(8, "DGX H100 and HGX H100 boards")
    nvlink_bytes_per_s: float = assumed(
        450e9, "H100 SXM datasheet: 900 GB/s both ways, so 450 each way a GPU"
    )
    nvlink_share: float = assumed(0.7, "assumption: of the datasheet's figure, for messages of tens of MB")
    nvlink_latency_s: float = assumed(5e-6, "assumption: one message of NCCL's ring inside a node")
    network_bytes_per_s: float = assumed(50e9, "one 400 Gb/s InfiniBand adapter a GPU, as in a DGX H100")
    network_share: float = assumed(0.8, "assumption: of the adapter's figure")
    network_latency_s: float = assumed(10e-6, "assumption: one message between nodes, two switches")
    peak_flops_per_s: float = assumed(989e12, "H100 SXM and H200 datasheet: bf16, dense")
    peak_share: float = assumed(0.15, "assumption: of that peak, for ResNets; a slower step scales better")

    @property
    def inside(self) -> Link:
        return Link(self.nvlink_latency_s, self.nvlink_bytes_per_s * self.nvlink_share)

    @property
    def between(self) -> Link:
        return Link(self.network_latency_s, self.network_bytes_per_s * self.network_share)

    def described(self) -> dict[str, dict[str, object]]:
        return {
            f.name: {"value": getattr(self, f.name), "source": f.metadata["source"]} for f in fields(self)
        }

    def seconds(self, kind: str, size: float, world: int) -> float:
        """Of a collective over `world` GPUs: one node, or whole nodes.

        All-reduce: reduce-scatter inside the nodes, all-reduce of each GPU's piece between them, all-gather inside.
        All-gather: each GPU between the nodes, then all of that inside.
        """
        local = min(world, self.gpus_per_node)
        nodes = world // local
        if kind == REDUCE:
            inside = ring_seconds(REDUCE, size, local, self.inside)  # both halves
            return inside + ring_seconds(REDUCE, size / local, nodes, self.between)
        between = ring_seconds(GATHER, size, nodes, self.between)
        return between + ring_seconds(GATHER, size * nodes, local, self.inside)


def predict(
    compute_s: float,
    collectives: list[Collective],
    seconds_of,
    *,
    parts_s: Mapping[str, float] | None = None,
    data_s: float = 0.0,
) -> dict[str, float]:
    """Seconds of a step by piece.

    Args:
        compute_s: of one process, no other being waited for.
        collectives: of a step.
        seconds_of: kind and bytes to seconds.
        parts_s: seconds of the parts of a step during which the network works beside what computes; none where it takes
            the same cores.
        data_s: a loader's time for a batch; it works while the step does.
    """
    pieces = dict.fromkeys(PIECES, 0.0) | {"compute": compute_s}
    free = dict(parts_s or {})
    for one in collectives:
        if one.under == NEXT or one.bytes == 0:
            continue
        seconds = seconds_of(one.kind, one.bytes)
        hidden = min(seconds, free.get(one.under, 0.0))
        free[one.under] = free.get(one.under, 0.0) - hidden
        pieces[one.piece] += seconds - hidden
    pieces["data"] = max(0.0, data_s - sum(pieces.values()))
    return pieces


def curve(name: str, batch: int, worlds: list[int], pieces_of) -> list[dict[str, object]]:
    """Rows of one line: efficiency is the step's time on one process over that on N, each with the same batch."""
    alone = sum(pieces_of(1).values())
    rows = []
    for world in worlds:
        pieces = pieces_of(world)
        step = sum(pieces.values())
        rows.append(
            {"series": name, "processes": world, "pieces_s": pieces, "step_s": step}
            | {"images_per_s": world * batch / step, "efficiency": alone / step}
        )
    return rows
