"""The page at /, in a browser: it streams, shows the times of stages, and asks no other server."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gated_toy import PATIENCE
from tests.support.http_server import http_server
from tests.support.toy_pair import make_pair

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")]


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_a_prompt_is_answered_side_by_side(browser: Any, tmp_path: Path) -> None:
    pairs = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pairs[name] = make_pair(tmp_path / name, {"a": f"{name} bcdefgh"})
    with http_server(pairs) as server:
        for width, scheme in ((1100, "light"), (390, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            context.set_default_timeout(PATIENCE * 1000)
            page, problems = context.new_page(), list[str]()
            page.on("console", lambda message, to=problems: to.append(message.text))
            page.on("pageerror", lambda error, to=problems: to.append(str(error)))
            page.on(
                "request",
                lambda request, to=problems: to.append(request.url) if server.url not in request.url else None,
            )
            page.goto(server.url)
            page.get_by_label("two").check()
            page.get_by_label("Maximum new tokens").fill("8")
            page.get_by_label("Prompt").fill("a")
            page.keyboard.press("Control+Enter")
            page.locator(".facts:not(:empty)").nth(1).wait_for()
            assert page.locator(".text").all_inner_texts() == ["one bcde", "two bcde"]
            assert all(
                "8 new tokens" in text and "tokens/s" in text for text in page.locator(".facts").all_inner_texts()
            )
            assert page.locator(".legend").first.inner_text().split()[0] == "queue"
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.get_by_label("Prompt").fill("a" * 40)
            page.get_by_role("button", name="Generate").click()
            page.locator(".error").first.wait_for()
            assert "41 tokens, at most 12" in page.locator(".error").first.inner_text()
            assert [problem for problem in problems if "400" not in problem and "data:" not in problem] == []
            context.close()
