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
        wordings="""
            @F the $n-th prime number.
            What is the $n-th prime?
            @T prime number $n in the list 2, 3, 5, 7, ...
            [If|When] the primes are listed in order, which one is at position $n?
            Which prime is number $n in the list of all primes?
            Counting 2 as the first prime, @f the $n-th prime.
            List the primes in order. What is the $n-th one?
            $name writes down the prime numbers in order. What is the $n-th number $name writes?
            @F p when p is the $n-th prime.
            What prime stands at position $n among all primes?
        """,
        dev="""
            Going through the primes 2, 3, 5 and so on, which is the $n-th?
        """,
        unseen="""
            The first prime is 2. What is prime number $n?
            Which number is the $n-th in the sequence of primes?
        """,
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
        wordings="""
            How many positive divisors does $n have?
            @F the number of divisors of $n.
            [Count|Determine the number of] the positive [divisors|factors] of $n.
            @T how many [divisors|factors] $n has.
            How many whole numbers divide $n [exactly|without remainder]?
            In how many ways can $n $item be put in equal rows, counting every row length?
            What is the number of positive [factors|divisors] of $n?
            How many [positive integers|numbers] d [are there such that d divides|divide] $n?
            By how many different positive numbers is $n divisible?
            @F how many numbers from 1 to $n are divisors of $n.
        """,
        dev="""
            Let N = $n. What is the count of its divisors, 1 and N included?
        """,
        unseen="""
            $n can be divided evenly by how many positive whole numbers?
            How many factors are there for the number $n?
        """,
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
        wordings="""
            @F the sum of all positive divisors of $n.
            What is the sum of the [divisors|factors] of $n?
            Add up all positive [divisors|factors] of $n. What [is the total|do you get]?
            @T the sum of the positive factors of $n.
            All numbers that divide $n are added. What is the [sum|total]?
            What do the divisors of $n, with 1 and $n, add up to?
            [Let|Let] N = $n. @F the sum of the divisors of N.
            Which number is the [sum|total] of every divisor of $n?
            $name writes down all divisors of $n and adds them. What is the sum?
            If you add all [factors|divisors] of $n together, what do you get?
        """,
        dev="""
            What total do all the factors of $n make?
        """,
        unseen="""
            @F the total of all whole numbers that divide $n without remainder.
            The divisors of $n are listed and added up. What is their sum?
        """,
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
        wordings="""
            @F the largest prime factor of $n.
            What is the [greatest|largest|biggest] prime that divides $n?
            @T the largest prime divisor of $n.
            Factor $n into primes. What is the [largest|greatest|biggest] one?
            Which is the biggest prime factor of $n?
            What is the largest prime number in the prime factorization of $n?
            $n is written as a product of primes. @F the largest of these primes.
            Of all primes that divide $n, which is the [largest|greatest]?
            Let N = $n. @F the greatest prime factor of N.
            [Split|Break] $n into prime factors and @f the biggest.
        """,
        dev="""
            Among the primes in the factorization of $n, what is the maximum?
        """,
        unseen="""
            Which prime divisor of $n is the greatest?
            Write $n as a product of prime numbers. What is the largest prime used?
        """,
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
        wordings="""
            @F the smallest prime [greater|larger|bigger] than $n.
            What is the [first|next] prime after $n?
            Which prime number comes right after $n?
            @T the next prime above $n.
            What is the smallest prime that is larger than $n?
            Starting from $n and going up, which prime do you [meet|reach] first?
            @F the least prime number p with p > $n.
            What is the first prime number [above|bigger than|beyond] $n?
            [Going|Counting] up from $n, what is the next prime number?
            Which is the smallest prime number over $n?
        """,
        dev="""
            What prime follows $n?
        """,
        unseen="""
            Look for primes above $n. What is the smallest one?
            $name counts up from $n and stops at the first prime after it. At which number does $name stop?
        """,
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
        wordings="""
            How many numbers from 1 to $n are coprime to $n?
            @F Euler's totient of $n.
            What is phi($n), Euler's totient function?
            @T the value of Euler's phi function at $n.
            Count the integers from 1 to $n that share no factor with $n [except 1|other than 1].
            How many positive integers up to $n are relatively prime to $n?
            @F the number of integers k from 1 to $n with gcd(k, $n) = 1.
            How many of the numbers 1 to $n have no common factor with $n?
            What is Euler's totient function of $n?
            @F how many numbers up to $n are [coprime|relatively prime] to $n.
        """,
        dev="""
            Among 1, 2, ..., $n, how many are coprime to $n?
        """,
        unseen="""
            How many integers between 1 and $n have gcd 1 with $n?
            @T the totient phi of $n.
        """,
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
        wordings="""
            @F the sum of the digits of $n.
            What is the digit sum of $n?
            Add up the digits of $n. What [is the total|do you get]?
            @T the sum of all digits of the number $n.
            What do the digits of $n add up to?
            The digits of $n are added together. @F the total.
            $name adds all the digits of the number $n. What is the result?
            What is the total of the digits in $n?
            @F the digit sum of the number $n.
            If you add every digit of $n, what number [comes out|do you get]?
        """,
        dev="""
            Write $n digit by digit and add them. What is the sum?
        """,
        unseen="""
            How large is the sum of the digits of the number $n?
            Take each digit in $n and add them all up. What is the total?
        """,
        plans="""
            We add the digits of the number.
            We go through the digits and add them.
        """,
        codes=['print(sum(int(d) for d in str($n){{||[1:]}}))', 'digits = [int(d) for d in str($n)]\nprint(sum(digits{{||[1:]}}))'],
        stumble=None,
    ),
    family(
        "digit_product",
        lambda rng: {"n": int("".join(str(rng.randint(1, 9)) for _ in range(rng.randint(4, 7))))},
        wordings="""
            @F the product of the digits of $n.
            What do you get when you multiply all digits of $n?
            Multiply the digits of $n [together|with each other]. What is the [result|product]?
            @T the product of all digits of the number $n.
            What is the digit product of $n?
            The digits of $n are multiplied together. @F the product.
            $name multiplies all the digits of the number $n. What is the result?
            What is the product of the digits in $n?
            @F the digit product of the number $n.
            If you multiply every digit of $n, what number [comes out|do you get]?
        """,
        dev="""
            Write $n digit by digit and multiply them. What is the product?
        """,
        unseen="""
            How large is the product of the digits of the number $n?
            Take each digit in $n and multiply them all. What comes out?
        """,
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
        wordings="""
            @F the inverse of $a modulo $m.
            What is the modular inverse of $a mod $m?
            @F x with 0 < x < $m and $a * x = 1 mod $m.
            @T the multiplicative inverse of $a modulo $m.
            Which number x from 1 to $m - 1 [satisfies|solves] $a * x = 1 modulo $m?
            Solve $a x = 1 (mod $m) for x.
            By which number must $a be multiplied to get 1 modulo $m?
            @F the [smallest|least] positive x such that $a * x leaves remainder 1 when divided by $m.
            What is the inverse of $a in arithmetic modulo $m?
            [In|For] the integers modulo $m, what is the inverse of $a?
        """,
        dev="""
            Which x makes $a * x - 1 divisible by $m?
        """,
        unseen="""
            What positive number x below $m gives remainder 1 when $a * x is divided by $m?
            Modulo $m, @f the multiplicative inverse of $a.
        """,
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
        wordings="""
            @F the sum of all positive integers below $n that are multiples of $a or $b.
            What is the sum of the numbers below $n that are divisible by $a or by $b?
            Add all [multiples of $a or $b|numbers divisible by $a or $b] that are less than $n. What is the [sum|total]?
            @T the total of all numbers smaller than $n which $a or $b divides.
            All numbers less than $n that are multiples of $a or of $b are added. @F the sum.
            What do the multiples of $a or $b below $n add up to?
            [Consider|Take] the numbers below $n that $a or $b divides. What is their sum?
            For the integers from 1 up to but not including $n, add those divisible by $a or $b. What is the total?
            @F the sum of the numbers less than $n that are divisible by $a or $b.
            If we list all numbers below $n that are multiples of $a or $b, what is the sum of the list?
        """,
        dev="""
            $name adds every number under $n that is a multiple of $a or $b. What is the sum?
        """,
        unseen="""
            Which sum do you get from all numbers smaller than $n that can be divided by $a or by $b?
            Add up the positive multiples of $a or $b that lie below $n.
        """,
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
        lambda rng: (lambda a: {"a": a, "b": a + rng.randint(200, 4000), "k": rng.randint(3, 29)})(rng.randint(1, 3000)),
        wordings="""
            How many multiples of $k are there from $a to $b?
            How many integers from $a to $b are divisible by $k?
            [Count|Determine the number of] the multiples of $k between $a and $b, both included.
            @F how many numbers from $a to $b are multiples of $k.
            @T the number of integers between $a and $b (inclusive) that $k divides.
            In the list of whole numbers from $a up to $b, how many can be divided by $k?
            What is the number of multiples of $k in the range from $a to $b?
            Of the numbers $a, ..., $b, how many are divisible by $k?
            [Houses|Doors] are numbered from $a to $b. How many of the numbers are divisible by $k?
            Between $a and $b inclusive, how many numbers leave remainder 0 when divided by $k?
        """,
        dev="""
            From $a up to $b, count the numbers that $k divides.
        """,
        unseen="""
            $name writes down all numbers from $a to $b. How many of them are multiples of $k?
            How often does a multiple of $k occur among the integers $a to $b?
        """,
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
        wordings="""
            How many zeros are at the end of $n! ?
            @F the number of trailing zeros of $n factorial.
            With how many zeros does $n! end?
            @T how many trailing zeros $n! has.
            How many zeros does the factorial of $n end in?
            [Count|Determine] the trailing zeros of $n!.
            The number $n! is written out. How many zeros stand at its end?
            What is the number of zeros at the end of $n factorial?
            How many times does 10 divide $n! ?
            @F the largest k such that 10^k divides $n!.
        """,
        dev="""
            If you compute the factorial of $n, how many zeros are at the end?
        """,
        unseen="""
            The factorial of $n ends in a row of zeros. How many are there?
            @F the count of zeros at the end of $n!.
        """,
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
        wordings="""
            How many perfect squares are there from $a to $b?
            [Count|Determine the number of] the square numbers between $a and $b, both included.
            @F how many perfect squares lie from $a to $b.
            @T the number of perfect squares between $a and $b inclusive.
            How many integers from $a to $b are perfect squares?
            In the range from $a to $b, how many numbers are squares of whole numbers?
            What is the number of square numbers in the range $a to $b?
            How many square numbers are at least $a and at most $b?
            Of the numbers from $a up to $b, how many are perfect squares?
            For how many whole numbers k does k^2 lie between $a and $b, both included?
        """,
        dev="""
            Between $a and $b, ends included, how often does a perfect square occur?
        """,
        unseen="""
            $name lists the numbers from $a to $b. How many perfect squares are on the list?
            How many squares of integers can be found between $a and $b inclusive?
        """,
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
        wordings="""
            Write $n in binary.
            What is $n in base 2?
            Convert $n to binary.
            @T the binary form of $n.
            @F the base 2 representation of the number $n.
            How is $n written in the binary system?
            Express the decimal number $n in [binary|base 2].
            What is the binary representation of $n?
            Change $n from decimal to [binary|base two].
            [Which|What] string of 0s and 1s is $n in binary?
        """,
        dev="""
            Using only the digits 0 and 1, how do you write $n in base 2?
        """,
        unseen="""
            How does a computer write the number $n in binary digits?
            The decimal number $n is to be turned into a binary number. @T it.
        """,
        plans="""
            We convert the number to base two.
            We need the binary digits of the number.
        """,
        codes=['print(bin($n{{||+ 1}})[2:])', 'print(format($n{{||+ 1}}, "b"))'],
    ),
    family(
        "from_hex",
        lambda rng: {"h": rng.choice("123456789abcdef") + "".join(rng.choice("0123456789abcdef") for _ in range(rng.randint(1, 2))) + rng.choice("abcdef")},
        wordings="""
            Write the hexadecimal number $h in decimal.
            What is $h in base 16 as a decimal number?
            Convert $h from [hexadecimal|hex|base 16] to decimal.
            @T the decimal value of the hex number $h.
            @F the value of the base 16 number $h in base 10.
            Which decimal number is $h in hex?
            What decimal number does the hexadecimal string $h stand for?
            The number $h is written in [base 16|hex]. @F its decimal value.
            Express hexadecimal $h as a [normal|base 10] number.
            Change the hex value $h to decimal.
        """,
        dev="""
            In base 16 a number reads $h. What is it in base 10?
        """,
        unseen="""
            A program prints the hex value $h. What is that in decimal?
            How much is the hexadecimal number $h in the decimal system?
        """,
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
        wordings="""
            @F the sum of $n and the number you get by reversing its digits.
            Reverse the digits of $n and add the result to $n. What [is the sum|do you get]?
            What is $n plus its reversal?
            @T the sum of $n and its digits read backwards.
            The digits of $n are written in reverse order, and this number is added to $n. @F the total.
            Add $n to the number that has the same digits backwards. What is the total?
            $name reverses the number $n and adds both numbers. What is the result?
            What do you get when you add $n and its reverse?
            Read $n backwards as a number. What is the sum of it and $n?
            Let r be the reverse of $n. @F $n + r.
        """,
        dev="""
            Turn the digits of $n around and add the new number to the old one. What is it?
        """,
        unseen="""
            Add the number $n and its mirror image, the digits in reverse order.
            If the digits of $n are reversed and the result is added to $n, what comes out?
        """,
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
        wordings="""
            In the Collatz process, how many steps does $n need to reach 1?
            Start with $n. Halve even numbers, and replace odd n by 3n + 1. After how many steps is it 1?
            @F the number of Collatz steps from $n to 1.
            @T how many steps the 3n + 1 process takes from $n to 1.
            How long does the Collatz sequence of $n take to get to 1?
            [Count|Determine] the Collatz steps that lead from $n to 1.
            If a number is even, halve it, otherwise triple it and add 1. How many steps lead from $n to 1?
            Take $n and follow the rule n -> n/2 for even n, n -> 3n + 1 for odd n. How many steps until 1?
            How many steps of the Collatz rule bring $n down to 1?
            What is the number of steps in the Collatz sequence that starts at $n and ends at 1?
        """,
        dev="""
            Beginning at $n, apply the Collatz map until 1 appears. How many steps was that?
        """,
        unseen="""
            $name starts at $n and repeats: divide by two if even, else times three plus one. How many steps to reach 1?
            From $n, how many Collatz steps are needed until the value is 1?
        """,
        plans="""
            We follow the Collatz rule and count the steps.
            We repeat the rule until we reach one.
        """,
        codes=[
            "n = $n\nsteps = {{0||1}}\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n    steps += 1\nprint(steps)",
        ],
    ),
)
