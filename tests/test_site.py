"""The site builds without a warning, and every page of it, opened in a browser without a network, is whole.

Both need what `make site` installs, and the second one Chromium with its driver (`apt-get install chromium chromium-driver`);
without them these tests are skipped, and say so.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "chapters" / "site" / "build.py"
SPEC = importlib.util.spec_from_file_location("build_site", BUILD)
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)
PHONE = 390  # pixels


# ---- the pages as they are laid out


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "id": "m", "metadata": {}, "source": text}


def code(text: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "id": "c", "metadata": {"nbgrader": {}}, "source": [text], "outputs": [*outputs]}


def laid_out(*cells: dict) -> list[dict]:
    return build.page_of({"cells": [*cells], "metadata": {}}, "99_tiny.ipynb")["cells"]


def test_badges_become_links_and_the_notebook_can_be_had():
    badges = "[![Open in Colab](https://a/c.svg)](https://a/99)\n[![Open in Binder](https://b/b.svg)](https://b/99)"
    (cell,) = laid_out(markdown(f"# A\n\n{badges}\n\n1. [B](#B,-c?)"))
    assert "![" not in cell["source"]
    assert "[Open in Colab](https://a/99) ·\n[Open in Binder](https://b/99) · {download}`" in cell["source"]
    assert "<../notebooks/99_tiny.ipynb>`\n\n1. [B](#b-c)" in cell["source"]


def test_a_chapter_that_is_named_is_linked_but_not_in_code_or_formulas():
    text = "# Chapter 05\nChapter 05, `chapter 05`, $chapter 05$, [chapter 05](x.md), chapter 77\n```\nchapter 05\n```"
    linked = build.with_links(text)
    assert linked == text.replace("Chapter 05,", "[Chapter 05](05_forward_noising.ipynb),")


def test_a_solution_is_folded_under_a_stub():
    stub, solution = laid_out(code("def f(x):\n    ### BEGIN SOLUTION\n    y = x\n    return y\n    ### END SOLUTION"))
    assert stub["source"] == "def f(x):\n    ...  # your code here"
    assert solution["metadata"]["tags"] == ["hide-input"]
    assert "return y" in solution["source"][0]


def test_sliders_are_left_out_with_a_word_and_pictures_stay():
    shown = [{"text/plain": ["IntSlider(value=3)"]}, {"text/plain": "Output()"}, {"text/plain": "a fox", "text/html": ""}]
    *widgets, picture = ({"output_type": "display_data", "data": data} for data in shown)
    cell, note = laid_out(code("slider", *widgets, picture))
    assert cell["outputs"] == [picture]
    assert note["source"] == build.SLIDERS


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    text = "[a](chapters/05_forward_noising.ipynb) [b](datasets/README.md) [c](LICENSE) [d](https://x.org/README.md)"
    good = "[a](chapters/05_forward_noising.ipynb) [b](datasets/README.md) [c](%s/LICENSE) [d](https://x.org/README.md)"
    assert build.resolved(text, "README.md", tmp_path) == good % build.GITHUB
    assert build.resolved("[up](../README.md)", "datasets/README.md", tmp_path) == "[up](../index.md)"
    with pytest.raises(FileNotFoundError, match=r"README.md links to gone.md, which is not there"):
        build.resolved("[a](gone.md)", "README.md", tmp_path)


def test_every_module_and_chapter_has_its_page(tmp_path):
    build.lay_out(tmp_path)
    assert {path.stem for path in (tmp_path / "modules").glob("*.rst")} == {*build.MODULES, "index"}
    front, index = (tmp_path / "index.md").read_text(), (tmp_path / "modules" / "index.rst").read_text()
    assert [name for name in build.MODULES if f"\n   {name}\n" not in index] == []
    assert [path.stem for path in build.CHAPTERS if f" <chapters/{path.stem}>\n" not in front] == []
    assert "[`flow.py`](modules/flow.rst)" in front


def test_a_warning_fails_the_build(installed, tmp_path):
    code = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import build; here = Path(sys.argv[2]);"
    code += "sys.exit(build.render(here / 'source', here / 'site', here / 'read'))"
    (tmp_path / "source").mkdir()
    for text, returned in (("# A\n\n[b](index.md)\n", 0), ("# A\n\n[b](gone.md)\n", 1)):
        (tmp_path / "source" / "index.md").write_text(text)
        command = [sys.executable, "-c", code, str(BUILD.parent), str(tmp_path)]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == returned, made.stderr
    assert "gone.md" in made.stderr


# ---- in a browser

LOOK = """
const [phone, done] = arguments;
const look = () => {
  const all = (where) => [...document.querySelectorAll(where)];
  const scrollable = (e) => /auto|scroll/.test(getComputedStyle(e).overflowX);
  const scrolls = (e) => e && e !== document.body && (scrollable(e) || scrolls(e.parentElement));
  const shown = (e) => e.getClientRects().length > 0;
  const text = all('main :is(p, li, h1, h2, h3, dt, img, summary, td)').filter((e) => shown(e) && !scrolls(e));
  return {
    ids: all('[id]').map((e) => e.id),
    links: all('a[href]').map((e) => e.href),
    from_elsewhere: performance.getEntriesByType('resource').map((e) => e.name).filter((n) => !/^(file|data|blob):/.test(n)),
    named_elsewhere: all('[src], link[href]:not([rel~=canonical])').map((e) => e.getAttribute('src') || e.href || '')
      .filter((n) => /^(https?:)?[/][/]/.test(n)),
    not_loaded: all('img').filter((e) => !(e.complete && e.naturalWidth)).map((e) => e.src.slice(0, 90)),
    not_described: all('img').filter((e) => !(e.getAttribute('alt') || '').trim()).map((e) => e.src.slice(0, 90)),
    pictures: all('img').length,
    formulas: all('.math').length,
    not_set: all('.math').filter((e) => !e.querySelector('mjx-container') || e.querySelector('mjx-merror, [data-mjx-error]'))
      .map((e) => e.textContent.slice(0, 90)),
    solutions: all('details.hide').length,
    open: all('details.hide[open]').length,
    width: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth),
    too_wide: text.filter((e) => e.getBoundingClientRect().right > phone + 1)
      .map((e) => e.tagName + ' ' + e.textContent.trim().slice(0, 60)),
  };
};
const set = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
set.then(() => setTimeout(() => done(look()), 30));
"""


@pytest.fixture(scope="module")
def installed() -> None:
    for package in ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the site needs {package}: run `make site`, or pip install -e '.[site]'")


@pytest.fixture(scope="module")
def site(installed, tmp_path_factory) -> Path:
    """A fresh build; it fails at any warning."""
    folder = tmp_path_factory.mktemp("site") / "site"
    made = subprocess.run([sys.executable, str(BUILD), str(folder)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium: run `make site`")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    phone = {"width": PHONE, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    yield window
    window.quit()


def visit(browser, page: Path) -> dict:
    """What a browser as narrow as a phone's finds on a page."""
    browser.get_log("browser")  # what earlier pages said
    browser.get(page.as_uri())
    found = browser.execute_async_script(LOOK, PHONE)
    return found | {"said": [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]}


