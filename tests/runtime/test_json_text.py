import json
import math

from kdav_fast.runtime.json_text import json_text


def test_what_json_has_not_becomes_null_at_any_depth():
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "NaN", "e": None, "f": True}
    text = json_text(value)
    strict = json.loads(text, parse_constant=lambda word: (_ for _ in ()).throw(AssertionError(word)))
    assert strict == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": None, "f": True}
    assert text == json.dumps(strict)
