"""Time and memory of methods beside KD's: every pair is kept, a failure costs one row, needs are those of a run."""

import method_cost_results
import method_costs
import method_needs
import method_steps
import pytest
import record
import torch

from kdav_fast.config.method import method_section
from kdav_fast.runtime.processes import start_cluster
from tests.benchmarks.scripts import refusal

SETTINGS = {
    "device": "cpu",
    "teacher": "cifar:resnet8",
    "student": "cifar:resnet8",
    "image_size": 16,
    "classes": 4,
    "images": 40,
    "batch_size": 8,
    "precision": "fp32",
    "methods": {"cocord": {"hidden": 16, "width": 12, "predictor": 10, "queue": 20}},
}
TINY = [
    *("--device=cpu", "--teacher=cifar:resnet8", "--student=cifar:resnet8", "--image-size=16"),
    *("--batch-size=8", "--classes=4", "--images=40", "--turn-seconds=0.01"),
]
FACTS = {"views": 1, "teacher": True, "before": "", "learned_bytes": 0, "remembered_bytes": 0}


def facts_of(name, held, step):
    on_imagenet = {"learned_bytes": 3 * 2**20, "remembered_bytes": 0}
    return {"method": name, "held_bytes": held, "step_bytes": step, **FACTS, "on_imagenet": on_imagenet}


def pair(name, seconds, of_kd, number=1):
    return {"method": name, "round": number, "steps": 1, "step_s": seconds, "kd_step_s": of_kd}


@pytest.fixture
def made_record(tmp_path):
    environment = {"versions": {}, "device": "a CPU"}
    return lambda: record.Record(
        tmp_path / "result.json", environment, SETTINGS, method_cost_results.summarise, name="measured"
    )


class FakeBench:
    """Takes no time; one method cannot be started, another fails at its second turn."""

    def __init__(self):
        self.dropped, self.started = [], []

    def start(self, name):
        self.started.append(name)
        if name == "crd":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    def facts(self, name):
        return facts_of(name, 10, 5)

    def take_turns(self, name, number):
        if name == "mld" and number == 2:
            raise FloatingPointError("loss or gradient not finite")
        return pair(name, 2.0, 1.0, number)

    def drop(self, name):
        self.dropped.append(name)


def test_a_method_that_fails_costs_its_own_row(made_record):
    bench, kept = FakeBench(), made_record()
    method_costs.measure(["kd", "crd", "mld", "at"], 2, lambda: bench, kept)
    result = kept.write()
    assert bench.dropped == ["crd", "mld"]
    assert result["not_measured"] == {
        "crd": "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB.",
        "mld": "FloatingPointError: loss or gradient not finite",
    }
    assert {row["method"]: row["pairs"] for row in result["rows"]} == {"kd": 2, "at": 2}


def test_a_killed_run_goes_on_and_measures_nothing_again(made_record):
    class Killed(BaseException):
        pass

    class Dying(FakeBench):
        def take_turns(self, name, number):
            if (name, number) == ("at", 2):
                raise Killed
            return super().take_turns(name, number)

    with pytest.raises(Killed):
        method_costs.measure(["kd", "at", "sp"], 3, Dying, made_record())
    again, kept = FakeBench(), made_record()
    method_costs.measure(["kd", "at", "sp"], 3, lambda: again, kept)
    assert again.started == ["at", "sp", "kd", "at", "sp"]
    taken = [(row["method"], row["round"]) for row in kept.rows if "round" in row]
    assert taken == [(name, number) for number in (1, 2, 3) for name in ("kd", "at", "sp")]
    assert sum("held_bytes" in row for row in kept.rows) == 3
    method_costs.measure(["kd", "at", "sp"], 3, lambda: pytest.fail("nothing is left to measure"), kept)


