"""YAML and JSON: what is read as what, and what is refused in which words."""

import pytest

from kdav_fast.config.documents import DocumentError, parse_json, parse_yaml, read_document

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{key}: &{key} [{','.join([f'*{before}'] * 9)}]\n"
    for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("-7", -7),
        ("-.inf", float("-inf")),
        ("~", None),
        ("", None),
        ("yes", True),
        ("Off", False),
        # YAML 1.1 makes 90, 5430.5, 8 and dates of these; nobody who writes them in a config means that.
        ("1:30", "1:30"),
        ("1:30:30.5", "1:30:30.5"),
        ("010", "010"),
        ("2020-01-02", "2020-01-02"),
        ("2020-01-02 03:04:05", "2020-01-02 03:04:05"),
        ("=", "="),
        ("nan", "nan"),
        ("'3'", "3"),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
        ("[*x, &x 1]", None),
    ],
)
def test_plain_values(text, value):
    if value is None and text.startswith("["):
        with pytest.raises(DocumentError, match="undefined alias 'x'"):
            parse_yaml(text)
    else:
        parsed = parse_yaml(text)
        assert parsed == value
        assert type(parsed) is type(value)


def test_what_aliases_stand_for_is_not_shared():
    parsed = parse_yaml("a: &x {k: [1]}\nb: *x\n")
    parsed["a"]["k"].append(2)
    assert parsed["b"] == {"k": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "gives 'a' twice, in line 1 and 3; keep one"),
        ("a:\n  b: 1\n  'b': 2\n", "gives 'a.b' twice, in line 2 and 3; keep one"),
        ("l: [{a: 1}, {a: 1, a: 2}]", "gives 'l.1.a' twice, in line 1; keep one"),
        ("{<<: {a: 1}, <<: {b: 1}}", "gives '<<' twice"),
        ("on: 1", "the key 'on' in line 1 is not text"),
        ("a:\n  1: 2", "the key '1' in line 2 is not text"),
        ("~: 2", "the key '~' in line 1 is not text"),
        ("? [a]\n: 1", "the key in line 1 is no name"),
        (BOMB, "stands for more than 10000 values"),
        ("[" + "x," * 10_001 + "]", "stands for more than 10000 values"),
        ("a: &a {b: *a}", "the alias in line 1 refers to what it stands in"),
        ("a: &a {<<: *a}", "the alias in line 1 refers to what it stands in"),
        ("a: !!python/object/apply:os.system [ls]", "line 1 has the tag '!!python/object/apply:os.system'"),
        ("a: !!timestamp 2020-01-01", "line 1 has the tag '!!timestamp'; give plain values"),
        ("a: !mine 1", "line 1 has the tag '!mine'; give plain values"),
        ("a: !!int b", "'b' in line 1 is no int"),
        ("a: !!bool maybe", "'maybe' in line 1 is no bool"),
        ("a: !!map 3", "expected a mapping node"),
        ("a: " + "1" * 5000, "in line 1 is no int"),
        ("a: 1\n\tb: 2", "line 2, column 1: a tab where YAML takes none; indent with spaces"),
        ("a: {b: 1", "line 1, column 9: the text ends too early; close what was opened"),
        ("- a\nb: 3", "line 2, column 1: this does not continue what stands above it"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: 1\n---\na: 2", "line 2, column 1: a second document begins; give one"),
        ("a: \0", "it holds the character U+0000"),
        ("a: \x1b[31m", "it holds the character U+001B"),
        ("[" * 5000, "is nested too deeply"),
        ("- " * 5000, "is nested too deeply"),
        ("{a: " * 5000, "is nested too deeply"),
    ],
)
def test_yaml_that_is_refused(text, message):
    with pytest.raises(DocumentError) as error:
        parse_yaml(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "gives 'c' twice; keep one"),
        ('{"a": NaN}', "it holds NaN, which is no number there"),
        ('{"a": -Infinity}', "it holds -Infinity"),
        ('{"a": 1e999}', "holds '1e999', which is too large a number"),
        ('{"a": ' + "1" * 5000 + "}", "a number of too many digits"),
        ("[" * 100_000, "is nested too deeply"),
        ("{'a': 1}", "is not valid JSON: line 1, column 2: expecting property name"),
        ('{"a": 1,\n "b" 2}', "line 2, column 6: expecting ':' delimiter"),
        ("", "is not valid JSON: line 1, column 1"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(DocumentError) as error:
        parse_json(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\n" * 60_000, "is larger than 256 KiB"),
        ("a: 1".encode("utf-16"), "is not text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "is not text in UTF-8"),
    ],
)
def test_files_that_are_no_documents(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        read_document(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    assert parse_yaml(read_document(path)) == {"a": 1}
