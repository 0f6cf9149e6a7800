"""What the processes of a run do not have alike is named."""

from kdav_fast.runtime.agreement import code_facts, difference


def test_equal_facts_agree():
    assert difference([("rank 0", {"lr": "0.1"}), ("rank 1", {"lr": "0.1"})]) == ""


def test_every_rank_is_compared_and_each_value_named():
    line = difference([("rank 0", {"lr": "0.1"}), ("rank 1", {"lr": "0.1"}), ("rank 2", {"lr": "0.2"})])
    assert "lr is 0.1 on rank 0 and 0.2 on rank 2" in line


def test_a_fact_that_one_does_not_know_is_a_difference():
    assert "new is unknown on rank 0 and 1 on rank 1" in difference(
        [("rank 0", {}), ("rank 1", {"new": "1"})]
    )


def test_many_differences_are_counted():
    facts = {str(n): "a" for n in range(9)}
    line = difference([("rank 0", facts), ("rank 1", dict.fromkeys(facts, "b"))])
    assert line.count(" is a on ") == 3
    assert "and 6 more" in line
    assert "\n" not in line


def test_the_method_is_named_first():
    mine = {"distiller.alpha": "1", "distiller.name": "dkd", "distiller.weight": "2", "data.seed": "0"}
    line = difference([("rank 0", mine), ("rank 1", {"distiller.name": "kd", "data.seed": "1"})])
    assert line.index("distiller.name is dkd on rank 0 and kd on rank 1") < line.index("data.seed")


def test_the_code_is_told_by_its_versions_and_its_source(tmp_path, monkeypatch):
    facts = code_facts()
    assert facts["torch"][0].isdigit()
    package = tmp_path / "kdav_fast"
    package.mkdir()
    (package / "module.py").write_text("x = 1")
    monkeypatch.setattr(
        "kdav_fast.runtime.agreement.find_spec",
        lambda name: type("Spec", (), {"submodule_search_locations": [str(package)]}),
    )
    code_facts.cache_clear()
    one = code_facts()["kdav_fast"]
    (package / "module.py").write_text("x = 2")
    code_facts.cache_clear()
    assert code_facts()["kdav_fast"] != one
    monkeypatch.undo()
    code_facts.cache_clear()
    assert code_facts() == facts
