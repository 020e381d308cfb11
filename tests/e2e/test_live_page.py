"""The live page in Chromium and the request view, on a real server with real requests.

Oracle: what `flux_route_decisions_total` on `/metrics` gained by each request, sent one by one.
Pinned: the page follows without reload and keeps the focus; nothing is asked of another host; no
response of `/flux` holds a word of a prompt or a request's id. The tests share one server and run
in order: later ones find the requests of earlier ones.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from demo.server import Server
from tests.helpers.metrics import parse, total

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="needs chromium; tools/install_test_services.sh installs it"
    ),
]

NUM_LAYERS = 30
SECRET = "zanzibarquux"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
ROWS = """() => [...document.querySelectorAll('#map tbody tr')].map(
    row => [...row.cells].slice(1).map(cell => cell.textContent).join(''))"""


@pytest.fixture(scope="module")
def server(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The sample model, routed by its router, with the live page enabled."""
    log = tmp_path_factory.mktemp("live") / "log"
    arguments = [
        *(str(sample_model), "--attention-backend", "flux", "--enforce-eager"),
        *("--served-model-name", "sample", "--max-model-len", "2048"),
        *("--kv-cache-memory-bytes", str(256 << 20), "--max-num-batched-tokens", "512"),
    ]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_PLUGINS", "flux,flux_live")
        with Server(arguments, log) as running:
            yield running.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(server: str, browser: Any) -> Iterator[Any]:
    with browser.new_context(viewport=DESKTOP) as context:
        opened = context.new_page()
        opened.set_default_timeout(20_000)
        opened.goto(f"{server}/flux")
        yield opened


def decisions(server: str) -> dict[tuple[int, str], float]:
    samples = parse(httpx.get(f"{server}/metrics", timeout=30).text)
    return {
        (layer, route): total(samples, "flux_route_decisions_total", layer=str(layer), route=route)
        for layer in range(NUM_LAYERS)
        for route in ("full", "sparse")
    }


def client(server: str) -> OpenAI:
    return OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)


def ask(server: str, words: int, name: str | None = None) -> tuple[str, str]:
    """Send one request. Returns: the response's id, and the routes that the counters gained."""
    before = decisions(server)
    answer = client(server).completions.create(
        model="sample",
        # Longer than the router's sinks and window, so that routes matter.
        prompt=f"{SECRET} {words}: " + "one two three " * (200 + words),
        max_tokens=2,
        temperature=0,
        extra_headers={} if name is None else {"X-Request-Id": name},
    )
    after = decisions(server)
    gained = [
        [after[layer, route] - before[layer, route] for route in ("full", "sparse")]
        for layer in range(NUM_LAYERS)
    ]
    assert all(sorted(pair) == [0, 1] for pair in gained)
    return answer.id, "".join("F" if full else "S" for full, _ in gained)


def wait_for_rows(page: Any, expected: list[str]) -> None:
    """Wait until the page's first rows are these, newest first; show what is there if not."""
    page.wait_for_function(f"rows => JSON.stringify(({ROWS})()) !== rows", arg="[]")
    try:
        page.wait_for_function(
            f"wanted => JSON.stringify(({ROWS})().slice(0, wanted.length))"
            " === JSON.stringify(wanted)",
            arg=expected,
        )
    except playwright.TimeoutError:
        assert page.evaluate(ROWS)[: len(expected)] == expected
        raise


def detail(page: Any) -> str:
    return page.locator("#detail").inner_text()


