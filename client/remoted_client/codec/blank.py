"""Takes the literal values of ``env=`` out of source text before it travels (F16): the daemon keeps texts of code.

Lines stay where they are. What is not written as a literal in the call (an f-string, a dict that a module keeps under
a name and uses elsewhere too) stays in the text of a module: there the text must go on meaning what it means.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator

from remoted_client import context

#: Texts without one are not parsed.
_KEYWORD = re.compile(r"\benv\s*=")
#: In a text that runs in the worker, ``env=`` of anybody else means something else.
_OURS = frozenset({
    "remote", "PodTemplate", "ResourceConfig", "LiveServerless", "CpuLiveServerless", "ServerlessEndpoint", "CpuServerlessEndpoint",
    "LiveLoadBalancer", "CpuLiveLoadBalancer", "LoadBalancerSlsResource", "CpuLoadBalancerSlsResource",
})  # fmt: skip
_LOOK_UP = "__import__('remoted_client.context',fromlist='_').value_of({!r})"


@functools.lru_cache(maxsize=64)
def shown(text: str) -> str:
    """For a text that is only shown (tracebacks, compilers that read a function): ``None`` for each value."""
    tree = _parsed(text)
    if tree is None:
        return text
    found = [value for written in _environments(tree, None) for value in _values(written) if _holds_text(value)]
    return _replaced(text, found, lambda _: "None")


def runnable(name: str, text: str) -> str:
    """For the text of a module, which runs in the worker: a value is looked up in what comes with the call."""
    tree = _parsed(text)
    if tree is None:
        return text
    aliases = _OURS | {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname and alias.name in _OURS}
    found = [leaf for written in _environments(tree, aliases) for value in _values(written) for leaf in _leaves(value)]

    def replacement(leaf: ast.expr) -> str:
        place = f"{name}:{leaf.lineno}:{leaf.col_offset}"
        context.values[place] = str(ast.literal_eval(leaf))
        return _LOOK_UP.format(place)

    return _replaced(text, found, replacement)


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text) if _KEYWORD.search(text) else None
    except (SyntaxError, ValueError, RecursionError):  # it is not what runs here
        return None


def _environments(tree: ast.Module, callees: frozenset[str] | None) -> Iterator[ast.expr]:
    """The expressions after ``env=`` in calls of these; of everybody (None), and then what the names in them are too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (callees is None or _called(node) in callees):
            for keyword in node.keywords:
                if keyword.arg == "env":
                    yield keyword.value
                    names |= {each.id for each in ast.walk(keyword.value) if isinstance(each, ast.Name)}
    for node in ast.walk(tree) if callees is None else ():
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and any(isinstance(target, ast.Name) and target.id in names for target in targets):
            yield node.value


def _called(node: ast.Call) -> str:
    function = node.func
    return function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""


def _values(written: ast.expr) -> Iterator[ast.expr]:
    """Of a dict, of ``dict(...)``, of a list of pairs with ``key`` and ``value``; or a plain text itself."""
    if isinstance(written, (ast.Constant, ast.JoinedStr)):
        yield written
    for node in ast.walk(written):
        if isinstance(node, ast.Dict):
            names = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            is_pair = set(names) == {"key", "value"}
            yield from (value for name, value in zip(names, node.values, strict=True) if not is_pair or name == "value")
        elif isinstance(node, ast.Call) and _called(node) == "dict":
            yield from (keyword.value for keyword in node.keywords)


def _holds_text(value: ast.expr) -> bool:
    """A value that is looked up (``os.environ["KEY"]``, a name) holds none of its own."""
    if isinstance(value, (ast.Dict, ast.List, ast.Subscript, ast.Name, ast.Attribute)):
        return False
    return any(_is_text(node) for node in ast.walk(value))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(node.value)


def _leaves(value: ast.expr) -> Iterator[ast.expr]:
    """The literals that a value is put together from."""
    if _is_text(value):
        yield value
    elif isinstance(value, (ast.BinOp, ast.BoolOp, ast.IfExp)):
        for part in ast.iter_child_nodes(value):
            if isinstance(part, ast.expr):
                yield from _leaves(part)


def _replaced(text: str, values: list[ast.expr], replacement: Callable[[ast.expr], str]) -> str:
    """From the last to the first, so that places stay right; columns count UTF-8 bytes."""
    lines = text.encode("utf-8", "surrogatepass").splitlines(keepends=True)
    for value in reversed(_outermost(values)):
        assert value.end_lineno is not None
        assert value.end_col_offset is not None
        first, last = value.lineno - 1, value.end_lineno - 1
        new = replacement(value).encode()
        start, tail = lines[first][: value.col_offset], lines[last][value.end_col_offset :]
        if first == last:
            lines[first] = start + new.ljust(value.end_col_offset - value.col_offset) + tail
        else:
            lines[first : last + 1] = [start + new + b"\n", *[b"\n"] * (last - first - 1), tail]
    return b"".join(lines).decode("utf-8", "surrogatepass")


def _outermost(values: list[ast.expr]) -> list[ast.expr]:
    """Without what lies inside another, or is there twice."""
    kept: list[ast.expr] = []
    for value in sorted(values, key=lambda value: (value.lineno, value.col_offset, -(value.end_lineno or 0), -(value.end_col_offset or 0))):
        if not kept or (value.lineno, value.col_offset) >= (kept[-1].end_lineno, kept[-1].end_col_offset):
            kept.append(value)
    return kept
