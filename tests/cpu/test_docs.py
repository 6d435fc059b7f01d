"""Every page names what is there: files, functions, links, commands, options, public names, figures of families."""

import ast
import functools
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import resnet_fast
from resnet_fast.cli.app import app
from resnet_fast.kernels.choices import Choices

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "benchmarks", "examples", ".github")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
}
MAPS = ("docs/architecture.md", "CONTRIBUTING.md")  # pages that say where things are
KERNELS = sorted(path.name for path in (ROOT / "kernels/triton").glob("*.py") if "@triton.jit" in path.read_text())
COMMANDS = typer.main.get_command(app).commands
EXAMPLE = "double"  # the op that a recipe adds

each_page = pytest.mark.parametrize("page", PAGES)
each_map = pytest.mark.parametrize("page", MAPS)


def _code_blocks(text: str, language: str) -> list[str]:
    """At the margin: those in lists are pieces of files."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


# --- links ------------------------------------------------------------------------------------------------------------


def _targets(text: str) -> set[str]:
    """GitHub makes the target of a heading: lower case, without punctuation, a hyphen for each space."""
    headings = re.findall(r"^#+ (.*)$", _prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links(page):
    """Files and folders, by their place relative to the page, and headings in them."""
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(PAGES[page])):
        name, _, heading = link.partition("#")
        if ":" in name:  # https://
            continue
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), link
        if heading:
            assert heading in _targets(target.read_text()), link


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\(([\w.]+\.md)\)", PAGES["docs/index.md"]))
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")}
    assert linked == pages - {"index.md"}


def test_the_readme_is_one_page():
    assert len(PAGES["README.md"].splitlines()) <= 130


# --- files and functions ----------------------------------------------------------------------------------------------


@each_page
def test_files_are_there(page):
    for name in re.findall(r"`([\w./]+\.py)`", PAGES[page]):
        assert EXAMPLE in name or (ROOT / name).is_file() or list(ROOT.glob(f"*/**/{name}")), name


def _places(page: str) -> list[tuple[str, str]]:
    """What is in code and looks like the path of a file or folder; with the name after its colon, or ''."""
    quoted = re.findall(r"`([\w./-]+)(?::([\w.]+))?`", _prose(PAGES[page]))
    return [(name, inside) for name, inside in quoted if "/" in name and EXAMPLE not in name]


def test_the_maps_name_places():
    """Or the next two tests would look at nothing."""
    assert all(len(_places(page)) > 20 for page in MAPS)
    assert sum(bool(inside) for page in MAPS for _, inside in _places(page)) > 40


@each_map
def test_places_are_there(page):
    missing = [name for name, _ in _places(page) if not (ROOT / name).exists()]
    assert not missing, missing


@each_map
def test_functions_are_there(page):
    """``file.py:function``, ``file.py:Class.method``, ``file.h:name``."""
    missing = [f"{name}:{inside}" for name, inside in _places(page) if inside and inside not in _defined(name)]
    assert not missing, missing


@functools.cache
def _defined(name: str) -> set[str]:
    """Functions and classes in a file, those within others with a dot between; in C++, all that may be one."""
    text = (ROOT / name).read_text() if (ROOT / name).is_file() else ""
    if not name.endswith(".py"):
        return set(re.findall(r"(\w+) ?[({<:]", text))

    def within(node: ast.AST, prefix: str) -> set[str]:
        found: set[str] = set()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found |= {prefix + child.name, *within(child, f"{prefix}{child.name}.")}
            else:
                found |= within(child, prefix)
        return found

    return within(ast.parse(text), "")


@each_page
def test_public_names_exist(page):
    for name in re.findall(r"resnet_fast\.(\w+)\(", PAGES[page]):
        assert name in resnet_fast.__all__, name


# --- commands and code ------------------------------------------------------------------------------------------------


@each_page
def test_commands_and_their_options_exist(page):
    """Those of ``resnet-fast``, and of ``make``."""
    quoted = re.findall(r"`([^`\n]+)`", PAGES[page]) + [
        line.partition("  #")[0] for block in _code_blocks(PAGES[page], "sh") for line in block.splitlines()
    ]
    for words in map(shlex.split, (one for one in quoted if one.startswith(("make ", "resnet-fast ")))):
        if words[0] == "make":
            assert words[1] in _make_targets(), words
        elif re.fullmatch("[a-z]+", words[1]):  # neither an option nor COMMAND
            options = {name for one in COMMANDS[words[1]].params for name in one.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= options, words


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_has_every_option(command):
    """But for those that all commands have, which it explains once, and the demo's, which is for a first look."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGES["docs/cli.md"], re.MULTILINE | re.DOTALL))
    common = {"--json", "--quiet", "--debug"}
    options = {param.opts[0] for param in COMMANDS[command].params if param.opts[0].startswith("--")} - common
    missing = {name for name in options if not re.search(rf"{name}\b(?!-)", sections[command])}
    assert not missing or command == "demo"
    assert re.search(rf"^resnet-fast {command}\b", sections[command], re.MULTILINE)


@functools.cache
def _make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_workflows_and_forms_are_sound():
    """They cannot run here, but they are YAML, and what they ask of ``make`` exists."""
    yaml = pytest.importorskip("yaml")
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    loaded = {path: yaml.safe_load(path.read_text()) for path in files}
    jobs = [job for content in loaded.values() for job in content.get("jobs", {}).values()]
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert {"make test", "make lint"} <= set(commands)
    assert {command.split()[1] for command in commands if command.startswith("make ")} <= _make_targets()
    assert loaded[ROOT / "CITATION.cff"]["version"] in PAGES["CHANGELOG.md"]


