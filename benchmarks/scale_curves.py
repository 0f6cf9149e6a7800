"""Efficiency from 1 to 1,024 processes: the measured CPU pieces, and assumed GPUs and their network."""

import json
from functools import partial
from pathlib import Path

import torch
from scale_model import BACKWARD, STUDENT, GpuCluster, Link, curve, predict, ring_seconds, step_collectives
from torch.utils.flop_counter import FlopCounterMode

from kdav_fast.errors import InputError
from kdav_fast.models import build_classifier
from kdav_fast.student.heads import EmbeddingHead
from kdav_fast.student.student import Student

WORLDS = [2**power for power in range(11)]
BATCH, CLASSES = 256, 1000
SETTING = f"ResNet-34 to ResNet-18, 224 pixels, batch {BATCH} a GPU"


def imagenet_facts() -> dict[str, float]:
    """Parameters, widths and FLOP an image of the ImageNet recipe's networks; nothing is computed to count them."""
    meta = torch.device("meta")
    teacher = build_classifier("torchvision:resnet34", CLASSES).eval().to(meta)
    network = build_classifier("torchvision:resnet18", CLASSES).to(meta)
    head = EmbeddingHead(network.feature_width, teacher.feature_width, CLASSES).to(meta)
    student = Student(network, head)
    images = torch.zeros(2, 3, 224, 224, device=meta)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        teacher(images)
    with FlopCounterMode(display=False) as both:
        embedding = head(network.backbone(images))
        ahead = both.get_total_flops()
        embedding.sum().backward()
    return {
        "width": teacher.feature_width,
        "parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "teacher_flops": forward.get_total_flops() / 2,
        "student_forward_flops": ahead / 2,
        "student_backward_flops": (both.get_total_flops() - ahead) / 2,
    }


def measured_step(results: Path) -> tuple[float, str] | None:
    """Seconds of one process's step on resident data, if a result of these networks on a GPU is there."""
    path = results / "training_step_cuda.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
        rates = {row["contender"]: row["median_images_per_s"] for row in result["rows"]}
        settings = result["settings"]
        networks = settings["teacher"].rpartition(":")[2], settings["student"].rpartition(":")[2]
        sizes = settings["batch_size"], settings["image_size"], settings["classes"]
        name = "kdav_fast synthetic"
        if (networks, sizes) != (("resnet34", "resnet18"), (BATCH, 224, CLASSES)) or name not in rates:
            return None
        return BATCH / rates[name], f"measured: {name} in {path.name}, {result['environment']['device']}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path.name} is not a result of training_step.py ({error!r}); measure it again"
        ) from None


def gpu_step(facts: dict[str, float], cluster: GpuCluster, results: Path) -> tuple[float, str]:
    """Seconds of a step without communication, and where they come from."""
    flops = sum(facts[part] for part in ("teacher_flops", "student_forward_flops", "student_backward_flops"))
    source = (
        f"assumption, not a measurement: {flops / 1e9:.1f} GFLOP an image, counted, at {cluster.peak_share:.0%} of "
        f"{cluster.peak_flops_per_s / 1e12:.0f} TFLOP/s"
    )
    counted = flops * BATCH / (cluster.peak_share * cluster.peak_flops_per_s)
    return measured_step(results) or (counted, source)


def curves(
    pieces: list[dict], rows: list[dict], device: str, results: Path
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """All lines, and what was assumed for them.

    Args:
        pieces: of each number of processes, as `scale.measure` gives them.
        rows: predictions of the same, as `scale.compare` gives them.
        device: that they were measured on.
        results: folder where a GPU's measured training step may lie.
    """
    cluster = GpuCluster()
    facts = imagenet_facts()
    compute, source = gpu_step(facts, cluster, results)
    if device == "cuda":
        own, parts = pieces[0]["alone"]["median_s"], pieces[0]["facts"]
        if (parts["batch"], parts["parameters"]) == (BATCH, facts["parameters"]):
            compute, source = own, "measured in this run: one process without communication"
    flops = {name: value for name, value in facts.items() if name.endswith("flops")}
    beside = {
        STUDENT: compute * facts["student_forward_flops"] / sum(flops.values()),
        BACKWARD: compute * facts["student_backward_flops"] / sum(flops.values()),
    }

    def gpu(world: int, posterior: str, parts_s: dict[str, float]) -> dict[str, float]:
        sent = step_collectives(BATCH, facts["width"], CLASSES, posterior, 2, facts["parameters"])
        seconds_of = partial(cluster.seconds, world=world)
        return predict(compute, sent if world > 1 else [], seconds_of, parts_s=parts_s)

    drawn = curve("GPUs, class ids", BATCH, WORLDS, partial(gpu, posterior="ids", parts_s=beside))
    drawn += curve("GPUs, dense posteriors", BATCH, WORLDS, partial(gpu, posterior="dense", parts_s=beside))
    drawn += curve(
        "GPUs, class ids, nothing overlapped", BATCH, WORLDS, partial(gpu, posterior="ids", parts_s={})
    )
    assumptions = {
        "gpu_cluster": cluster.described(),
        "gpu_setting": SETTING,
        "gpu_compute": {"seconds": compute, "source": source},
        "gpu_networks": facts,
        "gpu_beside": {"seconds": beside, "source": "their shares of the FLOP, counted"},
        "memory_value_bytes": {"value": 2, "source": "bf16 embeddings and posteriors; class ids take 8"},
        "overlapped": "the teacher's rows travel during the student's forward pass, and all gradients but the last "
        "bucket during the backward pass, as far as these last",
        "rings": "every collective is a ring; NCCL takes trees for short all-reduces, which need fewer messages",
        "left_out": "waiting for the slowest of many processes, the data loader (it keeps up), and other traffic",
    }
    chosen = next((i for i, row in enumerate(rows) if row["processes"] > 1), None)
    if device == "cpu" and chosen is not None:
        links = {kind: Link(**link) for kind, link in rows[chosen]["links"].items()}
        piece = pieces[chosen]

        def cpu(world: int) -> dict[str, float]:
            sent = step_collectives(**piece["facts"]) if world > 1 else []
            data = piece["facts"]["batch"] / piece["loader_images_per_s"]
            seconds_of = partial(_ring, world=world, links=links)
            return predict(piece["alone"]["median_s"], sent, seconds_of, data_s=data)

        drawn = curve("CPU processes, loopback network", piece["facts"]["batch"], WORLDS, cpu) + drawn
        assumptions["cpu_curve"] = (
            f"compute, latency and bandwidth as measured with {piece['processes']} processes here, one ring of any "
            "length, a core for each further process"
        )
    return drawn, assumptions


def _ring(kind: str, size: float, world: int, links: dict[str, Link]) -> float:
    return ring_seconds(kind, size, world, links[kind])
