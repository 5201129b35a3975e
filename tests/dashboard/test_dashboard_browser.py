"""The dashboard in a real browser, opened from the disk and served: what it shows, does, and never lets run."""

import shutil
import threading
from collections import Counter

import numpy as np
import pytest

from bad_input import HOSTILE
from endwise import load_model
from endwise.common.text import printable
from endwise.dashboard import write_dashboard
from endwise.dashboard.server import dashboard_server
from endwise.features.harvest.results import TOP, read_harvest
from made_harvests import write_harvested_run, write_predicted, write_said
from small_gpt2 import SITE

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOW = "the dashboard in a browser is not tried: install Chromium (Debian: apt-get install chromium), or put one on PATH"
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason=HOW), pytest.mark.usefixtures("loaded_once")]

ATTACK = "<img src=x onerror=window.hacked=1>"
ATTACKS = [
    ATTACK,
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "\u2028window.hacked=1//",
    "${window.hacked=1}",
    '" onmouseover="window.hacked=1',
    "javascript:window.hacked=1",
    "{{constructor.constructor('window.hacked=1')()}}",
    HOSTILE,
    "<svg/onload=window.hacked=1>",
    "\\u003cscript>",
    "'-(window.hacked=1)-'",
]
FEATURES = 150
SOME = ((TOP, 10), (0, 2), (1, 2))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser):
    """Opens pages, and fails for whatever any of them says on its console, throws, or asks a network for."""
    said, contexts = [], []

    def to(url, *, width=1280, height=900, scheme="light", settled=True):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith(own(url)) else None)
        page.goto(url)
        if settled:
            shown(page)
        return page

    yield to
    for context in contexts:
        context.close()
    assert said == []


def own(url):
    return ("data:", url.partition("index.html")[0].partition("#")[0])


def shown(page, hash_=None):
    """The view is complete, after a step to another one if so wanted."""
    if hash_ is not None:
        page.evaluate("hash => location.hash = hash", hash_)
        page.wait_for_selector(f'#view[data-shown="{hash_}"]')
    else:
        page.wait_for_selector("#view[data-shown]")
    return page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = [("local", True), ("e2e", True), ("e2e_ds", True)]
    width = load_model().width(SITE)
    return [
        write_harvested_run(folder / kind, FEATURES, kind=kind, seed=n, measured=measured, groups=SOME, width=width)
        for n, (kind, measured) in enumerate(settings)
    ]


@pytest.fixture(scope="module")
def one(runs):
    return write_dashboard(runs[:1]).as_uri()


@pytest.fixture(scope="module")
def site(runs, one):
    """Site of all runs; the first is explained, which it was not when `one` was written."""
    write_predicted(runs[0], {0: [frozenset({5, 6}), None]})
    write_said(runs[0], {0: ("ends of texts", 0.93, 0.71), 1: ("something with exclamation", 0.81, None)})
    return write_dashboard(runs).as_uri()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose name, tokens and explanations are all attacks."""
    folder = tmp_path_factory.mktemp("hostile") / ATTACK / "<script>window.hacked=1<|script>"
    texts = {token: f"{ATTACKS[token % len(ATTACKS)]}{token}" for token in range(4096)}
    run = write_harvested_run(folder, 60, texts=texts, groups=SOME, width=load_model().width(SITE))
    said = {feature: ATTACKS[feature % len(ATTACKS)] * 2 for feature in range(60)}
    write_said(run, {feature: (text, 0.5, None) for feature, text in said.items()})
    write_predicted(run, {feature: [frozenset({feature})] for feature in range(60)})
    return run, write_dashboard([run]), said


@pytest.fixture(scope="module")
def served(runs):
    with dashboard_server(runs) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


def until(page, expression):
    """Waits for it to be true. Not playwright's own way, which evaluates a text, as the pages' policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {expression}")


def column(page, name):
    """Texts of a column's cells, in the order of the table, as far as rows are in sight."""
    rows = page.locator(".table-body .table-row").all()
    rows.sort(key=lambda row: int(row.get_attribute("aria-rowindex")))
    return [row.locator(f".cell.{name}").inner_text() for row in rows]


