"""What the READMEs and the examples tell people to type: Python snippets, and every command line."""

import ast
import re
import shlex
from pathlib import Path

import typer

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
READMES = [README, *sorted(ROOT.glob("grip_hf/*/README.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PROGRAMS = ("grip-hf", "python", "torchrun", "accelerate", "pip", "pytest")


def everything():
    """The text of all READMEs."""
    return "\n".join(path.read_text(encoding="utf-8") for path in READMES)


def fenced(language, text=None):
    """The blocks of one language, in order; of all READMEs if no text is given."""
    text = everything() if text is None else text
    return [body for found, body in FENCED.findall(text) if found == language]


def commands(text=None):
    """Every command line as a list of words: those of bash blocks, and those within sentences that have options."""
    text = everything() if text is None else text
    lines = [line for body in fenced("bash", text) for line in body.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in INLINE.findall(FENCED.sub("", text))]
    lines += [span for span in spans if span.startswith(PROGRAMS) and " -" in span]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [each for each in words if each]


def commands_of_examples():
    """The command lines in the docstrings of the examples."""
    texts = [ast.get_docstring(ast.parse(path.read_text())) for path in sorted((ROOT / "examples").glob("*.py"))]
    command = re.compile(rf"(?:\w+=\S+ )*\b(?:{'|'.join(PROGRAMS)}) .*")
    lines = [line for text in texts for line in command.findall(text.replace("\\\n", " "))]
    return [shlex.split(line, comments=True) for line in lines]


def code_of(path):
    """A script without its docstring, which may speak of anything."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return "\n".join(ast.unparse(part) for part in tree.body[1:])


def without_settings(words):
    """A command without the `NAME=value` before it."""
    return words[next(i for i, word in enumerate(words) if not re.fullmatch(r"\w+=.*", word)) :]


def module_and_arguments(words):
    """The module that `python -m` or `torchrun ... -m` starts, and its arguments; (None, []) if none is started."""
    if "-m" not in words:
        return None, []
    place = words.index("-m")
    return words[place + 1], words[place + 2 :]


def parse(app, words):
    """Let typer read the arguments of a command without running it, and raise what a person would see; the context."""
    command = app if not isinstance(app, typer.Typer) else typer.main.get_command(app)
    context = command.make_context("grip-hf", list(words))
    if hasattr(command, "resolve_command"):
        name, chosen, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = chosen.make_context(name, rest, parent=context)
    return context
