"""Equations, polynomials and sequences given by a rule."""

from __future__ import annotations

from random import Random

from omr.corpus.family import Values, family, ints


def _linear(rng: Random) -> Values:
    a, x, b = rng.randint(2, 29), rng.randint(2, 199), rng.randint(5, 499)
    return {"a": a, "b": b, "c": a * x + b}


def _both_sides(rng: Random) -> Values:
    c, x, b = rng.randint(2, 15), rng.randint(2, 99), rng.randint(5, 299)
    a = c + rng.randint(1, 14)
    return {"a": a, "b": b, "c": c, "d": (a - c) * x + b}


def _system(rng: Random) -> Values:
    x, y = rng.randint(2, 60), rng.randint(2, 60)
    a, b = rng.randint(2, 15), rng.randint(2, 15)
    c, d = rng.randint(2, 15), rng.randint(2, 15)
    while a * d == b * c:
        d = rng.randint(2, 15)
    return {"a": a, "b": b, "e": a * x + b * y, "c": c, "d": d, "f": c * x + d * y}


def _quadratic(rng: Random) -> Values:
    r, s = rng.randint(3, 90), rng.randint(2, 90)
    while r == s:
        s = rng.randint(2, 90)
    return {"p": r + s, "q": r * s}


def _sum_gap(rng: Random) -> Values:
    x, y = rng.randint(60, 999), rng.randint(3, 59)
    return {"s": x + y, "d": x - y}


FAMILIES = (
    family(
        "linear_equation",
        _linear,
        plans="""
            We solve a linear equation: subtract, then divide.
            First take away the constant, then divide by the factor.
        """,
        codes=["print(($c {{-||+}} $b) // $a)", "right = $c {{-||+}} $b\nprint(right // $a)"],
    ),
    family(
        "linear_both_sides",
        _both_sides,
        plans="""
            We collect x on one side and divide.
            Both sides have x, so we subtract and then divide.
        """,
        codes=["print(($d - $b) // ($a {{-||+}} $c))", "top = $d - $b\nbottom = $a {{-||+}} $c\nprint(top // bottom)"],
    ),
    family(
        "linear_system",
        _system,
        plans="""
            We solve two linear equations with determinants and add the unknowns.
            Two equations with two unknowns: we use Cramer's rule.
        """,
        codes=[
            "a, b, e = $a, $b, $e\nc, d, f = $c, $d, $f\ndet = a * d - b * c\nx = (e * d - b * f) // det\ny = (a * f - e * c) // det\nprint(x {{+||-}} y)",
        ],
    ),
    family(
        "quadratic_root",
        _quadratic,
        plans="""
            We solve a quadratic equation and take the larger root.
            The larger root uses the plus sign in the formula.
        """,
        codes=[
            "import math\np, q = $p, $q\nroot = math.isqrt(p * p - 4 * q)\nprint((p {{+||-}} root) // 2)",
            "p, q = $p, $q\nroots = [x for x in range(p + 1) if x * (p - x) == q]\nprint({{max||min}}(roots))",
        ],
    ),
    family(
        "polynomial_value",
        ints(a=(2, 9), b=(2, 30), c=(2, 99), x=(3, 40)),
        plans="""
            We put the value of x into the polynomial.
            We evaluate the polynomial at the given point.
        """,
        codes=[
            "x = {{$x||-$x}}\nprint($a * x ** 2 + $b * x + $c)",
            "def f(x):\n    return $a * x * x {{+||-}} $b * x + $c\n\nprint(f($x))",
        ],
    ),
    family(
        "composition",
        ints(a=(2, 15), b=(2, 40), c=(2, 20), x=(3, 30)),
        plans="""
            We define both functions and apply the inner one first.
            This is a composition of two functions.
        """,
        codes=[
            "def f(x):\n    return $a * x + $b\n\ndef g(x):\n    return x ** 2 + $c\n\nprint({{f(g($x))||g(f($x))}})",
            "f = lambda x: $a * x + $b\ng = lambda x: x * x + $c\nprint({{f(g($x))||g(f($x))}})",
        ],
    ),
    family(
        "sum_and_difference",
        _sum_gap,
        plans="""
            The larger number is half of the sum plus the difference.
            We know the sum and the difference of two numbers.
        """,
        codes=["print(($s {{+||-}} $d) // 2)", "x = ($s {{+||-}} $d) // 2\nprint(x)"],
    ),
    family(
        "recurrence",
        ints(s=(2, 9), a=(2, 4), b=(1, 30), n=(5, 14)),
        plans="""
            We start with the first term and repeat the rule.
            We apply the rule in a loop.
        """,
        codes=["x = $s\nfor k in range($n{{ - 1||}}):\n    x = $a * x + $b\nprint(x)"],
    ),
    family(
        "fibonacci_mod",
        ints(n=(12, 400), m=(7, 999)),
        plans="""
            We step through the Fibonacci numbers and reduce.
            We need a Fibonacci number modulo a number.
        """,
        codes=["a, b = 0, 1\nfor k in range($n{{|| - 1}}):\n    a, b = b, a + b\nprint(a % $m)"],
    ),
    family(
        "arithmetic_term",
        ints(a=(2, 99), d=(3, 40), n=(12, 400)),
        plans="""
            We need one term of an arithmetic sequence.
            We add the difference again and again to the first term.
        """,
        codes=["print($a + ($n{{ - 1||}}) * $d)", "x = $a\nfor k in range($n{{ - 1||}}):\n    x += $d\nprint(x)"],
    ),
    family(
        "arithmetic_sum",
        ints(a=(2, 99), d=(3, 40), n=(12, 200)),
        plans="""
            We add the terms of an arithmetic sequence.
            We need the sum of an arithmetic series.
        """,
        codes=[
            "print(sum($a + k * $d for k in range($n{{|| - 1}})))",
            "total = 0\nx = $a\nfor k in range($n{{|| - 1}}):\n    total += x\n    x += $d\nprint(total)",
        ],
    ),
    family(
        "geometric_sum",
        ints(a=(2, 60), r=(2, 6), n=(4, 12)),
        plans="""
            We add the terms of a geometric sequence.
            We need the sum of a geometric series.
        """,
        codes=[
            "print(sum($a * $r ** k for k in range($n{{|| - 1}})))",
            "total = 0\nx = $a\nfor k in range($n{{|| - 1}}):\n    total += x\n    x *= $r\nprint(total)",
        ],
    ),
    family(
        "sum_of_powers",
        lambda rng: {"n": rng.randint(12, 900), "e": rng.choice([2, 3])},
        plans="""
            We add the powers of all numbers up to the limit.
            We need a sum of powers.
        """,
        codes=[
            "print(sum(k ** $e for k in range(1, $n{{ + 1||}})))",
            "total = 0\nfor k in range(1, $n{{ + 1||}}):\n    total += k ** $e\nprint(total)",
        ],
    ),
)
