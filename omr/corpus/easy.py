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
        wordings="""
            What is $a + $b?
            @F $a + $b.
            How much is $a plus $b?
            @T the sum of $a and $b.
            Add $a and $b.
            $name has $a $item and finds $b more. How many $item is that?
            There are $a red and $b blue $item. How many $item are there?
            $a birds sit on a tree, and $b more come. How many birds are there now?
            What do you get if you add $b to $a?
            A boy is $a years old. How old is he in $b years?
        """,
        dev="""
            Which number is $b more than $a?
        """,
        unseen="""
            Put $a $item and $b $item in one bag. How many $item are in the bag?
            What is the sum of the two numbers $a and $b?
        """,
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
        wordings="""
            What is $a * $b?
            @F $a * $b.
            How much is $a times $b?
            @T the product of $a and $b.
            Multiply $a by $b.
            $name has $a bags with $b $item each. How many $item is that?
            There are $a rows of $b chairs. How many chairs are there?
            $a boxes hold $b $item each. How many $item do they hold together?
            What do you get if you multiply $b and $a?
            A ticket costs $b coins. What do $a tickets cost?
        """,
        dev="""
            Which number is $a times as large as $b?
        """,
        unseen="""
            In each of $a boats sit $b people. How many people sit in the boats?
            What is the product of the two numbers $a and $b?
        """,
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
        wordings="""
            What is the last digit of $n?
            @F the units digit of $n.
            @T the last digit of the number $n.
            Which digit does $n end in?
            What is the ones digit of $n?
            The number $n ends in which digit?
            $name writes $n. What is the last digit?
            Which digit stands at the end of $n?
            In the number $n, what is the units digit?
            @F the final digit of $n.
        """,
        dev="""
            With which digit does the number $n end?
        """,
        unseen="""
            Look at $n. What is its last digit?
            @T the digit in the ones place of $n.
        """,
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
        wordings="""
            What is the first digit of $n?
            @F the leading digit of $n.
            @T the first digit of the number $n.
            Which digit does $n start with?
            With which digit does the number $n begin?
            The number $n begins with which digit?
            $name writes $n. What is the first digit?
            Which digit stands at the start of $n?
            In the number $n, what is the leading digit?
            @F the digit that $n starts with.
        """,
        dev="""
            Reading $n from the left, what digit comes first?
        """,
        unseen="""
            Look at $n. What is its first digit?
            @T the leftmost digit of $n.
        """,
        plans="""
            We take the first digit.
            This asks for the leading digit.
        """,
        codes=['print(str($n)[{{0||1}}])'],
        direct="""
            We read off the first digit: \\boxed{$answer}.
            The number starts with \\boxed{$answer}.
        """,
    ),
    family(
        "num_digits",
        lambda rng: {"n": rng.randint(10 ** rng.randint(0, 5), 10 ** 6 - 1) if rng.random() < 0.3 else rng.randint(*(lambda d: (10 ** (d - 1), 10**d - 1))(rng.randint(2, 6)))},
        wordings="""
            How many digits does $n have?
            @F the number of digits of $n.
            @T how many digits the number $n has.
            With how many digits is $n written?
            [Count|Determine the number of] the digits of $n.
            What is the number of digits in $n?
            $name writes the number $n. How many digits is that?
            How many digits are in $n?
            The number $n has how many digits?
            How many digits long is the number $n?
        """,
        dev="""
            Written out, how many digits are there in the number $n?
        """,
        unseen="""
            If you write down $n, how many digits do you write?
            What is the length of the number $n in digits?
        """,
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
        wordings="""
            How many legs do $n ${animal}s have?
            @F the number of legs of $n ${animal}s.
            $name has $n ${animal}s. How many legs do they have?
            @T the total number of legs of $n ${animal}s.
            There are $n ${animal}s. How many legs are there?
            If one $animal has $l legs, how many legs do $n ${animal}s have?
            $n ${animal}s stand in a yard. How many legs do you count?
            What is the number of legs that $n ${animal}s have together?
            A picture shows $n ${animal}s. How many legs can be seen?
            How many legs are there on $n ${animal}s?
        """,
        dev="""
            In all, $n ${animal}s walk on how many legs?
        """,
        unseen="""
            $name draws $n ${animal}s with all their legs. How many legs must be drawn?
            Count the legs of $n ${animal}s.
        """,
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
        wordings="""
            How many sides do a $shape and a $other have together?
            @F the number of sides of a $shape plus those of a $other.
            What is the sum of the sides of a $shape and a $other?
            @T how many sides a $shape and a $other have in all.
            $name draws a $shape and a $other. How many sides is that?
            A $shape and a $other have how many corners together?
            Add the number of corners of a $shape and of a $other.
            How many corners do a $shape and a $other have in total?
            There are a $shape and a $other on the table. How many corners are there?
            How many sticks are needed to lay a $shape and a $other, one for each side?
        """,
        dev="""
            Count the sides of a $shape, then the sides of a $other. What is the total?
        """,
        unseen="""
            With one line for each side, how many lines make up a $shape and a separate $other?
            What is the total number of sides in a $shape and a $other?
        """,
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
        wordings="""
            Which is larger, $a or $b?
            @F the larger of $a and $b.
            @T the bigger number of $a and $b.
            What is the maximum of $a and $b?
            Which of the two numbers $a and $b is greater?
            $name has $a $item and $name2 has $b. What is the larger number of $item?
            Of $a and $b, which is the bigger number?
            Compare $a and $b. Which one is larger?
            What is the greater of $a and $b?
            @F max($a, $b).
        """,
        dev="""
            Between the numbers $a and $b, which one is the largest?
        """,
        unseen="""
            One team has $a points, the other has $b points. How many points does the winner have?
            Which number is bigger: $a or $b?
        """,
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
        wordings="""
            How many days are $w weeks and $d days?
            @F the number of days in $w weeks and $d days.
            A trip takes $w weeks and $d days. How many days is that?
            @T $w weeks and $d days in days.
            Convert $w weeks $d days to days.
            $name waits for $w weeks and $d days. How many days is that?
            How many days pass in $w weeks plus $d days?
            A plant needs $w weeks and $d days to grow. How many days does it need?
            Express $w weeks and $d days in days only.
            What is $w weeks and $d days, in days?
        """,
        dev="""
            A holiday of $w weeks and $d days has how many days?
        """,
        unseen="""
            A ship is at sea for $w weeks and $d days. For how many days is it at sea?
            In days, how long are $w weeks and $d days?
        """,
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
