"""Every Hugging Face causal LM that has a tp plan, cut by it and compared with the uncut model; and the page on it."""

import pytest

from benchmarks import survey_table

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
