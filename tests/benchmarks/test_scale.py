"""The scaling model against formulas by hand, and the measurement on the smallest networks. No time is asserted."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

if __name__ == "__main__":  # one of two ranks
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import scale
import scale_curves
import scale_groups
import scale_model
import scale_process
from scale_model import GATHER, REDUCE, ring_seconds

from tests.benchmarks.scripts import completed, refusal
from tests.train import processes

SMALLEST = ["--teacher=cifar:resnet8", "--student=cifar:resnet8", "--classes=4", "--image-size=8"]
SMALLEST += ["--batch-size=4", "--memory-length=16", "--device=cpu"]


def test_ring_of_two_by_hand():
    link = scale_model.Link(latency_s=1e-3, bytes_per_s=1e6)
    # Two exchange halves of 1,000 bytes, add, and exchange the sums: two messages of 500 bytes.
    assert ring_seconds(REDUCE, 1000, 2, link) == pytest.approx(2 * (1e-3 + 500e-6))
    # Each sends its 1,000 bytes to the other.
    assert ring_seconds(GATHER, 1000, 2, link) == pytest.approx(1e-3 + 1000e-6)
    assert ring_seconds(GATHER, 1000, 4, link) == pytest.approx(3 * (1e-3 + 1000e-6))
    assert ring_seconds(REDUCE, 1000, 1, link) == ring_seconds(GATHER, 9, 1, link) == 0


@pytest.mark.parametrize("kind", [REDUCE, GATHER])
def test_fit_finds_the_link_that_made_the_times(kind):
    link = scale_model.Link(latency_s=20e-6, bytes_per_s=3e9)
    sizes = [4, 4096, 2**20, 2**24]
    points = [scale_model.Point(s, n, ring_seconds(kind, s, n, link)) for n in (2, 4) for s in sizes]
    assert scale_model.fit_link(kind, points) == pytest.approx(link)


def test_nested_rings_by_hand():
    cluster = scale_model.GpuCluster()
    inside, between, size = cluster.inside, cluster.between, 46e6
    node = ring_seconds(REDUCE, size, 8, inside)
    assert cluster.seconds(REDUCE, size, 8) == pytest.approx(node)
    assert cluster.seconds(REDUCE, size, 4) == ring_seconds(REDUCE, size, 4, inside)
    # Two nodes: each GPU exchanges its eighth with its peer, half of that at a time.
    exchange = 2 * (between.latency_s + size / 16 / between.bytes_per_s)
    assert cluster.seconds(REDUCE, size, 16) == pytest.approx(node + exchange)
    gather = between.latency_s + 1e6 / between.bytes_per_s + 7 * (inside.latency_s + 2e6 / inside.bytes_per_s)
    assert cluster.seconds(GATHER, 1e6, 16) == pytest.approx(gather)


def test_what_a_step_sends():
    dense, ids = (
        {one.what: one.bytes for one in scale_model.step_collectives(256, 512, 1000, kind, 2, 11_000_000)}
        for kind in ("dense", "ids")
    )
    assert dense["teacher rows"] == 256 * (512 * 2 + 1000 * 2 + 1)
    assert ids["teacher rows"] == 256 * (512 * 2 + 8 + 1)
    assert dense["gradients"] + dense["last gradients"] == 44_000_000


def test_efficiency_is_1_alone_and_falls_with_every_node():
    cluster = scale_model.GpuCluster()
    sent = scale_model.step_collectives(256, 512, 1000, "dense", 2, 11_000_000)

    def pieces(world, parts_s):
        needed, seconds = sent if world > 1 else [], partial(cluster.seconds, world=world)
        return scale_model.predict(0.03, needed, seconds, parts_s=parts_s)

    worlds = [2**power for power in range(11)]
    beside = {scale_model.STUDENT: 0.005, scale_model.BACKWARD: 0.01}
    plain, overlapped = (
        scale_model.curve("", 256, worlds, partial(pieces, parts_s=parts_s)) for parts_s in ({}, beside)
    )
    efficiency = [row["efficiency"] for row in plain]
    assert efficiency[0] == 1
    assert efficiency == sorted(efficiency, reverse=True)
    assert all(a["efficiency"] >= b["efficiency"] for a, b in zip(overlapped, plain, strict=True))
    assert plain[0]["images_per_s"] == pytest.approx(256 / 0.03)
    assert all(sum(row["pieces_s"].values()) == pytest.approx(row["step_s"]) for row in plain)


def test_what_the_network_does_beside_the_step_costs_what_is_left_over():
    sent = scale_model.step_collectives(256, 512, 1000, "ids", 2, 11_000_000)
    needed = {one.what: one.bytes for one in sent}

    def pieces(**parts_s):
        return scale_model.predict(1.0, sent, lambda kind, size: 1e-9 * size, parts_s=parts_s)

    both = {scale_model.STUDENT: 1.0, scale_model.BACKWARD: 0.01}
    late = 1e-9 * (needed["gradients"] + needed["last gradients"]) - 0.01
    assert pieces(**both)["gradients"] == pytest.approx(late)
    assert pieces(**both)["teacher rows"] == pieces(**both)["small sums"] == 0
    assert pieces()["gradients"] == pytest.approx(0.044)
    everything = {scale_model.STUDENT: 1.0, scale_model.BACKWARD: 1.0}
    assert pieces(**everything)["gradients"] == pytest.approx(1e-9 * scale_model.BUCKET)


def test_a_slow_loader_is_waited_for_only_as_long_as_the_step_is_shorter():
    assert scale_model.predict(0.03, [], None, data_s=0.05)["data"] == pytest.approx(0.02)
    assert scale_model.predict(0.03, [], None, data_s=0.01)["data"] == 0


def test_a_measured_step_of_the_same_networks_stands_for_the_assumed_one(tmp_path):
    assert scale_curves.measured_step(tmp_path) is None
    settings = {"teacher": "timm:resnet34", "student": "timm:resnet18", "image_size": 224, "classes": 1000}
    rows = [{"contender": "kdav_fast synthetic", "median_images_per_s": 5120.0}]
    result = {"environment": {"device": "GPU"}, "rows": rows, "settings": settings | {"batch_size": 256}}
    file = tmp_path / "training_step_cuda.json"
    file.write_text(json.dumps(result))
    assert scale_curves.measured_step(tmp_path)[0] == pytest.approx(0.05)
    file.write_text(json.dumps(result | {"settings": settings | {"batch_size": 64}}))
    assert scale_curves.measured_step(tmp_path) is None


def test_facts_of_the_imagenet_recipe():
    """Against published counts: ResNet-18's 11,689,512 parameters with the head in place of its classifier."""
    facts = scale_curves.imagenet_facts()
    assert facts["parameters"] == 11_689_512 - (512 + 1) * 1000 + 512 * 512 + 2 * 512
    assert facts["teacher_flops"] == pytest.approx(2 * 3.66e9, rel=0.01)  # torchvision: 3.66 GMAC
    assert facts["student_forward_flops"] == pytest.approx(2 * 1.81e9, rel=0.01)