@pytest.fixture(scope="module")
def visits(site, browser) -> dict[str, dict]:
    pages = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    return {page.relative_to(site).as_posix(): visit(browser, page) for page in pages}


def broken(visits: dict[str, dict], site: Path) -> dict[str, list[str]]:
    """Links to a file of the site that is not there, or to a place in it that is not there."""
    here, wrong = site.as_uri() + "/", {}
    for page, found in visits.items():
        for link in {*found["links"]}:
            target, place = urldefrag(link)
            if not target.startswith("file:"):
                continue
            name = unquote(target.removeprefix(here))
            known = visits[name]["ids"] if name in visits else None
            if not (site / name).is_file() or (known is not None and place and unquote(place) not in known):
                wrong.setdefault(page, []).append(link)
    return wrong


def worth_saying(visits: dict[str, dict], what: str) -> dict[str, list]:
    return {page: found[what] for page, found in visits.items() if found[what]}


def test_every_page_was_opened(visits):
    assert [path.stem for path in build.CHAPTERS if f"chapters/{path.stem}.html" not in visits] == []
    assert [name for name in build.MODULES if f"modules/{name}.html" not in visits] == []
    print({what: sum(found[what] for found in visits.values()) for what in ("pictures", "formulas", "solutions")}, len(visits))


