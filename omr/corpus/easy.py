"""Questions small enough to answer at once: the model may do without a tool here, and so a tool's absence is not fatal."""

from __future__ import annotations

from random import Random

from omr.corpus.family import Values, family, ints

_ANIMALS = {"dog": 4, "cat": 4, "spider": 8, "ant": 6, "bird": 2, "duck": 2, "cow": 4, "bee": 6, "frog": 4, "hen": 2}
_SHAPES = {
    "triangle": 3,
    "square": 4,
    "pentagon": 5,
    "hexagon": 6,
    "heptagon": 7,
    "octagon": 8,
    "nonagon": 9,
    "decagon": 10,
    "rectangle": 4,
    "rhombus": 4,
}


def _legs(rng: Random) -> Values:
    animal = rng.choice(list(_ANIMALS))
    return {"animal": animal, "l": _ANIMALS[animal], "n": rng.randint(2, 9)}


def _sides(rng: Random) -> Values:
    first, second = rng.choice(list(_SHAPES)), rng.choice(list(_SHAPES))
    return {"shape": first, "other": second, "s": _SHAPES[first], "o": _SHAPES[second]}


FAMILIES = (
    family(
        "small_sum",
        ints(a=(1, 9), b=(1, 9)),
        plans="""
            We add two small numbers.
            This is a small sum.
        """,
        codes=["print($a {{+||-}} $b)"],
        direct="""
            This is a small sum. The answer is \\boxed{$answer}.
            Adding gives \\boxed{$answer}.
        """,
    ),
    family(
        "small_product",
        ints(a=(2, 9), b=(2, 9)),
        plans="""
            We multiply two small numbers.
            This is a small product.
        """,
        codes=["print($a {{*||+}} $b)"],
        direct="""
            This is a small product. The answer is \\boxed{$answer}.
            Multiplying gives \\boxed{$answer}.
        """,
    ),
    family(
        "last_digit",
        ints(n=(100, 99999)),
        plans="""
            We take the last digit.
            This asks for the units digit.
        """,
        codes=["print($n % {{10||100}})"],
        direct="""
            We read off the last digit: \\boxed{$answer}.
            The number ends in \\boxed{$answer}.
        """,
    ),
    family(
        "first_digit",
        ints(n=(100, 99999)),
        plans="""
            We take the first digit.
            This asks for the leading digit.
        """,
        codes=["print(str($n)[{{0||1}}])"],
        direct="""
            We read off the first digit: \\boxed{$answer}.
            The number starts with \\boxed{$answer}.
        """,
    ),
    family(
        "num_digits",
        lambda rng: {
            "n": rng.randint(10 ** rng.randint(0, 5), 10**6 - 1)
            if rng.random() < 0.3
            else rng.randint(*(lambda d: (10 ** (d - 1), 10**d - 1))(rng.randint(2, 6)))
        },
        plans="""
            We count the digits.
            This asks how long the number is.
        """,
        codes=["print(len(str($n)){{|| - 1}})"],
        direct="""
            Counting the digits gives \\boxed{$answer}.
            The number of digits is \\boxed{$answer}.
        """,
    ),
    family(
        "animal_legs",
        _legs,
        plans="""
            One $animal has $l legs.
            We multiply by the legs of one $animal.
        """,
        codes=["print($n {{*||+}} $l)"],
        direct="""
            One $animal has $l legs, so the answer is \\boxed{$answer}.
            A $animal has $l legs. Together this gives \\boxed{$answer}.
        """,
    ),
    family(
        "shape_sides",
        _sides,
        plans="""
            A $shape has $s sides and a $other has $o.
            We add $s and $o sides.
        """,
        codes=["print($s {{+||-}} $o)"],
        direct="""
            A $shape has $s sides and a $other has $o. The answer is \\boxed{$answer}.
            We add $s and $o and get \\boxed{$answer}.
        """,
    ),
    family(
        "larger_of_two",
        lambda rng: dict(zip("ab", rng.sample(range(1, 100), 2), strict=True)),
        plans="""
            We compare the two numbers.
            This asks for the maximum.
        """,
        codes=["print({{max||min}}($a, $b))"],
        direct="""
            Comparing the two, the larger is \\boxed{$answer}.
            The larger number is \\boxed{$answer}.
        """,
    ),
    family(
        "weeks_to_days",
        ints(w=(1, 9), d=(1, 6)),
        plans="""
            A week has 7 days.
            We multiply the weeks by 7 and add the days.
        """,
        codes=["print($w * 7 {{+||-}} $d)"],
        direct="""
            A week has 7 days, so the answer is \\boxed{$answer}.
            With 7 days in a week we get \\boxed{$answer}.
        """,
    ),
)