def features(page):
    return [int(text.split()[0]) for text in column(page, "feature")]


def count(page):
    return page.locator(".count").inner_text()


def test_every_view_opens_from_the_disk_without_a_word(opened, site):
    page = opened(site)
    for hash_ in (
        "#/run/0",
        "#/run/1/feature/0",
        "#/run/0/feature/0",
        "#/run/2/feature/2",
        "#/",
        "#/run/2/feature/149",
    ):
        shown(page, hash_)
        assert page.locator("h1").count() == 1 and page.locator(".error:visible").count() == 0
    assert page.locator("#to-text").is_hidden()
    assert page.evaluate("document.compatMode") == "CSS1Compat"


def test_runs_stand_side_by_side(opened, site, runs):
    page = opened(site)
    assert page.locator(".card h2 .name").all_inner_texts() == ["local", "e2e", "e2e_ds"]
    for run, card in zip(runs, page.locator(".card").all(), strict=True):
        firings = read_harvest(run).firings
        assert (
            f"{(firings > 0).sum()}\nof {FEATURES}" in card.inner_text()
            and f"{(firings == 0).sum()}" in card.inner_text()
        )
        words = card.locator("canvas").get_attribute("aria-label")
        assert f"{(firings > 0).sum()} alive features" in words and "Importance, nats per token" in words
    alive = sum(int((read_harvest(run).firings > 0).sum()) for run in runs)
    assert count(page) == f"{alive} of {3 * FEATURES} features"
    page.get_by_label("Of", exact=True).select_option(label="e2e")
    assert page.locator(".cell.feature .of").first.inner_text() == "e2e"
    assert count(page) == f"{(read_harvest(runs[1]).firings > 0).sum()} of {FEATURES} features"


@pytest.mark.parametrize(("name", "read"), [("density", "density"), ("importance", "ce_second"), ("max", "max_active")])
def test_the_table_sorts(opened, one, runs, name, read):
    page = opened(one)
    harvest = read_harvest(runs[0])
    alive = np.flatnonzero(harvest.firings)
    rising = alive[np.argsort(harvest.column(read)[alive].astype(np.float32), kind="stable")].tolist()
    heading = page.locator(f".head .cell.{name}")
    if heading.get_attribute("aria-sort") == "none":
        heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    seen = features(page)
    falling = sorted(alive.tolist(), key=lambda f: (-np.float32(harvest.column(read)[f]), f))
    assert len(seen) > 10 and seen == falling[: len(seen)]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending" and features(page) == rising[: len(seen)]
    assert Counter(head.get_attribute("aria-sort") for head in page.locator(".head .cell").all())["none"] == 5


def test_dead_features_are_listed(opened, one, runs):
    page = opened(one)
    page.get_by_label("Show", exact=True).select_option("dead")
    dead = np.flatnonzero(read_harvest(runs[0]).firings == 0).tolist()
    assert count(page) == f"{len(dead)} of {FEATURES} features"
    assert features(page) == dead and column(page, "density") == ["0 %"] * len(dead)
    shown(page, f"#/run/0/feature/{dead[0]}")
    assert "never fired" in page.locator("#view").inner_text()


def test_search_by_words_and_by_number(opened, site):
    page = opened(site)
    page.locator("#search").fill("Exclamation")
    assert column(page, "explanation") == ["something with exclamation\n0.81"] and count(page).startswith("1 of")
    page.locator("#search").fill("#77")
    assert set(features(page)) == {77}
    page.locator("#search").fill("nothing says this")
    assert count(page).startswith("0 of") and features(page) == []
    page.keyboard.press("Escape")
    assert page.locator("#search").input_value() == "" and len(features(page)) > 10


def test_search_by_token_finds_what_the_harvest_has(opened, one, runs):
    page = opened(one)
    harvest = read_harvest(runs[0])
    token = max(
        Counter(c.tokens[c.peak] for f, of in harvest.all_contexts() for c in of).items(), key=lambda kv: kv[1]
    )[0]
    text = harvest.vocabulary[token]
    same = {t for t, written in enumerate(harvest.vocabulary) if written.strip().lower() == text.strip().lower()}
    expected = {f for f, of in harvest.all_contexts() if any(c.tokens[c.peak] in same for c in of)}
    page.get_by_label("Search in").select_option("token")
    page.locator("#search").fill(text.strip())
    for reason in ("fires there", "raises it"):
        page.get_by_role("button", name=reason).click()
        page.wait_for_selector(f'.chip[aria-pressed="false"]:has-text("{reason}")')
    until(page, f"document.querySelector('.count').textContent.startsWith('{len(expected)} of')")
    assert set(features(page)) == expected


