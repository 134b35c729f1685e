"""The page at /, in a headless Chromium."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.deploy.service.browser import Browser, find_browser
from tests.deploy.service.conftest import Server, chat_prompt, expected
from tests.deploy.service.test_http import Raw, get

PAGE = REPOSITORY / "deploy" / "web" / "index.html"
READY = "document.getElementById('state')?.textContent === 'ready'"
DONE = "document.getElementById('answer').getAttribute('aria-busy') === 'false'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no chromium or google-chrome")
    with Browser(program, tmp_path_factory.mktemp("profile")) as one:
        yield one


def visit(browser: Browser, server: Server, *, width: int = 1100, dark: bool = False) -> None:
    browser.events.clear()
    browser.look(width=width, height=900, dark=dark)
    browser.call("Page.navigate", url=f"{server.url}/")
    browser.until(READY)


def text(browser: Browser, name: str) -> str:
    return str(browser.js(f"document.getElementById('{name}').textContent"))


def fill(browser: Browser, **values: str) -> None:
    for name, value in values.items():
        browser.js(f"document.getElementById('{name}').value = {value!r}")


def press(browser: Browser, key: str, code: int, modifiers: int = 0) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent",
            type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers,
        )  # fmt: skip


def test_it_is_one_file_and_needs_no_network(serve: Callable[..., Server]) -> None:
    source = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href|url\(|import)\s*[=(]?\s*["']?(?:https?:)?//""", source)
    with Raw(serve()) as raw:
        status, fields, body = raw.send(get("/")).answer()
    assert (status, body.decode()) == (200, source)
    assert fields["content-type"] == "text/html; charset=utf-8"
    assert fields["content-security-policy"].startswith("default-src 'none'; ")


def test_the_card_and_a_prompt(browser: Browser, serve: Callable[..., Server]) -> None:
    server = serve(fake={"step_us": 1000})
    visit(browser, server)
    assert [text(browser, name) for name in ("name", "bits", "proof")] == [
        "fake",
        "w4a8",
        "proof passed",
    ]
    card = text(browser, "details")
    assert all(part in card for part in ("123.5 MB", "4,096 of 4,096 tokens", "static, 16 bits"))
    fill(browser, prompt="hello", tokens="40")
    browser.js("document.getElementById('run').click()")
    browser.until(DONE)
    assert text(browser, "answer") == expected(chat_prompt("hello"), 40)
    assert re.fullmatch(
        r"40 tokens, [\d.]+ a second; the first after [\d.]+ s; cut at the most tokens or the context",
        text(browser, "status"),
    )
    fill(browser, prompt="END=3", mode="text")
    browser.js("document.getElementById('run').click()")
    browser.until("document.getElementById('status').textContent.startsWith('3 tokens')")
    assert text(browser, "answer") == expected("END=3", 3)
    assert browser.problems() == []


def test_keys_run_and_stop_it(browser: Browser, serve: Callable[..., Server]) -> None:
    """With the keyboard alone; a stopped text's slot is free again."""
    server = serve(fake={"step_us": 5000})
    visit(browser, server)
    fill(browser, prompt="x", tokens="4000")
    browser.js("document.getElementById('prompt').focus()")
    press(browser, "Enter", 13, modifiers=2)
    browser.until("document.getElementById('answer').textContent.length > 5")
    browser.until("document.getElementById('slots').textContent === '1 of 4'")
    browser.until("Number(document.getElementById('speed').textContent) > 0")
    press(browser, "Escape", 27)
    browser.until(DONE)
    assert text(browser, "status") == "Stopped"
    server.until_idle()
    # The buttons hand the focus to each other.
    browser.js("document.getElementById('run').focus()")
    press(browser, " ", 32)
    browser.js("document.activeElement.id === 'run' && document.getElementById('run').click()")
    browser.until("document.activeElement.id === 'stop'")
    browser.js("document.getElementById('stop').click()")
    browser.until("document.activeElement.id === 'run'")


def test_what_goes_wrong_is_said(
    browser: Browser, serve: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("sesame")
    server = serve("--api-key", str(tmp_path / "keys"), fake={"why_not": "got none, expected one"})
    browser.look(width=1100, height=900)
    browser.call("Page.navigate", url=f"{server.url}/")
    browser.until("document.getElementById('state')?.textContent === 'needs a key'")
    assert browser.js("document.getElementById('key').checkVisibility()")
    fill(browser, key="sesame", prompt="<b>x</b>")
    browser.until(READY)
    browser.js("document.getElementById('run').click()")
    browser.until("document.getElementById('status').className === 'bad'")
    assert text(browser, "status") == (
        "chat template: got none, expected one. Use /v1/completions."
    )
    server.stop()
    browser.until("document.getElementById('state').textContent === 'no answer'")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390])
def test_it_can_be_read(
    browser: Browser, serve: Callable[..., Server], width: int, dark: bool
) -> None:
    """Nothing sticks out, and text stands out from what is behind it (WCAG AA)."""
    visit(browser, serve(), width=width, dark=dark)
    assert browser.js("document.documentElement.scrollWidth") == width
    weak = browser.js(
        """(() => {
          const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const light = (colour) => channels(colour).slice(0, 3).map((one) => one / 255)
            .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
            .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
          const behind = (element) => {
            const colour = getComputedStyle(element).backgroundColor;
            const clear = (channels(colour)[3] ?? 1) === 0;
            return clear && element.parentElement ? behind(element.parentElement) : colour;
          };
          return [...document.querySelectorAll("main *")].filter((element) =>
              element.checkVisibility() && !element.disabled &&
              [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
            .map((element) => {
              const pair = [light(getComputedStyle(element).color), light(behind(element))];
              return [element.textContent.slice(0, 30), (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
            }).filter(([, ratio]) => ratio < 4.5);
        })()"""
    )
    assert weak == []
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(16, 20, 26)" if dark else "rgb(246, 247, 249)")


def test_every_control_has_a_name(browser: Browser, serve: Callable[..., Server]) -> None:
    """As a screen reader hears the page."""
    visit(browser, serve())
    nodes: list[dict[str, Any]] = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node.get("ignored") and "role" in node and "name" in node
    }
    assert {
        ("heading", "fake"), ("heading", "Try it"), ("heading", "Model"), ("textbox", "Prompt"),
        ("combobox", "As"), ("spinbutton", "Most tokens"), ("spinbutton", "Temperature"),
        ("button", "Run"), ("button", "Stop"), ("status", "Answer"),
    } <= named  # fmt: skip
    controls = {"textbox", "combobox", "spinbutton", "button", "image", "group"}
    assert not [role for role, name in named if role in controls and not name]
    assert browser.js("document.documentElement.lang") == "en"
