"""The summary shows every result, calls nothing met that was not measured, and keeps what is not its own."""

import json
import re
import runpy
import sys

import pytest

from tests.benchmarks.scripts import BENCHMARKS

SCRIPT = BENCHMARKS / "summary.py"
NAMES = (
    "loss_kernel",
    "data_pipeline",
    "training_step",
    "method_costs",
    "method_accuracy",
    "accuracy",
    "scale",
)
MARKED = "before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n"


def environment(benchmark):
    command = f"python benchmarks/{benchmark}.py --x <y>"
    fixed = {"device": "Some <CPU> & more", "threads": 2, "date": "2026-01-02 03:04 UTC"}
    return {**fixed, "versions": {"torch": "9.9.9"}, "command": command}


def spread(value, unit):
    return {f"median_{unit}": value, f"p20_{unit}": 0.9 * value, f"p80_{unit}": 1.1 * value}


def loss_rows(shape, times, **changes):
    """Rows of one shape; times in seconds by implementation."""
    fixed = {"shape": f"{shape} ids", "posterior": "ids", "pass": "full", "gradient_error": 1e-3}
    fixed |= {
        "same_bits_again": True,
        "extra_mib": 100.0,
        "times_roofline": 2.0,
        "speed_over_eager_fp32": 1.0,
    }
    return [
        {**fixed, **spread(seconds, "s"), "implementation": name, **changes.get(name, {})}
        for name, seconds in times.items()
    ]


def write(folder, name, data):
    benchmark = name.rsplit("_", 1)[0]
    (folder / f"{name}.json").write_text(json.dumps({"environment": environment(benchmark), **data}))


def loader_rows(ratio=3.0):
    names = {"torchvision": 100.0, "dali <b>cpu</b>": 100.0 * ratio}
    return {
        "settings": {"batch_size": 4},
        "rows": [{"loader": name, **spread(rate, "images_per_s")} for name, rate in names.items()],
        "ratio_dali_cpu_over_torchvision": ratio,
        "ratio_dali_gpu_over_torchvision": None,
        "noise": 0.2,
    }


def step_rows(**rates):
    rows = [{"contender": name, **spread(rate, "images_per_s")} for name, rate in rates.items()]
    return {
        "rows": rows,
        "breakdown_s": {"kdav_fast": {"teacher": 0.5, "communication": None}},
        "noise": 0.01,
    }


def costs(**failed):
    """A result of method_costs.py with KD, one method more, and what failed."""
    on_imagenet = {"learned_bytes": 0, "remembered_bytes": 2**30}
    fixed = {"views": 1, "before": "", "extra_bytes": 2**20, "learned_bytes": 0, "remembered_bytes": 0}
    rows = [
        {
            "method": name,
            **spread(seconds, "step_s"),
            "over_kd": spread(seconds - 0.1, "s"),
            "times_kd": spread(10 * seconds, "ratio"),
            "on_imagenet": on_imagenet,
            **fixed,
        }
        for name, seconds in (("kd", 0.1), ("crd", 0.12))
    ]
    sizes = {"teacher": "t", "student": "s", "image_size": 8, "batch_size": 4, "precision": "fp32"}
    return {"rows": rows, "not_measured": failed, "settings": sizes | {"images": 5, "classes": 2}}


def reached():
    """A result of method_accuracy.py with two methods."""
    row = {
        "mean_top1": 70.0,
        "std_top1": None,
        "held_out_top1": 71.0,
        "seeds": [0],
        "lr": 0.1,
        "minutes": 2.0,
    }
    return {
        "rows": [{**row, "method": "crd", "mean_top1": 72.5}, {**row, "method": "none"}],
        "networks": {"teacher": "t", "student": {"name": "s", "width": 0.5}},
        "preset": {"train_subset": 25000, "epochs": 12},
        "teacher_top1": 85.6,
    }


@pytest.fixture
def folder(tmp_path):
    """One small result of every benchmark and a page with markers."""
    times = {"eager fp32": 0.8, "eager bf16": 0.9, "compile": 0.6, "chunked": 0.5}
    write(tmp_path, "loss_kernel_cpu", {"rows": loss_rows("B256 d512 L65536 K1000", times)})
    write(tmp_path, "data_pipeline_cpu", loader_rows())
    read = {"way": "process", "main": "launches", "work_alone_ms": 16.1, "lost_ms": 0.5}
    rates = {f"{name}_images_per_s": 15000.0 for name in ("median", "p20", "p80")}
    write(tmp_path, "reading_cpu", {"rows": [read | rates]})
    missed = {
        "name": "over the reference",
        "target": 4.0,
        "measured": 2.5,
        "met": False,
        "reason": "no JPEG unit",
    }
    unknown = {"name": "a GPU's", "target": ">= 90 %", "measured": None, "met": None, "reason": "no GPU"}
    step = step_rows(reference=50.0, kdav_fast=50.0) | {"targets": [missed, unknown]}
    write(tmp_path, "training_step_cpu", step)
    write(tmp_path, "method_costs_cpu", costs())
    write(tmp_path, "method_accuracy_cpu", reached())
    method = {"settings": "few", "seeds": [0, 1], "mean_top1": 70.25, "std_top1": 0.5, "minutes": 3.0}
    methods = [{**method, "method": m, "held_out_top1": top1} for m, top1 in (("kd", None), ("kdav", 71.5))]
    met = {"name": "KDAV over KD", "target": ">= 2.0", "measured": 2.5, "met": True}
    write(tmp_path, "accuracy_cpu", {"rows": methods, "targets": [met], "teacher_top1": 86.0})
    pieces = {"compute": 0.1, "gradients": 0.01, "data": 0.0}
    scaled = {"processes": 2, "pieces_s": pieces, "predicted_s": 0.11, "measured_s": 0.12}
    scaled |= {"error_percent": -8.3, "images_per_s": 20.0}
    line = [{"series": "GPUs", "processes": n, "efficiency": 0.5} for n in (1, 8, 64, 1024)]
    write(tmp_path, "scale_cpu", {"rows": [scaled], "curves": line})
    (tmp_path / "page.md").write_text(MARKED)
    return tmp_path


