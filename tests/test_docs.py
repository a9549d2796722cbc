"""The README and the pages of docs/: code blocks run, links lead somewhere, commands name what exists."""

import ast
import configparser
import importlib
import inspect
import pathlib
import re
import types

import pytest

import farhox

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# What a person types into a shell or reads on a screen. Blocks of shell code are in two pages: the README's two set-up
# commands, of which test_quickstart runs the script of the one and the other runs these tests; and those of the page on
# serving, which test_serving_scripts runs.
OUTPUT = {"text", "console"}
WITH_SHELL = {README, ROOT / "docs" / "serving.md"}


# Pages that the default run runs too, with few epochs. Of the others, which train for longer or trace many graphs, it
# checks the names and arguments; all are run whole among the slow tests.
QUICK = {"README", "data", "example_weights", "index"}
# What pages say of the names of their code, loosely: other machines and versions draw other numbers.
CLAIMS = {
    "wrong_labels": ["precision > 0.8", "recall > 0.7", "after > before + 0.02"],
    "fairness": ["gap_before > 0.12", "gap_after < gap_before - 0.08", "accuracy_after > accuracy_before - 0.05"],
    "data_mixture": ["path[-1][2] < 0.05", "after > before + 0.02"],
    "l2_per_weight": ["each_loss < one_loss - 0.05", "each_accuracy > one_accuracy + 0.02"],
    "lasso": ["all(kernel[:4] != 0)", "np.sum(kernel == 0) > 10", "history['outer_loss'][-1] < 1.05 * min(losses)"],
    "distillation": ["after > 0.8", "after > before + 0.05"],
    "few_shot": ["after > before + 0.04"],
    "imbalance": ["after > before + 0.08"],
    "augmentation": ["float(shift) > 0.08", "after > before + 0.1"],
    "physics": ["after < before / 3"],
    "image_folder": ["after > 0.85", "after > before + 0.02", "type(best).__module__.startswith('keras')"],
    "recipes": ["np.mean(answers == 1) > 0.5", "np.mean(wrong[suspects]) > 0.6", "history.epoch == [*range(8)]"],
}


def page_name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """The fenced blocks of a page: (language, line of the fence, code)."""
    found, language, start, lines = [], None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"```(\w*)\s*$", line)
        if fence and language is None:
            language, start, lines = fence[1], number, []
        elif fence:
            found.append((language, start, "\n".join(lines)))
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page_name(page)}:{start}: a block is not closed"
    return found


# What makes a block long and not another one: the default run takes at most this much of it.
AT_MOST = {"epochs": 2, "n_trials": 1, "steps_per_epoch": 3, "episodes": 5, "repeats": 1}


def shortened(code):
    """The block with few epochs, steps and episodes, and grids of three by three."""
    code = re.sub(rf"\b({'|'.join(AT_MOST)})=(\d+)", lambda found: (
        f"{found[1]}={min(int(found[2]), AT_MOST[found[1]])}"), code)
    return re.sub(r"(np.geomspace\([^,()]+, [^,()]+), \d+\)", r"\1, 3)", code)


def run(page, whole):
    """What the names of a page stand for when its blocks have run one after another."""
    namespace = {"__name__": "page"}
    for language, line, code in blocks(page):
        if language == "python" and (page != README or "\"photos\"" not in code):  # Run in test_tuner_responses.
            code = code if whole else shortened(code)
            # Newlines in front make line numbers in errors those of the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
    return namespace


WITH_CODE = [page for page in PAGES if any(language == "python" for language, _, _ in blocks(page))]


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page.stem in QUICK], ids=page_name)
def test_code_blocks_of_a_page_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, whole=False)


