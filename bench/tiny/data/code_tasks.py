"""Programming tasks over functions of a file, whose answers come from the file.

A task is a function (rng, function, neighbours) -> Turn or None where the function does not lend itself to it.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable, Sequence

from softprune.bench.tiny.data.chat_tasks import Turn
from softprune.bench.tiny.data.functions import Function, is_free

Task = Callable[[random.Random, Function, Sequence[Function]], Turn | None]
_NEW_NAMES = (
    "value",
    "item",
    "entry",
    "result",
    "current",
    "data",
    "element",
    "record",
    "chosen",
    "index_value",
    "left_side",
    "temp",
    "thing",
)


def fenced(code: str) -> str:
    """Code as Markdown shows it."""
    return f"```python\n{code}\n```"


def _context(function: Function, neighbours: Sequence[Function]) -> str:
    """Where the function stands, and another one of the file."""
    where = f"File {function.document.title}" + (f", class {function.owner}" if function.owner else "")
    other = next((one for one in neighbours if one is not function and one.owner == function.owner and len(one.bare) < 700), None)
    return f"{where}. Another function there:\n{fenced(other.bare)}\n" if other else f"{where}.\n"


def write_function(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """The body for a signature and docstring."""
    if not function.docstring or len(function.body) > 700:
        return None
    ask = rng.choice(("Write this function.", "Implement the function.", "Complete the body."))
    thought = f"I write {function.name}({', '.join(function.parameters)})."
    return Turn(
        f"{_context(function, neighbours)}{ask}\n{fenced(function.signature + chr(10) + function.docstring)}",
        thought,
        fenced(function.code),
    )


def complete_function(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """The second half of a body."""
    lines = function.body.split("\n")
    if len(lines) < 6:
        return None
    at = rng.randint(len(lines) // 3, len(lines) - 2)
    begun = f"{function.signature}\n" + "\n".join(lines[:at])
    thought = f"{function.name} goes on after {lines[at - 1].strip()!r}."
    return Turn(f"{_context(function, neighbours)}Complete it.\n{fenced(begun)}", thought, fenced("\n".join(lines[at:])))


def missing_line(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """One line taken out, and the function with it."""
    lines = function.body.split("\n")
    places = [index for index, line in enumerate(lines[1:], 1) if len(line.strip()) > 10 and not line.strip().startswith("#")]
    if not places:
        return None
    at = rng.choice(places)
    indent = len(lines[at]) - len(lines[at].lstrip())
    gapped = function.signature + "\n" + "\n".join([*lines[:at], " " * indent + "# TODO", *lines[at + 1 :]])
    return Turn(f"Replace the TODO.\n{fenced(gapped)}", f"The missing line: {lines[at].strip()}", fenced(function.bare))


def rename(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """A local variable renamed throughout."""
    old_names = [name for name in function.locals if not re.search(rf"['\"#][^\n]*\b{name}\b", function.bare)]
    free = [name for name in _NEW_NAMES if is_free(name, function.bare)]
    if not old_names or not free:
        return None
    old, new = rng.choice(old_names), rng.choice(free)
    count = len(re.findall(rf"\b{old}\b", function.bare))
    ask = rng.choice(("Rename {} to {}.", "Rename the variable {} to {} throughout.", "Use another name: {} becomes {}."))
    return Turn(
        f"{ask.format(old, new)}\n{fenced(function.bare)}",
        f"{old} occurs {count} times.",
        fenced(re.sub(rf"\b{old}\b", new, function.bare)),
    )


def rename_function(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn:
    """The function itself renamed."""
    other = rng.choice([one.name for one in neighbours if one.name != function.name] or ["helper"])
    new = f"{rng.choice(('do', 'new', 'my', 'safe', 'fast'))}_{other.strip('_')}"
    ask = rng.choice(("Call this function {}.", "Rename the function to {}."))
    return Turn(
        f"{ask.format(new)}\n{fenced(function.bare)}",
        f"{function.name} becomes {new}.",
        fenced(re.sub(rf"\b{function.name}\b", new, function.bare)),
    )


def add_docstring(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """The docstring that the file has, put into the function."""
    if not function.docstring or len(function.docstring) > 300:
        return None
    ask = rng.choice(("Add a docstring.", "Document this function."))
    return Turn(
        f"{_context(function, neighbours)}{ask}\n{fenced(function.bare)}",
        f"{function.name} takes {', '.join(function.parameters) or 'nothing'}.",
        fenced(function.code),
    )


def given_docstring(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """A docstring that the user words, put into the right place."""
    if not function.summary or len(function.summary) > 200 or '"' in function.summary or "\\" in function.summary:
        return None
    indent = re.match(r" *", function.body.lstrip("\n"))
    line = f'{indent[0] if indent else "    "}"""{function.summary}"""'
    return Turn(
        f"Add the docstring: {function.summary}\n{fenced(function.bare)}",
        "It goes after the signature.",
        fenced(f"{function.signature}\n{line}\n{function.body}"),
    )


def remove_docstring(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """The docstring taken out."""
    if not function.docstring or len(function.docstring) > 400:
        return None
    return Turn(
        f"{rng.choice(('Remove the docstring.', 'Drop the docstring.'))}\n{fenced(function.code)}",
        "I keep signature and body.",
        fenced(function.bare),
    )


def find_function(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """The one of several functions that a description fits."""
    if not function.summary or len(function.bare) > 600:
        return None
    others = [one for one in neighbours if one.name != function.name and len(one.bare) < 600][:2]
    if not others:
        return None
    shown = [function, *others]
    rng.shuffle(shown)
    listed = "\n\n".join(one.bare for one in shown)
    return Turn(
        f"Which function does this: {function.summary}\n{fenced(listed)}",
        f"The functions are {', '.join(one.name for one in shown)}. It is {function.name}.",
        fenced(function.bare),
    )


def extract_function(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """One of several functions by its name."""
    others = [one for one in neighbours if one.name != function.name and len(one.bare) < 600][:2]
    if not others or len(function.bare) > 700:
        return None
    shown = [function, *others]
    rng.shuffle(shown)
    listed = "\n\n".join(one.bare for one in shown)
    return Turn(
        f"Show me only {function.name}.\n{fenced(listed)}", f"{function.name} is number {shown.index(function) + 1}.", fenced(function.bare)
    )


def explain(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn:
    """What the parser sees: parameters, calls, returned expressions, exceptions."""
    returned = [ast.unparse(node.value) for node in ast.walk(function.tree) if isinstance(node, ast.Return) and node.value is not None]
    raised = [
        ast.unparse(node.exc).split("(")[0] for node in ast.walk(function.tree) if isinstance(node, ast.Raise) and node.exc is not None
    ]
    loops = sum(isinstance(node, ast.For | ast.While) for node in ast.walk(function.tree))
    kind = "method" if function.owner else "function"
    lines = [f"`{function.name}` is a {kind} that takes {', '.join(function.parameters) or 'nothing'}."]
    lines += [f"It calls {', '.join(function.calls[:8])}."] if function.calls else ["It calls nothing."]
    lines += [f"It loops {'once' if loops == 1 else f'{loops} times'}."] if loops else []
    lines += [f"It raises {', '.join(dict.fromkeys(raised))}."] if raised else []
    lines += (
        [f"It returns {' or '.join(f'`{text}`' for text in dict.fromkeys(returned) if len(text) < 80)}."]
        if any(len(text) < 80 for text in returned)
        else ["It returns nothing."]
    )
    ask = rng.choice(("Explain this function.", "What does this code do?", "Describe the function."))
    return Turn(f"{ask}\n{fenced(function.bare)}", f"I go through {function.name}.", "\n".join(lines))


def list_names(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """Parameters or calls as JSON."""
    ask, found = rng.choice((("List the parameters as JSON.", function.parameters), ("List what it calls as JSON.", function.calls)))
    return Turn(f"{ask}\n{fenced(function.bare)}", f"{len(found)} names.", json.dumps(found)) if found else None


def fix_bug(rng: random.Random, function: Function, neighbours: Sequence[Function]) -> Turn | None:
    """One line spoilt, found and put right."""
    lines = function.body.split("\n")
    spoilt = [(index, line, new) for index, line in enumerate(lines) for new in [_spoil(rng, line)] if new != line]
    if not spoilt:
        return None
    index, line, new = rng.choice(spoilt)
    broken = function.signature + "\n" + "\n".join([*lines[:index], new, *lines[index + 1 :]])
    ask = rng.choice(("Fix the syntax error.", "This does not run. Repair it.", "Find the mistake."))
    return Turn(f"{ask}\n{fenced(broken)}", f"Wrong: {new.strip()}\nRight: {line.strip()}", fenced(function.bare))


def _spoil(rng: random.Random, line: str) -> str:
    """A change to the line that Python's grammar does not allow."""
    if re.search(r"^\s*(if|for|while|else|try|with|elif)\b.*:$", line):
        return line[:-1]
    if line.endswith(")") and line.count("(") == line.count(")") and "#" not in line:
        return line[:-1]
    return re.sub(r"^(\s*)return\b", r"\1retrun", line) if re.match(r"\s*return \w", line) else line


TASKS: dict[Task, int] = {
    write_function: 14, complete_function: 12, missing_line: 10, rename: 14, rename_function: 7, add_docstring: 5, given_docstring: 7,
    remove_docstring: 6, find_function: 9, extract_function: 6, explain: 9, list_names: 4, fix_bug: 9,
}  # fmt: skip
"""Every task and how often it is set."""
