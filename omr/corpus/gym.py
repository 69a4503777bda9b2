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
        wordings="""
            @F the [greatest common divisor|gcd] of $a and $b.
            What is the [greatest common divisor|greatest common factor|gcd] of $a and $b?
            @F gcd($a, $b).
            @T the largest number that divides both $a and $b.
            What is the [largest|biggest] integer that divides $a and $b without remainder?
            $a red and $b blue $item are put in equal bags with nothing left over. What is the largest possible number of bags?
            Simplifying the fraction $a/$b, by which largest number can you divide top and bottom?
            The numbers $a and $b have some common divisors. Which is the greatest?
            A floor of $a by $b is covered with equal square tiles of whole size. What is the largest side of a tile?
            @F the greatest common factor of the two numbers $a and $b.
        """,
        dev="""
            Which is the greatest whole number that is a divisor of $a and also of $b?
        """,
        unseen="""
            Two ropes of $a and $b meters are cut into equal pieces, as long as possible, with no rest. How long is a piece?
            @F the highest common factor of $a and $b.
        """,
        plans="""
            We need the greatest common divisor.
            This asks for the gcd of the two numbers.
        """,
        codes=["import math\nprint(math.{{gcd||lcm}}($a, $b))", "from math import gcd, lcm\nprint({{gcd||lcm}}($a, $b))"],
    ),
    family(
        "lcm",
        gym("lcm", _two_numbers, min_value=6, max_value=400),
        wordings="""
            @F the [least common multiple|lcm] of $a and $b.
            What is the [least common multiple|smallest common multiple|lcm] of $a and $b?
            @F lcm($a, $b).
            @T the smallest number that both $a and $b divide.
            What is the [smallest|least] positive integer divisible by $a and by $b?
            One bell rings every $a minutes and another every $b minutes. They ring together now. After how many minutes do they ring together again?
            Two lights flash every $a and every $b seconds. They flash together now. In how many seconds does this happen next?
            The numbers $a and $b have many common multiples. Which is the smallest?
            Buses leave every $a and every $b minutes, now both at once. After how many minutes do both leave at once again?
            @F the lowest common multiple of the two numbers $a and $b.
        """,
        dev="""
            Which is the least positive number that is a multiple of $a and also of $b?
        """,
        unseen="""
            $name visits every $a days and $name2 every $b days. Today both came. After how many days do both come on the same day again?
            @F the smallest number that is divisible by both $a and $b.
        """,
        plans="""
            We need the least common multiple.
            This asks for the lcm of the two numbers.
        """,
        codes=["import math\nprint(math.{{lcm||gcd}}($a, $b))", "from math import gcd\nprint($a * $b // {{gcd($a, $b)||gcd($a, $a)}})"],
    ),
    family(
        "count_primes",
        gym("count_primes", _primes, min_n=1, max_n=4000),
        wordings="""
            How many primes are there from $a to $b?
            How many prime numbers lie between $a and $b, both included?
            [Count|Determine the number of] the primes from $a to $b.
            @F the number of primes p with $a <= p <= $b.
            @T how many prime numbers there are between $a and $b inclusive.
            How many integers from $a to $b are prime?
            In the list of whole numbers from $a up to $b, how many are prime numbers?
            What is the number of primes in the range $a to $b?
            Of the numbers $a, ..., $b, how many are prime?
            How many prime numbers are at least $a and at most $b?
        """,
        dev="""
            From $a up to $b, how often do we meet a prime number?
        """,
        unseen="""
            $name writes down all numbers from $a to $b. How many of them are prime?
            How many primes can be found in the interval from $a to $b, ends included?
        """,
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
        wordings="""
            How many ones are in the binary form of $n?
            How many 1 bits does the number $n have in binary?
            [Count|Determine] the digits 1 in the binary representation of $n.
            @F the number of ones when $n is written in base 2.
            @T how many 1s there are in $n written in binary.
            Write $n in binary. How many times does the digit 1 occur?
            What is the number of 1 bits of $n?
            How often does 1 appear in the base 2 form of $n?
            The number $n is written in base 2. How many of its digits are 1?
            @F the count of set bits in $n.
        """,
        dev="""
            In base 2, how many digits of $n are equal to 1?
        """,
        unseen="""
            A computer stores $n as bits. How many of these bits are 1?
            If $n is converted to binary, how many ones do you see?
        """,
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
        wordings="""
            Convert $s from base $b to decimal.
            What is the base $b number $s in decimal?
            @F the decimal value of $s in base $b.
            @T the value of the number $s, which is written in base $b, in base 10.
            The number $s is written in base $b. What is it in base 10?
            Which decimal number does $s in base $b stand for?
            Express the base $b number $s as a [normal|decimal] number.
            What is the decimal value of $s when read in base $b?
            In base $b a number is written as $s. @F it in base 10.
            Change $s from base $b to base 10.
        """,
        dev="""
            Read $s as a number in base $b. How much is it in the decimal system?
        """,
        unseen="""
            On a planet people count in base $b and write $s. What number do they mean, in decimal?
            Turn the base $b numeral $s into a decimal number.
        """,
        plans="""
            We read the digits in the given base.
            We convert from the given base to decimal.
        """,
        codes=['print(int("$s", $b{{|| + 1}}))', 'n = 0\nfor d in "$s":\n    n = n * ($b{{|| + 1}}) + int(d)\nprint(n)'],
    ),
    family(
        "simplify_fraction",
        gym("fraction_simplification", _fraction, min_value=2, max_value=60, min_factor=2, max_factor=40),
        wordings="""
            Simplify the fraction $a/$b.
            Write $a/$b in lowest terms.
            Reduce the fraction $a/$b [to lowest terms|as far as possible].
            @T the fraction $a/$b in lowest terms.
            What is $a/$b in lowest terms?
            @F the simplest form of $a/$b.
            What is the reduced form of the fraction $a/$b?
            Cancel common factors in $a/$b. What fraction is left?
            Bring $a/$b to its lowest terms.
            Express the fraction $a/$b in its simplest form.
        """,
        dev="""
            After canceling, what does the fraction $a/$b become?
        """,
        unseen="""
            Shorten the fraction $a/$b until no common factor is left.
            Of $b $item, $a are red. What fraction is that, in lowest terms?
        """,
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
        gym("decimal_chain_sum", _expression, min_terms=2, max_terms=3, min_digits=1, max_digits=3, max_decimal_places=2),
        wordings="""
            @F $e.
            What is $e?
            How much is $e?
            @T the value of $e.
            [Evaluate|Compute] $e exactly.
            What do you get for $e?
            $name types $e. What [should the result be|is the result]?
            @F the exact value of $e.
            [Evaluate|Work out] the decimal expression $e.
            What number is $e?
        """,
        dev="""
            How large is the number $e?
        """,
        unseen="""
            A bill shows $e. What is the result?
            Calculate with decimals: $e.
        """,
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
        wordings="""
            How many legs are there in total: $zoo?
            A zoo has these animals: $zoo. How many legs do they have in all?
            @F the total number of legs of $zoo.
            @T how many legs these animals have together: $zoo.
            There are $zoo. How many legs are there altogether?
            $name counts the legs of $zoo. What is the total?
            [Add up|Count] the legs of these animals: $zoo.
            What is the number of legs of $zoo taken together?
            In a park live $zoo. How many legs is that?
            If you have $zoo, how many legs do you have in total?
        """,
        dev="""
            How many legs walk around if $zoo are there?
        """,
        unseen="""
            On a farm we see $zoo. What is the total number of their legs?
            Sum the legs over all of these animals: $zoo.
        """,
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
        wordings="""
            How many times does the letter "$c" occur in "$t"?
            [Count|Determine how often] the letter "$c" in the text "$t".
            @F how often the letter "$c" appears in "$t".
            @T the number of letters "$c" in "$t".
            In "$t", how many times is the letter "$c" used?
            How many of the letters in "$t" are "$c"?
            What is the count of "$c" in the text "$t"?
            $name writes "$t". How many times is the letter "$c" written?
            The text is "$t". How often does "$c" appear in it?
            How many letters "$c" are there in "$t"?
        """,
        dev="""
            Going through "$t", how many times do we see the letter "$c"?
        """,
        unseen="""
            Look for the letter "$c" in "$t". How many are there?
            Somebody typed "$t". How often was the key "$c" pressed?
        """,
        plans="""
            We count a letter in a text.
            We count without regard to upper case.
        """,
        codes=['print("$t".lower().count("$c"){{|| + 1}})', 'text = "$t"\nprint(sum(1 for x in text.lower() if x {{==||!=}} "$c"))'],
    ),
    family(
        "big_product",
        gym("products", _products, min_terms=2, max_terms=2, min_digits=3, max_digits=4),
        wordings="""
            @F $a * $b.
            What is $a times $b?
            Multiply $a by $b.
            @T the product of $a and $b.
            How much is $a × $b?
            A $place orders $a boxes with $b $item each. How many $item is that?
            What is the area of a field of $a by $b meters?
            [Work out|Compute] the product $a * $b.
            What do you get when you multiply $a and $b?
            There are $a rows with $b seats in each row. How many seats are there?
        """,
        dev="""
            Which number is $a times as large as $b?
        """,
        unseen="""
            A printer makes $b pages an hour. How many pages does it make in $a hours?
            What is the result of multiplying $a with $b?
        """,
        plans="""
            We multiply two large numbers.
            This is a product of two numbers.
        """,
        codes=["print($a {{*||+}} $b)", "x = $a\ny = $b\nprint(x {{*||+}} y)"],
    ),
)
