"""A method's section: found by the name of its file, and told by its developer what a method is."""

import sys
from typing import ClassVar

import pytest

import kdav_fast.distillers
from kdav_fast.config import MethodConfig, known_keys, load_config
from kdav_fast.config.method import method_config, method_names
from kdav_fast.errors import InputError

SAMPLE = """
from kdav_fast.config import MethodConfig, Positive

class METHOD:
    class Config(MethodConfig):
        needs_teacher = False
        hardness: Positive = 2.0
"""


@pytest.fixture
def add_method(tmp_path, monkeypatch):
    """Adds a file to the folder of the methods."""
    monkeypatch.setattr(kdav_fast.distillers, "__path__", [*kdav_fast.distillers.__path__, str(tmp_path)])
    monkeypatch.setattr(
        kdav_fast.distillers.__spec__, "submodule_search_locations", kdav_fast.distillers.__path__
    )

    def add(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    yield add
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(f"kdav_fast.distillers.{file.stem}", None)


def test_a_file_more_is_a_method_more(add_method):
    before = method_names()
    add_method("sample_one", SAMPLE)
    assert set(method_names()) == {*before, "sample_one"}
    assert load_config(None, ["distiller.name=sample_one"]).distiller.hardness == 2
    assert "distiller.hardness" in known_keys()
    for overrides, message in (
        (["distiller.hardness=0"], "'distiller.hardness' is 0; allowed: a number above 0"),
        (
            ["distiller.hardnes=1"],
            "'distiller.hardnes' with distiller.name 'sample_one'; the nearest known one is",
        ),
        (["distiller.alpha=1"], "'distiller.alpha' with distiller.name 'sample_one'; it goes with '"),
        (["distiller.name=none", "distiller.hardness=1"], "it goes with 'sample_one'"),
    ):
        with pytest.raises(InputError) as error:
            load_config(None, ["distiller.name=sample_one", *overrides])
        assert message in str(error.value)


def test_editors_leave_no_methods(add_method):
    before = method_names()
    for name in (".#kd", "kd.orig", "kd-copy", "kd (1)"):
        add_method(name, SAMPLE)
    assert method_names() == before


@pytest.mark.parametrize(
    "text",
    ["", "METHOD = 3", "METHOD = object", "class METHOD: Config = dict", "class METHOD: Config = {}"],
)
def test_a_file_that_is_no_method_is_named(add_method, text):
    add_method("sample_two", text)
    with pytest.raises(
        TypeError, match=r"sample_two\.py: METHOD must be a Distiller whose Config is a Method"
    ):
        method_config("sample_two")


def test_a_section_takes_no_name_of_its_interface():
    with pytest.raises(
        TypeError, match="has the key 'name', which is MethodConfig's; give the key another name"
    ):

        class Named(MethodConfig):
            name: str = "mine"

    with (
        pytest.warns(UserWarning, match="shadows"),
        pytest.raises(TypeError, match="leave out its annotation"),
    ):

        class Annotated(MethodConfig):
            uses_labels: bool = False

    class Sound(MethodConfig):
        uses_labels: ClassVar[bool] = False
        takes_mixed = False
        needed: float = 1.0

    assert list(Sound.model_fields) == ["name", "needed"]
    assert (Sound.uses_labels, Sound.takes_mixed, Sound.needs_teacher) == (False, False, True)
