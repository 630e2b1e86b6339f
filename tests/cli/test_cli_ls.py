"""What is listed is what is accepted."""

from __future__ import annotations

from typing import get_args

import pytest

from perpend.config import METHODS, MODES, Method, Mode, Recipe, build
from perpend.core.schedule import KINDS
from perpend.errors import UsageError
from perpend.tasks.ls import LISTS, ls


def _names(kind):
    return [entry.name for entry in ls(kind).kinds[kind]]


def test_the_choices_of_a_recipe_are_listed_whole():
    assert _names("methods") == list(get_args(Method)) == list(METHODS)
    assert _names("modes") == list(get_args(Mode)) == list(MODES)
    assert _names("schedules") == list(KINDS)


@pytest.mark.parametrize(
    ("kind", "section", "key"),
    [
        ("methods", "fit", "method"),
        ("modes", "edit", "mode"),
        ("judges", "eval", "classifier"),
        ("prompts", "prompts", "target"),
    ],
)
def test_every_listed_name_is_accepted_by_the_recipe(kind, section, key):
    for name in _names(kind):
        if name != "dictionary":  # always asked, so not a classifier to choose
            build(Recipe, {section: {key: name}}, "test")


def test_prompt_sets_say_how_many_prompts_each_split_has():
    for entry in ls("prompts").kinds["prompts"]:
        for split in ("fit", "select", "report"):
            assert split in entry.summary


def test_everything_is_listed_when_nothing_is_asked(cli):
    assert list(cli("ls", "--json").json) == list(LISTS)
    assert cli("ls").out.count("\n\n") == len(LISTS) - 1


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match="did you mean 'modes'"):
        ls("mode")
