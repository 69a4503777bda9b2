"""Lengths, areas, volumes, angles, all with whole numbers."""

from __future__ import annotations

from random import Random

from omr.corpus.family import TwoCalls, Values, family, ints


def _right_triangle(rng: Random) -> Values:
    m = rng.randint(2, 12)
    n = rng.randint(1, m - 1)
    k = rng.randint(1, 6)
    a, b = k * (m * m - n * n), 2 * k * m * n
    return {"a": a, "b": b}


def _triangle(rng: Random) -> Values:
    while True:
        v = {name: rng.randint(0, 40) for name in ("a", "b", "c", "d", "e", "f")}
        if (v["c"] - v["a"]) * (v["f"] - v["b"]) != (v["e"] - v["a"]) * (v["d"] - v["b"]):
            return dict(v)


FAMILIES = (
    family(
        "perimeter",
        ints(a=(12, 999), b=(12, 999)),
        plans="""
            The perimeter is twice the sum of the sides.
            We add the sides of the rectangle and double.
        """,
        codes=["print({{2 * ||}}($a + $b))", "half = $a + $b\nprint(half{{ * 2||}})"],
    ),
    family(
        "box_volume",
        ints(a=(4, 60), b=(4, 60), c=(4, 60)),
        plans="""
            The volume is the product of the three edges.
            We multiply length, width and height.
        """,
        codes=["print($a * $b {{*||+}} $c)", "base = $a * $b\nprint(base {{*||+}} $c)"],
    ),
    family(
        "box_surface",
        ints(a=(4, 60), b=(4, 60), c=(4, 60)),
        plans="""
            The surface is twice the sum of the three face areas.
            We add the areas of the faces of the box.
        """,
        codes=["a, b, c = $a, $b, $c\nprint({{2 * ||}}(a * b + b * c + a * c))"],
    ),
    family(
        "hypotenuse",
        _right_triangle,
        plans="""
            By Pythagoras we need the root of the sum of squares.
            The hypotenuse is the root of a sum of two squares.
        """,
        codes=[
            "import math\nprint(math.isqrt($a ** 2 {{+||*}} $b ** 2))",
            TwoCalls(
                first="print($a ** 2 {{+||*}} $b ** 2)",
                between="The square of the hypotenuse is $out. Now take the root.",
                second="import math\nprint(math.isqrt($out))",
            ),
        ],
    ),
    family(
        "triangle_area",
        _triangle,
        plans="""
            We use the determinant of two sides.
            The cross product of two sides gives twice the area.
        """,
        codes=[
            "x1, y1 = $a, $b\nx2, y2 = $c, $d\nx3, y3 = $e, $f\nprint(abs((x2 - x1) * (y3 - y1) {{-||+}} (x3 - x1) * (y2 - y1)))",
        ],
    ),
    family(
        "distance_squared",
        ints(a=(0, 60), b=(0, 60), c=(61, 120), d=(0, 120)),
        plans="""
            We add the squares of the coordinate differences.
            The squared distance needs no root.
        """,
        codes=[
            "print(($c - $a) ** 2 {{+||-}} ($d - $b) ** 2)",
            "dx = $c - $a\ndy = $d - $b\nprint(dx * dx {{+||-}} dy * dy)",
        ],
    ),
    family(
        "angle_sum",
        ints(n=(7, 400)),
        plans="""
            A polygon is cut into triangles, two fewer than its sides.
            Each triangle of the polygon gives 180 degrees.
        """,
        codes=["print(($n {{- 2||- 1}}) * 180)", "triangles = $n {{- 2||- 1}}\nprint(triangles * 180)"],
    ),
    family(
        "diagonals",
        ints(n=(7, 600)),
        plans="""
            Each corner joins all but itself and its two neighbors.
            We count the diagonals: n times n minus three, halved.
        """,
        codes=["print($n * ($n - {{3||1}}) // 2)", "n = $n\nprint(n * (n - {{3||1}}) // 2)"],
    ),
)
