"""Every page of the documentation with Python in it runs as written, and prints what it says."""

from __future__ import annotations

import mlx.core as mx
import pytest
import tutorials

import mlxshim
import mlxshim.nn

DOCS = tutorials.ROOT / "docs"
PAGES = [DOCS / "index.md", *sorted(DOCS.glob("tutorials/*.md"))]
#: What a page needs besides the test extra.
NEEDS = {"dp-sgd": "dp_accounting"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_page(page, tmp_path, monkeypatch):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    monkeypatch.chdir(tmp_path)
    mx.random.seed(0)
    ran = tutorials.outputs(page)
    assert ran, "a page without Python"
    for block, printed in ran:
        if block.output is not None:
            where = f"{page.name}, line {block.line}"
            assert tutorials.same(block.output, printed), f"{where} prints:\n{printed}"
    assert any(printed for _, printed in ran), "a page that shows no result"


@pytest.mark.parametrize("module", [mlxshim, mlxshim.nn], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    pages = [page.read_text("utf-8").splitlines() for page in DOCS.glob("api/*.md")]
    named = {line for page in pages for line in page}
    missing = [name for name in module.__all__ if f"::: {module.__name__}.{name}" not in named]
    assert not missing, f"put them into a page of docs/api: {missing}"


def test_another_number_or_word_is_seen():
    assert tutorials.same("loss 1.00 of 3", "loss 1.001 of 3\n")
    assert not tutorials.same("loss 1.00", "loss 1.2")
    assert not tutorials.same("loss 1.00", "cost 1.00")
    assert not tutorials.same("1 2", "1 2 3")