@pytest.fixture
def summarise(folder, monkeypatch, capsys):
    """Runs the script on the folder; returns its exit code and what it printed to stdout and stderr."""

    def call(*arguments):
        monkeypatch.syspath_prepend(BENCHMARKS)
        given = ["--results", str(folder), "--page", str(folder / "page.md"), *arguments]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capsys.readouterr()

    return call


def states(summary):
    """Target's name to its last column."""
    rows = [line.split(" | ") for line in summary.split("**")[0].splitlines() if line.startswith("| ")]
    return {row[0][2:]: row[-1].removesuffix(" |") for row in rows}


def test_the_page_shows_every_result_as_text_and_opens_offline(folder, summarise):
    assert summarise()[0] == 0
    text = (folder / "report.html").read_text()
    assert all(f"<h2>{name}" in text for name in NAMES)
    assert "<p>Not measured" not in text
    row = re.search(r"<tr><t[dh]>dali &lt;b&gt;cpu&lt;/b&gt;<.*?</tr>", text, re.DOTALL)[0]
    assert re.findall(r">([\d.]+)<", row) == [
        "300",
        "270",
        "330",
        "3.00",
    ]  # median, p20, p80, over torchvision
    assert "<b>" not in text
    assert "--x &lt;y&gt;" in text
    assert "://" not in text
    assert "too noisy" in text  # 0.2 of the loaders


def test_targets_are_met_missed_or_not_measured(folder, summarise):
    summarise()
    found = states((folder / "summary.md").read_text())
    assert found["loss on a CPU, chunked over eager, L 65,536"] == "met"
    assert found["DALI decoding on the CPU, over torchvision"] == "met"
    assert found["KDAV over KD (accuracy_cpu.json)"] == "met"
    assert found["over the reference (training_step_cpu.json)"] == "missed (no JPEG unit)"
    assert found["a GPU's (training_step_cpu.json)"] == "not measured (no GPU)"
    # What a CPU measured meets no target of a GPU.
    gpu = [
        name
        for name in found
        if name.startswith(("loss, ", "DALI decoding on the GPU", "training step over"))
    ]
    assert len(gpu) == 15
    assert {found[name] for name in gpu} == {"not measured (no GPU)"}


def test_the_kernel_is_judged_by_the_worse_posterior(folder, summarise):
    times = {"eager fp32": 9.0, "eager bf16": 8.0, "compile": 3.0, "chunked": 2.5, "triton": 2.0}
    rows = loss_rows("B256 d512 L16384 K1000", times)
    dense = loss_rows("B256 d512 L16384 K1000", times | {"eager bf16": 5.0}, triton={"times_roofline": 2.4})
    rows += [row | {"posterior": "dense"} for row in dense]
    large = loss_rows("B1024 d2048 L65536 K1000", times, triton={"extra_mib": 11.0, "gradient_error": 2.1e-3})
    write(folder, "loss_kernel_cuda", {"rows": rows + large})
    summarise()
    found = states((folder / "summary.md").read_text())
    assert found["loss, shape A, ids, over eager bf16"] == "met"  # 4.0, wanted 3
    assert found["loss, shape A, dense, over eager bf16"] == "missed"  # 2.5
    assert found["loss, shape A, dense, over torch.compile"] == "met"  # 1.5
    assert found["loss, shape A, dense, over its roofline"] == "met"  # 2.4, wanted 2.5
    assert found["loss, large shape, ids, over eager bf16"] == "met"  # 4.0
    assert found["loss, large shape, ids, peak extra memory over eager's"] == "missed"  # 0.11
    assert found["loss, large shape, dense, over eager bf16"].startswith("not measured (no figure of fused")
    assert found["loss, bf16 error over eager bf16's"] == "missed"  # 0.0011


