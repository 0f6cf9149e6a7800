"""Every key of every method, set to something absurd: refused by its name before the run, or harmless."""

from typing import Any

import pytest

from kdav_fast.config.loading import load_config, parse_config
from kdav_fast.config.method import method_config, method_names
from kdav_fast.distillers.memories import checks, sample
from kdav_fast.errors import InputError
from tests.distillers.small_run import SMALL, SmallRun

ABSURD = (10**9, 10**6, 1e-30, 1e30, 0, -1, float("nan"), float("inf"))
ON = {"simkd": {"weight_map": 1.0}}
"""Keys without which others do nothing."""
STEPS = 2


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    """As on a small machine: what does not fit there is refused on any."""
    for module in (checks, sample):
        monkeypatch.setattr(module, "free_memory", lambda device: 2**30)


def settings(method: str) -> list[tuple[str, Any]]:
    return [
        (key, [value] if isinstance(field.default, tuple) else value)
        for key, field in method_config(method).model_fields.items()
        if key != "name"
        for value in ABSURD
    ]


def attempt(method: str, key: str, value: Any) -> SmallRun | str:
    """A run with it, or what is said against it."""
    section = {"name": method, **SMALL.get(method, {}), **ON.get(method, {}), key: value}
    raw = {"distiller": section, "teacher": {"name": "cifar:resnet8"}, "data": {"crop": "none"}}
    try:
        return SmallRun(parse_config(raw).distiller)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("method", method_names())
def test_an_absurd_setting_is_refused_by_name_or_harmless(method):
    for key, value in settings(method):
        found, said = attempt(method, key, value), f"{key}={value}"
        if isinstance(found, str):
            assert f"distiller.{key}" in found, said
            continue
        for step in range(STEPS):
            answer, gradients = found.answer(found.sample(step, padding=(1,)), step)
            assert answer.total.isfinite(), said
            assert all(gradient.isfinite().all() for gradient in gradients.values()), said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "kd.temperature=1.0e-30",
            "1e-30; allowed: a number of at least 0.01 and of at most 1000 (in float32",
        ),
        ("crd.contrast_temperature=1.0e-30", "(exponentials of cosines / T must fit float32)"),
        (
            "diffkd.steps=1000000",
            "is 1000000; allowed: a whole number of at least 1 and of at most 500 (they divide",
        ),
        ("wcord.rounds=1000000000", "of at most 1000 (each is two passes over B x B costs at every step)"),
        (
            "tfkd.temperature=1.0e+30",
            "allowed: null or a number of at least 0.01 and of at most 1000 (in float32",
        ),
        (
            "mld.temperatures=[2.0, 0.0]",
            "'distiller.temperatures[1]' is 0.0; allowed: a number of at least 0.01 and",
        ),
    ],
)
def test_the_reason_is_told(setting, message):
    method, _, override = setting.partition(".")
    key, _, value = override.partition("=")
    with pytest.raises(InputError) as error:
        load_config(
            None, [f"distiller.name={method}", f"distiller.{key}={value}", "teacher.name=cifar:resnet8"]
        )
    assert message in str(error.value)
