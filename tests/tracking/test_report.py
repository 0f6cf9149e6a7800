import base64
import json
import math
import re
import struct
from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from kdav_fast.errors import InputError
from kdav_fast.tracking.report import write_report


def make_run(folder, lines, config="schedule: {name: cosine}\n"):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def training(steps=6, **more):
    lines = []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "epoch": step / 2,
            "train/loss": 3.0 / step,
            "train/top1": 10.0 * step,
            "lr": 0.1,
        }
        lines.append(line | {"images_per_second": 900.0 + step, "data_wait_share": 0.1} | more)
        if step % 2 == 0:
            lines.append(
                {"step": step, "epoch": step / 2, "val/top1": 50.0 - abs(4 - step), "val/images": 100}
            )
    return lines


def pngs(folder):
    return {path.stem for path in folder.glob("*.png")}


def text_of(page):
    return re.sub(r"<[^>]+>", " ", page.read_text())


def test_the_page_stands_alone_and_embeds_every_figure(tmp_path):
    run = make_run(tmp_path / "run", training())
    page = write_report({"KDAV": run}, tmp_path / "report", title="A run")
    assert page == tmp_path / "report" / "index.html"
    html = page.read_text()
    assert pngs(tmp_path / "report") == {"losses", "accuracy", "learning_rate", "throughput"}
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?+(?!data:)""", html) == []
    assert "://" not in html
    assert "@import" not in html
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert sorted(embedded) == sorted(path.read_bytes() for path in (tmp_path / "report").glob("*.png"))
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_the_table_gives_final_and_best_and_when(tmp_path):
    run = make_run(tmp_path / "run", training())
    text = text_of(write_report({"KDAV": run}, tmp_path / "report", title="A run", summary={"gain": 2.914}))
    # val/top1 is 48, 50, 48 at epochs 1, 2, 3: the last is not the best.
    assert re.search(r"48\.00\s+best 50\.00, epoch 2\.00", text)
    assert re.search(r"906\.00\s+median 903\.50", text)
    assert re.search(r"gain\s+2\.91", text)
    assert "schedule: {name: cosine}" in text
    assert "torch 2." in text


def test_loss_is_best_when_lowest(tmp_path):
    lines = [{"step": step, "train/loss": loss} for step, loss in enumerate([2.0, 1.25, 1.5])]
    text = text_of(write_report({"a": make_run(tmp_path / "run", lines)}, tmp_path / "report", title="t"))
    assert re.search(r"1\.50\s+best 1\.25, step 1\b", text)


def test_user_text_is_escaped(tmp_path):
    evil = "<script>alert('&')</script>"
    run = make_run(tmp_path / "run", training(), config=f"run_dir: {evil}\n")
    html = write_report({evil: run}, tmp_path / "report", title=evil, summary={evil: 1.0}).read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") >= 6


@pytest.fixture
def figures_of(tmp_path, monkeypatch):
    """Writes a report of runs, given as label to lines, and returns its figures as matplotlib has them, by name."""
    drawn, save = {}, Figure.savefig

    def savefig(figure, file, **options):
        drawn[Path(file).stem] = figure
        save(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def write(runs):
        folders = {
            label: make_run(tmp_path / "runs" / str(number), lines)
            for number, (label, lines) in enumerate(runs.items())
        }
        write_report(folders, tmp_path / "report", title="$_{")  # broken mathematics would raise here
        return drawn

    return write


def test_labels_that_matplotlib_would_read_as_markup(figures_of):
    figures = figures_of({"_$x_{$": training(**{"odd$_key$": 1.0})})
    [entry, *_] = figures["losses"].legends[0].get_texts()
    assert entry.get_text().strip() == r"_\$x_{\$"


def test_every_run_of_an_overlay_has_a_line_and_its_own_look(figures_of):
    runs = {f"run {i}": training(**{"train/loss": 1.0 + i}) for i in range(9)}
    figure = figures_of(runs)["losses"]
    lines = figure.axes[0].get_lines()
    assert len(lines) == 9
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)


def test_an_unknown_number_gets_a_plot_and_text_does_not(figures_of):
    more = {
        "grad_norm": 1.0,
        "train/skipped_steps": 2,
        "time/forward_ms": 3.0,
        "train/loss/hint": 1.0,
        "train/loss/discount_kl": 1.0,
        "train/count": 4,
        "note": "x",
    }
    figures = figures_of({"a": training(**more)})
    panels = {name: [axes.get_ylabel() for axes in figure.axes] for name, figure in figures.items()}
    assert panels["losses"] == ["loss (nats)", "hint", "discount KL (nats)"]
    assert panels["other"] == ["grad norm", "skipped steps", "count"]
    assert panels["time"] == ["time/forward ms (ms)"]
    assert panels["accuracy"] == ["top-1 accuracy (%)"]
    assert len(figures["accuracy"].axes[0].get_lines()) == 2  # of training and validation
    assert "note" not in str(panels)


def test_the_parts_of_a_loss_that_earlier_versions_logged_beside_it_still_have_their_curves(figures_of):
    old, new = training(**{"train/membership_kl": 0.5}), training(**{"train/loss/membership_kl": 0.5})
    figures = figures_of({"old": old, "new": new})
    panels = {name: [axes.get_ylabel() for axes in figure.axes] for name, figure in figures.items()}
    assert panels["losses"] == ["loss (nats)", "membership KL (nats)"]
    assert panels["other"] == ["membership KL (nats)"]


@pytest.mark.parametrize("key", ["../escape/x", "a b/../c", "é/x"])
def test_a_key_cannot_choose_where_a_figure_goes(tmp_path, key):
    run = make_run(tmp_path / "run", training(**{key: 1.0}))
    write_report({"a": run}, tmp_path / "out" / "report", title="t")
    assert {path.parent for path in tmp_path.rglob("*.png")} == {tmp_path / "out" / "report"}
    assert len(pngs(tmp_path / "out" / "report")) == 5


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 0}],
        [{"step": 1, "epoch": 0.5, "train/loss": 1.0}],
        [{"step": 1, "train/loss": None}, {"step": 2, "train/loss": None}],
        [{"step": 0, "epoch": 0.0, "val/top1": 10.0}],
        [{"step": 1, "train/loss": 0.0}, {"step": 2, "train/loss": "text"}, {"step": 3, "train/loss": 1e9}],
        training(3)[:3],
    ],
    ids=["empty", "bare", "one", "nulls", "at zero", "mixed", "no evaluation"],
)
def test_thin_runs_still_give_a_report(tmp_path, lines):
    thin, full = make_run(tmp_path / "thin", lines, config=None), make_run(tmp_path / "full", training())
    alone = write_report({"thin": thin}, tmp_path / "alone", title="t").read_text()
    assert "no config.yaml" in alone
    assert ("No metrics" in alone) == (not pngs(tmp_path / "alone"))
    both = write_report({"thin": thin, "full": full}, tmp_path / "both", title="t").read_text()
    assert "thin" in both
    assert pngs(tmp_path / "both") == {"losses", "accuracy", "learning_rate", "throughput"}


def test_a_null_is_a_gap_and_a_point_between_two_gaps_is_marked(figures_of):
    lines = [{"step": i, "train/loss": None if i in (98, 100) else float(i)} for i in range(150)]
    [line] = figures_of({"a": lines})["losses"].axes[0].get_lines()
    assert [i for i, value in enumerate(line.get_ydata()) if math.isnan(value)] == [98, 100]
    assert line.get_markevery() == [99]


def test_axis_is_the_step_when_a_run_has_no_epochs(figures_of):
    figures = figures_of({"a": training(), "b": [{"step": 7, "lr": 0.1}]})
    assert {figure.axes[-1].get_xlabel() for figure in figures.values()} == {"optimizer step"}


def test_smoothing_takes_noise_and_leaves_schedules_and_outliers(figures_of):
    noise = [1 + (-1.0) ** i / 10 for i in range(300)]
    noise[150], noise[50] = 1000.0, None
    lines = [
        {
            "step": i,
            "train/loss/noise": value,
            "train/loss/falling": i // 50,
            "train/loss/wave": math.cos(i / 100),
        }
        for i, value in enumerate(noise)
    ]
    noisy, falling, wave = figures_of({"a": lines})["losses"].axes
    assert len(falling.get_lines()) == len(wave.get_lines()) == 1
    raw, smooth = (line.get_ydata() for line in noisy.get_lines())
    assert raw[150] == 1000
    assert math.isnan(smooth[50])
    assert all(0.9 <= value <= 1.1 for i, value in enumerate(smooth) if i != 50)


@pytest.mark.parametrize(
    ("key", "values", "scale"),
    [
        ("train/loss", [5.0 - i / 50 for i in range(200)], "linear"),
        ("grad_norm", [1000 / (i + 1) for i in range(200)], "log"),
        ("grad_norm", [0.0] + [1000 / (i + 1) for i in range(200)], "linear"),
        ("lr", [0.1 * 10.0 ** -(i // 50) for i in range(200)], "log"),
        ("lr", [0.1 * math.cos(i / 200 * math.pi / 2) for i in range(200)], "linear"),
        ("val/top1", [0.1 + i / 2 for i in range(200)], "linear"),
    ],
)
def test_scale(figures_of, key, values, scale):
    [figure] = figures_of({"a": [{"step": i, key: value} for i, value in enumerate(values)]}).values()
    assert figure.axes[0].get_yscale() == scale


def test_no_pyplot_state_and_figures_of_a_legible_size(tmp_path):
    before = pyplot.get_fignums()
    write_report({"a": make_run(tmp_path / "run", training())}, tmp_path / "report", title="t")
    assert pyplot.get_fignums() == before
    for path in (tmp_path / "report").glob("*.png"):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width == 960
        assert height >= 450


def test_errors_name_what_to_give(tmp_path):
    with pytest.raises(InputError, match="at least one run folder"):
        write_report({}, tmp_path / "report", title="t")
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        write_report({"a": tmp_path / "missing"}, tmp_path / "report", title="t")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="folder that can be written"):
        write_report({"a": make_run(tmp_path / "run", training())}, tmp_path / "file", title="t")


def accuracies(values, key="val/top5"):
    return [{"step": i, "epoch": float(i), key: value} for i, value in enumerate(values)]


@pytest.fixture
def drawn(figures_of):
    """The only figure of a report of runs."""
    return lambda runs: next(iter(figures_of(runs).values()))


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([90.0, 100.0, 100.0], 80, 100),
        ([100.0, 100.0], 0, 100),
        ([0.0, 1.0], 0, 2),
        ([0.0, 0.0], 0, 1),
        ([0.0, 100.0], 0, 100),
        ([100.0], 0, 100),
    ],
)
def test_no_axis_of_percentages_goes_beyond_them(drawn, values, low, high):
    axes = drawn({"a": accuracies(values)}).axes[0]
    bottom, top = axes.get_ylim()
    assert low <= bottom < top <= high
    for line in axes.get_lines():
        assert not line.get_clip_on()


def test_a_share_ends_at_one(drawn):
    assert drawn({"a": accuracies([0.5, 1.0], "data_wait_share")}).axes[0].get_ylim() == (0, 1)


def test_what_is_no_percentage_under_that_name_is_not_cut(drawn):
    assert drawn({"a": accuracies([0.5, 250.0])}).axes[0].get_ylim()[1] > 250


def test_runs_that_coincide_all_show_and_are_named(drawn):
    same, different = accuracies([10.0, 20.0, 30.0]), accuracies([11.0, 25.0, 29.0])
    figure = drawn({"one": same, "other": different, "two": same, "three": same})
    one, other, two, three = figure.axes[0].get_lines()
    assert one.get_linewidth() > two.get_linewidth() + 1 > three.get_linewidth() + 2
    assert one.get_markersize() > two.get_markersize() > three.get_markersize()
    assert other.get_linewidth() == three.get_linewidth()
    assert figure.axes[0].get_title(loc="right") == "identical in validation: one = two = three"


def test_runs_that_differ_are_not_called_identical(drawn):
    runs = {
        "a": accuracies([10.0, 20.0]),
        "b": accuracies([10.0, 21.0]),
        "c": accuracies([10.0, 20.0, 30.0]),
        "d": [],
    }
    figure = drawn(runs | {"e": []})
    assert figure.axes[0].get_title(loc="right") == ""
    assert len({line.get_linewidth() for line in figure.axes[0].get_lines()}) == 1


def test_runs_that_only_look_alike_are_not_called_equal(drawn):
    runs = {"a": accuracies([10.0, 90.0]), "b": accuracies([10.0, 90.001])}
    figure = drawn(runs)
    assert figure.axes[0].get_title(loc="right") == "nearly identical in validation: a = b"


def test_a_gap_is_as_a_gap(drawn):
    figure = drawn({"a": accuracies([1.0, None, 3.0]), "b": accuracies([1.0, None, 3.0])})
    assert figure.axes[0].get_title(loc="right") == "identical in validation: a = b"


def test_long_and_many_names_leave_room_for_the_curves(drawn):
    long = {f"{'x' * 300}/{i}": accuracies([1.0 * i, 2.0]) for i in range(30)}
    figure = drawn(long)
    figure.canvas.draw()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(names)) == 30
    assert max(map(len, names)) < 80
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width
    assert figure.axes[0].get_window_extent().height > 150


def test_names_that_are_cut_to_the_same_stay_different(drawn):
    names = ["a" * 60 + "1" + "b" * 60, "a" * 60 + "2" + "b" * 60, "short"]
    figure = drawn({name: accuracies([1.0, 2.0]) for name in names})
    first, second, third = (text.get_text() for text in figure.legends[0].get_texts())
    assert first.endswith("(1)")
    assert second.endswith("(2)")
    assert third == "short"


def test_a_long_curve_is_smoothed_at_a_thousand_places(drawn):
    noisy = [100.0 + (-1) ** i for i in range(30_000)]
    line = drawn({"a": accuracies(noisy, "train/loss")}).axes[0].get_lines()[-1]
    assert 900 <= len(line.get_ydata()) <= 1100
    assert set(line.get_ydata()) <= {99.0, 100.0, 101.0}