def test_what_failed_is_told_and_judges_nothing(folder, summarise):
    rows = loss_rows("B256 d512 L16384 K1000", {"eager bf16": 8.0, "chunked": 2.0, "triton": 1.0})
    rows[-1] = {key: rows[-1][key] for key in ("shape", "posterior", "pass", "implementation")}
    rows[-1]["error"] = "OutOfResources: shared memory"
    write(folder, "loss_kernel_cuda", {"rows": rows})
    checks = [{"what": "no wait in a step, bf16", "right": False, "error": "it waits"}]
    write(folder, "check_cuda", {"rows": [*checks, {"what": "the loss", "right": True}]})
    write(folder, "data_pipeline_cuda", loader_rows() | {"not_measured": {"dali gpu": "no decoder"}})
    summarise()
    text = (folder / "summary.md").read_text()
    found = states(text)
    assert found["loss, shape A, ids, over eager bf16"] == "met"  # by chunked
    assert found["loss, shape A, ids, over torch.compile"].startswith("not measured (no figure of compile")
    assert found["steps without waiting for the device"] == "missed"
    assert found["loss: every check against float64"] == "met"
    assert found["DALI decoding on the GPU, over torchvision"] == "not measured (no decoder)"
    assert "OutOfResources: shared memory" in text
    assert "| dali gpu | no decoder |" in text


def test_the_page_gets_the_summary_and_keeps_the_rest(folder, summarise):
    summarise()
    page = (folder / "page.md").read_text()
    assert page.startswith("before\n<!-- benchmarks:begin -->\n")
    assert page.endswith("<!-- benchmarks:end -->\nafter\n")
    assert (folder / "summary.md").read_text().strip() in page
    summarise()
    assert (folder / "page.md").read_text() == page


def test_missing_results_are_not_measured(folder, summarise):
    for path in folder.glob("*.json"):
        path.unlink()
    assert summarise()[0] == 0
    found = states((folder / "summary.md").read_text())
    assert not {"met", "missed"} & set(found.values())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data_pipeline_cpu.json", "{"),
        ("loss_kernel_cpu.json", json.dumps({"environment": environment("x"), "rows": [{}]})),
    ],
)
def test_a_malformed_result_is_named_in_one_line(folder, summarise, name, content):
    (folder / name).write_text(content)
    code, _, message = summarise()
    assert code == 2
    assert f"{name} is not a result of" in message
    assert len(message.splitlines()) == 1
    assert (folder / "page.md").read_text() == MARKED
    assert not (folder / "report.html").exists()


def test_what_methods_cost_is_a_target_and_a_table_of_their_page(folder, summarise):
    name = "every method: time and memory beside KD's, in one run"
    marked = "before\n<!-- costs:begin -->\nold\n<!-- costs:end -->\nafter\n"
    (folder / "methods.md").write_text(marked)
    (folder / "method_accuracy_cpu.json").unlink()
    assert summarise()[0] == 0
    assert states((folder / "summary.md").read_text())[name] == "met"
    text = (folder / "methods.md").read_text()
    assert "old" not in text
    assert "| crd | 1 | - | 120.0 | +20.0 | 1.200 (1.080 to 1.320) | +1.0 | - | - | - | 1,024 |" in text
    write(folder, "method_costs_cuda", costs(mld="OutOfMemoryError: much"))
    summarise()
    assert states((folder / "summary.md").read_text())[name] == "missed"
    assert "| mld | OutOfMemoryError: much |" in (folder / "methods.md").read_text()


def test_what_methods_reach_is_another_table_of_their_page(folder, summarise):
    (folder / "methods.md").write_text("<!-- reaches:begin -->\nold\n<!-- reaches:end -->\n")
    (folder / "method_costs_cpu.json").unlink()
    assert summarise()[0] == 0
    text = (folder / "methods.md").read_text()
    assert "old" not in text
    assert "t (85.60 %) teaches s of width 0.5, 25,000 training images, 12 epochs" in text
    assert "| crd | 72.50 | - | +2.50 | 71.00 | 1 | 0.1 | 2.0 |" in text


def test_compare_tells_a_slower_machine_from_a_slower_part(folder, summarise, tmp_path_factory):
    """Times twice as long and rates half as high, but one rate a quarter."""
    old = tmp_path_factory.mktemp("old")
    write(old, "data_pipeline_cpu", loader_rows() | {"settings": {"batch_size": 8}})
    for place, seconds, rates in ((old, 0.6, (50.0, 100.0, 200.0)), (folder, 1.2, (25.0, 50.0, 50.0))):
        write(place, "loss_kernel_cpu", {"rows": loss_rows("B8 d8 L8 K8", {"compile": seconds})})
        names = ("reference", "kdav_fast", "kdav_fast synthetic")
        write(place, "training_step_cpu", step_rows(**dict(zip(names, rates, strict=True))))
    _, printed, _ = summarise("--compare", str(old))
    assert "loss_kernel_cpu.json: as a whole -50.0 % in speed" in printed
    assert "training_step_cpu.json: as a whole -50.0 % in speed" in printed
    assert "data_pipeline_cpu.json: not compared, other settings" in printed
    aside, verdict = printed.splitlines()[-2:]
    assert "1 of 4 medians differ by more than 10 %, the most by 50.0 %" in aside
    assert verdict.startswith("4 of 4 medians differ by more than 10 %")
