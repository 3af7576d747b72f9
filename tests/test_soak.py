"""The soak counts what it says it counts. The long runs are `python benchmarks/soak.py` by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import soak
from soak_schedule import ENDS_PROCESSES, FAULTS, GONE, Answer, Fault, Stretch, schedule


def test_the_schedule_follows_from_the_seed_and_has_every_fault():
    stretches = schedule(0, 1050, 100, tuple(FAULTS), 2)
    assert stretches == schedule(0, 1050, 100, tuple(FAULTS), 2) != schedule(1, 1050, 100, tuple(FAULTS), 2)
    assert [s.calls for s in stretches] == [100] * 10 + [50]
    assert {s.fault.kind for s in stretches} == set(FAULTS)
    assert stretches[-1].fault.kind in ENDS_PROCESSES, "the others leave the processes alive for longer"
    assert {s.fault for s in schedule(0, 100, 10, (), 2)} == {None}
    calls = list(stretches[0].each())
    assert len(calls) == 100 and calls == list(stretches[0].each()) != list(stretches[1].each())
    assert len({call.rows for call in calls}) > 5 and any(max(call.delays) for call in calls)


@pytest.mark.parametrize(
    ("fault", "answers", "found"),
    [
        (None, [Answer(10, 0), Answer(10, 0)], {}),
        (None, [Answer(10, 1), Answer(10, 0)], {"wrong": 1}),
        (None, [Answer(10, 0), None], {"hangs": 1}),
        (None, [Answer(3, 0, "RuntimeError: x"), Answer(10, 0)], {"unexpected": ["RuntimeError: x"]}),
        (Fault("skip", 0), [Answer(9, 0, "RuntimeError: x"), Answer(9, 0, "RuntimeError: y")], {}),
        (Fault("skip", 0), [Answer(9, 0, "RuntimeError: x"), Answer(10, 0)], {"unreported": 1}),
        (Fault("exit", 0), [Answer(0, 0, GONE), Answer(9, 0, "RuntimeError: x")], {}),
    ],
)
def test_whatever_went_wrong_is_counted_and_nothing_else(fault, answers, found):
    tally = soak.Tally()
    tally.add(Stretch(0, 0, 10, 2, fault), answers)
    counted = {name: getattr(tally, name) for name in ("wrong", "hangs", "unreported", "unexpected")}
    assert {name: value for name, value in counted.items() if value} == found
    assert tally.clean == (not found)
    assert json.loads(json.dumps(tally.summary()))["faults"] == ({fault.kind: 1} if fault else {})


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_short_soak_on_two_processes_is_clean(tmp_path):
    out = tmp_path / "soak.json"
    arguments = ["cpu", "--iterations", "300", "--every", "50", "--out", str(out)]
    done = subprocess.run([sys.executable, soak.__file__, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())["result"]
    assert result["wrong"] == result["hangs"] == result["unreported"] == 0
    assert set(result["faults"]) == set(FAULTS) and result["errors_reported"] == 2 * sum(result["faults"].values())
    assert result["iterations"] >= 300 - sum(result["faults"].values())


def test_the_lines_in_the_documentation_come_from_results_files():
    root = Path(soak.__file__).resolve().parents[1]
    block = (root / "docs" / "reliability.md").read_text(encoding="utf-8").split("<!-- soak -->")[1].split("<!--")[0]
    written = [line.strip() for line in block.splitlines() if line.strip().startswith("soak ")]
    results = [json.loads(path.read_text())["result"]["line"] for path in soak.RESULTS.glob("soak_*.json")]
    assert written and set(written) <= set(results)
