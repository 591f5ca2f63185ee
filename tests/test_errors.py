"""Common mistakes: our message names the argument and says how to mend it."""

from __future__ import annotations

import builtins

import pytest
from errors import LEAK, MISTAKES, PAGE, code, error_of, said

IDS = [mistake.title for mistake in MISTAKES]


@pytest.mark.parametrize("mistake", MISTAKES, ids=IDS)
def test_the_message_names_and_mends(mistake):
    assert mistake.names and mistake.mends
    message = said(error_of(mistake.program, "mlxshim"), 10**4)
    assert mistake.names in message and mistake.mends in message, message
    assert ": [" in message  # the transform's own name comes first


@pytest.mark.parametrize("mistake", MISTAKES, ids=IDS)
def test_the_page_has_it(mistake):
    """If it has not: python -m tests.errors > docs/errors.md"""
    text = PAGE.read_text("utf-8")
    assert mistake.program in text
    assert code(said(error_of(mistake.program, "mlxshim"), 10**4)) in text


def builtin_kinds(error: Exception) -> set[type]:
    kinds = {kind for kind in type(error).__mro__ if getattr(builtins, kind.__name__, 0) is kind}
    return kinds - {object, BaseException, Exception}


@pytest.mark.parametrize("mistake", MISTAKES, ids=IDS)
def test_the_class_is_one_that_jax_raises_too(mistake):
    pytest.importorskip("jax")
    theirs, ours = error_of(mistake.program, "jax"), error_of(mistake.program, "mlxshim")
    assert theirs is not None and ours is not None
    if builtin_kinds(theirs) != {AssertionError}:  # which is no answer to an argument
        assert builtin_kinds(theirs) & builtin_kinds(ours), (type(theirs), type(ours))


def test_a_leak_is_an_error_in_both():
    pytest.importorskip("jax")
    assert error_of(LEAK.program, "jax") is not None
    assert error_of(LEAK.program, "mlxshim") is not None
