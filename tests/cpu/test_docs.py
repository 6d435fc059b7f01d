"""The pages in ``docs/`` name what is there: files, commands, options, names of this package, figures of families."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import resnet_fast
from resnet_fast.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
KERNELS = sorted(path.name for path in (ROOT / "kernels/triton").glob("*.py") if "@triton.jit" in path.read_text())
COMMANDS = typer.main.get_command(app).commands

each_page = pytest.mark.parametrize("page", PAGES)


@pytest.mark.parametrize("file", KERNELS)
def test_every_kernel_is_explained(file):
    """By a heading with its name."""
    assert any(file in line for line in PAGES["kernels.md"].splitlines() if line.startswith("## "))


@each_page
def test_files_are_there(page):
    """Names in code and targets of links."""
    text = PAGES[page]
    for name in re.findall(r"`([\w./]+\.py)`", text):
        assert (ROOT / name).is_file() or list(ROOT.glob(f"*/**/{name}")), name
    for name in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / "docs" / name).is_file(), name


@each_page
def test_links_into_the_page(page):
    """GitHub makes the target of a heading: lower case, without punctuation, a hyphen for each space."""
    text = PAGES[page]
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    targets = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= targets


@each_page
def test_quoted_lines_are_in_the_sources(page):
    """Of kernels: every whole line of Python that the page quotes, but for what is left out as ``...``."""
    sources = "".join(path.read_text() for path in (ROOT / "kernels/triton").glob("*.py"))
    sources = re.sub(r"\s+", "", sources)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    lines = [line for block in blocks if "import" not in block for line in block.splitlines()]
    quoted = [re.sub(r"\s+#.*", "", line) for line in lines]
    missing = [line for line in quoted if "..." not in line and re.sub(r"\s+", "", line) not in sources]
    assert not missing


@each_page
def test_commands_and_their_options_exist(page):
    """Of ``resnet-fast``, and of ``make``."""
    makefile = (ROOT / "Makefile").read_text()
    quoted = re.findall(r"`([^`\n]+)`", PAGES[page]) + [
        line.partition("  #")[0]
        for block in re.findall(r"```sh\n(.*?)```", PAGES[page], re.DOTALL)
        for line in block.splitlines()
    ]
    for words in map(shlex.split, (one for one in quoted if one.startswith(("make ", "resnet-fast ")))):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        else:
            options = {name for one in COMMANDS[words[1]].params for name in one.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= options, words


@each_page
def test_public_names_exist(page):
    for name in re.findall(r"resnet_fast\.(\w+)\(", PAGES[page]):
        assert name in resnet_fast.__all__, name


def test_the_snippets_on_deployment_run(tmp_path, monkeypatch, capsys):
    """In order, in one session. What AOTInductor compiles takes long, and ``test_archives.py`` does it."""
    monkeypatch.chdir(tmp_path)
    session = {}
    for block in re.findall(r"```python\n(.*?)```", PAGES["deployment.md"], re.DOTALL):
        if "_inductor" not in block:
            exec(compile(block, "deployment.md", "exec"), session)
    assert {path.name for path in tmp_path.iterdir()} == {"resnet18.onnx", "fast.pt2"}
    assert session["names"] == list(session["model"].classes)
    assert session["logits"].shape == (5, 10)
    assert "ExecutionProvider: " in capsys.readouterr().out


def test_the_figures_of_kernels_are_those_recorded():
    quoted = re.findall(r'^(\w+) +("\w+_kernel .*\])$', PAGES["kernels.md"], re.MULTILINE)
    assert len(quoted) > 30
    for architecture, line in quoted:
        recorded = (ROOT / f"tests/aot/expected/{architecture}.json").read_text()
        assert line in recorded.replace(",\n", "\n").splitlines()


def test_the_choices_lie_where_the_page_says(monkeypatch, tmp_path):
    from resnet_fast.kernels.triton.tuning import planner

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RESNET_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert f"~/{planner.choices.path().relative_to(tmp_path)}" in PAGES["gpu.md"]