def test_figures_are_of_pairs_not_of_medians():
    """The machine is three times slower in the second pair; the method takes a tenth more in every pair."""
    measured = [facts_of("kd", 100, 20), facts_of("at", 130, 25)]
    for number, slow in enumerate((1.0, 3.0, 1.0), 1):
        measured += [pair("kd", slow, slow, number), pair("at", 1.1 * slow, slow, number)]
    result = method_cost_results.summarise(measured)
    base, row = result["rows"]
    assert list(row["times_kd"].values()) == pytest.approx([1.1] * 3)
    assert (row["median_step_s"], row["over_kd"]["median_s"]) == pytest.approx((1.1, 0.1))
    assert (row["peak_bytes"], row["extra_bytes"], base["extra_bytes"]) == (155, 35, 0)
    assert result["noise"] == 0


def test_a_table_without_kd_claims_nothing(capsys):
    result = method_cost_results.summarise([facts_of("at", 130, 25), pair("at", 2.0, 1.0)])
    environment = {"device": "a CPU"}
    method_cost_results.print_table(result | {"settings": SETTINGS, "environment": environment})
    printed = capsys.readouterr().out
    assert "2.000 (2.000 to 2.000)" in printed
    assert printed.splitlines()[1].split()[-5:] == ["-", "-", "-", "3.00", "-"]


@pytest.fixture(scope="module")
def at_work(tmp_path_factory):
    """A function that gives the steps of a method."""
    folder, cluster = tmp_path_factory.mktemp("method"), start_cluster("cpu")
    method_steps.write_teacher(folder, SETTINGS)
    data = method_steps.make_data(SETTINGS["images"], SETTINGS["classes"])

    def get(name):
        section = {"name": name, **SETTINGS["methods"].get(name, {})}
        return method_steps.MethodSteps(method_steps.make_config(folder, SETTINGS, section), data, cluster)

    return get


@pytest.mark.parametrize(
    ("name", "views"), [("none", 1), ("kdav", 1), ("crd", 1), ("pskd", 1), ("cocord", 3), ("sskd", 4)]
)
def test_needs_are_those_of_the_run(at_work, name, views):
    one = at_work(name)
    run, batch = one._run, next(one._batches)
    section = method_section({"name": name, **SETTINGS["methods"].get(name, {})})
    found = method_needs.needs(section, SETTINGS, torch.float32)
    assert found["remembered_bytes"] == sum(buffer.nbytes for buffer in run.distiller.buffers())
    beside = method_needs.bytes_of(run.trainee) - method_needs.bytes_of(run.student.network)
    assert found["learned_bytes"] == beside
    assert (found["views"], one.views, batch.views, len(batch.images)) == (views, views, views, 8 * views)
    assert found["teacher"] == (run.teacher is not None)
    assert found["before"] == {"kdav": "1 pass", "sskd": "60 epochs"}.get(name, "")
    networks = [run.trainee, run.distiller] + ([run.teacher.network] if run.teacher else [])
    least = sum(map(method_needs.bytes_of, networks)) + batch.images.nbytes
    assert least < one.held_bytes < 2 * least + 2**21
    assert one.step_bytes > 0


def test_a_step_that_is_not_finite_is_told(at_work):
    one = at_work("none")
    assert one.take_turn(2) > 0
    next(one._batches).images.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        one.take_turn(1)


def test_memory_of_every_image_is_told_for_imagenet_without_being_held():
    large = SETTINGS | {"classes": 1000, "images": 1_281_167}
    needed = method_needs.needs(method_section({"name": "pskd"}), large, torch.bfloat16)
    assert needed["remembered_bytes"] == 1_281_168 * (1000 * 2 + 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--methods", "kd", "fastest"], "--methods has 'fastest'; allowed: 'none', "),
        (["--images=4"], "--batch-size is 8, more than --images 4"),
        (["--json", "missing/result.json"], "the folder missing does not exist"),
    ],
)
def test_ends_with_one_line_where_it_cannot_measure(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    given = [*TINY, "--json", "result.json", *arguments]
    assert reason in refusal("method_costs.py", given, monkeypatch, capsys)
    assert not (tmp_path / "result.json").exists()
