"""README.md and docs/ are run: the Python blocks of a page in order, in one namespace, in an empty
folder; and their relative links exist.
"""

import re
import traceback

import pytest
from conftest import ROOT

README = ROOT / "README.md"
PAGES = {path.name: path for path in (README, ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))}
# The pages with Python that needs no GPU and no cluster
RUN = ("README.md", "package.md", "data.md", "t5-primer.md")
FENCE = re.compile(r"^(```+|~~~+)[ \t]*(\w*)[^\n]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
SKIP = re.compile(r"<!-- no test: \S(?:(?!-->).)*-->\s*\Z", re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=[\"']([^\"']+)")


def python_blocks(text):
    """[(line number of the first line of code, code)] of every ```python block without `<!-- no
    test: reason -->`.
    """
    return [
        (text.count("\n", 0, match.start(3)) + 1, match[3])
        for match in FENCE.finditer(text)
        if match[2] == "python" and not SKIP.search(text[: match.start()])
    ]


def run_blocks(text, name="README.md"):
    """Run the blocks of `text`; fail with the line of `name` that raised, and with what stands
    there.
    """
    blocks = python_blocks(text)
    namespace = {"__name__": "readme"}
    if not blocks:
        pytest.fail(f"{name} has no python block that is run: nothing of it is tested")
    for start, code in blocks:
        try:
            exec(compile("\n" * (start - 1) + code, name, "exec"), namespace)  # noqa: S102 - that is the test
        except Exception as error:  # noqa: BLE001 - told below, with its line
            here = [
                frame.lineno
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename == name
            ]
            # A SyntaxError has no frame of ours
            line = here[0] if here else getattr(error, "lineno", None) or start
            source = text.splitlines()[line - 1].strip()
            pytest.fail(f"{name} line {line}: `{source}` raised {type(error).__name__}: {error}")
    return namespace


def relative_links(text):
    """Targets of links and images that are files of the repository, without their #anchor; code
    blocks are no links.
    """
    targets = (markdown or html for markdown, html in LINK.findall(FENCE.sub("", text)))
    return [
        target.split("#")[0]
        for target in targets
        if not re.match(r"[a-z][a-z0-9+.-]*:|#|//", target)
    ]


SAMPLE = """# Sample
```python
a = 1
```
<!-- no test: needs a GPU -->

```python
a = 1 / 0
```
```bash
exit 1
```
```python
b = a + 1
c = b
```
[file](docs/a.md#part) ![picture](<b.png>) <img src="c.svg"> \
[out](https://example.org/d) [here](#sample)
"""


def test_sample_runs_in_order_and_skips_what_says_so():
    assert [line for line, _ in python_blocks(SAMPLE)] == [3, 14]
    assert run_blocks(SAMPLE)["c"] == 2
    assert relative_links(SAMPLE) == ["docs/a.md", "b.png", "c.svg"]


@pytest.mark.parametrize(
    "text, message",
    [
        (SAMPLE.replace("c = b", "c = missing"), r"line 15: `c = missing` raised NameError"),
        (SAMPLE.replace("c = b", "c ="), r"line 15: `c =` raised SyntaxError"),
        # A skip gives a reason
        (SAMPLE.replace(" needs a GPU", " "), r"line 8: `a = 1 / 0` raised ZeroDivisionError"),
        ("# Title\n```bash\nls\n```\n", r"no python block"),
    ],
)
def test_sample_failures_name_the_line(text, message):
    with pytest.raises(pytest.fail.Exception, match=message):
        run_blocks(text)


def test_every_page_with_python_is_run():
    assert {name for name, path in PAGES.items() if python_blocks(path.read_text())} == set(RUN)


@pytest.mark.parametrize("name", RUN)
def test_python_blocks(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(PAGES[name].read_text(encoding="utf-8"), name)


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_exist(name):
    path = PAGES[name]
    links = relative_links(path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing, f"{name} links to what is not there: {missing}"
