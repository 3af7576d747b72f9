"""What is read from JSON: policies, dispatch tables, reports. Refusals name the field; nothing is ever executed."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tpfuse
from tpfuse import Boundary, OptionError, PolicyError, Report, SharingPolicy, TPFuseError
from tpfuse.kernels.symmetric.dispatch import TABLE_VARIABLE, Entry, Table, default_table
from tpfuse.strict_json import MAX_DEPTH

POLICY = SharingPolicy(8, 2, 4, {"layers.0.mlp": 1})
TABLE = Table([Entry("H", 4, 4096, 8, "one_shot", split=4), Entry("*", 2, 4096, 64, "two_shot")], "a note")
REPORT = Report(
    [Boundary("attention→dense_mlp", "layers.0", "all_reduce", (0, 1), "rms_norm", "all_reduce_norm", True)],
    3,
    1,
    ["ü"],
)
WRITTEN = [(POLICY, PolicyError), (TABLE, OptionError), (REPORT, OptionError)]
EACH = pytest.mark.parametrize(("written", "error"), WRITTEN, ids=["policy", "table", "report"])


def changed(written, **fields) -> str:
    return json.dumps({**json.loads(written.to_json()), **fields})


@EACH
def test_what_is_written_is_read_again(written, error):
    assert type(written).from_json(written.to_json()) == written
    assert type(written).from_json(written.to_json().encode()) == written
    assert type(written).from_dict(written.to_dict()) == written


@EACH
@pytest.mark.parametrize("text", ["", "{", "null", "[]", "7", '"x"', "{]", "{'a': 1}", b"\xff\xfe{}", b"\x80", None, 4])
def test_what_is_no_json_object_is_refused_by_the_name_of_the_class(written, error, text):
    with pytest.raises(error, match=type(written).__name__):
        type(written).from_json(text)


@EACH
def test_an_unknown_field_is_named_with_those_there_are(written, error):
    with pytest.raises(error, match=r"unknown field 'colour'.*allowed: ") as caught:
        type(written).from_json(changed(written, colour=1))
    assert next(iter(written.to_dict())) in str(caught.value)


@EACH
def test_a_field_given_twice_is_named(written, error):
    field = next(iter(written.to_dict()))
    text = changed(written)[:-1] + f', "{field}": 1}}'
    with pytest.raises(error, match=f"'{field}' is given twice"):
        type(written).from_json(text)


@EACH
@pytest.mark.parametrize("open_, close", ["[]", ("{" + '"a": ', "}")])
def test_deep_nesting_is_refused_by_the_field_that_holds_it(written, error, open_, close):
    for depth in (MAX_DEPTH + 1, 100_000):
        deep = open_ * depth + "1" + close * depth
        with pytest.raises(error, match=r"field 'note' .*nests deeper"):
            type(written).from_json(changed(written)[:-1] + f', "note": {deep}}}')
        with pytest.raises(error, match="nests deeper"):
            type(written).from_json(deep)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ENTRY = {"device": "H", "world": 4, "hidden": 4096, "rows": 8, "kernel": "one_shot"}
VERDICT = {"kind": "unknown", "module": "", "collective": "all_reduce", "group": [0, 1]}


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (SharingPolicy, {"tp_size": True}, ["SharingPolicy.tp_size=True is a bool", "allowed: int"]),
        (SharingPolicy, {"tp_size": "8"}, ["SharingPolicy.tp_size='8' is a str"]),
        (SharingPolicy, {"tp_size": 8.0}, ["SharingPolicy.tp_size=8.0 is a float"]),
        (SharingPolicy, {"tp_size": 10**17}, ["SharingPolicy.tp_size=", "an integer from 1 to"]),
        (SharingPolicy, {"tp_size": 8, "moe_dense_tp_size": False}, ["moe_dense_tp_size=False", "int or None"]),
        (SharingPolicy, {"tp_size": 8, "overrides": [["a", 1]]}, ["SharingPolicy.overrides=", "an object"]),
        (SharingPolicy, {"tp_size": 8, "overrides": {"a": 1.0}}, ["overrides['a']=1.0 is a float"]),
        (
            SharingPolicy,
            {"tp_size": 8, "residual": None},
            ["SharingPolicy.residual=None", "replicated, scattered, auto"],
        ),
        (SharingPolicy, {"tp_size": 8, "overrides": {"\ud800": 1}}, ["SharingPolicy.overrides", "surrogate"]),
        (Table, {"entries": {}}, ["Table.entries={} is a dict", "allowed: a list"]),
        (Table, {"entries": [7]}, ["Table.entries[0]", "not from 7"]),
        (Table, {"entries": [ENTRY, {**ENTRY, "world": True}]}, ["Table.entries[1].world=True is a bool"]),
        (Table, {"entries": [{**ENTRY, "world": 0}]}, ["Entry.world=0", "an integer from 1"]),
        (Table, {"entries": [{**ENTRY, "rows": -1}]}, ["Entry.rows=-1"]),
        (Table, {"entries": [{**ENTRY, "hidden": 10**17}]}, ["Entry.hidden="]),
        (Table, {"entries": [{**ENTRY, "kernel": "three_shot"}]}, ["Entry.kernel='three_shot'", "one_shot, two_shot"]),
        (Table, {"entries": [{**ENTRY, "source": ["measured"]}]}, ["Table.entries[0].source=['measured'] is a list"]),
        (Table, {"entries": [{**ENTRY, "kernle": "x"}]}, ["unknown field 'kernle' of Table.entries[0]", "kernel"]),
        (Table, {"entries": [{"device": "H"}]}, ["the field 'world' of Table.entries[0] is missing"]),
        (Table, {"note": None}, ["Table.note=None"]),
        (Report, {"norms": "3"}, ["Report.norms='3' is a str"]),
        (Report, {"notes": [1]}, ["Report.notes[0]=1 is a int"]),
        (Report, {"notes": ["\udfff"]}, ["Report.notes[0]", "surrogate"]),
        (Report, {"boundaries": [VERDICT, {**VERDICT, "group": [0, "1"]}]}, ["Report.boundaries[1].group[1]='1'"]),
        (Report, {"boundaries": [{**VERDICT, "fused": 1}]}, ["Report.boundaries[0].fused=1 is a int", "allowed: bool"]),
        (Report, {"boundaries": [{**VERDICT, "norm": 0}]}, ["Report.boundaries[0].norm=0", "str or None"]),
    ],
)
def test_a_wrong_value_is_named_by_its_path(cls, fields, words):
    for read, source in ((cls.from_dict, fields), (cls.from_json, json.dumps(fields))):
        with pytest.raises(cls.json_error) as caught:
            read(source)
        assert isinstance(caught.value, TPFuseError) and isinstance(caught.value, ValueError)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 19, "-" + "9" * 100_000])
@pytest.mark.parametrize(("cls", "field"), [(SharingPolicy, "tp_size"), (Table, "note"), (Report, "norms")])
def test_numbers_beyond_all_sense_are_named_by_their_field(cls, field, number):
    with pytest.raises(cls.json_error, match=f"{cls.__name__}.{field}="):
        cls.from_json(f'{{"{field}": {number}}}')


@pytest.mark.parametrize(
    "value", [10**5000, [10**5000], nested(100_000), "x" * 1_000_000], ids=["huge", "list", "deep", "long"]
)
def test_values_that_cannot_even_be_printed_are_refused_in_short_words(value):
    for cls, field in ((SharingPolicy, "tp_size"), (Table, "entries"), (Report, "norms")):
        with pytest.raises(cls.json_error, match=field) as caught:
            cls.from_dict({field: value})
        assert len(str(caught.value)) < 300


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
FIELDS = st.sampled_from(["tp_size", "overrides", "entries", "note", "boundaries", "norms", *ENTRY, *VERDICT])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(FIELDS, inner), max_leaves=12)


@pytest.mark.parametrize("cls", [SharingPolicy, Table, Report])
@given(value=VALUES, fields=st.dictionaries(FIELDS, VALUES))
def test_any_json_gives_an_object_or_the_classs_own_error(cls, value, fields):
    for given_value in (value, fields):
        try:
            read = cls.from_json(json.dumps(given_value))
        except cls.json_error:
            continue
        assert cls.from_json(read.to_json()) == read


@pytest.mark.parametrize("cls", [SharingPolicy, Table, Report])
@given(text=st.text() | st.binary() | st.text(alphabet='[]{}",:\\ 0a'))
def test_any_text_gives_an_object_or_the_classs_own_error(cls, text):
    try:
        cls.from_json(text)
    except cls.json_error:
        return


def test_a_table_that_is_not_utf8_is_refused_by_its_path(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_bytes(TABLE.to_json().encode("utf-16"))
    monkeypatch.setenv(TABLE_VARIABLE, str(path))
    default_table.cache_clear()
    try:
        with pytest.raises(OptionError, match=r"table\.json"):
            default_table()
    finally:
        default_table.cache_clear()


def test_a_spoilt_report_in_the_cache_is_no_report(tmp_path, monkeypatch):
    from tpfuse.runtime import report_store

    monkeypatch.setattr(report_store, "inductor_cache_dir", lambda: str(tmp_path))
    report_store.save("name", REPORT)
    assert report_store.load("name") == REPORT
    for spoilt in (b"", b"\xff", b"[" * 100_000, b'{"norms": true}', b'{"boundaries": [{}]}', b'{"norms": 1e999}'):
        (tmp_path / "tpfuse" / "name.json").write_bytes(spoilt)
        assert report_store.load("name") is None


# -- nothing is unpickled or evaluated --------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("numpy", "load"), ("np", "load"), ("yaml", "load")}


def ways_to_run_data(source: str) -> Iterator[str]:
    """Every place in `source` that could turn data into running code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names = {module.split(".")[0] for module in modules} & FORBIDDEN_MODULES
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = {node.func.id} & FORBIDDEN_CALLS
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {f"{node.value.id}.{node.attr}"} if (node.value.id, node.attr) in FORBIDDEN_ATTRIBUTES else set()
        else:
            continue
        yield from (f"line {node.lineno}: {name}" for name in names)


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load(f)", "eval(text)", "exec(code, {})",
     "from os import path\n__import__(name)", "import marshal as m"],
)  # fmt: skip
def test_the_scan_finds_what_it_looks_for(source):
    assert list(ways_to_run_data(source))


def test_no_source_unpickles_or_evaluates_anything():
    package = Path(tpfuse.__file__).parent
    sources = sorted({path for folder in (".", "passes", "kernels") for path in (package / folder).rglob("*.py")})
    assert len(sources) > 40
    found = {path.name: places for path in sources if (places := list(ways_to_run_data(path.read_text("utf-8"))))}
    assert not found
