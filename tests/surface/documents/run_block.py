"""Runs one block of a document as a script, then asks it questions: ``run_block.py PRELUDE BLOCK QUESTIONS``.

The block may use ``await`` at its top level, as the document does. A name that it defines twice is kept:
``f__1`` is the first ``f``. The answers are the last line of the output, as JSON.
"""

import ast
import asyncio
import inspect
import json
import sys
from collections import Counter
from pathlib import Path


def statements(text: str, path: str) -> list[ast.stmt]:
    return compile(text, path, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT).body


def keeping_all(body: list[ast.stmt]) -> list[ast.stmt]:
    """After each definition of a name that is defined again later, another name for it."""
    kept: list[ast.stmt] = []
    seen: Counter[str] = Counter()
    for statement in body:
        kept.append(statement)
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            seen[statement.name] += 1
            alias = f"{statement.name}__{seen[statement.name]} = {statement.name}"
            kept += ast.parse(alias).body
    return kept


def run(body: list[ast.stmt], path: str) -> None:
    code = compile(ast.fix_missing_locations(ast.Module(body, [])), path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    made = eval(code, globals())
    if inspect.iscoroutine(made):
        asyncio.run(made)


run(statements(Path(sys.argv[1]).read_text(), sys.argv[1]), sys.argv[1])
block = keeping_all(statements(Path(sys.argv[2]).read_text(), sys.argv[2]))
answers__: list[object] = []
questions = "\n".join(f"answers__.append({question})" for question in json.loads(sys.argv[3]))
run(block + statements(questions, "questions"), sys.argv[2])
print(json.dumps(answers__, default=repr))