def imported(tree):
    """What the imports of a module make of names: modules, and what is taken from them."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                names[alias.asname or alias.name.split(".")[0]] = (
                    module if alias.asname else importlib.import_module(alias.name.split(".")[0]))
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    return names


def value_of(node, names):
    """What an expression a.b.c stands for where a is imported, else None."""
    if isinstance(node, ast.Attribute):
        before = value_of(node.value, names)
        return None if before is None or not isinstance(before, (types.ModuleType, type)) else getattr(
            before, node.attr)
    return names.get(node.id) if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("page", WITH_CODE, ids=page_name)
def test_code_of_a_page_imports_what_exists_and_calls_it_by_its_signature(page):
    code = "\n".join(code for language, _, code in blocks(page) if language == "python")
    tree = ast.parse(code)
    names = imported(tree)
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = {name: value for name, value in names.items() if name not in own}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value_of(node, names)
        elif isinstance(node, ast.Call):
            function = value_of(node.func, names)
            if getattr(function, "__module__", "").startswith("farhox") and not any(
                    isinstance(part, ast.Starred) for part in node.args):
                keywords = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
                inspect.signature(function).bind_partial(*node.args, **dict.fromkeys(keywords))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_a_page_says_of_its_code_comes_of_it(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(page, whole=True)
    assert [claim for claim in CLAIMS.get(page.stem, []) if not eval(claim, names)] == []
    if page.parent.name == "tutorials":
        shown = re.findall(r'<img src="([^"]+)"', page.read_text(encoding="utf-8"))
        assert [picture for picture in shown if (tmp_path / picture).read_bytes()[:4] != b"\x89PNG"] == []
        assert len(shown) == 1 or page.stem == "index"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_is_python_that_runs_or_is_marked_as_text(page):
    allowed = OUTPUT | {"python"} | ({"bash"} if page in WITH_SHELL else set())
    assert [(line, language) for language, line, _ in blocks(page) if language not in allowed] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_pictures_of_a_page_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if not re.match(r"https?:|#", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_has_its_place_in_the_order_of_the_site():
    order = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(order) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES if page != README)


def anchors(page):
    """What a link to a heading of a page may say after the #: that of GitHub and of the site."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_to_headings_of_a_page_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = [target.split("#") for target in re.findall(r"\]\(([^)\s]+#[^)\s]+)\)", text) if "://" not in target]
    assert [link for link in links if link[1] not in anchors(page.parent / link[0] if link[0] else page)] == []


def public_names():
    """The full name of every public name but the modules, and the object."""
    rooms = {f"farhox.{name}": getattr(farhox, name) for name in farhox.__all__
             if isinstance(getattr(farhox, name), types.ModuleType)}
    return {f"{path}.{name}": getattr(room, name) for path, room in {"farhox": farhox, **rooms}.items()
            for name in room.__all__ if not isinstance(getattr(room, name), types.ModuleType)}


def test_every_public_name_has_one_entry_in_the_reference():
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    entries = [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), flags=re.M)]
    assert len(entries) == len(set(entries))
    names = public_names()
    assert sorted(set(entries) - set(names)) == []
    described = [id(names[entry]) for entry in entries]
    # A name that has two paths is described under one of them.
    assert [name for name, value in names.items() if described.count(id(value)) != 1] == []


def test_public_names_in_code_become_links_and_nothing_else_does(monkeypatch):
    markdown = pytest.importorskip("markdown")
    monkeypatch.syspath_prepend(str(ROOT))
    html = markdown.markdown(
        "`Neumann`, `farhox.repeat()`, `repeat`, `stn.Dropout`, `Dropout`, `farhox.linear_solvers.GMRES`\n\n# `Box`\n",
        extensions=["docs.links_to_reference:LinksToReference"])
    assert re.findall(r'identifier="([\w.]+)"[^>]*><code>([^<]+)<', html) == [
        ("farhox.linear_solvers.Neumann", "Neumann"), ("farhox.repeat", "farhox.repeat()"),
        ("farhox.stn.Dropout", "stn.Dropout"), ("farhox.linear_solvers.GMRES", "farhox.linear_solvers.GMRES")]


def test_every_page_is_reached_from_the_index():
    index = ROOT / "docs" / "index.md"
    reached, waiting = set(), [index]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        waiting += [(page.parent / target).resolve()
                    for target in re.findall(r"\]\(([^)#\s]+\.md)\)", page.read_text(encoding="utf-8"))]
    assert [page_name(page) for page in PAGES if page != README and page not in reached] == []


def test_the_readme_has_two_set_up_commands_that_name_what_exists():
    shell = [code for language, _, code in blocks(README) if language == "bash"]
    assert len(shell) == 1
    comments, commands = shell[0].split("\n")[0::2], shell[0].split("\n")[1::2]
    assert comments == ["# Run the quickstart", "# Run the tests"] and len(commands) == 2
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    for command in commands:
        assert command.startswith("python3 -m venv .venv && ")
        extra = re.search(r'"\.\[(\w+)\]"', command)[1]
        assert extra in settings["options.extras_require"]
    script = re.search(r"scripts/\w+/\w+\.py", commands[0])[0]
    assert (ROOT / script).exists() and commands[1].endswith(" -m pytest -n 2 --dist worksteal")
