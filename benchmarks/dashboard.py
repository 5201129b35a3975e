"""Time a dashboard of 46,080 features: `python benchmarks/dashboard.py --out dashboard.json`.

A harvest of that many features is made up (or harvested runs are given), its site written, and opened from the disk in
headless Chromium, each time in a browser that knows nothing of it. Measured there: the first paint; when the table and
the scatter stand; each column's sort, up and down, with the rows that are then drawn; a search by words and one by a
token; opening a feature. The bars: first paint under 1 s, a sort under 200 ms. Nothing is discarded: run it while
nothing else computes. It needs playwright and Chromium.
"""

import argparse
import importlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from endwise.dashboard import write_dashboard
from harness import GIB, cores, machine, resident, write_json

HELPERS = Path(__file__).parents[1] / "tests" / "helpers"
FIRST_PAINT, SORT = 1000.0, 200.0
"""The bars, in milliseconds."""


def made_run(folder: Path, size: int, width: int) -> Path:
    """A run with a harvest as the tests make them, each feature with 22 contexts of 24 tokens."""
    sys.path.append(str(HELPERS))
    return importlib.import_module("made_harvests").write_harvested_run(folder, size, width=width)


def opened(browser: Any, url: str) -> tuple[Any, dict[str, float]]:
    """The page in a context of its own, and milliseconds since it was asked for."""
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    page.goto(url)
    page.wait_for_selector("#view[data-shown]")
    page.wait_for_timeout(300)
    return page, page.evaluate(
        """() => ({
          first_paint: performance.getEntriesByName("first-paint")[0].startTime,
          first_contentful_paint: performance.getEntriesByName("first-contentful-paint")[0].startTime,
          shown: performance.getEntriesByName("endwise-shown")[0].startTime,
        })"""
    )


def painted(page: Any, act: str) -> float:
    """Milliseconds from an act until the frame after it is painted."""
    return page.evaluate(
        f"""async () => {{
          const start = performance.now();
          await ({act})();
          await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
          return performance.now() - start;
        }}"""
    )


def sorts(page: Any) -> dict[str, float]:
    """Time to sort by each column, first one way and then the other."""
    names = page.evaluate("overview.columns().map((column) => column.name)")
    click = """() => document.querySelector(".head .cell.%s button").click()"""
    return {f"{name} {turn}": painted(page, click % name) for name in names for turn in ("first", "again")}


def acts(page: Any, token: str) -> dict[str, float]:
    typed = """async () => { Object.assign(overview.state, { words: "%s", scope: "%s" }); await overview.search(); }"""
    times = {"search by words, first": painted(page, typed % ("the", "all"))}
    times["search by words, again"] = painted(page, typed % ("ing", "all"))
    times["search by token, first"] = painted(page, typed % (token, "token"))
    times["all features again"] = painted(page, typed % ("", "all"))
    going = """async () => {
      location.hash = "#/run/0/feature/%d";
      const view = document.getElementById("view");
      while (view.dataset.shown !== location.hash) await new Promise((done) => setTimeout(done));
    }"""
    times["a feature, its file unread"] = painted(page, going % 4000)
    times["a feature, its file read"] = painted(page, going % 4001)
    return times


def measured(url: str, turns: int) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"))
        opening: list[dict[str, float]] = []
        sorting: list[dict[str, float]] = []
        doing: list[dict[str, float]] = []
        for _ in range(turns):
            page, times = opened(browser, url)
            opening.append(times)
            sorting.append(sorts(page))
            doing.append(acts(page, "the"))
            page.context.close()
        version = browser.version
        browser.close()
    times = {"opening_ms": collected(opening), "sorts_ms": collected(sorting), "acts_ms": collected(doing)}
    return {"chromium": version, **times}


def collected(times: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {"median": statistics.median(each[name] for each in times), "most": max(each[name] for each in times)}
        for name in times[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="harvested runs instead of a made one")
    parser.add_argument("--size", type=int, default=46_080, help="features of the made run")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = given.runs or [made_run(Path(folder) / "run", given.size, given.width)]
        start = time.perf_counter()
        site = write_dashboard(runs, Path(folder) / "site", say=lambda text: print(text, flush=True))
        result: dict[str, Any] = {"machine": machine(cores()), "write_s": time.perf_counter() - start}
        result["peak_gib"] = resident("VmHWM") / GIB
        files = [file.stat().st_size for file in site.parent.rglob("*") if file.is_file()]
        result |= {"files": len(files), "bytes": sum(files), **measured(site.as_uri(), given.turns)}
    print(f"written in {result['write_s']:.0f} s: {result['files']} files, {result['bytes'] / 1e6:.0f} MB")
    for kind in ("opening_ms", "sorts_ms", "acts_ms"):
        for name, times in result[kind].items():
            print(f"{name:<32}{times['median']:>8.0f} ms, at most {times['most']:.0f}")
    paint = result["opening_ms"]["first_contentful_paint"]["most"]
    slowest = max(times["most"] for times in result["sorts_ms"].values())
    print(f"first paint {paint:.0f} ms (bar {FIRST_PAINT:.0f}), slowest sort {slowest:.0f} ms (bar {SORT:.0f})")
    if given.out is not None:
        write_json(given.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
