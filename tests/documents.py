"""What the tests of the documents share: their commands, links, anchors, and the files that they name."""

import importlib
import re
import shlex

COMMAND = re.compile(r"(?:python|torchrun [^`\n]*?) (\w+)\.py([^`\n#]*)")
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
FILE = re.compile(r"(?<![\w./-])[\w./-]*\w(?:\.(?:py|md|txt|cff|toml|png|gif)\b|/(?!\w))")
MADE_BY_RUNS = ("outputs/", "images.", "nearest.png", "previous/", "data/", "evaluation.")  # not in the repository


def commands(text):
    """{(script, arguments)} of every command in a document, in code blocks and in backticks."""
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda quoted: quoted[0].replace("\n", " "), text.replace("\\\n", " "))
    return {(name, arguments.strip()) for name, arguments in COMMAND.findall(text)}


def parse(name, arguments):
    importlib.import_module(name).parse_args(shlex.split(arguments.replace("...", "outputs/model_final.pt")
                                                         .replace("NAME", "mnist")))


def links(text):
    """The targets of every link and picture in a document."""
    return [link or picture for link, picture in LINK.findall(text)]


def anchors(text):
    """The names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(root, name):
    """The links of a document that lead nowhere; those into the network are not followed."""
    broken = []
    for target in links((root / name).read_text()):
        path, _, anchor = target.partition("#")
        file = (root / name).parent / path if path else root / name
        if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file.read_text()))):
            broken.append(target)
    return broken


def missing_files(root, text):
    """The files and folders that a text names and the repository has not got, looked for as git shows them."""
    return [name for name in FILE.findall(text)
            if not name.startswith(MADE_BY_RUNS) and not any((root / folder / name).exists() for folder in
                                                             (".", "benchmarks", "models"))]
