"""The report's page in a browser: axe-core finds nothing, and a phone or paper cuts nothing.

axe-core is the file in the package axe-playwright-python, whose browser is not used: Chromium runs
the page by itself and prints what the page then contains.
"""

import importlib.util
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from tuneline.artifacts import Decision, RunHeader, TrainingSummary, write_jsonl
from tuneline.recipe import Recipe
from tuneline.report.run import run

BROWSER = next(
    filter(
        None,
        map(
            shutil.which,
            ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"),
        ),
    ),
    None,
)
AXE = importlib.util.find_spec("axe_playwright_python")

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Google Chrome on the PATH"),
    pytest.mark.skipif(AXE is None, reason="needs the package axe-playwright-python (axe-core)"),
]

KOREAN = "파드의 메모리 요청량을 계산하는 방법을 설명해 주세요. "

LOOK = """
<pre id="seen"></pre><script>
axe.run(document).then(result => {
  const root = document.documentElement;
  const cut = [...document.querySelectorAll('.scroll, pre, main')].filter(
    each => each.scrollWidth > each.clientWidth + 1);
  document.getElementById('seen').textContent = JSON.stringify({
    width: innerWidth, page: root.scrollWidth, cut: cut.map(each => each.outerHTML.slice(0, 200)),
    violations: result.violations.map(each => [each.id, each.nodes.map(node => node.html)]),
    smallest: Math.min(...[...document.querySelectorAll('svg.chart')].filter(
      each => each.getClientRects().length).map(
      each => parseFloat(getComputedStyle(each).fontSize) * each.getScreenCTM().a)),
    passes: result.passes.length, text: document.querySelector('main').innerText,
  });
});
</script>"""


def seen(page: str, directory: Path, *, width: int) -> dict:
    """Return what a browser sees of a page in a frame of a width."""
    axe = Path(AXE.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8")
    inner = page.replace("</body>", f"<script>{axe}</script>{LOOK}</body>")
    (directory / "inner.html").write_text(inner, encoding="utf-8")
    # A window is at least 500 pixels wide, but a frame can be as narrow as a phone.
    (directory / "outer.html").write_text(
        f'<!doctype html><iframe src="inner.html" style="border:0;width:{width}px;height:900px">'
        "</iframe><pre id=seen></pre><script>setInterval(() => {"
        "document.getElementById('seen').textContent = document.querySelector('iframe')"
        ".contentDocument.getElementById('seen').textContent}, 100)</script>",
        encoding="utf-8",
    )
    out = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"),
            *("--allow-file-access-from-files", f"--user-data-dir={directory / 'profile'}"),
            *("--virtual-time-budget=60000", "--dump-dom", str(directory / "outer.html")),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    found = json.loads(unescape(re.search(r'<pre id="?seen"?>(.*?)</pre>', out, re.S)[1]))
    assert found["width"] == width and found["passes"] > 15
    return found


@pytest.fixture
def pages(recipe: Recipe, run_dirs: dict) -> dict[str, str]:
    """A promoted run, and a held run with long Korean answers."""
    header = RunHeader.parse(recipe.model_dump_json())
    written = {}
    run(header, run_name="demo-20261127-211354", **run_dirs)
    written["promote"] = Path(run_dirs["page_path"]).read_text(encoding="utf-8")
    held = Decision.read(run_dirs["decision_dir"])
    undecided = {"difference": 0.01, "interval": (-0.02, 0.04), "lower": -0.015, "num_changed": 9}
    undecided |= {"base": 0.32, "tuned": 0.33, "outcome": "undecided"}
    first = held.comparisons[0].model_copy(update=undecided)
    held.model_copy(
        update={"verdict": "hold", "comparisons": [first, *held.comparisons[1:]]}
    ).write(Path(run_dirs["decision_dir"]))
    training = TrainingSummary.read(run_dirs["adapter_dir"])
    training.model_copy(update={"learning_rate": 2e-4}).write(run_dirs["adapter_dir"])
    for side in ("base", "tuned"):
        row = {"question": KOREAN * 9, "prompt": "p", "answer": KOREAN, "text": KOREAN * 30}
        write_jsonl(Path(run_dirs[f"{side}_scores_dir"], "generations.jsonl"), [row])
    again = {**run_dirs, "summary_dir": f"{run_dirs['summary_dir']}-hold"}
    run(header, run_name="demo-20261127-211354", **again)
    written["hold"] = Path(run_dirs["page_path"]).read_text(encoding="utf-8")
    return written


@pytest.mark.parametrize(
    ("name", "width", "media"),
    [
        ("hold", 1280, "(prefers-color-scheme:dark)"),
        ("hold", 375, ""),
        ("promote", 703, "print"),
    ],
)
def test_the_page_is_accessible_and_whole(
    pages: dict[str, str], tmp_path: Path, name: str, width: int, media: str
) -> None:
    page = pages[name]
    if media:
        # The rules of the medium apply always, and those of screens never.
        assert f"@media {media}{{" in page
        page = page.replace(f"@media {media}{{", "@media all{")
        if media == "print":
            page = page.replace("@media screen and", "@media not all and")
    found = seen(page, tmp_path, width=width)
    assert found["violations"] == []
    assert found["page"] <= width and found["cut"] == []
    assert found["smallest"] >= 10  # pixels of the text in charts
    if name == "hold":
        # Whole syllables, neither escaped nor shortened.
        assert KOREAN.strip() in found["text"] and found["text"].count(KOREAN.strip()) >= 60
        assert "\ufffd" not in found["text"] and "\\u" not in found["text"]
