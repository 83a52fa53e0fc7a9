"""What runs in a grading process: math-verify, or the scorers of reasoning-gym. See `grader.Grader`, which starts it.

Run as a script, ``python grader_process.py math SECONDS``, it imports neither torch nor this package. It takes pickled
requests ``(function, arguments)`` of its parent, and gives each a line of JSON. No timeout that Python raises as an
exception reaches an answer like 10^(10^10), which is one operation; so the system ends the whole process.
"""

import ast
import builtins
import contextlib
import faulthandler
import json
import logging
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

MEMORY = 4 * 2**30  # bytes of address space, where the system can limit it
PATIENCE = 6  # seconds on the clock for each of processor time
DECIMALS = 6  # to which math-verify compares numbers with a decimal point


def math_verifier() -> dict[str, Callable[..., Any]]:
    """Return the functions on math-verify; answers come as LaTeX, or as text in which it looks for one."""
    import sympy  # type: ignore[import-untyped]
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]
    from math_verify.grader import get_pct_val  # type: ignore[import-untyped]

    logging.disable()  # it warns that its own timeouts are off
    extraction = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    @lru_cache(maxsize=1024)
    def read(text: str) -> list[Any]:
        """Return the answer as sympy has it, if it can, then as it was written; nothing if there is none."""
        return parse(text, extraction, parsing_timeout=None)

    def is_right(expected: str, text: str) -> bool:
        gold = read(expected)
        return bool(verify(gold, read(text), float_rounding=decimals(gold), timeout_seconds=None))

    def decimals(gold: list[Any]) -> int:
        """Of a number so small that DECIMALS leave less than three digits of it, three count."""
        try:
            return max(DECIMALS, 2 - Decimal(str(sympy.N(gold[0], 3))).adjusted())
        except Exception:  # no number
            return DECIMALS

    def written(text: str) -> str | None:
        found = read(text)
        if not found:
            return None
        is_percentage = get_pct_val(found[0]) is not None and "%" not in found[-1]
        return f"{found[-1]}\\%" if is_percentage else str(found[-1])

    def same(one: str, other: str) -> bool:
        """Its verdict may depend on which of the two is the expected answer: both must hold."""
        return is_right(one, other) and is_right(other, one)

    return {"is_right": is_right, "written": written, "same": same}


def gym_scorer() -> dict[str, Callable[..., Any]]:
    """Return the function on reasoning-gym's scorers, some of which evaluate an answer as Python."""
    import reasoning_gym  # type: ignore[import-untyped]

    builtins.eval = checked_eval
    datasets: dict[str, Any] = {}

    def is_right(dataset: str, config: dict[str, Any], entry: dict[str, Any], answer: str | None) -> bool:
        key = repr((dataset, config))
        if key not in datasets:
            datasets[key] = reasoning_gym.create_dataset(dataset, seed=0, size=1, **config)
        return float(datasets[key].score_answer(answer, entry)) >= 1.0

    return {"is_right": is_right}


_eval = eval
_DATA = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword),
    *(ast.List, ast.Tuple, ast.Set, ast.Dict, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop),
)


def checked_eval(source: Any, globals: Any = None, locals: Any = None) -> Any:
    """Evaluate arithmetic, containers and, as sympy writes an expression, calls of its types and elementary functions.

    Raises:
        ValueError: anything else, such as an attribute, a lambda, or the call of a function that takes code or files.
    """
    tree = ast.parse(source, mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _DATA) or (isinstance(node, ast.Call) and not _is_mathematics(node.func)):
            raise ValueError(f"an answer must be data or an expression, got {ast.unparse(node)[:60]!r}")
    return _eval(compile(tree, "<answer>", "eval"), globals, locals)


def _is_mathematics(function: ast.expr) -> bool:
    import sympy

    value = getattr(sympy, function.id, None) if isinstance(function, ast.Name) else None
    return value in (sympy.sqrt, sympy.cbrt) or (isinstance(value, type) and issubclass(value, sympy.Basic))


def serve(functions: dict[str, Callable[..., Any]], seconds: float, requests: Any, reply: Callable[..., None]) -> None:
    """Answer requests until there are no more; a call that takes longer ends the process.

    The seconds are of processor time, so that no verdict depends on what else the machine does; PATIENCE times as many
    on the clock end it too.
    """
    with open(os.devnull, "w") as nowhere:
        while True:
            try:
                name, arguments = pickle.load(requests)
            except EOFError:
                return
            faulthandler.dump_traceback_later(PATIENCE * seconds, exit=True, file=nowhere)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                value, error = functions[name](*arguments), None
            except Exception as raised:  # whatever a library makes of an answer
                value, error = None, f"{type(raised).__name__}: {raised}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            reply(value=value, error=error)


def main() -> None:
    _, verifier, seconds = sys.argv
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply

    def reply(**fields: Any) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    try:
        functions = {"math": math_verifier, "gym": gym_scorer}[verifier]()
    except ImportError as error:
        return reply(error=str(error))
    _limit_memory()
    reply(error=None)
    serve(functions, float(seconds), sys.stdin.buffer, reply)


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # macOS has the limit, and refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))


if __name__ == "__main__":
    main()