@each_page
def test_python_on_the_pages_is_python(page):
    for block in _code_blocks(PAGES[page], "python"):
        if page != "docs/kernels.md":  # which quotes lines out of their functions
            ast.parse(block)


def test_the_snippets_on_deployment_run(tmp_path, monkeypatch, capsys):
    """In order, in one session. What AOTInductor compiles takes long, and ``test_archives.py`` does it."""
    monkeypatch.chdir(tmp_path)
    session = {}
    for block in _code_blocks(PAGES["docs/deployment.md"], "python"):
        if "_inductor" not in block:
            exec(compile(block, "deployment.md", "exec"), session)
    assert {path.name for path in tmp_path.iterdir()} == {"resnet18.onnx", "fast.pt2"}
    assert session["names"] == list(session["model"].classes)
    assert session["logits"].shape == (5, 10)
    assert "ExecutionProvider: " in capsys.readouterr().out


# --- figures ----------------------------------------------------------------------------------------------------------


@functools.cache
def _recorded() -> list[list[dict]]:
    """Of each recorded workload in float32, the providers that were timed."""
    files = (ROOT / "benchmarks/results").glob("*.json")
    workloads = [one for file in files for one in json.loads(file.read_text()).get("workloads", ())]
    return [[one for one in work["providers"] if one["status"] == "ok"] for work in workloads if "providers" in work]


def _is(number: float, text: str) -> bool:
    """Whether a page says ``text`` of a number: rounded to as many places."""
    return f"{number:.{len(text.partition('.')[2])}f}" == text


def test_the_readme_quotes_recorded_figures():
    """Ours, the fastest peer's, and their ratio; but for the machine whose rounds are not recorded."""
    rows = [line for line in PAGES["README.md"].splitlines() if line.startswith("| ") and "Zen 3" not in line]
    quoted = [one for row in rows for one in re.findall(r"([\d.]+) / ([\d.]+): \**([\d.]+)", row)]
    assert len(quoted) == 8
    for ours, peer, ratio in quoted:
        found = [sorted((one["ratio"], one["median_ms"]) for one in providers)[:2] for providers in _recorded()]
        assert any(_is(a, ours) and _is(b, peer) and _is(r, ratio) for (_, a), (r, b) in found), (ours, peer, ratio)


@pytest.mark.parametrize(("page", "count"), [("docs/cpu.md", 28), ("docs/training.md", 8)])
def test_the_tables_quote_recorded_figures(page, count):
    """Milliseconds, and in brackets the ratio to ours."""
    rows = [line for line in PAGES[page].splitlines() if line.startswith("| ")]
    quoted = [one for row in rows for one in re.findall(r"([\d.]+) \((\d\.\d\d)\)", row)]
    assert len(quoted) == count
    timed = [one for providers in _recorded() for one in providers]
    for milliseconds, ratio in quoted:
        assert any(_is(one["median_ms"], milliseconds) and _is(one["ratio"], ratio) for one in timed), milliseconds


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", KERNELS)
def test_every_kernel_is_explained(file):
    """By a heading with its name."""
    assert any(file in line for line in PAGES["docs/kernels.md"].splitlines() if line.startswith("## "))


def test_quoted_lines_are_in_the_sources():
    """Every whole line of Python that the page on kernels quotes, but for what is left out as ``...``."""
    sources = "".join(path.read_text() for path in (ROOT / "kernels/triton").glob("*.py"))
    sources = re.sub(r"\s+", "", sources)
    blocks = _code_blocks(PAGES["docs/kernels.md"], "python")
    lines = [line for block in blocks if "import" not in block for line in block.splitlines()]
    quoted = [re.sub(r"\s+#.*", "", line) for line in lines]
    missing = [line for line in quoted if "..." not in line and re.sub(r"\s+", "", line) not in sources]
    assert not missing


def test_the_figures_of_kernels_are_those_recorded():
    quoted = re.findall(r'^(\w+) +("\w+_kernel .*\])$', PAGES["docs/kernels.md"], re.MULTILINE)
    assert len(quoted) > 30
    for architecture, line in quoted:
        recorded = (ROOT / f"tests/aot/expected/{architecture}.json").read_text()
        assert line in recorded.replace(",\n", "\n").splitlines()


@pytest.mark.parametrize(("file", "page"), [("gpu-choices.json", "docs/gpu.md"), ("cpu-choices.json", "docs/cpu.md")])
def test_the_choices_lie_where_the_pages_say(file, page, monkeypatch, tmp_path):
    assert any(f'Choices("{file}")' in path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RESNET_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert f"~/{Choices(file).path().relative_to(tmp_path)}" in PAGES[page]


# --- versions ---------------------------------------------------------------------------------------------------------


def test_versions():
    """The releases that the tests run on are those that the README names, from the oldest that is admitted."""
    files = [path.stem for path in (ROOT / "tests/versions").glob("*.txt")]
    *some, last = sorted(files, key=lambda version: [int(part) for part in version.split(".")])
    assert f"Tested with PyTorch {', '.join(some)} and {last};" in PAGES["README.md"]
    project = (ROOT / "pyproject.toml").read_text()
    major, minor = map(int, last.split("."))
    assert f'"torch>={some[0]},<{major}.{minor + 1}"' in project
    assert f"NEWEST := {last}\n" in (ROOT / "Makefile").read_text()