def test_no_page_complains(visits):
    assert worth_saying(visits, "said") == {}


def test_nothing_comes_from_another_host(visits):
    assert worth_saying(visits, "from_elsewhere") == {}
    assert worth_saying(visits, "named_elsewhere") == {}


def test_no_link_is_broken(visits, site):
    assert broken(visits, site) == {}


def test_every_picture_is_there_and_described(visits):
    assert sum(found["pictures"] for found in visits.values()) > 100
    assert worth_saying(visits, "not_loaded") == {}
    assert worth_saying(visits, "not_described") == {}


def test_every_formula_is_set(visits):
    assert sum(found["formulas"] for found in visits.values()) > 100
    assert worth_saying(visits, "not_set") == {}


def test_a_phone_shows_all_of_it(visits):
    assert {page: found["width"] for page, found in visits.items() if found["width"] > PHONE} == {}
    assert worth_saying(visits, "too_wide") == {}


def test_solutions_are_folded_until_asked_for(visits, browser, site):
    for path in build.CHAPTERS:
        found = visits[f"chapters/{path.stem}.html"]
        cells = json.loads(path.read_text())["cells"]
        solutions = sum(cell["cell_type"] == "code" and "### BEGIN SOLUTION" in "".join(cell["source"]) for cell in cells)
        assert (found["solutions"], found["open"]) == (solutions, 0), path.stem
    browser.get((site / "chapters" / "07_the_unet.html").as_uri())
    fold = browser.find_element("css selector", "details.hide")
    assert not fold.find_element("css selector", "pre").is_displayed()
    browser.execute_script("arguments[0].querySelector('summary').click()", fold)
    assert "BEGIN SOLUTION" in fold.find_element("css selector", "pre").text


def test_pages_follow_one_another(browser, site):
    browser.get((site / "chapters" / "05_forward_noising.html").as_uri())
    around = [link.get_attribute("href") for link in browser.find_elements("css selector", ".prev-next-area a")]
    assert [Path(link).stem for link in around] == ["04_vector_quantisation", "06_learning_to_denoise"]


def test_it_can_be_searched(browser, site):
    browser.get((site / "search.html").as_uri() + "?q=classifier-free")
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda b: len(b.find_elements("css selector", "#search-results li a")) > 2)
    hits = [a.get_attribute("href") for a in browser.find_elements("css selector", "#search-results li a")]
    assert any("12_guidance_and_prompts" in hit for hit in hits)


def test_it_has_a_dark_side(browser, site):
    browser.get((site / "index.html").as_uri())
    seen = {}
    for mode in ("light", "dark"):
        browser.execute_script(f"document.querySelector('.theme-change-button[data-mode={mode}]').click()")
        seen[mode] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert seen["light"] == "rgb(255, 255, 255)"
    assert max(int(part) for part in seen["dark"][4:-1].split(",")) < 60


def test_a_bad_page_is_found_out(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width, initial-scale=1"><body><main>'
        '<img src="gone.png"><script src="https://cdn.example.org/x.js"></script><a href="gone.html"></a><a href="#gone"></a>'
        '<p style="width: 900px">wide</p><span class="math">\\(x\\)</span><script>console.error("oh")</script></main>'
    )
    found = visit(browser, page)
    assert found["width"] > PHONE
    assert found["too_wide"] == ["P wide"]
    assert found["not_set"] == ["\\(x\\)"]
    assert len(found["not_loaded"]) == len(found["not_described"]) == len(found["named_elsewhere"]) == 1
    assert len(found["said"]) >= 3  # the picture, the script of another host, and what the page says
    assert sorted(broken({"bad.html": found}, tmp_path)["bad.html"]) == [
        page.as_uri() + "#gone",
        (tmp_path / "gone.html").as_uri(),
    ]
