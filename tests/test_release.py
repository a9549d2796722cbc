"""What a release hands out: version, metadata, extras, and a README that can be read elsewhere."""

import ast
import configparser
import importlib.util
import pathlib
import re
import sys

import pytest

import farhox
from farhox.tuner import report

ROOT = pathlib.Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/farhox/farhox"
PLACES = (f"{REPOSITORY}/blob/main/", "https://raw.githubusercontent.com/farhox/farhox/main/")
# The names that packages are imported by, where they are other than those that they are installed by.
INSTALLED_BY = {"sklearn": "scikit-learn", "tensorflow_datasets": "tensorflow-datasets",
                "tensorflow_serving": "tensorflow-serving-api"}


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def extras(settings):
    return {name: set(packages.strip().splitlines()) for name, packages in settings["options.extras_require"].items()}


def test_the_changelog_begins_with_this_version_or_with_what_is_not_released():
    sections = re.findall(r"^## (.*)$", (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8"), flags=re.M)
    assert sections[0] == farhox.__version__ or sections[:2] == ["Unreleased", farhox.__version__]


def test_links_and_pictures_of_the_readme_are_absolute_and_lead_to_files_of_the_repository():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    places = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, flags=re.M))
    assert set(re.findall(r"\]\[([^\]]+)\]", text)) == set(places)
    targets += places.values()
    assert len(targets) > 10 and [target for target in targets if not target.startswith("https://")] == []
    own = [target for target in targets if "farhox/farhox" in target and target != REPOSITORY]
    assert [target for target in own if not target.startswith(PLACES)] == []
    paths = [re.sub("|".join(PLACES), "", target).split("#")[0] for target in own]
    assert paths and [path for path in paths if not (ROOT / path).is_file()] == []
    # A page is shown, a picture is fetched.
    assert [target for target in own if target.startswith(PLACES[1]) != target.endswith(".png")] == []


def test_the_project_names_its_places_author_and_licence(settings):
    metadata = settings["metadata"]
    assert metadata["url"] == REPOSITORY and metadata["author"] and metadata["license_expression"] == "Apache-2.0"
    urls = [line.split(" = ")[1] for line in metadata["project_urls"].strip().splitlines()]
    files = [url.removeprefix(PLACES[0]) for url in urls if url.startswith(PLACES[0])]
    assert len(files) >= 2 and all((ROOT / file).is_file() for file in files)
    assert all(url.startswith(REPOSITORY) for url in urls)
    assert settings["options.package_data"]["farhox"] == "py.typed"


def optional_imports():
    """(package, file) of what functions of farhox import when they are called, and is not of Python or required."""
    # Of google protobuf alone, which TensorFlow brings.
    known = {"farhox", "tensorflow", "keras", "numpy", "google", *sys.stdlib_module_names}
    for file in sorted((ROOT / "farhox").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) else [])
            yield from {(INSTALLED_BY.get(name, name), file) for name in (name.split(".")[0] for name in names)
                        if name not in known}


def test_what_a_function_needs_beyond_the_requirements_is_in_the_extra_that_its_error_names(extras):
    found = set(optional_imports())
    assert {"matplotlib", "tensorflow-datasets", "tensorflow-serving-api"} <= {package for package, _ in found}
    for package, file in found:
        named = re.findall(r"pip install 'farhox\[(\w+)\]'", file.read_text(encoding="utf-8"))
        assert [extra for extra in named if package in extras[extra]], (package, file)


def test_every_extra_that_an_error_or_a_page_names_exists(extras):
    files = [ROOT / "README.md", ROOT / "RELEASE.md", ROOT / ".ci" / "run"]
    for folder in ("farhox", "scripts", "docs"):
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".md")]
    named = {extra for file in files
             for names in re.findall(r"""(?:farhox|["'. ]\.)\[([a-z,]+)\]["']""", file.read_text(encoding="utf-8"))
             for extra in names.split(",")}
    assert named >= {"plots", "tensorboard", "omniglot", "serving", "test", "docs"}
    assert named - set(extras) == set()


def test_errors_about_a_missing_package_name_an_extra():
    for file in (ROOT / "farhox").rglob("*.py"):
        for command in re.findall(r"pip install ([^\s\"]+)", file.read_text(encoding="utf-8")):
            assert re.fullmatch(r"'farhox\[\w+\]'", command), (file, command)


def test_a_picture_of_a_tuned_run_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ImportError, match=r"plot needs the package matplotlib.*pip install 'farhox\[plots\]'"):
        report.plot([], [], None, tmp_path / "tuning.png")


def test_the_tests_have_all_that_single_functions_and_scripts_need(extras):
    needed = set().union(*(extras[name] for name in ("plots", "tensorboard", "omniglot", "examples", "search")))
    assert needed - extras["test"] == set()


def test_tensorflow_datasets_comes_with_what_it_forgets_to_install(extras):
    assert [name for name, packages in extras.items()
            if "tensorflow-datasets" in packages and "importlib_resources" not in packages] == []
