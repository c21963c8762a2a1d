"""The page in a real Chromium: before the demo model in a server process, and before scripted answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_helpers import Keys, Page, ScriptedServer, open_browser
from server_helpers import ScriptedEngine
from server_process import ServerProcess, running_server
from test_front_door import tokenizer

KEY = "sk-of-the-page"
ANSWER = """\
<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1">

## A heading with `<b>code</b>`

- **bold** and [a link](https://example.com/a)
- [no link](javascript:window.hacked=1)
  1. nested

| a | b |
|---|---|
| 1 | <i>2</i> |

```html
<svg onload="window.hacked = 1">
```
![an image](https://example.com/pixel.png)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("server"), "--api-key", KEY) as process:
        yield process


@pytest.fixture
def scripted(page: Page) -> Iterator[ScriptedServer]:
    opened = ScriptedServer(ScriptedEngine(tokenizer(), "Hello there."), thinking=False)
    yield opened
    opened.close()


def tile(page: Page, name: str) -> str:
    return page.text(f'[data-tile="{name}"] b')


def give_key(page: Page, url: str, key: str = KEY) -> None:
    page.open(url)
    page.until(lambda: page.text("#state") == "API key needed")
    page.one("#api-key").send_keys(key, Keys.TAB)


def test_a_question_is_answered_and_counted(page: Page, server: ServerProcess) -> None:
    give_key(page, server.url + "/", "sk-wrong")
    page.until(lambda: "not accepted" in page.text("#key-hint"))
    page.one("#tab-live").click()
    page.until(lambda: "API key" in page.text("#live-note"))
    page.one("#tab-settings").click()
    page.one("#api-key").clear()
    page.one("#api-key").send_keys(KEY, Keys.TAB)
    page.until(lambda: page.text("#model") == "dsengine-demo" and page.text("#state") == "")
    assert all("401" in message for message in page.console())

    page.one("#tab-live").click()
    page.until(lambda: tile(page, "requests") == "0")
    # Every state of the growing thoughts, as the browser saw them.
    page.driver.execute_script(
        "window.lengths = new Set(); new MutationObserver(() => window.lengths.add("
        "document.querySelector('.thoughts')?.textContent.length ?? 0)).observe("
        "document.getElementById('messages'), {childList: true, subtree: true, characterData: true})"
    )
    page.ask("What is 347 + 285?")
    page.until_answered()
    assert "632" in page.text(".answer .markdown")
    assert "Total 632" in page.text(".thoughts")
    assert page.one(".thinking").get_property("open") is False
    assert page.text(".thinking summary").startswith("Thought for")
    assert page.driver.execute_script("return window.lengths.size") > 5
    facts = page.text(".facts")
    assert "tokens/s" in facts and "first after" in facts
    page.until(lambda: tile(page, "requests") == "1" and tile(page, "running") == "0")
    assert tile(page, "ttft").endswith("s") and tile(page, "itl").endswith("ms")
    assert tile(page, "drafts") == "off" and "kept for reuse, of" in page.text('[data-tile="cache"] small')
    assert not page.text('[data-tile="throughput"] small').startswith("peak 0 ")
    assert page.console() == []
    assert page.requested() and all(url.startswith(server.url + "/") for url in page.requested())


def test_a_call_is_shown_and_its_result_sent_back(page: Page, server: ServerProcess) -> None:
    give_key(page, server.url + "/")
    page.one("#example-tools").click()
    page.one("[name=temperature]").send_keys("0")
    page.ask("What is the weather in Paris?")
    page.until_answered()
    assert page.text(".call-name") == "get_weather"
    assert page.text(".call-arguments") == '{\n  "city": "Paris"\n}'
    page.one(".call-result textarea").send_keys('{"city": "Paris", "temperature": 21, "condition": "sunny"}')
    page.button("Send the results").click()
    page.until_answered(2)
    assert "Paris" in page.text(".answer .markdown") and "21" in page.text(".answer .markdown")
    assert page.one(".call-result textarea").get_property("readOnly") is True


def test_settings_and_errors_of_the_api_are_shown(page: Page, server: ServerProcess) -> None:
    give_key(page, server.url + "/")
    page.one("[name=temperature]").send_keys("7")
    page.ask("Who are you?")
    page.until_answered()
    assert page.text(".answer .error").startswith("Temperature: ")
    page.one("[name=temperature]").clear()
    page.one("[name=tools]").send_keys('[{"name": 3}]')
    page.button("Regenerate").click()
    page.until(lambda: "tools.0.function.name" in page.text(".answer .error"))
    page.one("[name=tools]").clear()
    page.one("[name=max_tokens]").send_keys("3")
    page.button("Regenerate").click()
    page.until(lambda: "cut off by the limit" in page.text(".facts"))
    assert "3 tokens" in page.text(".facts")
    page.driver.refresh()
    page.until(lambda: page.text("#model") == "dsengine-demo")
    assert page.one("[name=max_tokens]").get_property("value") == "3"


def test_what_a_model_writes_is_text(page: Page, scripted: ScriptedServer) -> None:
    scripted.engine.script = lambda ids, params: ANSWER
    page.open(scripted.url)
    page.ask("<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>")
    page.until_answered()
    assert page.driver.execute_script("return window.hacked") is None
    assert not page.all("#messages img, #messages script, #messages svg, #messages i")
    assert "<img src=x onerror" in page.text(".question-text")
    assert '<script>window.hacked = 1</script><img src="x"' in page.text(".markdown")
    assert page.text(".markdown h3") == "A heading with <b>code</b>"
    assert page.text(".markdown pre") == '<svg onload="window.hacked = 1">'
    assert [cell.text for cell in page.all(".markdown td")] == ["1", "<i>2</i>"]
    assert page.text(".markdown li strong") == "bold" and page.text(".markdown li li") == "nested"
    links = [link.get_property("href") for link in page.all(".markdown a")]
    assert links == ["https://example.com/a", "https://example.com/pixel.png"]
    assert "[no link](javascript:" in page.text(".markdown")
    assert page.console() == []
    assert all(url.startswith((scripted.url, "about:")) for url in page.requested())


def test_an_answer_is_stopped_regenerated_and_edited(page: Page, scripted: ScriptedServer) -> None:
    engine = scripted.engine
    engine.hold_at = 2
    page.open(scripted.url)
    page.ask("one")
    page.until(lambda: page.text(".answer .markdown") != "" and engine.num_held == 1)
    assert engine.running and page.one("#stop").is_displayed()
    page.one("#stop").click()
    page.until(lambda: not engine.running)
    page.until_answered()
    assert "stopped" in page.text(".facts") and page.text(".answer .markdown") != "Hello there."
    page.button("Regenerate").click()
    page.until(lambda: engine.num_held == 2)
    page.one("#prompt").send_keys(Keys.ESCAPE)
    page.until_answered()
    engine.hold_at = None
    page.button("Regenerate").click()
    page.until(lambda: page.text(".answer:not(.busy) .markdown") == "Hello there.")
    page.ask("two")
    page.until_answered(2)
    page.all(".question .actions button")[0].click()
    area = page.one(".editor textarea")
    area.send_keys(" and a half", Keys.ENTER)
    page.until(lambda: page.text(".question-text") == "one and a half")
    page.until_answered()
    page.one("#new-chat").click()
    assert not page.all(".message") and page.one("#welcome").is_displayed()


def test_an_engine_that_dies_is_told(page: Page, scripted: ScriptedServer) -> None:
    scripted.engine.die_at = 2
    page.open(scripted.url)
    page.ask("hello")
    page.until_answered()
    assert "engine is not available" in page.text(".answer .error")
    assert page.text(".answer .markdown") != ""
    scripted.close()
    page.button("Regenerate").click()
    page.until(lambda: "cannot be reached" in page.text(".answer .error"))


def test_on_a_phone(scripted: ScriptedServer, tmp_path: Path) -> None:
    with open_browser(tmp_path, 390, 844) as page:
        page.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        )
        page.open(scripted.url)
        page.ask("hello " * 40 + "x" * 200)
        page.until_answered()
        width = "return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
        assert page.driver.execute_script(width) <= 390
        assert not page.one("#side").is_displayed()
        page.one("#open-live").send_keys(Keys.ENTER)
        assert page.one("#live").is_displayed() and page.one("#open-live").get_attribute("aria-expanded") == "true"
        page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        assert page.one("#settings").is_displayed() and not page.one("#live").is_displayed()
        page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert not page.one("#side").is_displayed()
        assert page.driver.execute_script(width) <= 390
