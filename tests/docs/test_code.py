"""Every Python block of the documentation runs, page by page, on a tiny bundle."""

import ast

import pytest

from .pages import PAGES, blocks, name_of

WIDTH = 96  # characters of code that a page shows without scrolling (docs/_static/wide.css)
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
BUNDLES = {"docs/guides/quantise.md": "tiny_precisions"}  # pages whose bundle has more than one precision


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_fits_the_page(page):
    lines = [line for block in blocks(page) for line in block.text.split("\n")]
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page, request, tmp_path, monkeypatch):
    bundle = request.getfixturevalue(BUNDLES.get(name_of(page), "tiny_bundle"))
    (tmp_path / "bundle").symlink_to(bundle)
    from medusa_runtime import Bundle

    (tmp_path / "digest.txt").write_text(f"{Bundle.open(bundle).manifest.digest}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python":
            # as many lines in front as on the page, so that an error's line is the page's
            tree = ast.parse("\n" * (block.line - 1) + block.text)
            if not block.runs:  # what it imports must be there all the same
                tree.body = [one for one in tree.body if isinstance(one, (ast.Import, ast.ImportFrom))]
            exec(compile(tree, name_of(page), "exec"), names)
