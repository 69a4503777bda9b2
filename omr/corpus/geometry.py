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
        wordings="""
            A rectangle has sides $a and $b. What is its perimeter?
            @F the perimeter of a rectangle with length $a and width $b.
            A garden is $a meters long and $b meters wide. How long is a fence around it?
            What is the perimeter of a $a by $b rectangle?
            @T the distance around a rectangle with sides $a and $b.
            A field measures $a by $b. How far do you walk if you go around it once?
            How long is the border of a picture that is $a wide and $b high?
            The length of a rectangle is $a and the width is $b. @F the perimeter.
            $name runs once around a rectangle field of $a by $b meters. How many meters is that?
            A room is $a long and $b wide. What is the total length of its four walls?
        """,
        dev="""
            Around a rectangle with sides of $a and $b, how long is the edge in total?
        """,
        unseen="""
            A rope is laid around a table of length $a and width $b. How long must the rope be?
            What do the four sides of a $a by $b rectangle add up to?
        """,
        plans="""
            The perimeter is twice the sum of the sides.
            We add the sides of the rectangle and double.
        """,
        codes=["print({{2 * ||}}($a + $b))", "half = $a + $b\nprint(half{{ * 2||}})"],
    ),
    family(
        "box_volume",
        ints(a=(4, 60), b=(4, 60), c=(4, 60)),
        wordings="""
            A box has sides $a, $b and $c. What is its volume?
            @F the volume of a box that is $a long, $b wide and $c high.
            How many unit cubes fit in a $a by $b by $c box?
            @T the volume of a cuboid with edges $a, $b and $c.
            A tank measures $a by $b by $c. How much water does it hold?
            What is the volume of a $a x $b x $c box?
            How much space is in a room $a long, $b wide and $c high?
            $name builds a block of $a by $b by $c small cubes. How many cubes are used?
            The edges of a brick are $a, $b and $c. @F its volume.
            A crate has length $a, width $b and height $c. How many cubes of side 1 does it hold?
        """,
        dev="""
            With edges of $a, $b and $c, how large is the volume of a cuboid?
        """,
        unseen="""
            A swimming pool has length $a, width $b and depth $c. What is its volume?
            How many sugar cubes of side 1 are in a full box of $a by $b by $c?
        """,
        plans="""
            The volume is the product of the three edges.
            We multiply length, width and height.
        """,
        codes=["print($a * $b {{*||+}} $c)", "base = $a * $b\nprint(base {{*||+}} $c)"],
    ),
    family(
        "box_surface",
        ints(a=(4, 60), b=(4, 60), c=(4, 60)),
        wordings="""
            A box has sides $a, $b and $c. What is its surface area?
            @F the surface area of a box that is $a long, $b wide and $c high.
            How much paper covers all six faces of a $a by $b by $c box?
            @T the surface area of a cuboid with edges $a, $b and $c.
            What is the total area of the faces of a $a x $b x $c box?
            The edges of a brick are $a, $b and $c. @F its surface area.
            $name paints all sides of a block of size $a by $b by $c. What area is painted?
            A crate has length $a, width $b and height $c. What is the area of its surface?
            What is the surface area of a $a by $b by $c box?
            How large is the outside area of a closed box with edges $a, $b, $c?
        """,
        dev="""
            With edges of $a, $b and $c, how large is the surface of a cuboid?
        """,
        unseen="""
            A gift of size $a by $b by $c is wrapped without overlap. What area of paper is needed?
            Add the areas of the six faces of a box with edges $a, $b and $c.
        """,
        plans="""
            The surface is twice the sum of the three face areas.
            We add the areas of the faces of the box.
        """,
        codes=["a, b, c = $a, $b, $c\nprint({{2 * ||}}(a * b + b * c + a * c))"],
    ),
    family(
        "hypotenuse",
        _right_triangle,
        wordings="""
            A right triangle has legs $a and $b. How long is the hypotenuse?
            @F the hypotenuse of a right triangle with legs $a and $b.
            The two short sides of a right triangle are $a and $b. What is the longest side?
            @T the length of the diagonal of a rectangle with sides $a and $b.
            How long is the diagonal of a $a by $b rectangle?
            $name walks $a steps east and $b steps north. How far is $name from the start in a straight line?
            A ladder stands $a away from a wall and reaches $b high. How long is the ladder?
            What is the distance from (0, 0) to ($a, $b)?
            The legs of a right triangle measure $a and $b. @F the third side.
            By the theorem of Pythagoras, what is the hypotenuse for legs $a and $b?
        """,
        dev="""
            Two sides that meet at a right angle are $a and $b. How long is the side opposite the right angle?
        """,
        unseen="""
            A ship sails $a miles south and then $b miles west. How many miles is it from its start, in a straight line?
            A screen is $a wide and $b high. How long is its diagonal?
        """,
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
        wordings="""
            @F twice the area of the triangle with corners ($a, $b), ($c, $d) and ($e, $f).
            A triangle has vertices ($a, $b), ($c, $d), ($e, $f). What is double its area?
            The points ($a, $b), ($c, $d) and ($e, $f) form a triangle. @T two times its area.
            What is 2 times the area of a triangle with the corners ($a, $b), ($c, $d), ($e, $f)?
            Let A = ($a, $b), B = ($c, $d), C = ($e, $f). @F twice the area of triangle ABC.
            If a triangle has corners at ($a, $b), ($c, $d) and ($e, $f), what is twice its area?
            What is the area of a parallelogram that has ($a, $b), ($c, $d) and ($e, $f) as three of its corners?
            Double the area of the triangle with vertices ($a, $b), ($c, $d) and ($e, $f) is which number?
            Three points ($a, $b), ($c, $d), ($e, $f) are given. @F double the area of their triangle.
            @T the area, multiplied by 2, of the triangle through ($a, $b), ($c, $d) and ($e, $f).
        """,
        dev="""
            With corners at ($a, $b), ($c, $d) and ($e, $f), a triangle has some area. What is twice that?
        """,
        unseen="""
            Calculate the doubled area of the triangle ($a, $b), ($c, $d), ($e, $f).
            Connect ($a, $b), ($c, $d) and ($e, $f) by straight lines. What is twice the area inside?
        """,
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
        wordings="""
            @F the square of the distance between ($a, $b) and ($c, $d).
            What is the squared distance from ($a, $b) to ($c, $d)?
            The points P = ($a, $b) and Q = ($c, $d) are given. What is the square of PQ?
            @T the squared distance of the points ($a, $b) and ($c, $d).
            A square has the segment from ($a, $b) to ($c, $d) as a side. What is its area?
            How large is the squared length of the segment from ($a, $b) to ($c, $d)?
            If d is the distance of ($a, $b) and ($c, $d), what is d^2?
            Two points are ($a, $b) and ($c, $d). @F the square of their distance.
            What is the squared length of the line from ($a, $b) to ($c, $d)?
            The vector from ($a, $b) to ($c, $d) has which squared length?
        """,
        dev="""
            Between ($a, $b) and ($c, $d) there is some distance. What is its square?
        """,
        unseen="""
            Take the distance of the points ($a, $b) and ($c, $d) and square it. What is the result?
            @F d squared, where d is how far ($c, $d) is from ($a, $b).
        """,
        plans="""
            We add the squares of the coordinate differences.
            The squared distance needs no root.
        """,
        codes=["print(($c - $a) ** 2 {{+||-}} ($d - $b) ** 2)", "dx = $c - $a\ndy = $d - $b\nprint(dx * dx {{+||-}} dy * dy)"],
    ),
    family(
        "angle_sum",
        ints(n=(7, 400)),
        wordings="""
            What is the sum of the interior angles of a polygon with $n sides, in degrees?
            @F the sum of the interior angles of a $n sided polygon.
            A polygon has $n corners. How many degrees do its interior angles add up to?
            @T the total of all inside angles of a polygon with $n sides.
            How many degrees do the interior angles of a polygon with $n vertices have together?
            The interior angles of a polygon with $n sides are added. @F the sum in degrees.
            In a polygon with $n corners, what is the angle sum?
            What do the angles inside a polygon with $n sides add up to?
            @F the angle sum of a polygon with $n vertices in degrees.
            If a polygon has $n sides, how large are its interior angles in total?
        """,
        dev="""
            Added together, how many degrees are the inner angles of a polygon that has $n sides?
        """,
        unseen="""
            $name measures all interior angles of a polygon with $n corners and adds them. What is the total?
            How large is the sum of the angles in a $n sided polygon?
        """,
        plans="""
            A polygon is cut into triangles, two fewer than its sides.
            Each triangle of the polygon gives 180 degrees.
        """,
        codes=["print(($n {{- 2||- 1}}) * 180)", "triangles = $n {{- 2||- 1}}\nprint(triangles * 180)"],
    ),
    family(
        "diagonals",
        ints(n=(7, 600)),
        wordings="""
            How many diagonals does a polygon with $n sides have?
            @F the number of diagonals of a convex polygon with $n vertices.
            A polygon has $n corners. How many diagonals can be drawn?
            @T how many diagonals a $n sided polygon has.
            [Count|Determine the number of] the diagonals in a polygon with $n sides.
            What is the number of diagonals of a polygon with $n corners?
            In a polygon with $n vertices, all diagonals are drawn. How many are there?
            $name draws every diagonal of a polygon with $n sides. How many lines is that?
            How many diagonals are in a convex polygon of $n sides?
            How many segments join two corners of a polygon with $n sides but are not sides?
        """,
        dev="""
            If a convex polygon has $n corners, what is the count of its diagonals?
        """,
        unseen="""
            All the diagonals in a polygon of $n vertices are painted blue. How many blue lines are there?
            A figure with $n sides has how many diagonals?
        """,
        plans="""
            Each corner joins all but itself and its two neighbors.
            We count the diagonals: n times n minus three, halved.
        """,
        codes=["print($n * ($n - {{3||1}}) // 2)", "n = $n\nprint(n * (n - {{3||1}}) // 2)"],
    ),
)
