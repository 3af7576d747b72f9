"""The dispatch table: what is chosen, that ranks agree, that it survives JSON, and how measurements become entries."""

import dataclasses

import pytest
import torch

from tpfuse.errors import OptionError
from tpfuse.kernels.bench.table import candidates, compacted, entry_of, measured_entries, name_of
from tpfuse.kernels.call import Call
from tpfuse.kernels.rendezvous import judge, why_not
from tpfuse.kernels.symmetric.dispatch import TABLE_VARIABLE, Entry, Table, bind, default_table
from tpfuse.kernels.symmetric.pieces import run
from tpfuse.kernels.symmetric.registry import KERNELS
from tpfuse.kernels.symmetric.tables import H100, SHIPPED
from tpfuse.kernels.symmetric.workspace import virtual_ranks

TABLE = Table(
    [
        Entry("H", 4, 4096, 8, "one_shot", split=4),
        Entry("H", 4, 4096, 64, "one_shot"),
        Entry("H", 4, 4096, 512, "two_shot", source="derived"),
        Entry("H", 4, 8192, 16, "one_shot"),
        Entry("*", 4, 4096, 2, "one_shot", source="published"),
    ]
)


def chosen(device="H", world=4, hidden=4096, itemsize=2, rows=1):
    entry = TABLE.choose(device, world, hidden, itemsize, rows)
    return entry.kernel, entry.split


def test_the_smallest_entry_that_holds_the_rows_wins():
    assert chosen(rows=1) == chosen(rows=8) == ("one_shot", 4)
    assert chosen(rows=9) == chosen(rows=64) == ("one_shot", 1)
    assert chosen(rows=65) == chosen(rows=512) == ("two_shot", 1)
    assert chosen(rows=513) == ("functional", 1)


def test_other_devices_worlds_and_widths():
    assert chosen(device="unheard of", rows=2) == ("one_shot", 1)
    assert chosen(device="unheard of", rows=3)[0] == "functional"
    assert chosen(world=2)[0] == "functional"
    # a float32 row of 4096 is as wide as a 16-bit row of 8192, and rows of 16384 count double there
    assert chosen(itemsize=4, rows=16)[0] == "one_shot" and chosen(itemsize=4, rows=17)[0] == "functional"
    assert chosen(hidden=16384, rows=8)[0] == "one_shot" and chosen(hidden=16384, rows=9)[0] == "functional"


def test_json_keeps_the_table_and_its_digest(tmp_path, monkeypatch):
    assert Table.from_json(TABLE.to_json()) == TABLE
    assert Table.from_json(TABLE.to_json()).digest == TABLE.digest != SHIPPED.digest
    default_table.cache_clear()
    try:
        path = tmp_path / "table.json"
        path.write_text(TABLE.to_json())
        monkeypatch.setenv(TABLE_VARIABLE, str(path))
        assert default_table() == TABLE
        path.write_text("{]")
        default_table.cache_clear()
        with pytest.raises(OptionError, match=r"table\.json"):
            default_table()
    finally:
        default_table.cache_clear()


def test_an_unknown_kernel_is_refused():
    with pytest.raises(OptionError, match="three_shot"):
        Entry("H", 4, 4096, 8, "three_shot")


@pytest.mark.parametrize("world", range(2, 9))
@pytest.mark.parametrize("hidden", [2048, 4096, 7168, 8192])
def test_the_shipped_table_covers_decode_and_ends_somewhere(world, hidden):
    for device in ("NVIDIA H200", "a GPU of another kind"):
        assert SHIPPED.choose(device, world, hidden, 2, 1).kernel == "one_shot"
        assert SHIPPED.choose(device, world, hidden, 2, 1 << 20).kernel == "functional"


@pytest.mark.parametrize("hidden", [2048, 4096, 7168, 8192])
def test_many_rows_on_two_h200s_run_as_on_two_h100s(hidden):
    """There only the H100s have been measured with the kernels as they are."""
    for rows in (256, 1024, 4096, 16384):
        there, here = (SHIPPED.choose(device, 2, hidden, 2, rows) for device in (H100, "NVIDIA H200"))
        assert (here.kernel, here.split, here.warps) == (there.kernel, there.split, there.warps)
        assert here.source == "derived"


@pytest.mark.parametrize(("world", "like"), [(3, 4), (5, 4), (6, 8), (7, 8)])
def test_numbers_of_ranks_that_nobody_measured_run_as_the_nearest_one(world, like):
    for device in ("NVIDIA H200", H100, f"virtual {H100}", "a GPU of another kind"):
        for rows in (1, 8, 20, 64, 512, 1 << 15):
            here, there = (SHIPPED.choose(device, ranks, 4096, 2, rows) for ranks in (world, like))
            assert (here.kernel, here.split, here.warps) == (there.kernel, there.split, there.warps)
            assert here.world == world and here.source == "derived"


