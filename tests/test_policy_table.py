"""The policy table counts the collectives that `parallelize` really emits, and recommends by its own numbers."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_parallelize_compile import EXPECTED
from tpfuse.policy import SharingPolicy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import policy_families
import policy_table as table
from md import RESULTS

OVER = {"A": "attention", "D": "dp", "T": "whole"}


@pytest.mark.parametrize("dense", [1, 2, 4])
def test_naive_collectives_are_those_traced(dense):
    traced = [name.rstrip(")").split("(") for name in EXPECTED["mlp", dense][0] if "(" in name]
    found = table.naive(SharingPolicy(4, 2, dense))
    assert [(step.collective, step.over) for step in found] == [(name, OVER[group]) for name, group in traced]


def test_bytes_and_work():
    payload = 256 * table.HIDDEN * table.BYTES
    shared, alone = table.tabulate(8, 2, 256, 4), table.tabulate(8, 2, 256, 1)
    assert shared.naive_bytes == shared.rewritten_bytes == 2 * 2 * 3 / 4 * payload
    assert alone.rewritten_bytes == pytest.approx(2 * 3 / 4 * payload)  # a reduce-scatter and an all-gather
    assert (alone.norm_rows_naive, alone.norm_rows_rewritten) == (512, 128)
    assert table.tabulate(8, 2, 1, 1).mlp_waste == 4 and shared.mlp_waste == 1


def test_recommendation_and_degenerate_sizes():
    assert table.tabulate(2, 2, 64, 1).naive_collectives == "none"
    rows = table.table()
    best = table.recommended(rows)
    assert len(best) == len(table.MESHES) * len(table.ROWS)
    assert all(row.total_us >= best[row.tp, row.dp, row.rows].total_us for row in rows)
    assert table.markdown(rows).count(" * |") == len(best)


def test_real_families_send_no_more_than_as_they_are_written():
    """In the results file, as the page shows it; own rows and the whole group always send less."""
    rows = [SimpleNamespace(**row) for row in json.loads((RESULTS / policy_families.FILE).read_text())["records"]]
    policies = {(tp, dp, dense) for tp, dp in policy_families.MESHES for dense in (1, tp // dp, tp)}
    for name in policy_families.FAMILIES:
        assert {(row.tp, row.dp, row.moe_dense_tp_size) for row in rows if row.family == name} == policies
    for row in rows:
        assert row.bytes_after <= row.bytes_before, row
        wanted = {1: "scatter_dense", row.tp // row.dp: "all_reduce_norm", row.tp: "gather_full_tp"}
        assert wanted[row.moe_dense_tp_size] in row.rewrites, row
        assert row.bytes_after < row.bytes_before or row.moe_dense_tp_size == row.tp // row.dp, row
