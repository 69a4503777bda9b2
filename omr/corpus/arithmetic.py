"""Sums, products, powers, percentages, fractions."""

from __future__ import annotations

from random import Random

from omr.corpus.family import TwoCalls, Values, family, ints


def _percent(rng: Random) -> Values:
    return {"p": rng.randint(1, 19) * 5, "n": rng.randint(2, 450) * 20}


def _fractions(rng: Random) -> Values:
    return {"a": rng.randint(1, 19), "b": rng.randint(2, 20), "c": rng.randint(1, 19), "d": rng.randint(2, 20)}


def _average(rng: Random) -> Values:
    xs = [rng.randint(2, 99) for _ in range(rng.randint(3, 5))]
    xs.append((-sum(xs)) % (len(xs) + 1) + (len(xs) + 1) * rng.randint(1, 12))
    rng.shuffle(xs)
    return {"xs": xs}


FAMILIES = (
    family(
        "sum_then_take",
        ints(a=(120, 4999), b=(120, 4999), c=(11, 230)),
        plans="""
            We add the first two numbers and subtract the third.
            This is a sum followed by a subtraction.
        """,
        codes=["print($a + $b {{-||+}} $c)", "total = $a + $b\nprint(total {{-||+}} $c)"],
    ),
    family(
        "product_plus",
        ints(a=(12, 999), b=(12, 99), c=(11, 999)),
        plans="""
            We multiply the first two numbers and add the third.
            This is a product plus an extra amount.
        """,
        codes=["print($a * $b {{+||-}} $c)", "product = $a * $b\nprint(product {{+||-}} $c)"],
    ),
    family(
        "power_mod",
        ints(a=(2, 60), b=(5, 99), m=(7, 999)),
        plans="""
            We need a power modulo a number.
            This asks for the remainder of a power.
        """,
        codes=["print(pow($a, $b{{||+ 1}}, $m))", "n = $a ** $b\nprint(n {{%||//}} $m)"],
    ),
    family(
        "quotient",
        ints(a=(1000, 99999), b=(12, 99)),
        plans="""
            We need the whole quotient, so integer division.
            This asks for integer division.
        """,
        codes=["print($a // $b{{|| + 1}})", "q, r = divmod($a, $b)\nprint({{q||r}})"],
    ),
    family(
        "remainder",
        ints(a=(1000, 99999), b=(12, 99)),
        plans="""
            We need the remainder of a division.
            This asks for the first number modulo the second.
        """,
        codes=["print($a {{%||//}} $b)", "q, r = divmod($a, $b)\nprint({{r||q}})"],
    ),
    family(
        "percent_of",
        _percent,
        plans="""
            We need a percentage of a number.
            A percentage means dividing by one hundred.
        """,
        codes=["print($n * $p // {{100||10}})", "share = $n * $p\nprint(share // {{100||10}})"],
    ),
    family(
        "percent_off",
        _percent,
        plans="""
            We lower the number by a percentage.
            The percentage is taken off, the rest remains.
        """,
        codes=["print($n * (100 {{-||+}} $p) // 100)", "cut = $n * $p // 100\nprint($n {{-||+}} cut)"],
    ),
    family(
        "percent_up",
        _percent,
        plans="""
            We raise the number by a percentage.
            The percentage is added to the whole.
        """,
        codes=["print($n * (100 {{+||-}} $p) // 100)", "extra = $n * $p // 100\nprint($n {{+||-}} extra)"],
    ),
    family(
        "fraction_sum",
        _fractions,
        plans="""
            We add two fractions.
            This is a sum of fractions, so we use exact fractions.
        """,
        codes=[
            "from fractions import Fraction\nprint(Fraction($a, $b) {{+||-}} Fraction($c, $d))",
            "from fractions import Fraction\nx = Fraction($a, $b)\ny = Fraction($c, $d)\nprint(x {{+||-}} y)",
        ],
    ),
    family(
        "average",
        _average,
        plans="""
            The average is the sum divided by how many numbers there are.
            We need the mean of the list.
        """,
        codes=[
            "xs = $xs\nprint(sum(xs) // {{len(xs)||(len(xs) - 1)}})",
            TwoCalls(
                first="xs = $xs\nprint(sum(xs))",
                between="The sum is $out. Now divide it by the count.",
                second="print($out // {{len(xs)||(len(xs) - 1)}})",
            ),
        ],
    ),
    family(
        "square_gap",
        ints(a=(60, 999), b=(11, 59)),
        plans="""
            We square both numbers and subtract.
            This is a difference of two squares.
        """,
        codes=["print($a ** 2 {{-||+}} $b ** 2)", "x = $a * $a\ny = $b * $b\nprint(x {{-||+}} y)"],
    ),
    family(
        "ratio_split",
        lambda rng: (lambda a, b, k: {"a": a, "b": b, "n": (a + b) * k})(
            rng.randint(2, 6), rng.randint(7, 12), rng.randint(11, 300)
        ),
        plans="""
            We split the total by the ratio and take the larger part.
            The parts of the ratio are added, then the larger part is taken.
        """,
        codes=[
            "part = $n // ($a + $b)\nprint(part * {{$b||$a}})",
            TwoCalls(
                first="print($n // ($a + $b))",
                between="One part is $out. The larger share has more parts.",
                second="print($out * {{$b||$a}})",
            ),
        ],
    ),
)
