"""The table of all networks against what the code does with them now."""

from pathlib import Path

import networks
import pytest
from networks_page import networks_page

ROWS = {row.name: row for row in networks.read_rows(Path(networks.DOCS) / "networks.csv")}
# Named in bug reports, one of a kind; the others only where time does not matter.
QUICK = [
    "timm:levit_128s",
    "timm:dla34",
    "timm:efficientformer_l1",
    "torchvision:squeezenet1_1",
    "torchvision:googlenet",
    "torchvision:regnet_x_400mf",
]
SLOW = [
    "timm:deit_tiny_distilled_patch16_224",
    "timm:efficientvim_m1",
    "timm:crossvit_tiny_240",
    "timm:resnet50_clip",
    "timm:resnetv2_50",
    "timm:swin_tiny_patch4_window7_224",
    "timm:vit_tiny_patch16_224",
    "timm:volo_d1_224",
    "torchvision:inception_v3",
    "torchvision:maxvit_t",
    "torchvision:vit_b_32",
]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_table_says_what_the_code_does(name):
    assert networks.try_network(name, most_parameters=120) == ROWS[name]


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [
        ("timm:levit_128s", "all", "all"),
        ("timm:resnetv2_50", "all", "all"),
        ("torchvision:inception_v3", "all", "all"),
        ("timm:volo_d1_224", "kd, kdav", "kd"),
        ("torchvision:squeezenet1_1", "kd, kdav", "kd"),
    ],
)
def test_what_the_table_must_say(name, teacher, student):
    assert (ROWS[name].teacher, ROWS[name].student) == (teacher, student)


def test_every_architecture_has_a_row():
    """Of the versions that made the table: others may have more."""
    missing = [name for name in networks.names() if name not in ROWS]
    assert len(missing) < 0.1 * len(ROWS), missing


def test_the_page_is_made_of_the_table():
    page = (networks.DOCS / "networks.md").read_text(encoding="utf-8")
    made = networks_page(page, list(ROWS.values()))
    libraries = next(line for line in page.splitlines() if line.startswith("timm "))
    made = made.replace(next(line for line in made.splitlines() if line.startswith("timm ")), libraries)
    assert made == page


@pytest.mark.slow  # two processes that import everything
def test_a_network_that_crashes_is_a_row_and_the_next_one_is_tried():
    rows = list(networks.try_all(["timm:no_such_network", "cifar:resnet8"], 1e-9, 100.0))
    assert [row.name for row in rows] == ["timm:no_such_network", "cifar:resnet8"]
    assert rows[0].why.startswith("not tried")
