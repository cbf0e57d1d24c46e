"""``make lines``: how large the project is without its tests, in lines of code and in all lines (ADR 3)."""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

LIMIT = 21_500
SILENT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def lines_of_code(source: str) -> int:
    """Lines that hold a token other than a comment or a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        for inner in (
            getattr(node, "body", None) or [] if not isinstance(node, ast.Lambda | ast.IfExp) else []
        ):
            if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
                lines.difference_update(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return len(lines)


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    code: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for name in listed:
        if not name.startswith("tests/") and "_pb2" not in name and Path(name).exists():
            source = Path(name).read_text(encoding="utf-8")
            folder = name.partition("/")[0]
            code[folder] += lines_of_code(source)
            every[folder] += source.count("\n")
    for folder in [*sorted(code), "total"]:
        counts = (code.total(), every.total()) if folder == "total" else (code[folder], every[folder])
        print(f"{folder:<13} {counts[0]:>6} lines of code, {counts[1]:>6} in all")
    if code.total() >= LIMIT:
        print(f"{LIMIT} lines of code or more", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
