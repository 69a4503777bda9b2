"""Families whose numbers come from the generators of the `reasoning_gym` package.

Its generators draw a problem and know the answer; wording, reasoning and code are this package's. The value `gym_answer`
carries their answer along, so a test can hold our code against an independent one.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from omr.corpus.family import Draw, TwoCalls, Values, family

Entry = dict[str, Any]


@cache
def _dataset(name: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=2**31 - 1, **dict(settings))


def gym(name: str, read: Callable[[Entry], Values], **settings: Any) -> Draw:
    """Values read from an entry of the dataset `name`, drawn at random."""

    def draw(rng: Random) -> Values:
        entry = _dataset(name, tuple(settings.items()))[rng.randrange(2**31 - 1)]
        return {"gym_answer": str(entry["answer"]), **read(entry)}

    return draw


def _two_numbers(entry: Entry) -> Values:
    a, b = entry["metadata"]["numbers"]
    return {"a": a, "b": b}


def _primes(entry: Entry) -> Values:
    return {"a": entry["metadata"]["start"], "b": entry["metadata"]["end"]}


def _bits(entry: Entry) -> Values:
    return {"n": entry["metadata"]["number"]}


def _base(entry: Entry) -> Values:
    data = entry["metadata"]
    return {"s": data["source_repr"], "b": data["source_base"], "gym_answer": str(data["decimal_value"])}


def _fraction(entry: Entry) -> Values:
    data = entry["metadata"]
    answer = f"{data['simplified_numerator']}/{data['simplified_denominator']}".removesuffix("/1")
    return {"a": data["numerator"], "b": data["denominator"], "gym_answer": answer}


def _expression(entry: Entry) -> Values:
    return {"e": entry["metadata"]["expression"]}


def _legs(entry: Entry) -> Values:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    animals = entry["metadata"]["animals"]
    return {
        "zoo": [f"{count} {_plural(name)}" for name, count in animals.items()],
        "pairs": ", ".join(f"({count}, {ANIMALS[name]})" for name, count in animals.items()),
    }


def _plural(name: str) -> str:
    if name in ("sheep", "deer", "jellyfish", "starfish", "shrimp"):
        return name
    if name == "woodlouse":
        return "woodlice"
    return name[:-1] + "ies" if name[-1] == "y" else name + ("es" if name.endswith(("ch", "s")) else "s")


def _letters(entry: Entry) -> Values:
    return {"c": entry["metadata"]["target_letter"], "t": " ".join(entry["metadata"]["span"])}


def _products(entry: Entry) -> Values:
    a, b = entry["metadata"]["expression"].split(" * ")
    return {"a": int(a), "b": int(b)}


def same_answer(ours: str, gym_answer: str) -> bool:
    """Whether the package's answer is ours, whatever its notation."""
    theirs = gym_answer.strip("$")
    if ours == theirs:
        return True
    try:
        return bool(abs(float(ast.literal_eval(ours)) - float(ast.literal_eval(theirs))) < 1e-9)
    except (ValueError, SyntaxError):
        return False


FAMILIES = (
    family(
        "gcd",
        gym("gcd", _two_numbers, min_value=24, max_value=3000),
        plans="""
            We need the greatest common divisor.
            This asks for the gcd of the two numbers.
        """,
        codes=[
            "import math\nprint(math.{{gcd||lcm}}($a, $b))",
            "from math import gcd, lcm\nprint({{gcd||lcm}}($a, $b))",
        ],
    ),
    family(
        "lcm",
        gym("lcm", _two_numbers, min_value=6, max_value=400),
        plans="""
            We need the least common multiple.
            This asks for the lcm of the two numbers.
        """,
        codes=[
            "import math\nprint(math.{{lcm||gcd}}($a, $b))",
            "from math import gcd\nprint($a * $b // {{gcd($a, $b)||gcd($a, $a)}})",
        ],
    ),
    family(
        "count_primes",
        gym("count_primes", _primes, min_n=1, max_n=4000),
        plans="""
            We test every number of the range for being prime.
            We count the primes in the range.
        """,
        codes=[
            "def is_prime(k):\n    return k > 1 and all(k % d for d in range(2, int(k ** 0.5) + 1))\n\nprint(sum(is_prime(k) for k in range($a, $b{{ + 1|| - 9}})))",
        ],
    ),
    family(
        "count_bits",
        gym("count_bits", _bits, min_n=100, max_n=99999),
        plans="""
            We write the number in binary and count the ones.
            We count the one bits.
        """,
        codes=[
            'print(bin($n).count("{{1||0}}"))',
            TwoCalls(
                first="print(bin($n)[2:])",
                between="Now count the ones in $out.",
                second='print("$out".count("{{1||0}}"))',
            ),
        ],
    ),
    family(
        "base_to_decimal",
        gym("base_conversion", _base, min_base=3, max_base=9, min_value=100, max_value=9999),
        plans="""
            We read the digits in the given base.
            We convert from the given base to decimal.
        """,
        codes=[
            'print(int("$s", $b{{|| + 1}}))',
            'n = 0\nfor d in "$s":\n    n = n * ($b{{|| + 1}}) + int(d)\nprint(n)',
        ],
    ),
    family(
        "simplify_fraction",
        gym("fraction_simplification", _fraction, min_value=2, max_value=60, min_factor=2, max_factor=40),
        plans="""
            We divide top and bottom by their greatest common divisor.
            An exact fraction is reduced by itself.
        """,
        codes=[
            "from fractions import Fraction\nprint(Fraction({{$a, $b||$b, $a}}))",
            'import math\na, b = {{$a, $b||$b, $a}}\ng = math.gcd(a, b)\nprint(f"{a // g}/{b // g}".removesuffix("/1"))',
        ],
    ),
    family(
        "decimal_sum",
        gym(
            "decimal_chain_sum", _expression, min_terms=2, max_terms=3, min_digits=1, max_digits=3, max_decimal_places=2
        ),
        plans="""
            We use exact decimals.
            Decimal numbers need exact arithmetic.
        """,
        codes=[
            'from decimal import Decimal\nterms = "$e".replace("- ", "-").replace("+ ", "").split()\nprint(sum(Decimal(t) for t in terms{{||[1:]}}))',
        ],
    ),
    family(
        "zoo_legs",
        gym("leg_counting", _legs, min_animals=2, max_animals=3, min_instances=2, max_instances=40),
        plans="""
            We multiply each count by the legs of that animal and add.
            Each animal has its own number of legs.
        """,
        codes=[
            "print(sum(n {{*||+}} legs for n, legs in [$pairs]))",
            "total = 0\nfor n, legs in [$pairs]:\n    total += n {{*||+}} legs\nprint(total)",
        ],
    ),
    family(
        "letter_count",
        gym("letter_counting", _letters, min_words=3, max_words=4),
        plans="""
            We count a letter in a text.
            We count without regard to upper case.
        """,
        codes=[
            'print("$t".lower().count("$c"){{|| + 1}})',
            'text = "$t"\nprint(sum(1 for x in text.lower() if x {{==||!=}} "$c"))',
        ],
    ),
    family(
        "big_product",
        gym("products", _products, min_terms=2, max_terms=2, min_digits=3, max_digits=4),
        plans="""
            We multiply two large numbers.
            This is a product of two numbers.
        """,
        codes=["print($a {{*||+}} $b)", "x = $a\ny = $b\nprint(x {{*||+}} y)"],
    ),
)
