"""Equations, polynomials and sequences given by a rule."""

from __future__ import annotations

from random import Random

from omr.corpus.family import TwoCalls, Values, family, ints


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
        wordings="""
            Solve $a*x + $b = $c for x.
            @F x if $a x + $b = $c.
            What is x in the equation $a*x + $b = $c?
            @T the solution x of $a * x + $b = $c.
            [I think|$name thinks] of a number, multiply it by $a and add $b. The result is $c. What is the number?
            $a times a number plus $b is $c. What is the number?
            For which x is $a x + $b equal to $c?
            A taxi costs $b coins plus $a coins for each mile. A ride costs $c coins. How many miles is the ride?
            $name pays $b coins to enter and $a coins for each game, $c coins in all. How many games does $name play?
            If a number is multiplied by $a and then $b is added, the result is $c. @F the number.
        """,
        dev="""
            When $b is added to $a times some number we get $c. Which number is it?
        """,
        unseen="""
            The equation $a x + $b = $c has one solution. What is it?
            A phone plan costs $b coins a month and $a coins for each call. The bill is $c coins. How many calls were made?
        """,
        plans="""
            We solve a linear equation: subtract, then divide.
            First take away the constant, then divide by the factor.
        """,
        codes=["print(($c {{-||+}} $b) // $a)", "right = $c {{-||+}} $b\nprint(right // $a)"],
    ),
    family(
        "linear_both_sides",
        _both_sides,
        wordings="""
            Solve $a*x + $b = $c*x + $d for x.
            @F x if $a x + $b = $c x + $d.
            What is x in the equation $a x + $b = $c x + $d?
            @T the solution of $a*x + $b = $c*x + $d.
            For which x are $a x + $b and $c x + $d equal?
            $a times a number plus $b is the same as $c times the number plus $d. What is the number?
            Where do the lines y = $a x + $b and y = $c x + $d meet? @T the x coordinate.
            Plan A costs $b coins plus $a coins a day. Plan B costs $d coins plus $c coins a day. After how many days do they cost the same?
            $name has $b $item and gets $a more each day. $name2 has $d $item and gets $c more each day. After how many days do they have equally many?
            At which x does $a*x + $b equal $c*x + $d?
        """,
        dev="""
            The expressions $a x + $b and $c x + $d have the same value. What must x be?
        """,
        unseen="""
            @F the number x that makes $a x + $b = $c x + $d true.
            One tank has $b liters and gains $a liters an hour, another has $d liters and gains $c liters an hour. After how many hours do they hold the same?
        """,
        plans="""
            We collect x on one side and divide.
            Both sides have x, so we subtract and then divide.
        """,
        codes=["print(($d - $b) // ($a {{-||+}} $c))", "top = $d - $b\nbottom = $a {{-||+}} $c\nprint(top // bottom)"],
    ),
    family(
        "linear_system",
        _system,
        wordings="""
            Solve $a x + $b y = $e and $c x + $d y = $f. What is x + y?
            @F x + y if $a*x + $b*y = $e and $c*x + $d*y = $f.
            The equations $a x + $b y = $e and $c x + $d y = $f hold. @T x + y.
            What is the sum x + y for the system $a x + $b y = $e, $c x + $d y = $f?
            Two numbers x and y satisfy $a x + $b y = $e and $c x + $d y = $f. What is their sum?
            If $a x + $b y = $e while $c x + $d y = $f, what is x + y?
            $a pens and $b books cost $e coins, $c pens and $d books cost $f coins. What do one pen and one book cost together?
            Given $a*x + $b*y = $e and $c*x + $d*y = $f, @f the sum of x and y.
            $name pays $e coins for $a apples and $b pears, and $f coins for $c apples and $d pears. What is the price of an apple plus a pear?
            Let x and y solve $a x + $b y = $e and $c x + $d y = $f. What is x + y?
        """,
        dev="""
            From $a x + $b y = $e and $c x + $d y = $f, what does x + y come to?
        """,
        unseen="""
            A system has the two equations $a x + $b y = $e and $c x + $d y = $f. Add its solutions x and y.
            $a cups and $b plates cost $e coins. $c cups and $d plates cost $f coins. @F the cost of one cup and one plate.
        """,
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
        wordings="""
            @F the larger root of x^2 - $p x + $q = 0.
            Solve x^2 - $p*x + $q = 0. What is the larger solution?
            What is the [greater|bigger] root of the equation x^2 - $p x + $q = 0?
            @T the larger solution of x^2 - $p*x + $q = 0.
            Two numbers have the sum $p and the product $q. What is the larger one?
            The sum of two numbers is $p and their product is $q. @F the larger number.
            Which is the largest x with x^2 - $p x + $q = 0?
            A rectangle has area $q, and its length plus its width is $p. How long is the longer side?
            The quadratic x^2 - $p x + $q has two roots. @F the greater one.
            At which larger x does x^2 - $p*x + $q become 0?
        """,
        dev="""
            Of the two solutions of x^2 - $p x + $q = 0, which is the bigger number?
        """,
        unseen="""
            $name chooses two numbers. Added they give $p, multiplied they give $q. What is the larger of them?
            The equation x^2 - $p x + $q = 0 has two solutions. @T the greater solution.
        """,
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
        wordings="""
            @F $a x^2 + $b x + $c at x = $x.
            What is the value of $a*x^2 + $b*x + $c for x = $x?
            Let f(x) = $a x^2 + $b x + $c. What is f($x)?
            @T f($x) for f(x) = $a x^2 + $b x + $c.
            If x = $x, what is $a x^2 + $b x + $c?
            Plug x = $x into $a x^2 + $b x + $c. What do you get?
            The function f(x) = $a*x^2 + $b*x + $c is given. @F f($x).
            [Evaluate|Compute] the polynomial $a x^2 + $b x + $c when x is $x.
            For f(x) = $a x^2 + $b x + $c, @f the value at $x.
            What value does $a x^2 + $b x + $c take at x = $x?
        """,
        dev="""
            With x equal to $x, how much is $a x^2 + $b x + $c?
        """,
        unseen="""
            Replace x by $x in the expression $a x^2 + $b x + $c and @f its value.
            A function is given by f(x) = $a x^2 + $b x + $c. Which number is f($x)?
        """,
        plans="""
            We put the value of x into the polynomial.
            We evaluate the polynomial at the given point.
        """,
        codes=["x = {{$x||-$x}}\nprint($a * x ** 2 + $b * x + $c)", "def f(x):\n    return $a * x * x {{+||-}} $b * x + $c\n\nprint(f($x))"],
    ),
    family(
        "composition",
        ints(a=(2, 15), b=(2, 40), c=(2, 20), x=(3, 30)),
        wordings="""
            Let f(x) = $a x + $b and g(x) = x^2 + $c. @F f(g($x)).
            What is f(g($x)) if f(x) = $a*x + $b and g(x) = x^2 + $c?
            The functions f(x) = $a x + $b and g(x) = x^2 + $c are given. @T f(g($x)).
            For f(x) = $a x + $b and g(x) = x^2 + $c, @f f(g($x)).
            If f(x) = $a x + $b and g(x) = x^2 + $c, what is f(g($x))?
            Given f(x) = $a*x + $b and g(x) = x^2 + $c, what is the value of f(g($x))?
            Apply g(x) = x^2 + $c to $x and then f(x) = $a x + $b to the result. What [comes out|do you get]?
            @F the value of f(g(x)) at x = $x with f(x) = $a x + $b and g(x) = x^2 + $c.
            With f(x) = $a x + $b and g(x) = x^2 + $c, [evaluate|compute] f(g($x)).
            Suppose f(x) = $a x + $b, and suppose g(x) = x^2 + $c. @T f(g($x)).
        """,
        dev="""
            Two functions: f(x) = $a x + $b, g(x) = x^2 + $c. How much is f(g($x))?
        """,
        unseen="""
            We define f(x) = $a x + $b and g(x) = x^2 + $c. Which number is f(g($x))?
            f(x) = $a*x + $b, g(x) = x^2 + $c. Put $x into g, then put the result into f. What is the value?
        """,
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
        wordings="""
            Two numbers have the sum $s and the difference $d. What is the larger number?
            The sum of two numbers is $s and their difference is $d. @F the larger one.
            @F the larger of two numbers with sum $s and difference $d.
            $name and $name2 have $s $item together. $name has $d more than $name2. How many $item does $name have?
            Two numbers add up to $s and differ by $d. @T the [bigger|larger] number.
            Together two books cost $s coins, and one costs $d coins more than the other. What does the more expensive one cost?
            If x + y = $s and x - y = $d, what is x?
            x plus y is $s and x minus y is $d. @F x.
            A rope of length $s is cut into two pieces, one $d longer than the other. How long is the longer piece?
            What is the greater of two numbers whose sum is $s and whose difference is $d?
        """,
        dev="""
            Two numbers total $s. One is $d more than the other. What is the bigger one?
        """,
        unseen="""
            Adding two numbers gives $s, subtracting them gives $d. Which is the larger number?
            Two classes have $s students together, and the first has $d students more than the second. How many students are in the first class?
        """,
        plans="""
            The larger number is half of the sum plus the difference.
            We know the sum and the difference of two numbers.
        """,
        codes=["print(($s {{+||-}} $d) // 2)", "x = ($s {{+||-}} $d) // 2\nprint(x)"],
    ),
    family(
        "recurrence",
        ints(s=(2, 9), a=(2, 4), b=(1, 30), n=(5, 14)),
        wordings="""
            A sequence starts with $s, and each next term is $a times the last plus $b. What is term number $n?
            Let a_1 = $s and a_(k+1) = $a a_k + $b. @F a_$n.
            The first term is $s. Every term is multiplied by $a and then $b is added to get the next. @F term $n.
            @T term $n of the sequence with first term $s where each term is $a times the one before plus $b.
            A sequence has x_1 = $s and x_(k+1) = $a * x_k + $b. What is x_$n?
            Start with $s as term 1. To get the next term, multiply by $a and add $b. What is term $n?
            In a sequence term 1 is $s, and the next term is always $a times the term plus $b. What is the $n-th term?
            If a_1 = $s and a_(k+1) = $a*a_k + $b, what is a_$n?
            @F the $n-th term of the sequence that begins with $s and follows the rule: times $a, plus $b.
            What is the $n-th term when the first term is $s and each term is multiplied by $a and increased by $b to give the next?
        """,
        dev="""
            The rule times $a plus $b gives each new term, beginning at $s as the first. Which number is the $n-th term?
        """,
        unseen="""
            $name writes $s first and then always writes $a times the last number plus $b. What is the $n-th number?
            A sequence is defined by a_1 = $s and a_(k+1) = $a a_k + $b. @T a_$n.
        """,
        plans="""
            We start with the first term and repeat the rule.
            We apply the rule in a loop.
        """,
        codes=["x = $s\nfor k in range($n{{ - 1||}}):\n    x = $a * x + $b\nprint(x)"],
    ),
    family(
        "fibonacci_mod",
        ints(n=(12, 400), m=(7, 999)),
        wordings="""
            @F the $n-th Fibonacci number modulo $m.
            What is the remainder when the $n-th Fibonacci number is divided by $m?
            Let F_1 = F_2 = 1 be the Fibonacci numbers. @F F_$n mod $m.
            @T the remainder of Fibonacci number $n [on division by|divided by] $m.
            The Fibonacci sequence begins 1, 1, 2, 3, 5. What is its $n-th term modulo $m?
            What remainder does Fibonacci number $n leave when divided by $m?
            @F Fibonacci number $n mod $m, where the sequence starts 1, 1, 2.
            Reduce the $n-th Fibonacci number modulo $m. What [is it|do you get]?
            If F(1) = F(2) = 1 and F(k) = F(k-1) + F(k-2), what is F($n) mod $m?
            Divide the $n-th Fibonacci number by $m. What is left over?
        """,
        dev="""
            Take Fibonacci number $n and divide it by $m. What is the remainder?
        """,
        unseen="""
            In the sequence 1, 1, 2, 3, 5, 8 each number is the sum of the two before. What is number $n modulo $m?
            Which remainder modulo $m does the Fibonacci number F_$n have?
        """,
        plans="""
            We step through the Fibonacci numbers and reduce.
            We need a Fibonacci number modulo a number.
        """,
        codes=["a, b = 0, 1\nfor k in range($n{{|| - 1}}):\n    a, b = b, a + b\nprint(a % $m)"],
    ),
    family(
        "arithmetic_term",
        ints(a=(2, 99), d=(3, 40), n=(12, 400)),
        wordings="""
            An arithmetic sequence starts with $a and has difference $d. What is term number $n?
            @F the $n-th term of the arithmetic sequence with first term $a and common difference $d.
            A sequence starts at $a and goes up by $d each time. @F its $n-th term.
            @T term $n of the arithmetic sequence that begins with $a and has common difference $d.
            The first number is $a and each next number is $d larger. What is the $n-th number?
            In a theater the first row has $a seats and each row has $d more than the row before. How many seats are in row $n?
            $name saves $a coins in week 1 and each week $d coins more than the week before. How many coins does $name save in week $n?
            Counting from $a in steps of $d, what is the $n-th number?
            What is the $n-th term of an arithmetic progression with first term $a and step $d?
            If the first term is $a and the difference is $d, what is term $n of the arithmetic sequence?
        """,
        dev="""
            Numbers go up by $d every time, and the first is $a. Which is the $n-th?
        """,
        unseen="""
            A staircase of blocks has $a blocks in step 1, and every step has $d blocks more than the one before. How many blocks are in step $n?
            @F number $n in the list that starts with $a and always adds $d.
        """,
        plans="""
            We need one term of an arithmetic sequence.
            We add the difference again and again to the first term.
        """,
        codes=["print($a + ($n{{ - 1||}}) * $d)", "x = $a\nfor k in range($n{{ - 1||}}):\n    x += $d\nprint(x)"],
    ),
    family(
        "arithmetic_sum",
        ints(a=(2, 99), d=(3, 40), n=(12, 200)),
        wordings="""
            @F the sum of the first $n terms of the arithmetic sequence with first term $a and common difference $d.
            An arithmetic sequence starts with $a and has difference $d. What is the sum of its first $n terms?
            A sequence starts at $a and goes up by $d each time. What do the first $n terms add up to?
            @T the sum of the first $n numbers of the sequence that begins with $a and has step $d.
            The first number is $a and each next number is $d larger. @F the total of the first $n numbers.
            In a theater the first row has $a seats and each row has $d more than the row before. How many seats are in all $n rows together?
            $name saves $a coins in week 1 and each week $d coins more than the week before. How many coins does $name save in $n weeks altogether?
            Add the first $n terms of the arithmetic progression with first term $a and step $d. What is the sum?
            What is the sum of an arithmetic series with $n terms, first term $a and difference $d?
            If the first term is $a and the difference is $d, what is the total of $n terms of the arithmetic sequence?
        """,
        dev="""
            Numbers go up by $d every time, and the first is $a. What is the sum of the first $n of them?
        """,
        unseen="""
            A staircase of blocks has $a blocks in step 1, and every step has $d blocks more than the one before. How many blocks do $n steps need in all?
            Add up $n numbers, where the first is $a and each is $d more than the last. What is the total?
        """,
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
        wordings="""
            @F the sum of the first $n terms of the geometric sequence with first term $a and ratio $r.
            A geometric sequence starts with $a and has ratio $r. What is the sum of its first $n terms?
            A sequence starts at $a and each term is $r times the one before. What do the first $n terms add up to?
            @T the sum of $n terms of the geometric series with first term $a and ratio $r.
            The first number is $a, and every next number is multiplied by $r. @F the total of the first $n numbers.
            $name plants $a seeds on day 1 and each day $r times as many as the day before. How many seeds are planted in $n days in total?
            Add the first $n terms of a geometric progression with start $a and ratio $r. What is the sum?
            What is the sum of a geometric series with $n terms, first term $a and common ratio $r?
            If the first term is $a and the ratio is $r, what is the total of $n terms of the geometric sequence?
            The numbers in a list are multiplied by $r from one to the next. The first is $a. What is the sum of the first $n?
        """,
        dev="""
            Each term is $r times the last, beginning with $a. Add the first $n terms. What is the total?
        """,
        unseen="""
            A game pays $a coins in round 1 and then always $r times as much as in the round before. How many coins are paid in $n rounds altogether?
            @F the total of $n numbers where the first is $a and each is $r times the one before.
        """,
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
        wordings="""
            @F 1^$e + 2^$e + ... + $n^$e.
            What is the sum of k^$e for k from 1 to $n?
            Add the numbers k^$e for k = 1, 2, ..., $n. What is the [sum|total]?
            @T the value of 1^$e + 2^$e + 3^$e + ... + $n^$e.
            Each whole number from 1 to $n is raised to the power $e. @F the sum of these powers.
            What do the powers 1^$e, 2^$e, ..., $n^$e add up to?
            @F the sum of the first $n positive integers, each raised to the power $e.
            If every number from 1 to $n is raised to the power $e, what is the [sum|total] of the results?
            How much is 1^$e + 2^$e + 3^$e and so on up to $n^$e?
            Sum up k^$e, where k runs from 1 to $n. @T the result.
        """,
        dev="""
            Let k go from 1 through $n and add all k^$e. Which number is it?
        """,
        unseen="""
            @F the total of all powers k^$e with 1 <= k <= $n.
            Raise the numbers 1, 2, ..., $n to the power $e and add them. What is the sum?
        """,
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