class TestLivePage:
    def test_before_the_first_request(self, page: Any) -> None:
        page.wait_for_selector("#live[aria-busy=false]")
        state = page.locator("#state").inner_text()
        assert state == "1 running engine. No request has been routed yet."
        assert page.locator("#map").is_hidden()
        assert page.locator("#sparse").inner_text() == "–"
        engines = page.locator("#engines").inner_text()
        for text in ("sample", "router", "SmolLM2-135M-Instruct", "30 of 30"):
            assert text in engines
        assert "Sparse pattern\ntriangle" in engines

    def test_shows_just_these_routes_without_reload(self, server: str, page: Any) -> None:
        page.evaluate("window.notReloaded = true")
        routes: list[str] = []
        for words in (1, 90, 5):
            routes.insert(0, ask(server, words)[1])
            wait_for_rows(page, routes)
        assert len(set(routes)) > 1
        assert page.evaluate(ROWS) == routes
        assert page.evaluate("window.notReloaded")
        share = "".join(routes).count("S") / len("".join(routes))
        assert page.locator("#sparse").inner_text() == f"{100 * share:.0f} %"
        assert page.locator("#requests").inner_text() == "3"
        for layer in range(NUM_LAYERS):
            full = sum(row[layer] == "F" for row in routes) / len(routes)
            shown = page.locator("#map thead tr:nth-child(2) td").nth(layer)
            assert shown.get_attribute("aria-label").startswith(f"{100 * full:.0f} % FULL")

    def test_saved_reading_is_that_of_metrics(self, server: str, page: Any) -> None:
        page.wait_for_selector("#map tbody tr")
        samples = parse(httpx.get(f"{server}/metrics", timeout=30).text)
        for phase in ("prefill", "decode"):
            attended = total(samples, "flux_attended_tokens_total", phase=phase)
            context = total(samples, "flux_context_tokens_total", phase=phase)
            shown = page.locator(f"#saved-{phase}").inner_text()
            assert shown == f"{100 * (1 - attended / context):.0f} %"

    def test_keyboard(self, server: str, page: Any) -> None:
        page.wait_for_selector("#map tbody tr")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "pause"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "scroll"
        page.keyboard.press("Tab")
        for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        letters = page.evaluate(ROWS)
        focused = "[document.activeElement.cellIndex, document.activeElement.textContent]"
        assert page.evaluate(focused) == [3, letters[1][2]]
        name = {"F": "FULL", "S": "SPARSE"}[letters[1][2]]
        assert re.search(
            rf"prompt tokens, layer 2: {name}, P\(FULL\) [01]\.\d{{3}}\.", detail(page)
        )
        _, newest = ask(server, 7)
        wait_for_rows(page, [newest, *letters])
        assert page.evaluate(focused) == [3, letters[1][2]]  # where it was, a row further down
        page.keyboard.press("End")
        assert "layer 29:" in detail(page)

    def test_pause(self, server: str, page: Any) -> None:
        page.wait_for_selector("#map tbody tr")
        before = page.evaluate(ROWS)
        page.locator("#pause").focus()
        page.keyboard.press("Enter")
        assert page.locator("#pause").get_attribute("aria-pressed") == "true"
        _, newest = ask(server, 8)
        page.wait_for_timeout(3000)
        assert page.evaluate(ROWS) == before
        page.keyboard.press("Enter")
        wait_for_rows(page, [newest, *before])

    def test_says_so_when_the_server_is_gone(self, page: Any) -> None:
        page.wait_for_selector("#map tbody tr")
        page.context.set_offline(True)
        page.wait_for_selector("#live.stale")
        assert "what is shown is old" in page.locator("#state").inner_text()
        page.context.set_offline(False)
        page.wait_for_selector("#live:not(.stale)")
        assert page.locator("#state").inner_text() == "1 running engine."

    def test_a_screen_reader_finds_a_table(self, page: Any) -> None:
        page.wait_for_selector("#map tbody tr")
        grid = page.get_by_role("grid", name="Route of each layer, newest request first")
        assert grid.get_by_role("columnheader", name="layer 29", exact=True).count() == 1
        rows = page.locator("#map tbody tr").count()
        assert (
            grid.get_by_role("rowheader", name=re.compile("% SPARSE, .* prompt tokens")).count()
            == rows
        )
        cells = grid.get_by_role("gridcell", name=re.compile(r"^(FULL|SPARSE), P\(FULL\) "))
        assert cells.count() == rows * NUM_LAYERS
        assert page.locator("td[tabindex='0']").count() == 1
        assert page.locator("html").get_attribute("lang") == "en"

    def test_nothing_from_elsewhere_and_no_text(self, server: str, browser: Any) -> None:
        with browser.new_context() as context:
            opened = context.new_page()
            requests: list[str] = []
            problems: list[str] = []
            bodies: list[str] = []
            opened.on("request", lambda request: requests.append(request.url))
            opened.on("response", lambda response: bodies.append(response.text()))
            opened.on("console", lambda message: problems.append(message.text))
            opened.on("pageerror", lambda error: problems.append(str(error)))
            opened.goto(f"{server}/flux")
            identifier, newest = ask(server, 9, name="a-name-of-mine")
            wait_for_rows(opened, [newest])
            assert problems == []
        assert {url.partition("?")[0] for url in requests} - {"data:,"} == {
            f"{server}/flux{path}" for path in ("", "/page.css", "/page.js", "/routes.json")
        }
        assert len(bodies) >= 4
        assert not any(word in body for body in bodies for word in (SECRET, "a-name-of-mine"))
        view = httpx.get(f"{server}/v1/flux/requests/{identifier}").text
        assert SECRET not in view