def test_a_kernel_that_does_not_take_so_many_ranks_is_left_out(monkeypatch):
    [ws, *_] = virtual_ranks(3, "cpu", 4, 1 << 16)
    x = torch.zeros(2, 64)
    call = Call(x, x, norm="rms_norm", out_dtype=x.dtype, hidden_dtype=x.dtype, eps=1e-6)
    one_shot = Entry("H", 3, 64, 8, "one_shot")
    assert bind(one_shot, call, ws).constants["WORLD"] == 3
    for name in ("one_shot", "two_shot"):
        monkeypatch.setitem(KERNELS, name, dataclasses.replace(KERNELS[name], worlds=range(4, 9)))
    assert KERNELS["one_shot"].why_not(call, ws, 1) == "3 ranks; one_shot takes 4 to 8"
    assert bind(one_shot, call, ws) is None and run(one_shot, call, ws) is None
    assert {entry.kernel for entry in candidates("H", 3, 4096, 8, linked=True)} == {"barrier", "functional"}


def record(rows, provider, us, note=""):
    return {"world": 4, "hidden": 4096, "rows": rows, "provider": provider, "us": us, "note": note}


def test_measurements_become_entries():
    records = [
        record(1, "empty", 1.0), record(1, "unfused", 2.0), record(1, "dispatched", 2.0), record(1, "barrier", 2.5),
        record(1, "one_shot s4 w4", 3.0), record(1, "one_shot s1 w16", 3.1), record(1, "one_shot s8 w2", None, "hung"),
        record(64, "one_shot s1 w16", 9.0), record(64, "two_shot w16", 8.0), record(64, "one_shot s1 w8", 7.0, "wrong"),
        record(512, "one_shot s1 w16", 90.0), record(512, "barrier rotating", 60.0),
    ]  # fmt: skip
    assert measured_entries(records, "H") == [
        Entry("H", 4, 4096, 1, "one_shot", 4, 4),
        Entry("H", 4, 4096, 64, "two_shot", 1, 16),
        Entry("H", 4, 4096, 512, "barrier"),
    ]


FACTS = {"host": "a", "boot": "1", "device": "H200", "uuid": "u0", "multiprocessors": 132, "capability": (9, 0),
         "torch": "2", "table": "t", "slot_bytes": 1, "overlap": False}  # fmt: skip


def test_ranks_that_cannot_share_memory_are_refused_alike():
    def verdict(**other):
        facts = [FACTS, {**FACTS, "uuid": "u1", **other}]
        assert judge(facts) == judge(facts[:])
        return judge(facts)

    assert verdict() == ""
    assert "several hosts (a, b)" in verdict(host="b")
    assert "several hosts" in verdict(boot="2")
    assert "differ in table" in verdict(table="other")
    assert "differ in device" in verdict(device="A100")
    assert "share one GPU" in verdict(uuid="u0")
    assert "share one GPU" in verdict(uuid="u0", overlap=True)  # one of the two did not allow it
    assert "older" in judge([{**FACTS, "capability": (7, 5)}])


def test_reasons_are_sentences_a_user_can_act_on():
    assert why_not("0", "cpu").startswith("Tensors are on cpu")
    assert "100" in why_not("0", "cuda", hidden=100)
    assert "nobody" in why_not("nobody", "cuda")


def test_a_size_given_twice_or_a_way_to_run_that_no_kernel_has_is_refused():
    with pytest.raises(OptionError, match=r"2 entries for device 'H', world 4, hidden 4096, rows 8"):
        Table([Entry("H", 4, 4096, 8, "one_shot"), Entry("H", 4, 4096, 8, "two_shot")])
    for wrong in ({"split": 3}, {"warps": 6}):
        with pytest.raises(OptionError, match=f"Entry.{next(iter(wrong))}"):
            Entry("H", 4, 4096, 8, "one_shot", **wrong)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("hidden", [64, 2048, 4096, 7168, 16384])
def test_the_name_of_a_candidate_says_how_it_runs(world, hidden):
    ways = candidates("H", world, hidden, 8, linked=True)
    assert {entry.kernel for entry in ways} == {"one_shot", "two_shot", "barrier", "functional"} or hidden < 512
    assert len({name_of(entry) for entry in ways}) == len(ways)
    for entry in ways:
        assert entry_of(name_of(entry), "H", world, hidden, 8) == entry


def test_noise_does_not_change_the_kernel_from_one_size_to_the_next():
    records = [
        record(1, "one_shot s4 w4", 3.0), record(1, "one_shot s1 w16", 3.5),
        record(8, "one_shot s4 w4", 4.02), record(8, "one_shot s1 w16", 4.0),
        record(64, "one_shot s4 w4", 9.0), record(64, "functional", 8.0),
    ]  # fmt: skip
    kept = measured_entries(records, "H", noise=0.01)
    assert [name_of(e) for e in kept] == ["one_shot s4 w4", "one_shot s4 w4", "functional"]
    assert [(e.rows, name_of(e)) for e in compacted(kept)] == [(8, "one_shot s4 w4"), (64, "functional")]
    assert [name_of(e) for e in measured_entries(records, "H")][1] == "one_shot s1 w16"
