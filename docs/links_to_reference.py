"""An extension of Python-Markdown: public names of farhox that stand in a text as code are links to the reference.

The documentation site is built with it, see `mkdocs.yml`. It reads the names from the package without importing it.
"""

import ast
import pathlib
from xml.etree import ElementTree

import markdown

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "farhox"
# Names that Keras has too: on their own they may mean either. So do those of self-tuning layers, `Dropout` for example:
# they are linked as `stn.Dropout`.
KERAS_HAS_THEM = {"Adam", "L1L2"}
# What is a link or a heading already, or a block of code, stays as it is.
KEPT = {"a", "autoref", "pre", "h1", "h2", "h3", "h4", "h5", "h6"}


def declared(module):
    """The names in `__all__` of a module's file."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__")


def public_names():
    """What may stand in a text for a public name -> the name that its entry has in the reference."""
    entries, rooms = {}, {}
    for name in declared(PACKAGE / "__init__.py"):
        files = [file for file in (PACKAGE / name / "__init__.py", PACKAGE / f"{name}.py") if file.exists()]
        if files:
            rooms[name] = files[0]
        else:
            entries[name] = entries[f"farhox.{name}"] = f"farhox.{name}"
    for room, file in rooms.items():
        for name in declared(file):
            entry = entries.get(f"farhox.{name}", f"farhox.{room}.{name}")
            entries[f"farhox.{room}.{name}"] = entries[f"{room}.{name}"] = entry
            if room != "stn":
                entries.setdefault(name, entry)
    # A word on its own, such as `repeat`, may mean anything.
    return {name: entry for name, entry in entries.items()
            if name not in KERAS_HAS_THEM and not (name.isalpha() and name.islower())}


class LinkNames(markdown.treeprocessors.Treeprocessor):
    """Wraps `code` elements into `autoref` elements, which the generator makes links."""

    def __init__(self, md, names):
        super().__init__(md)
        self.names = names

    def run(self, root):
        for position, element in enumerate(root):
            entry = self.names.get((element.text or "").removesuffix("()")) if element.tag == "code" else None
            if entry is not None:
                link = ElementTree.Element("autoref", {"identifier": entry, "optional": ""})
                link.tail, element.tail = element.tail, None
                root[position] = link
                link.append(element)
            elif element.tag not in KEPT:
                self.run(element)


class LinksToReference(markdown.Extension):
    """What `mkdocs.yml` names."""

    def extendMarkdown(self, md):
        # After the inline patterns (20), which make the elements, and before headings are read (5).
        md.treeprocessors.register(LinkNames(md, public_names()), "links_to_reference", 15)
