"""The site of `make docs`: it builds strictly and loads nothing from elsewhere; what is generated is up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")

from docs.site import stage
from docs.site.generated import PAGES, parts, regenerated
from docs.site.settings import SECTIONS, own_keys

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`mkdocs build`, as strict as mkdocs.yml says; not with -q, which does not count warnings."""
    program = [sys.executable, "-m", "mkdocs", "build", "-d", str(folder), *options]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_site_builds_and_is_whole(tmp_path):
    stage.stage()
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    html = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert {place.replace("README.md", "index.md") for place in stage.pages()} == {
        path.relative_to(tmp_path).with_suffix(".md").as_posix() for path in html
    } - {"404.md"}
    for path, text in html.items():
        loaded = re.findall(r"<(?:img|script|iframe|source)[^>]* src=\"?(\S+?)[\" >]", text)
        loaded += re.findall(r"<link[^>]* rel=\"?(?:stylesheet|preconnect|preload)\"?[^>]* href=\"?(\S+?)[\" >]", text)
        assert loaded
        assert not [address for address in loaded if "//" in address], path
        # without a blank line above, a list or a table becomes a part of the paragraph
        assert not re.search(r"<p>[^<]*(?:<(?!/p>)[^<]*)*\n(?:- |\| )", text), path
    assert "linear_logps" in (tmp_path / "api.html").read_text(encoding="utf-8")


def test_wrong_links_are_errors(tmp_path):
    links = ["nowhere.md", "other.md#nowhere", "#here", "/other.md", "nowhere.png"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Index\n\n" + "\n".join(f"[text]({link})" for link in links))
    (tmp_path / "docs/other.md").write_text("# Other\n")
    (tmp_path / "docs/forgotten.md").write_text("# In no menu\n")
    own = "site_name: test\ntheme: {name: mkdocs}\nplugins: []\nnav: [index.md, other.md]\n"
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\n{own}")
    done = build(tmp_path / "site", "-f", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0
    for link in (*links, "forgotten.md"):
        assert f"'{link}'" in done.stderr or f"- {link}\n" in done.stderr, (link, done.stderr)


def test_links_out_of_docs_lead_to_the_repository():
    page = ROOT / "docs/methods/sources.md"
    text = "[a](../../examples/demo) [b](../../setup.py#L1) [c](../data.md#columns) [d](../../CONTRIBUTING.md) [e](x)"
    assert stage.with_links_of_the_site(text, page, "methods/sources.md") == (
        f"[a]({stage.repository()}/tree/main/examples/demo) [b]({stage.repository()}/blob/main/setup.py#L1) "
        "[c](../data.md#columns) [d](../CONTRIBUTING.md) [e](x)"
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_is_generated_is_up_to_date(path):
    assert parts(path)
    assert path.read_text(encoding="utf-8") == regenerated(path), "run python -m docs.site"


def test_every_setting_is_in_a_table():
    shown: dict[str, list[str]] = {}
    for section, *keys in parts(ROOT / "docs/settings.md"):
        if section != "trainer":
            shown.setdefault(section, []).extend(keys or own_keys(SECTIONS[section][0]))
    for name, (section, _) in SECTIONS.items():
        assert sorted(shown[name]) == sorted(own_keys(section)), name
