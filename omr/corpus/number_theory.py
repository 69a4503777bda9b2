"""Divisors, primes, digits, residues."""

from __future__ import annotations

import math
from random import Random

from omr.corpus.family import Stumble, TwoCalls, Values, family, ints


def _range(low: int, high: int, width: int) -> object:
    def draw(rng: Random) -> Values:
        a = rng.randint(low, high)
        return {"a": a, "b": a + rng.randint(width // 4, width)}

    return draw


def _inverse(rng: Random) -> Values:
    while True:
        a, m = rng.randint(3, 150), rng.randint(11, 300)
        if a < m and math.gcd(a, m) == 1:
            return {"a": a, "m": m}


def _coprime_pair(rng: Random) -> Values:
    a = rng.randint(2, 9)
    b = rng.choice([x for x in range(3, 20) if x != a])
    return {"a": a, "b": b, "n": rng.randint(60, 999)}


FAMILIES = (
    family(
        "nth_prime",
        ints(n=(6, 600)),
        plans="""
            We count primes until we reach the wanted position.
            We need the prime at a given position.
        """,
        codes=[
            "def is_prime(k):\n    return all(k % d for d in range(2, int(k ** 0.5) + 1))\n\ncount = 0\nk = 1\nwhile count < $n{{|| - 1}}:\n    k += 1\n    if is_prime(k):\n        count += 1\nprint(k)",
        ],
    ),
    family(
        "num_divisors",
        ints(n=(100, 9999)),
        plans="""
            We count the divisors of the number.
            We try every possible divisor and count those that divide.
        """,
        codes=[
            "print(sum(1 for d in range(1, $n{{ + 1||}}) if $n % d == 0))",
            "count = 0\nfor d in range(1, $n{{ + 1||}}):\n    if $n % d == 0:\n        count += 1\nprint(count)",
        ],
    ),
    family(
        "sum_divisors",
        ints(n=(60, 2999)),
        plans="""
            We add all the divisors of the number.
            We need the sum of the divisors.
        """,
        codes=[
            "print(sum(d for d in range(1, $n{{ + 1||}}) if $n % d == 0))",
            "total = 0\nfor d in range(1, $n{{ + 1||}}):\n    if $n % d == 0:\n        total += d\nprint(total)",
        ],
    ),
    family(
        "largest_prime_factor",
        ints(n=(200, 99999)),
        plans="""
            We divide out the prime factors and keep the largest.
            We need the prime factors of the number.
        """,
        codes=[
            "n = $n\nfactors = []\nd = 2\nwhile n > 1:\n    while n % d == 0:\n        factors.append(d)\n        n //= d\n    d += 1\nprint({{max||min}}(factors))",
        ],
    ),
    family(
        "next_prime",
        ints(n=(100, 20000)),
        plans="""
            We go up until we find a prime.
            We need the next prime above the number.
        """,
        codes=[
            "def is_prime(k):\n    return all(k % d for d in range(2, int(k ** 0.5) + 1))\n\nk = $n + 1\nwhile not is_prime(k):\n    k += {{1||-1}}\nprint(k)",
        ],
    ),
    family(
        "totient",
        ints(n=(50, 2500)),
        plans="""
            We count the numbers that are coprime to the given one.
            This is the totient, so we count gcd equal to one.
        """,
        codes=[
            "import math\nprint(sum(1 for k in range(1, $n + 1) if math.gcd(k, $n) {{== 1||> 1}}))",
            "from math import gcd\ncount = 0\nfor k in range(1, $n + 1):\n    if gcd(k, $n) {{== 1||> 1}}:\n        count += 1\nprint(count)",
        ],
    ),
    family(
        "digit_sum",
        ints(n=(10000, 99999999)),
        plans="""
            We add the digits of the number.
            We go through the digits and add them.
        """,
        codes=[
            "print(sum(int(d) for d in str($n){{||[1:]}}))",
            "digits = [int(d) for d in str($n)]\nprint(sum(digits{{||[1:]}}))",
        ],
        stumble=None,
    ),
    family(
        "digit_product",
        lambda rng: {"n": int("".join(str(rng.randint(1, 9)) for _ in range(rng.randint(4, 7))))},
        plans="""
            We multiply the digits of the number.
            We go through the digits and multiply them.
        """,
        codes=[
            "import math\nprint(math.prod(int(d) for d in str($n){{||[1:]}}))",
            "product = 1\nfor d in str($n){{||[1:]}}:\n    product *= int(d)\nprint(product)",
        ],
    ),
    family(
        "mod_inverse",
        _inverse,
        plans="""
            We need the inverse modulo a number.
            This asks for a modular inverse.
        """,
        codes=[
            "print(pow($a, {{-1||-2}}, $m))",
            "for x in range(1, $m):\n    if $a * x % $m == {{1||$m - 1}}:\n        print(x)\n        break",
        ],
    ),
    family(
        "multiples_sum",
        _coprime_pair,
        plans="""
            We add the numbers below the limit that one of the two divides.
            We go through all numbers below the limit and test both divisors.
        """,
        codes=[
            "print(sum(k for k in range(1, $n) if k % $a == 0 {{or||and}} k % $b == 0))",
            "total = 0\nfor k in range(1, $n):\n    if k % $a == 0 {{or||and}} k % $b == 0:\n        total += k\nprint(total)",
        ],
    ),
    family(
        "multiples_count",
        lambda rng: (lambda a: {"a": a, "b": a + rng.randint(200, 4000), "k": rng.randint(3, 29)})(
            rng.randint(1, 3000)
        ),
        plans="""
            We count the multiples in the range.
            We test every number of the range for divisibility.
        """,
        codes=[
            "print(sum(1 for n in range($a, {{$b + 1||$b - $k}}) if n % $k == 0))",
            "print($b // $k - {{($a - 1)||($a + $k)}} // $k)",
        ],
    ),
    family(
        "factorial_zeros",
        ints(n=(20, 2500)),
        plans="""
            We count the factors of five in the factorial.
            The trailing zeros come from factors of five.
        """,
        codes=[
            "count = 0\np = 5\nwhile p <= $n:\n    count += $n // p\n    p *= {{5||10}}\nprint(count)",
        ],
    ),
    family(
        "squares_between",
        lambda rng: (lambda a: {"a": a, "b": a + rng.randint(500, 90000)})(rng.randint(2, 9000)),
        plans="""
            We count the perfect squares with integer square roots.
            The integer square root counts the squares up to a number.
        """,
        codes=[
            "import math\nprint(math.isqrt($b) - math.isqrt($a{{ - 1||* 2}}))",
            "import math\nlow = math.isqrt($a{{ - 1||* 2}})\nhigh = math.isqrt($b)\nprint(high - low)",
        ],
    ),
    family(
        "to_binary",
        ints(n=(40, 9999)),
        plans="""
            We convert the number to base two.
            We need the binary digits of the number.
        """,
        codes=["print(bin($n{{||+ 1}})[2:])", 'print(format($n{{||+ 1}}, "b"))'],
    ),
    family(
        "from_hex",
        lambda rng: {
            "h": rng.choice("123456789abcdef")
            + "".join(rng.choice("0123456789abcdef") for _ in range(rng.randint(1, 2)))
            + rng.choice("abcdef")
        },
        plans="""
            We convert a hexadecimal number to decimal.
            We read the digits in base sixteen.
        """,
        codes=['print(int("$h", {{16||15 + 2}}))', 'n = int("$h", {{16||15 + 2}})\nprint(n)'],
        stumble=Stumble(
            code='print(int("$h"))', remark="That failed because the digits are not decimal. We must give the base."
        ),
    ),
    family(
        "reverse_gap",
        ints(n=(1000, 99999)),
        plans="""
            We reverse the digits and add the two numbers.
            We need the reversed number and then a sum.
        """,
        codes=[
            "n = $n\nr = int(str(n)[::-1])\nprint(n {{+||-}} r)",
            TwoCalls(
                first="print(int(str($n)[::-1]))",
                between="The reversed number is $out. Now add the two.",
                second="print($n {{+||-}} $out)",
            ),
        ],
    ),
    family(
        "collatz",
        ints(n=(6, 3000)),
        plans="""
            We follow the Collatz rule and count the steps.
            We repeat the rule until we reach one.
        """,
        codes=[
            "n = $n\nsteps = {{0||1}}\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n    steps += 1\nprint(steps)",
        ],
    ),
)
