"""Every Hugging Face causal LM that has a tp plan, cut by it and compared with the uncut model; and the page on it."""

import json

import pytest

from benchmarks import survey_jobs, survey_table

CHUNK = 8
RECORDS = survey_table.read()
FAMILIES = sorted({record["family"] for record in RECORDS})


def test_the_page_holds_the_table_of_the_results():
    text = survey_table.PAGE.read_text()
    assert text == survey_table.page(text, RECORDS), "run: python benchmarks/survey_table.py"


def test_no_family_is_wrong_or_dies():
    assert {record["outcome"] for record in RECORDS} <= {"right", "refused"}


@pytest.mark.nightly
def test_the_results_are_of_all_families():
    from benchmarks.parallelize_survey import families

    assert families() == FAMILIES


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("policy", survey_table.POLICIES)
@pytest.mark.parametrize("first", range(0, len(FAMILIES), CHUNK))
def test_cut_by_its_own_plan_a_model_is_right_or_refused(first, policy):
    from benchmarks.parallelize_survey import survey

    records = list(survey(FAMILIES[first : first + CHUNK], [policy], timeout=120))
    assert not [record for record in records if record["outcome"] not in ("right", "refused")]


SERVES = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks.survey_jobs import serve

def surveyed(configurations, timeout):
    for family, policy in configurations:
        if family == "Dies":
            sys.exit(1)
        print("whatever a model prints")
        yield dict(family=family, policy=policy, outcome="right")

serve(surveyed, 1.0)
"""


def test_a_worker_that_dies_costs_one_record_and_a_stopped_run_goes_on(tmp_path):
    script, out = tmp_path / "serves.py", tmp_path / "out.jsonl"
    script.write_text(SERVES.format(root=str(survey_jobs.ROOT)))
    todo = [(family, "whole") for family in ("A", "Dies", "B", "C")]
    stopped = survey_jobs.Records(out, again=True)
    for record in survey_jobs.surveyed_apart(todo, 1.0, 2, script):
        stopped.add(record)
    assert {r["family"]: r["outcome"] for r in stopped.found.values()} == dict(
        A="right", Dies="dies", B="right", C="right"
    )
    assert not out.exists()
    records = survey_jobs.Records(out, again=False)
    assert records.found == stopped.found
    records.finish()
    assert [json.loads(line)["family"] for line in out.read_text().splitlines()] == ["A", "B", "C", "Dies"]
    assert survey_jobs.Records(out, again=False).found == {}