class TestAppearance:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
    def test_readable(self, server: str, browser: Any, scheme: str, viewport: dict) -> None:
        with browser.new_context(viewport=viewport, color_scheme=scheme) as context:
            opened = context.new_page()
            opened.goto(f"{server}/flux")
            opened.wait_for_selector("#map tbody td.full")
            width = opened.evaluate("document.documentElement.scrollWidth")
            assert width <= viewport["width"]
            ground = luminance(style(opened, "body", "background-color"))
            assert (ground > 0.5) == (scheme == "light")
            for selector in ("#map td.full", "#map td.sparse"):
                assert contrast(opened, selector, selector) >= 4.5
            assert contrast(opened, "#map tbody th", "body") >= 4.5
            assert contrast(opened, "#state", "body") >= 4.5
            assert contrast(opened, "dt", "#totals div") >= 4.5

    @pytest.mark.parametrize(("motion", "name"), [("reduce", "none"), ("no-preference", "arrive")])
    def test_motion(self, server: str, browser: Any, motion: str, name: str) -> None:
        with browser.new_context(reduced_motion=motion) as context:
            opened = context.new_page()
            opened.goto(f"{server}/flux")
            opened.wait_for_selector("#map tbody tr.new")
            assert style(opened, "#map tbody tr.new", "animation-name") == name


def style(page: Any, selector: str, name: str) -> str:
    return page.locator(selector).first.evaluate(
        "(element, name) => getComputedStyle(element).getPropertyValue(name)", name
    )


def luminance(color: str) -> float:
    """Give the relative luminance of `rgb(...)`, as WCAG 2 defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(page: Any, text: str, ground: str) -> float:
    values = (
        luminance(style(page, text, "color")),
        luminance(style(page, ground, "background-color")),
    )
    return (max(values) + 0.05) / (min(values) + 0.05)


class TestRequestView:
    def routes(self, server: str, name: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{server}/v1/flux/requests/{name}")
        assert answer.status_code == 200, answer.text
        return answer.json()["requests"]

    def test_by_the_responses_id_and_by_ones_own(self, server: str) -> None:
        identifier, routes = ask(server, 11, name="order-66")
        assert identifier == "cmpl-order-66"
        (found,) = self.routes(server, identifier)
        assert found["routes"] == routes
        assert [p >= 0.5 for p in found["full_probability"]] == [r == "F" for r in routes]
        assert self.routes(server, "order-66") == [found]

    def test_while_the_answer_streams(self, server: str) -> None:
        stream = client(server).chat.completions.create(
            model="sample",
            messages=[{"role": "user", "content": "Hello " * 700}],
            max_tokens=4,
            stream=True,
        )
        first = next(iter(stream))
        (found,) = self.routes(server, first.id)
        assert len(found["routes"]) == NUM_LAYERS
        stream.close()

    def test_every_prompt_and_choice(self, server: str) -> None:
        answer = client(server).completions.create(
            model="sample", prompt=["one " * 700, "one " * 800], n=2, max_tokens=1
        )
        found = self.routes(server, answer.id)
        assert [(r["prompt"], r["choice"]) for r in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert found[0]["prompt_tokens"] < found[2]["prompt_tokens"]

    def test_unknown(self, server: str) -> None:
        answer = httpx.get(f"{server}/v1/flux/requests/cmpl-nobody")
        assert answer.status_code == 404
        assert "found no routes for 'cmpl-nobody'" in answer.json()["error"]["message"]