def test_a_feature_shows_its_contexts_value_by_value(opened, one, runs):
    page = opened(one + "#/run/0/feature/0")
    harvest = read_harvest(runs[0])
    contexts = [context for context in harvest.contexts(0) if context.group == TOP]
    page.get_by_role("button", name="Show 2 more").click()
    lists = page.locator("ol.contexts")
    assert lists.count() == 3 and lists.first.locator("li").count() == len(contexts) == 10
    for context, item in zip(contexts, lists.first.locator("li").all(), strict=True):
        tokens = item.locator(".t").all()
        written = [harvest.vocabulary[token].replace("\n", "⏎") for token in context.tokens]
        assert [token.text_content() for token in tokens] == written
        values = [float(token.get_attribute("data-value")) for token in tokens]
        np.testing.assert_allclose(values, context.activations, rtol=1e-2)
        assert item.locator(".t.peak").text_content() == written[context.peak]
        assert item.locator(".t.on").count() == sum(value > 0 for value in context.activations)
    page.locator(".t.peak").first.hover()
    assert page.locator("#tip").is_visible()
    assert f"{contexts[0].activation:.3g}"[:3] in page.locator("#tip").inner_text()


def test_a_feature_shows_what_the_harvest_says(opened, site, runs):
    page = opened(site + "#/run/0/feature/0")
    harvest = read_harvest(runs[0])
    row = harvest.features.slice(0, 1).to_pylist()[0]
    assert page.locator("h1").inner_text() == "Feature 0"
    assert page.locator(".title .explanation").inner_text() == "ends of texts detection 0.93 fuzzing 0.71"
    predicted = page.locator(".card", has_text="Patterns that predict it")
    either = f"{written(harvest, 5)} | {written(harvest, 6)}"
    assert predicted.locator(".place, .any").all_inner_texts() == [either, "any"]
    assert "F1 0.8 (precision 0.9, recall 0.7), correlation 0.6" in predicted.inner_text()
    assert "0.3 %" in page.locator(".tiles").inner_text() and "1,200" in page.locator(".tiles").inner_text()
    assert page.locator(".histogram .bar-of").count() == len(row["histogram"])
    tall = page.locator(".histogram .bar-of").evaluate_all(
        "bars => bars.map(bar => Number(bar.getAttribute('height')))"
    )
    np.testing.assert_allclose(
        np.array(tall) / max(tall), np.array(row["histogram"]) / max(row["histogram"]), atol=1e-3
    )
    for side in ("boosted", "suppressed"):
        listed = page.locator(f".effects.{'raises' if side == 'boosted' else 'lowers'} .token").all_inner_texts()
        assert listed == [written(harvest, token) for token in row[side]]
    nearest = page.locator(".card", has_text="Nearest directions")
    assert [line.strip() for line in nearest.locator("h3").all_inner_texts()] == [
        "in its own dictionary",
        "in e2e",
        "in e2e_ds",
    ]
    assert nearest.locator("li").count() == 15
    assert nearest.locator("a").nth(5).get_attribute("href") == "#/run/1/feature/0"  # made to be like it
    together = page.locator(".card", has_text="Fires together with").locator("a").all_inner_texts()
    assert together == [str(other) for other in row["co_firing"]]


def written(harvest, token):
    return printable(harvest.vocabulary[token]).replace(" ", "␣").replace("\n", "⏎") or "(empty)"


