"""The page's files: where they are served, what is sent along, and that they hold nothing the policy forbids."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_front_door import KEY, app_of, send

from dsengine.server.web import page
from dsengine.server.web.page import PAGE_PATHS

STATIC = Path(page.__file__).parent / "static"


def test_every_file_is_served_under_its_own_path_with_the_policy() -> None:
    app = app_of(api_key=KEY)
    assert len(PAGE_PATHS) == len(list(STATIC.iterdir()))
    for path in PAGE_PATHS:
        response = send(app, "GET", path)
        assert response.status_code == 200
        assert response.content == (STATIC / (path.removeprefix("/web/").strip("/") or "index.html")).read_bytes()
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert send(app, "HEAD", path).status_code == 200
        assert send(app, "POST", path).status_code == 405
    assert send(app, "GET", "/web/main.js").headers["content-type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize(
    "path", ["/web", "/web/", "/web/page.py", "/web/../page.py", "/web/%2e%2e/page.py", "/index.html"]
)
def test_nothing_else_is_served(path: str) -> None:
    assert send(app_of(), "GET", path).status_code == 404
    assert send(app_of(api_key=KEY), "GET", path).status_code == 401


def test_the_page_can_be_left_out() -> None:
    app = app_of(disable_web_page=True)
    assert {send(app, "GET", path).status_code for path in PAGE_PATHS} == {404}
    assert send(app_of(disable_web_page=True, api_key=KEY), "GET", "/").status_code == 401


class _Page(HTMLParser):
    """Collects what a page refers to, and what a strict policy would block."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("#"):
                self.references.append(value or "")
            if name.startswith("on") or name == "style":
                self.inline.append(f"{tag} {name}")
        if tag == "style" or (tag == "script" and "src" not in dict(attrs)):
            self.inline.append(tag)


def test_the_page_refers_to_its_own_files_only() -> None:
    parsed = _Page()
    parsed.feed((STATIC / "index.html").read_text("utf-8"))
    assert parsed.references and {f"/{name}" for name in parsed.references} <= PAGE_PATHS
    assert not parsed.inline
    for path in STATIC.glob("*.js"):
        script = path.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script), (
            path
        )
        for name in re.findall(r'from "\./(.+?)"', script):
            assert f"/web/{name}" in PAGE_PATHS, f"{path.name} imports {name}"
    for path in STATIC.glob("*.css"):
        assert not re.search(r"url\(|@import", path.read_text("utf-8")), path
