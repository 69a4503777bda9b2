"""Final answers: taken out of a solution, brought into one form, compared.

The answer of a solution is its last `\\boxed{...}`, found by matching braces. Two answers are compared in three steps,
cheapest first:
  1. the same text once LaTeX dressing is gone (boxes, dollar signs, spacing, units, percent, `x =`);
  2. the same exact rational number: `070` = 70, `1,234` = `1\\,234`, 0.5 = 1/2, 1e3 = 1000; never rounded;
  3. the same mathematics according to math-verify (sympy), helped where it misreads: degrees inside a trigonometric
     function, the imaginary unit in an exponent, an inequality against an interval.

Steps 1 and 2 are a few microseconds of string work and settle every contest integer. Step 3 runs arbitrary computer
algebra on text that a model wrote: it may take minutes and gigabytes, so nothing here calls it in the caller's process;
see `grade.py`, which owns killable workers. `settle` says which case a pair is.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_CHARS = 2000
"""A longer answer is compared as text only: no benchmark has one, and computer algebra on it never ends well."""

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_WRAPPED = re.compile(r"^(?:\$\$?(?P<d>[^$]+)\$?\$|\\\((?P<p>.+)\\\)|\\\[(?P<b>.+)\\\])$", re.DOTALL)
_SPACING = re.compile(r"\\[,;:!> ]|\\(?:quad|qquad|left|right|displaystyle|limits)(?![A-Za-z])|~")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"\s*\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?$")
_DEGREE = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\degree(?![A-Za-z])")
_TRIG = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ASSIGN = re.compile(r"^[A-Za-z](?:_\{?[A-Za-z0-9]+\}?|\([A-Za-z]\))?\s*=\s*([^=<>]+)$")
_WORD = re.compile(r"^[A-Za-z][A-Za-z ]*$")

_INTEGER = r"[0-9]+"
_GROUPED = r"[0-9]{1,3}(?:(?:,|\{,\}| )[0-9]{3})+"
_PLAIN = re.compile(
    rf"^(?P<sign>[+-]?)\s*(?P<whole>{_GROUPED}|{_INTEGER})?(?P<frac>\.[0-9]*)?(?:[eE](?P<exp>[+-]?[0-9]{{1,3}}))?$"
)
_RATIO = re.compile(
    rf"^(?P<sign>[+-]?)\s*(?:\\[dtc]?frac\s*(?:\{{\s*(?P<n>-?{_INTEGER})\s*\}}\s*\{{\s*(?P<d>{_INTEGER})\s*\}}"
    rf"|(?P<n1>[0-9])\s*(?P<d1>[0-9]))|(?P<n2>{_INTEGER})\s*/\s*(?P<d2>{_INTEGER}))$"
)


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` in `text`; None when there is none, it never closes, or it is blank."""
    start = None
    for match in _BOXED.finditer(text):
        start = match.end()
    if start is None:
        return None
    end = closing_brace(text, start)
    return (text[start:end].strip() or None) if end is not None else None


def closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the group whose content begins at `start`; escaped braces do not count."""
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return None


def unwrap(answer: str) -> str:
    """`answer` without the boxes and math delimiters around it and the full stop behind it."""
    text = re.sub(r"\s+", " ", answer).strip()  # first, for the patterns below are quadratic in runs of spaces
    for _ in range(4):  # nested dressing is finite in practice; junk must not loop
        before = text
        boxed = last_boxed(text) if _BOXED.match(text) else None
        wrapped = _WRAPPED.match(text)
        if boxed is not None:
            text = boxed
        elif wrapped:
            text = wrapped["d"] or wrapped["p"] or wrapped["b"]
        text = text.strip().rstrip(".\\").strip()
        if text == before:
            break
    return text


def undress(answer: str) -> str:
    """`unwrap`, and without what carries no value: spacing commands, units, percent, `x =`."""
    text = unwrap(answer)
    text = text.replace("\\$", "").replace("\\%", "%").replace("−", "-").replace("{,}", ",")
    text = re.sub(r"(?<=[0-9])\\,(?=[0-9]{3})", " ", text)  # 1\,234: the space of a thousands group
    text = re.sub(r"\s+", " ", _SPACING.sub(" ", text))  # again, for the patterns below
    if not _TRIG.search(text):
        text = _DEGREE.sub("", text)
    bare = _UNIT.sub("", text)
    if bare != text and number(bare.strip()) is not None:
        text = bare
    text = _TEXT.sub(r" \1 ", text).strip()
    if text.endswith("%") and number(text[:-1].strip()) is not None:
        text = text[:-1]
    inside = text[1:-1].strip()
    if text.startswith("(") and text.endswith(")") and (number(inside) is not None or inside.isalpha()):
        text = inside  # (019), (C): one thing in parentheses is no tuple
    assigned = _ASSIGN.match(text)
    if assigned:
        text = assigned[1]
    return re.sub(r"\s+", " ", text).strip().replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def number(text: str) -> Fraction | None:
    """The exact value of a written integer, decimal, power of ten or ratio; None for anything else."""
    if len(text) > 1000:
        return None
    match = _PLAIN.match(text)
    if match and (match["whole"] or len(match["frac"] or "") > 1):
        whole = re.sub(r"[^0-9]", "", match["whole"] or "0")
        digits = (match["frac"] or ".")[1:]
        value = Fraction(int(whole + digits), 10 ** len(digits)) * Fraction(10) ** int(match["exp"] or 0)
        return -value if match["sign"] == "-" else value
    match = _RATIO.match(text)
    if match:
        above = int(match["n"] or match["n1"] or match["n2"])
        below = int(match["d"] or match["d1"] or match["d2"])
        if below == 0:
            return None
        return Fraction(-above if match["sign"] == "-" else above, below)
    return None


def _is_plain(text: str) -> bool:
    """Decimal digits and nothing else: most answers of most contests."""
    return len(text) < 1000 and text.isascii() and text.isdigit()


@lru_cache(maxsize=1024)
def vote_key(answer: str) -> str:
    """The form under which equal answers meet in a vote: exact number if it is one, else undressed text.

    One longer than MAX_CHARS stands for itself, as in `settle`. Remembered, as every ballot of a problem is looked at
    again whenever another one comes.
    """
    if _is_plain(answer):
        return str(int(answer))
    if len(answer) > MAX_CHARS:
        return answer.strip()
    text = undress(answer)
    value = number(text)
    if value is not None:
        return str(value)
    return text.casefold() if _WORD.match(text) else text.replace(" ", "")


def settle(prediction: str | None, reference: str) -> bool | None:
    """Whether the two are equal, as far as text and exact arithmetic can tell; None when it takes computer algebra."""
    if prediction is None or not prediction.strip():
        return False
    if prediction.strip() == reference.strip():
        return True
    if _is_plain(prediction) and _is_plain(reference):
        return int(prediction) == int(reference)
    if max(len(prediction), len(reference)) > MAX_CHARS:
        return False
    left, right = undress(prediction), undress(reference)
    a, b = number(left), number(right)
    if a is not None and b is not None:
        percent = prediction.rstrip(" $.").endswith("%") != reference.rstrip(" $.").endswith("%")
        return a == b or (percent and a in (b * 100, b / 100))  # 5% is written for 5 and for 0.05
    if _WORD.match(left) and _WORD.match(right):
        return left.casefold() == right.casefold()
    if left and left.replace(" ", "") == right.replace(" ", ""):
        return True
    return None


def _for_algebra(answer: str) -> str:
    text = unwrap(answer)
    if _TRIG.search(text):
        text = re.sub(rf"([0-9]+(?:\.[0-9]+)?)(?:{_DEGREE.pattern})", r"{(\1\\pi/180)}", text)
    return undress(text) if number(undress(text)) is not None or _TRIG.search(text) else text


def equal_by_algebra(prediction: str, reference: str) -> bool:
    """math-verify's verdict. Unbounded time and memory: call it only in a process that may be killed."""
    import sympy
    from math_verify import parse, verify

    def parsed(answer: str) -> list[Any]:
        # math-verify's own time limits are signals: they work in a main thread only, and sympy swallows them.
        value = parse(f"${_for_algebra(answer)}$", parsing_timeout=None)
        assert isinstance(value, list)
        return value

    gold, guess = parsed(reference), parsed(prediction)
    if verify(gold, guess, timeout_seconds=None, allow_set_relation_comp=True):
        return True
    # `i` is the imaginary unit when it is the only symbol of either side and the other side has none.
    left, right = (side[0] if side and isinstance(side[0], sympy.Expr) else None for side in (gold, guess))
    if left is None or right is None:
        return False
    names = {str(s) for s in left.free_symbols | right.free_symbols}
    if names != {"i"}:
        return False
    swap = {s: sympy.I for s in left.free_symbols | right.free_symbols}
    return bool(sympy.simplify(left.subs(swap) - right.subs(swap)) == 0)