def test_the_keyboard_is_enough(opened, one):
    page = opened(one)
    order = features(page)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("ArrowDown")
    table = page.get_by_role("grid")
    assert table.evaluate("table => table === document.activeElement")
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1)):
        page.keyboard.press(key)
        active = page.locator(f"#{table.get_attribute('aria-activedescendant')}")
        assert (
            active.get_attribute("aria-rowindex") == str(place + 2) and active.get_attribute("aria-selected") == "true"
        )
    page.keyboard.press("End")
    last = page.locator(f"#{table.get_attribute('aria-activedescendant')}")
    assert last.get_attribute("aria-rowindex") == table.get_attribute("aria-rowcount") and last.is_visible()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    shown(page, f"#/run/0/feature/{order[0]}")
    for key, place in (("n", 1), ("n", 2), ("p", 1)):
        page.keyboard.press(key)
        page.wait_for_selector(f'#view[data-shown="#/run/0/feature/{order[place]}"]')
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden() and page.locator("h1").inner_text().startswith("Feature")
    page.keyboard.press("Escape")
    page.wait_for_selector(".table")
    until(page, "document.activeElement.getAttribute('role') === 'grid'")
    assert page.locator(".table-row.active .cell.feature").inner_text() == str(order[1])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")


def test_a_dot_leads_to_its_feature(opened, one):
    page = opened(one)
    at = page.evaluate("[...Scatter.all][0].deref().x.findIndex((x) => x > 0)")
    place = page.evaluate("at => { const s = [...Scatter.all][0].deref(); return [s.x[at], s.y[at]]; }", at)
    canvas = page.locator("canvas")
    canvas.hover(position={"x": place[0], "y": place[1]})
    told = page.locator("#tip").inner_text()
    canvas.click(position={"x": place[0], "y": place[1]})
    page.wait_for_selector(".feature h1")
    assert told.startswith(page.locator("h1").inner_text())


def test_importance_that_was_not_measured_is_said_to_be_missing(opened, tmp_path):
    run = write_harvested_run(tmp_path / "run", 40, measured=False, groups=SOME)
    page = opened(write_dashboard([run]).as_uri())
    assert "Importance was not measured" in page.locator(".card").inner_text()
    assert set(column(page, "importance")) == {"–"}
    shown(page, "#/run/0/feature/0")
    assert "not measured" in page.locator(".tiles").inner_text()


def test_a_feature_or_a_file_that_is_not_there(opened, tmp_path):
    run = write_harvested_run(tmp_path / "run", 300, groups=())
    site = write_dashboard([run])
    page = opened(site.as_uri())
    for wrong in ("#/run/0/feature/300", "#/run/7/feature/0", "#/run/0/feature/x", "#/run/0/feature/-1"):
        page.evaluate("hash => location.hash = hash", wrong)
        assert page.locator(".error").inner_text() == "There is no such feature."
    page.evaluate("location.hash = '#/run/9'")
    page.wait_for_selector(".table")


def test_colours_follow_the_system_and_the_reader(opened, one):
    light = opened(one)
    dark = opened(one, scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert light.evaluate(background) != dark.evaluate(background)
    button = light.locator("#theme")
    for name in ("light", "dark"):
        button.click()
        assert button.get_attribute("aria-label") == f"Colours: {name}"
    assert light.evaluate(background) == dark.evaluate(background)
    light.reload()
    assert shown(light).evaluate(background) == dark.evaluate(background)
    button.click()
    assert light.evaluate(background) != dark.evaluate(background)


CONTRAST = """() => {
  const parse = (text) => {
    const n = text.match(/-?[\\d.]+(e-?\\d+)?/g).map(Number);
    const rgb = text.startsWith("color(") ? n.slice(0, 3).map((v) => v * 255) : n.slice(0, 3);
    return [...rgb, n.length > 3 ? n[3] : 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
  const background = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const poor = [];
  let seen = 0;
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("[aria-disabled], .unseen, noscript")) continue;
    seen += 1;
    const below = background(element);
    const [a, b] = [light(over(parse(getComputedStyle(element).color), below)), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push([element.tagName, element.className, ratio, element.textContent.slice(0, 30)]);
  }
  return [seen, poor];
}"""
NAMELESS = """() => [...document.querySelectorAll("a, button, input, select, textarea, [role=img], [role=grid]")]
  .filter((e) => e.checkVisibility() && !e.textContent.trim() && !e.getAttribute("aria-label"))
  .filter((e) => !(e.labels && e.labels.length))
  .map((e) => e.outerHTML)"""

BOXLESS = """() => [...document.querySelectorAll("a, button, input, select, textarea")]
  .filter((e) => getComputedStyle(e).display === "contents").map((e) => e.outerHTML)"""


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1280),
        ("dark", 390),
        pytest.param("light", 390, marks=pytest.mark.slow),
        pytest.param("dark", 1280, marks=pytest.mark.slow),
    ],
)
def test_every_view_can_be_read(opened, site, served, scheme, width):
    for url, hashes in (
        (site, ("#/", *(f"#/run/{run}/feature/0" for run in range(3)))),
        (served, ("#/text", "#/run/0/feature/0")),
    ):
        page = opened(url, scheme=scheme, width=width)
        for hash_ in hashes:
            shown(page, hash_)
            if hash_ == "#/text":
                page.locator("#text").fill("How to bake a cake.")
                page.get_by_role("button", name="Read", exact=True).click()
                page.wait_for_selector(".line .t.on")
            if url == served and "feature" in hash_:
                continue_text(page, "How to bake a cake.")
            seen, poor = page.evaluate(CONTRAST)
            assert seen > 30 and poor == []
            assert page.evaluate(NAMELESS) == [] and page.evaluate(BOXLESS) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
            assert len(ids) == len(set(ids))


