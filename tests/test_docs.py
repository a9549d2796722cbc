"""The README and the pages of docs/: code blocks run, links lead somewhere, commands name what exists."""

import configparser
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# What a person types into a shell or reads on a screen. Blocks of shell code are in two pages: the README's two set-up
# commands, of which test_quickstart runs the script of the one and the other runs these tests; and those of the page on
# serving, which test_serving_scripts runs.
OUTPUT = {"text", "console"}
WITH_SHELL = {README, ROOT / "docs" / "serving.md"}


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


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_blocks_of_a_page_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for language, line, code in blocks(page):
        if language == "python":
            # Newlines in front make line numbers in errors those of the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


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
