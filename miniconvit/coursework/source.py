"""What a student's file is, told without running it: its text, imports, names, and functions.

This file is run by itself, in a limited process: a legal text can cost gigabytes to parse.
"""

import ast
import codecs
import io
import json
import os
import re
import struct
import symtable
import sys
import tokenize
from contextlib import suppress
from copy import copy

WHITELIST = (
    *("numpy", "math", "kit", "functools", "itertools", "operator", "dataclasses", "typing"),
    *("collections", "__future__"),
)
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__", "open", "breakpoint", "input"}
HARMLESS = {"__init__", "__name__", "__doc__", "__call__", "__len__"}
MARKS = {  # the longer ones first: UTF-32 begins like UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CODING_LINE = re.compile(r"\A((?:.*(?:\r\n|\r|\n))?[ \t\f]*#.*?coding[:=][ \t]*)[-\w.]+")


class Unreadable(Exception):
    """The bytes are no text; the sentence says why."""


def describe_source(data):
    """{"text", "runs", "remark", "problem", "functions"} of a file's bytes.

    runs: the text without what never runs here, of which remark speaks. problem: why it is not run,
    or "". functions: name to whether it is blank, those of classes as Class.name; None where the
    text cannot be parsed.
    """
    text, runs, remark, functions = "", "", "", None
    try:
        text = decode(data)
        tree = ast.parse(text)
        functions = functions_of(tree)
        runs, unused = without_unused_imports(without_main(text, tree))
        remark = "; ".join(unused)
        problem = source_problem(runs)
    except Unreadable as error:
        problem = str(error)
    except SyntaxError as error:
        problem = f"is no valid Python: {error.msg} in line {error.lineno}"
    except (ValueError, RecursionError) as error:
        problem = f"is no valid Python: {error}"
    except MemoryError:
        problem = "is no valid Python: it takes too much memory to be read"
    return {
        "text": text,
        "runs": runs,
        "remark": remark,
        "problem": problem,
        "functions": functions,
    }


def decode(data):
    """The text of a file, in the coding that its first bytes or lines name, UTF-8 otherwise.

    A coding line then says UTF-8, which is what the text is saved in. Raises Unreadable.
    """
    coding = next((MARKS[mark] for mark in MARKS if data.startswith(mark)), None)
    try:
        if coding is None:
            coding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(coding)
    except SyntaxError as error:
        reason = f"is no UTF-8 text and names no coding that Python knows ({error})"
        raise Unreadable(f"{reason}: save it as UTF-8") from error
    except LookupError as error:
        raise Unreadable(f"names a coding that is none for text: {error}") from error
    except UnicodeError as error:
        name = coding.removesuffix("-sig").upper()
        raise Unreadable(f"is no {name} text: {error}: save it as UTF-8") from error
    if "\0" in text:
        raise Unreadable("holds zero bytes, as UTF-16 without its mark does: save it as UTF-8")
    return CODING_LINE.sub(r"\1utf-8", text)


def functions_of(tree):
    """{name: whether it is blank} of the functions and of the methods of classes."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = is_blank(node)
        elif isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": is_blank(method) for method in methods}
    return found


def is_blank(function):
    """Whether nothing is written in it, or it still ends with the blank's own line."""
    last = function.body[-1]
    if isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last):
        return True
    return all(
        isinstance(node, ast.Pass)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Return) and ast.unparse(node) in ("return", "return None"))
        for node in function.body
    )


def without_main(text, tree):
    """The text without what stands below `if __name__ == "__main__":`, which never runs here."""
    lines = re.split(r"\r\n|\r|\n", text)
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            last = node.body[-1].end_lineno
            lines[node.lineno - 1 : last] = ["if 0: pass"] + [""] * (last - node.lineno)
    return "\n".join(lines)


def without_unused_imports(text):
    """(the text, sentences): imports beyond the white list that nothing uses are left out, as if
    they had not been written, so they can do nothing. Lines keep their numbers."""
    tree, remarks, lines = ast.parse(text), [], text.encode().split(b"\n")
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        kept = [alias for alias in node.names if not _is_idle(node, alias, names)]
        if len(kept) == len(node.names):
            continue
        idle = _modules(node, [alias for alias in node.names if alias not in kept])
        modules = ", ".join(dict.fromkeys(idle))
        remarks.append(f"{modules} in line {node.lineno} is imported but not used, and left out")
        new = copy(node)
        new.names = kept
        first, last = node.lineno - 1, node.end_lineno - 1
        rest = lines[last][node.end_col_offset :]
        head = lines[first][: node.col_offset] + (ast.unparse(new) if kept else "pass").encode()
        lines[first : last + 1] = [head + rest] + [b""] * (last - first)
    return b"\n".join(lines).decode(), remarks[::-1]


def _is_idle(node, alias, names):
    """Whether an import is of no listed module, and binds a name that is not among those used."""
    name = alias.asname or alias.name.partition(".")[0]
    (module,) = _modules(node, [alias])
    return not _is_listed(module) and name not in (*names, "*")


def _modules(node, aliases):
    """The modules that an import statement names, once for each alias."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in aliases]
    return ["." * node.level + (node.module or "")] * len(aliases)


def _is_listed(module):
    return module.partition(".")[0] in WHITELIST


def source_problem(text):
    """Why a text is not run, or "": imports beyond the white list, names that open doors.

    A help for the honest, no wall: what holds is the process that the text runs in.
    """
    builtins = builtins_used(symtable.symtable(text, "text", "exec"))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in _modules(node, node.names):
                if not _is_listed(module):
                    return (
                        f"imports {module} in line {node.lineno}: allowed are "
                        f"{', '.join(WHITELIST)}; other exercises come through kit"
                    )
        name = getattr(node, "id", None) or getattr(node, "attr", None) or ""
        is_special = name.startswith("__") and name.endswith("__") and name not in HARMLESS
        is_door = isinstance(node, ast.Attribute) and is_special
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            is_door = any(first <= node.lineno for first in builtins.get(name, ()))
        if is_door:
            return f"uses {name} in line {node.lineno}, which no exercise needs"
    return ""


def builtins_used(module):
    """{name: first lines of the scopes that read it} of forbidden builtins, as builtins.

    A variable, argument or function of such a name is the student's own, and costs nothing.
    """
    own = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    found, queue = {}, [module]
    while queue:
        scope = queue.pop()
        queue += scope.get_children()
        for symbol in scope.get_symbols():
            name = symbol.get_name()
            is_outer = symbol.is_global() or scope is module
            if name in FORBIDDEN_BUILTINS - own and symbol.is_referenced() and is_outer:
                found.setdefault(name, []).append(scope.get_lineno())
    return found


def main(limits):
    """Describes texts from standard input, a line of JSON for each as soon as it is known."""
    texts = []
    while size := sys.stdin.buffer.read(4):
        texts.append(sys.stdin.buffer.read(*struct.unpack("<I", size)))
        # While the standard library can still be read, as nobody may not
        with suppress(SyntaxError):
            tokenize.detect_encoding(io.BytesIO(texts[-1]).readline)
    for coding in ("utf-8-sig", *MARKS.values()):
        codecs.lookup(coding)
    confine(*limits)
    for text in texts:
        print(json.dumps(describe_source(text)), flush=True)


if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from confine import confine

    main(map(int, sys.argv[1:5]))