def continue_text(page, text):
    page.locator(".main textarea").fill(text)
    page.get_by_role("button", name="Continue the text").click()
    page.wait_for_selector(".continued")
    until(page, "document.querySelector('.steer .button').textContent === 'Continue the text'")


def test_nothing_of_anyone_elses_runs(opened, hostile):
    run, site, said = hostile
    page = opened(site.as_uri())
    harvest = read_harvest(run)
    unhurt(page)
    assert page.locator("h1").inner_text() == "<script>window.hacked=1<|script>"
    assert ATTACK in page.locator(".table-body").inner_text()
    explained = {feature % len(ATTACKS): feature for feature in np.flatnonzero(harvest.firings).tolist()}
    assert len(explained) == len(ATTACKS)
    for feature in explained.values():
        shown(page, f"#/run/0/feature/{feature}")
        assert page.locator(".title .explanation").text_content().startswith(printable(said[feature]))
        first = harvest.contexts(feature)[0]
        texts = [printable(harvest.vocabulary[token]).replace("\n", "⏎") for token in first.tokens]
        assert page.locator("ol.contexts li").first.locator(".t").all_text_contents() == texts
        page.locator(".t.peak").first.hover()
        page.locator(".others a").first.hover()
        unhurt(page)
    shown(page, "#/")
    page.locator("canvas").hover()
    page.get_by_label("Search in").select_option("token")
    for attack in ATTACKS:
        page.locator("#search").fill(attack)
        page.wait_for_selector(".chips:not([hidden])")
        unhurt(page)
    page.evaluate("attack => location.hash = '#/run/0/feature/' + attack", ATTACK)
    unhurt(page)


def test_nothing_that_is_typed_runs(opened, hostile):
    with dashboard_server([hostile[0]], again=True) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page = opened(server.url + "#/text")
            page.wait_for_selector("#to-text:not([hidden])")
            for some in (ATTACKS[:4], ATTACKS[4:8], ATTACKS[8:]):
                page.locator("#text").fill(" ".join(some))
                page.get_by_role("button", name="Read", exact=True).click()
                until(page, "!document.querySelector('.button.primary').disabled")
                page.wait_for_selector(".line .t")
                page.locator(".line .t").first.click()
                unhurt(page)
            shown(page, "#/run/0/feature/0")
            several = " ".join(ATTACKS[:3])
            continue_text(page, several)
            unhurt(page)
            assert page.locator(".continued").first.text_content().startswith(printable(several))
        finally:
            server.shutdown()
            thread.join()


def unhurt(page):
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("img, svg script, iframe, #view script, [onerror], [onload], [onmouseover]").count() == 0
    assert page.evaluate("[...document.scripts].every(s => s.src && !s.textContent)")
    assert page.locator('a[href^="javascript"]').count() == 0