def test_the_model_counts_the_collectives_that_a_step_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scale.py", *SMALLEST])
    options = scale.read_options()
    scale_groups.write_data(tmp_path, options.classes, options.image_size)
    scale_groups.write_recipe(tmp_path, options)
    texts = processes.run([__file__, str(tmp_path)], 2)
    for calls, facts in (json.loads(text.splitlines()[-1]) for text in texts):
        expected = [one for one in scale_model.step_collectives(**facts) if one.piece != "gradients"]
        assert [tuple(call) for call in calls] == [(one.kind, one.bytes) for one in expected]


@pytest.mark.slow
def test_the_curves_reach_1024_and_say_what_they_assume(tmp_path):
    arguments = [*SMALLEST, f"--json={tmp_path}/result.json", "--processes=2", "--rounds=1"]
    process = completed("scale.py", [*arguments, "--round-seconds=0.02"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert max(row["processes"] for row in result["curves"]) == 1024
    assert all(one["source"] for one in result["assumptions"]["gpu_cluster"].values())
    assert str(tmp_path) not in json.dumps(result)
    assert "predictions, not measurements" in process.stdout.splitlines()[-1]


@pytest.mark.slow
def test_two_checkouts_take_turns():
    """This one beside itself."""
    arguments = [str(Path(__file__).parents[2]), *SMALLEST, "--rounds=2", "--round-seconds=0.02"]
    *_, wall, cpu = completed("scale_beside.py", arguments).stdout.splitlines()
    for name, line in (("wall", wall), ("cpu", cpu)):
        there, here, quotient = map(float, line.removeprefix(name).split("(")[0].split())
        assert min(there, here, quotient) > 0


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, monkeypatch, capsys):
    assert "has no benchmarks/scale_process.py" in refusal(
        "scale_beside.py", [str(tmp_path)], monkeypatch, capsys
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--json", "missing/result.json"], "the folder missing does not exist"),
        (["--teacher", "cifar:resnet9"], "resnet9"),
    ],
)
def test_ends_with_one_line_where_it_cannot_measure(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    usual = ["--device=cpu", "--json=result.json"]
    assert reason in refusal("scale.py", [*usual, *arguments], monkeypatch, capsys)
    assert not (tmp_path / "result.json").exists()


if __name__ == "__main__":
    process = scale_process.Process(Path(sys.argv[1]) / "recipe.yaml", ["train.batch_size=8"])
    print(json.dumps([process.calls(), process.facts()]))
