"""Names become objects, and a wrong name is answered with the right ones."""

import pytest

from gac_plugin.errors import UsageError, known_name, resolve

TABLE = {"circle": object(), "square": object()}


def test_a_name_resolves_to_its_entry_and_an_object_to_itself():
    assert resolve("circle", TABLE, "shape") is TABLE["circle"]
    stranger = object()
    assert resolve(stranger, TABLE, "shape") is stranger


def test_a_near_miss_is_told_with_a_suggestion_and_all_names():
    with pytest.raises(UsageError, match=r"unknown shape 'sqare' \(did you mean 'square'\?\).*circle, square"):
        resolve("sqare", TABLE, "shape")


def test_a_far_miss_lists_the_names_without_a_suggestion():
    with pytest.raises(UsageError, match=r"unknown shape 'zzz'; choose one of: circle, square$"):
        resolve("zzz", TABLE, "shape")


def test_a_usage_error_is_a_value_error():
    assert issubclass(UsageError, ValueError)


def test_known_name_inverts_resolve_and_leaves_strangers_alone():
    stranger = object()
    assert known_name(TABLE["square"], TABLE) == "square"
    assert known_name("square", TABLE) == "square"
    assert known_name(stranger, TABLE) is stranger