def test_which_features_fire_on_a_text(opened, served, runs):
    page = opened(served)
    page.wait_for_selector("#to-text:not([hidden])")
    page.keyboard.press("t")
    page.locator("#text").fill("Cut the paper.")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".line .t")
    model = load_model()
    tokens = [model.tokenizer.decode([token]) for token in model.tokenizer("Cut the paper.")["input_ids"]]
    assert page.locator(".line .t").all_text_contents() == tokens
    asked = page.evaluate(
        "async () => (await fetch('api/text', {method: 'POST', headers: {'Content-Type': 'application/json'},"
        " body: JSON.stringify({run: 0, text: 'Cut the paper.'})})).json()"
    )
    page.locator(".line .t").nth(1).click()
    active = page.locator(".card", has_text="Active at").locator("a").all_inner_texts()
    assert active == [str(feature) for feature, _ in asked["active"][1]]
    sides = page.locator(".detail .two > div")
    for side, name in enumerate(("clean", "spliced")):
        listed = sides.nth(side).locator(".token").all_inner_texts()
        assert listed == [text.replace(" ", "␣") for text, _ in asked[name][1]]
    page.keyboard.press("ArrowRight")
    assert "Active at" in page.locator(".detail h2").first.inner_text()
    assert page.locator('.line .t[aria-pressed="true"]').text_content() == tokens[2]
    page.locator(".text .chips .chip").first.click()
    assert f"Shaded by feature {asked['over_text'][0]['feature']}" in page.locator("#view").inner_text()
    page.get_by_label("With").select_option("1")
    until(page, "document.querySelector('.line').closest('[data-kind]').dataset.kind === 'e2e'")


def test_a_slider_steers_a_text(opened, served, site, runs):
    assert not opened(site + "#/run/0/feature/0").get_by_text("Steer a text with it").is_visible()
    page = opened(served + "#/run/1/feature/0")
    page.get_by_label("Strength").fill("-1.5")
    continue_text(page, "How to bake a cake:")
    greatest = float(read_harvest(runs[1]).column("max_active")[0])

    def asked(how, by):
        body = f"{{run: 1, text: 'How to bake a cake:', feature: 0, how: '{how}', by: {by}, tokens: 40}}"
        options = f"{{method: 'POST', headers: {{'Content-Type': 'application/json'}}, body: JSON.stringify({body})}}"
        return page.evaluate(f"async () => (await fetch('api/steer', {options})).json()")

    found = asked("add", -1.5 * greatest)
    texts = ["".join([*found["prompt"], *found[name]]) for name in ("clean", "steered")]
    assert page.locator(".continued").all_text_contents() == texts
    assert "-1.5".replace("-", "−") in page.locator(".steer output").inner_text()
    page.get_by_label("Activation", exact=True).select_option("set")
    expected = asked("set", -1.5 * greatest)
    until(page, f"document.querySelectorAll('.continued')[1].textContent.endsWith({''.join(expected['steered'])!r})")


def test_a_text_that_cannot_be_read_says_why(opened, served, browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto(served + "#/text")
    page.locator("#text").fill("word " * 400)
    page.get_by_role("button", name="Read", exact=True).click()
    page.wait_for_selector(".text .error:not([hidden])")
    assert "Shorten it" in page.locator(".text .error").inner_text()
    context.close()


@pytest.mark.parametrize("d_sae", [2_000, pytest.param(46_080, marks=pytest.mark.slow)])
def test_many_features_are_few_elements(opened, tmp_path, monkeypatch, d_sae):
    monkeypatch.setattr("endwise.dashboard.site.all_neighbours", lambda *_, **__: [{}])  # which takes a minute
    run = write_harvested_run(tmp_path / "run", d_sae, groups=())
    page = opened(write_dashboard([run]).as_uri())
    firings = read_harvest(run).firings
    assert count(page) == f"{(firings > 0).sum():,} of {d_sae:,} features"
    assert page.evaluate("document.querySelectorAll('*').length") < 1500
    page.get_by_role("grid").focus()
    page.keyboard.press("End")
    assert page.get_by_role("grid").get_attribute("aria-rowcount") == str((firings > 0).sum() + 1)
    assert page.locator(f"#row-{(firings > 0).sum() - 1}").is_visible()
    assert page.locator(".table-body .table-row").count() < 80
