"""SharingPolicy: values, JSON, and the messages of refusals."""

import contextlib
import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpfuse.errors import PolicyError, TPFuseError
from tpfuse.policy import SharingPolicy


@st.composite
def policies(draw):
    dp = draw(st.sampled_from([1, 2, 4]))
    attn = draw(st.sampled_from([1, 2, 4]))
    sizes = st.sampled_from([None, 1, attn, dp * attn])
    return SharingPolicy(
        dp * attn,
        dp,
        draw(sizes),
        draw(st.dictionaries(st.text(min_size=1, max_size=20), sizes, max_size=3)),
        draw(st.sampled_from(["replicated", "scattered", "auto"])),
        draw(st.none() | st.integers(1, 1000)),
    )


@given(policies())
def test_json_round_trip(policy):
    again = SharingPolicy.from_json(policy.to_json())
    assert again == policy and hash(again) == hash(policy)
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy


def test_example_of_the_interface():
    policy = SharingPolicy(
        tp_size=8, dp_size=2, moe_dense_tp_size=4, overrides={"model.layers.0.mlp": 1}, residual="auto"
    )
    assert policy.attn_tp_size == 4
    assert policy.dense_tp_size_of("model.layers.0.mlp") == 1
    assert policy.dense_tp_size_of("model.layers.1.mlp") == 4
    assert SharingPolicy(8, 2, None).dense_tp_size_of("x") == SharingPolicy(8, 2, 8).dense_tp_size_of("x") == 8


def test_exact_override_wins_then_the_later_glob():
    policy = SharingPolicy(8, 2, None, {"a.b": 8, "a.*": 4, "*.c": 1})
    assert [policy.dense_tp_size_of(n) for n in ("a.b", "a.x", "a.c", "z")] == [8, 4, 1, 8]
    assert policy.unmatched_overrides(["a.x"]) == ["a.b", "*.c"]


def test_policies_are_equal_when_they_mean_the_same():
    first, second = (SharingPolicy(8, 2, None, overrides) for overrides in ({"a.*": 4, "*.c": 1}, {"*.c": 1, "a.*": 4}))
    assert first.dense_tp_size_of("a.c") != second.dense_tp_size_of("a.c")
    assert first != second and hash(first) != hash(second) and first.overrides != second.overrides
    assert SharingPolicy.from_json(first.to_json()) == first == copy.deepcopy(first)
    named, reordered = (SharingPolicy(8, 2, None, overrides) for overrides in ({"a": 4, "b": 1}, {"b": 1, "a": 4}))
    assert named == reordered and hash(named) == hash(reordered)


def test_a_policy_is_frozen_all_the_way_down():
    given_overrides = {"a": 1}
    policy = SharingPolicy(4, 2, overrides=given_overrides)
    given_overrides["a"] = 4
    assert policy.dense_tp_size_of("a") == 1
    with pytest.raises(TypeError, match="frozen"):
        policy.overrides["a"] = 2
    with pytest.raises(AttributeError):
        policy.tp_size = 8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            dict(tp_size=8, dp_size=2, moe_dense_tp_size=2),
            ["moe_dense_tp_size=2", "attn_tp_size=4", "None, 1, 4, 8", "no process group is made of a part of an axis"],
        ),
        (dict(tp_size=8, dp_size=3), ["dp_size=3", "tp_size=8", "divisor"]),
        (dict(tp_size=8, moe_dense_tp_size=0), ["moe_dense_tp_size=0", "None or an integer from 1"]),
        (dict(tp_size=8, moe_dense_tp_size=-1), ["moe_dense_tp_size=-1"]),
        (dict(tp_size=0), ["tp_size=0"]),
        (dict(tp_size=True), ["tp_size=True", "bool"]),
        (dict(tp_size=4, dp_size=2.0), ["dp_size=2.0", "float"]),
        (dict(tp_size="4"), ["tp_size='4'", "str"]),
        (dict(tp_size=10**5000), ["tp_size=a number of too many digits"]),
        (dict(tp_size=4, overrides={"x": 3}), ["overrides['x']=3", "None, 1, 4"]),
        (dict(tp_size=4, overrides={"x": True}), ["overrides['x']=True", "bool"]),
        (dict(tp_size=4, overrides={"": 1}), ["overrides", "''"]),
        (dict(tp_size=4, overrides=["x"]), ["overrides=['x']", "list"]),
        (dict(tp_size=4, residual="split"), ["residual='split'", "replicated, scattered, auto"]),
        (dict(tp_size=4, residual=["auto"]), ["residual=['auto']"]),
        (dict(tp_size=4, max_rows=0), ["max_rows=0"]),
    ],
)
def test_bad_values_are_named(fields, words):
    with pytest.raises(PolicyError) as caught:
        SharingPolicy(**fields)
    assert isinstance(caught.value, (TPFuseError, ValueError))
    for word in words:
        assert word in str(caught.value)
    if fields.get("tp_size", 0) != 10**5000:
        with pytest.raises(PolicyError):
            SharingPolicy.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"tp_size": 4, "dp": 2}', ["'dp'", "dp_size"]),
        ('{"dp_size": 4}', ["'tp_size'", "missing"]),
        ('{"tp_size": 4, "tp_size": 8}', ["'tp_size'", "twice"]),
        ('{"tp_size": ' + "9" * 100_000 + "}", ["tp_size", "too many digits"]),
        ('{"tp_size": 1e400}', ["tp_size", "float"]),
        ('{"tp_size": NaN}', ["tp_size", "float"]),
        ('{"tp_size": 4, "overrides": ' + "[" * 100_000 + "]" * 100_000 + "}", ["'overrides'", "deeper"]),
        ('{"tp_size": 4, "overrides": {"a": {"b": 1}}}', ["overrides['a']", "dict"]),
        ('{"tp_size": null}', ["tp_size", "NoneType"]),
        ("[4]", ["not from [4]"]),
        ("{tp_size: 4}", ["not a JSON text"]),
        ("", ["not a JSON text"]),
        (b"\xff", ["not a JSON text"]),
        (None, ["not a JSON text"]),
    ],
)
def test_bad_json_is_refused_naming_the_field(text, words):
    with pytest.raises(PolicyError) as caught:
        SharingPolicy.from_json(text)
    for word in words:
        assert word in str(caught.value)


FIELDS = st.sampled_from(["tp_size", "dp_size", "overrides", "residual"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(FIELDS, inner)))
def test_any_json_gives_a_policy_or_a_policy_error(value):
    with contextlib.suppress(PolicyError):
        assert isinstance(SharingPolicy.from_json(json.dumps(value)), SharingPolicy)
