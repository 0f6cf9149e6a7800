"""What methods there are, and what each of them takes, in lines for a person."""

import ast
import inspect
import textwrap
from importlib import import_module

from kdav_fast.config.allowed import allowed
from kdav_fast.config.documents import written
from kdav_fast.config.method import method_config, method_files, method_section
from kdav_fast.errors import InputError, shown

_WIDTH = 110


def list_methods() -> list[str]:
    """A line for each: its name, and what its file begins with. Loads no method, and no torch."""
    titles = {name: _title(file.read_text("utf-8")) for name, file in method_files().items()}
    wide = max(map(len, titles))
    return [f"{name:{wide}}  {title}" for name, title in titles.items()]


def describe_method(name: str) -> list[str]:
    """What a method does, what it asks of a run, and its keys with defaults, what they may be and what they mean.

    Loads its file, and torch with it.

    Raises:
        InputError: there is no such method.
    """
    files = method_files()
    if name not in files:
        raise InputError(f"there is no method {shown(name)}; give one of {', '.join(files)}")
    section, config = method_section({"name": name}), method_config(name)
    method = import_module(config.__module__).METHOD
    lines = [f"{name}: {_title(files[name].read_text('utf-8'))}"]
    for own in (method, config):
        if own.__dict__.get("__doc__"):
            lines += ["", *inspect.cleandoc(own.__doc__).splitlines()]
    lines += ["", f"teacher: {_yes(section.needs_teacher)}; labels: {_yes(section.uses_labels)}; "]
    lines[-1] += f"feature maps: {_yes(section.needs_stages)}; mixup and CutMix: {_yes(section.takes_mixed)}"
    schema = config.model_json_schema()["properties"]
    for key, field in config.model_fields.items():
        if key == "name":
            continue
        lines += ["", f"distiller.{key}={written(field.default)}  ({allowed(schema[key])})"]
        lines += textwrap.wrap(
            field.description or "", _WIDTH, initial_indent="    ", subsequent_indent="    "
        )
    return lines


def _title(text: str) -> str:
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def _yes(it: bool) -> str:
    return "yes" if it else "no"
