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
        wordings="""
            @F $a + $b - $c.
            [What is|What do you get for|How much is] $a plus $b minus $c?
            Add $a [and|to] $b, then [subtract|take away] $c. [What is left?|What is the result?]
            @T the value of $a + $b - $c.
            [Start with|Take] $a, add $b, and then [remove|subtract] $c. What [number|value] do you end with?
            If you [increase|raise] $a by $b and then [decrease|lower] it by $c, what [do you get|is the result]?
            The [numbers|integers] $a and $b are added, and $c is [subtracted from|taken off] the total. @T the result.
            $name has $a $item, gets $b more and gives away $c. How many $item does $name have [now|in the end]?
            A $place had $a visitors in May and $b in June, but $c of them were counted twice. How many visitors is that in all, without the [double|repeated] counts?
            The sum of $a and $b is made smaller by $c. @F the [new number|result].
        """,
        dev="""
            From the total of $a and $b, take $c. What remains?
        """,
        unseen="""
            Put $a and $b together and then take $c off. What is the number?
            There were $a $item in a box. Someone put in $b more, and later $c were taken out. How many $item are in the box?
        """,
        plans="""
            We add the first two numbers and subtract the third.
            This is a sum followed by a subtraction.
        """,
        codes=["print($a + $b {{-||+}} $c)", "total = $a + $b\nprint(total {{-||+}} $c)"],
    ),
    family(
        "product_plus",
        ints(a=(12, 999), b=(12, 99), c=(11, 999)),
        wordings="""
            @F $a * $b + $c.
            [What is|How much is] $a times $b, plus $c?
            Multiply $a by $b and [add|then add] $c. What [is the result|do you get]?
            @T the value of $a × $b + $c.
            The product of $a and $b is [increased|raised] by $c. @F the result.
            $name fills $b boxes with $a $item each and has $c $item left over. How many $item [are there in all|does $name have in total]?
            There are $b rows of $a [seats|chairs] and $c more [seats|chairs] on the balcony. How many [seats|chairs] are there [in total|altogether]?
            Take $a, multiply it by $b, and add $c to the product. @T the [final number|result].
            A $place sells $b packs with $a $item each and also $c single $item. How many $item is that in all?
            [Start with|Begin with] $a. Make it $b times as large, then add $c. What [number|value] do you [get|reach]?
        """,
        dev="""
            What number do we get when $c is added to the product of $a and $b?
        """,
        unseen="""
            Add $c to $a times $b. What is the total?
            $name buys $b bags that hold $a $item each, and then finds $c more $item. What is the total number of $item?
        """,
        plans="""
            We multiply the first two numbers and add the third.
            This is a product plus an extra amount.
        """,
        codes=["print($a * $b {{+||-}} $c)", "product = $a * $b\nprint(product {{+||-}} $c)"],
    ),
    family(
        "power_mod",
        ints(a=(2, 60), b=(5, 99), m=(7, 999)),
        wordings="""
            @F the remainder when $a^$b is divided by $m.
            What is $a^$b mod $m?
            [What remainder does|Which remainder does] $a^$b leave [on division by|when divided by] $m?
            @T $a to the power $b, [modulo|mod] $m.
            @F $a raised to the power of $b modulo $m.
            [When|If] $a^$b is divided by $m, what is [left over|the remainder]?
            The number $a is raised to the power $b. @F its remainder [after division by|modulo] $m.
            Let N = $a^$b. [What is the remainder of N|@F the remainder of N] when N is divided by $m?
            Divide $a^$b by $m. What is the remainder?
            [Reduce|Take] $a to the $b-th power modulo $m. What [number|value] is it?
        """,
        dev="""
            Which number from 0 to $m - 1 is $a^$b congruent to modulo $m?
        """,
        unseen="""
            Raise $a to the power $b and divide by $m. What remainder is left?
            @F the value of $a^$b in arithmetic modulo $m.
        """,
        plans="""
            We need a power modulo a number.
            This asks for the remainder of a power.
        """,
        codes=["print(pow($a, $b{{||+ 1}}, $m))", "n = $a ** $b\nprint(n {{%||//}} $m)"],
    ),
    family(
        "quotient",
        ints(a=(1000, 99999), b=(12, 99)),
        wordings="""
            @F the integer quotient of $a divided by $b.
            How many times does $b [go|fit] into $a?
            [What is|@F] the whole part of $a / $b?
            @T the quotient when $a is divided by $b, [ignoring|without] the remainder.
            How many full boxes of $b can $name [fill|pack] with $a $item?
            $a $item are packed in bags of $b. How many [full|complete] bags are there?
            Divide $a by $b and [drop|ignore] the remainder. What [number|quotient] is left?
            A bus holds $b people. How many [full buses|buses full of people] can $a people fill?
            What is the largest whole number k with $b * k at most $a?
            @F the [floor|integer part] of $a divided by $b.
        """,
        dev="""
            How many complete groups of $b can be made out of $a?
        """,
        unseen="""
            If $a is divided by $b and only the whole number part is kept, what is it?
            $name has $a $item and puts $b in every box. How many boxes become full?
        """,
        plans="""
            We need the whole quotient, so integer division.
            This asks for integer division.
        """,
        codes=["print($a // $b{{|| + 1}})", "q, r = divmod($a, $b)\nprint({{q||r}})"],
    ),
    family(
        "remainder",
        ints(a=(1000, 99999), b=(12, 99)),
        wordings="""
            @F the remainder when $a is divided by $b.
            What is $a mod $b?
            What [remainder is left|remains] when $a is divided by $b?
            @T the remainder of $a divided by $b.
            $a $item are packed in boxes of $b. How many $item are left over?
            $name puts $a $item in [full rows|full bags] of $b. How many $item [remain|are left over]?
            [What is left over|How much is left over] if you divide $a by $b?
            @F $a modulo $b.
            Which remainder does $a leave on division by $b?
            If $a people form teams of $b, how many people are [left without a team|left over]?
        """,
        dev="""
            Dividing $a by $b leaves what remainder?
        """,
        unseen="""
            Divide $a by $b. What is the remainder?
            $a cards are dealt in equal piles of $b until no more full pile can be made. How many cards are left over?
        """,
        plans="""
            We need the remainder of a division.
            This asks for the first number modulo the second.
        """,
        codes=["print($a {{%||//}} $b)", "q, r = divmod($a, $b)\nprint({{r||q}})"],
    ),
    family(
        "percent_of",
        _percent,
        wordings="""
            @F $p% of $n.
            What is $p percent of $n?
            How much is $p% of $n?
            @T $p percent of the number $n.
            $p% of the $n students in a school play chess. How many students [play chess|is that]?
            $name has $n $item and [gives away|sells] $p% of them. How many $item [are given away|go] ?
            A $place has $n $item and $p percent of them are red. How many [are red|red ones are there]?
            What number is $p% of $n?
            [Take|Calculate] $p percent of $n. What [is it|do you get]?
            Of $n people asked, $p% said yes. How many people said yes?
        """,
        dev="""
            If the whole is $n, how much is $p percent of it?
        """,
        unseen="""
            In a town of $n people, $p percent own a bike. How many people own a bike?
            @T the amount that is $p% of $n.
        """,
        plans="""
            We need a percentage of a number.
            A percentage means dividing by one hundred.
        """,
        codes=["print($n * $p // {{100||10}})", "share = $n * $p\nprint(share // {{100||10}})"],
    ),
    family(
        "percent_off",
        _percent,
        wordings="""
            A price of $n coins is [reduced|cut] by $p%. What is the new price?
            $n is decreased by $p percent. What is the [result|new number]?
            @F the price after a discount of $p% on $n coins.
            An item costs $n coins. With $p% off, what [does it cost|is the price]?
            [After|With] a $p percent discount, how much do you pay for a coat that costs $n coins?
            Decrease $n by $p%. [What do you get|What is the result]?
            $name loses $p% of $n points. How many points [are left|does $name keep]?
            @T the number you get when $n is lowered by $p%.
            A tank holds $n liters and $p% [leaks out|is used up]. How many liters [remain|are left]?
            The number of $item in a $place was $n and fell by $p%. How many $item are there now?
        """,
        dev="""
            A bill of $n coins gets $p percent cheaper. How much is it then?
        """,
        unseen="""
            A bike that costs $n coins is sold with a discount of $p percent. What must be paid?
            What remains of $n after taking off $p% of it?
        """,
        plans="""
            We lower the number by a percentage.
            The percentage is taken off, the rest remains.
        """,
        codes=["print($n * (100 {{-||+}} $p) // 100)", "cut = $n * $p // 100\nprint($n {{-||+}} cut)"],
    ),
    family(
        "percent_up",
        _percent,
        wordings="""
            A price of $n coins [rises|goes up] by $p%. What is the new price?
            $n is increased by $p percent. What is the [result|new number]?
            @F the total when a tax of $p% is added to $n coins.
            A meal costs $n coins and a [tip|fee] of $p% is added. How much is [paid|the total]?
            Increase $n by $p%. [What do you get|What is the result]?
            The number of $item in a $place was $n and grew by $p%. How many $item are there now?
            @T the number you get when $n is raised by $p%.
            $name earns $n coins a week and gets a raise of $p percent. What does $name earn now?
            A town of $n people grows by $p percent. How many people live there [then|after that]?
            [After|With] an increase of $p%, what does the number $n become?
        """,
        dev="""
            A rent of $n coins gets $p percent dearer, so it goes up. How much is it then?
        """,
        unseen="""
            What is $n after it is increased by $p%?
            With a tax of $p percent added, what is the total price of a $n coin bike?
        """,
        plans="""
            We raise the number by a percentage.
            The percentage is added to the whole.
        """,
        codes=["print($n * (100 {{+||-}} $p) // 100)", "extra = $n * $p // 100\nprint($n {{+||-}} extra)"],
    ),
    family(
        "fraction_sum",
        _fractions,
        wordings="""
            @F $a/$b + $c/$d as a fraction in lowest terms.
            What is $a/$b + $c/$d? [Give a reduced fraction|Give the answer as a simple fraction].
            Add the fractions $a/$b and $c/$d [and simplify|in lowest terms].
            @T the sum of $a/$b and $c/$d as a reduced fraction.
            @F the sum of the two fractions $a/$b and $c/$d.
            $name [walks|runs] $a/$b of a mile and then $c/$d of a mile. How many miles [is that|in all], as a fraction?
            One jug holds $a/$b liters and another holds $c/$d liters. How much do they hold together, as a fraction?
            What fraction do you get when you add $a/$b to $c/$d?
            Simplify $a/$b + $c/$d [to one fraction|to a single fraction].
            [What is|How much is] $a/$b plus $c/$d, in lowest terms?
        """,
        dev="""
            Two fractions, $a/$b and $c/$d, are added. Write the total as one fraction.
        """,
        unseen="""
            Put $a/$b and $c/$d together. Which fraction in lowest terms is the sum?
            A recipe needs $a/$b cups of milk and $c/$d cups of water. How many cups is that, as a fraction?
        """,
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
        wordings="""
            @F the [average|mean] of $xs.
            What is the [average|mean|arithmetic mean] of the numbers $xs?
            @T the mean of this list: $xs.
            $name scored $xs points in some games. What [was|is] the average score?
            The temperatures on some days were $xs degrees. @F the average temperature.
            What is the average value of $xs?
            Given the [numbers|values] $xs, @f their [mean|average].
            Some boxes hold $xs $item. How many $item does a box hold on average?
            [Calculate|Find] the arithmetic mean: $xs.
            If $xs are shared out evenly, that is averaged, what is the mean?
        """,
        dev="""
            On average, how large are the numbers $xs?
        """,
        unseen="""
            $name made trips of $xs miles. What is the mean length of a trip?
            Here are some numbers: $xs. What is their average?
        """,
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
        wordings="""
            @F $a^2 - $b^2.
            What is the difference of the squares of $a and $b?
            [What is|How much is] $a squared minus $b squared?
            @T the value of $a^2 - $b^2.
            By how much is the square of $a larger than the square of $b?
            Subtract the square of $b from the square of $a. What [do you get|is the result]?
            A square with side $b is cut out of a square with side $a. What area is left?
            How much [bigger|larger] is a square with side $a than a square with side $b, in area?
            Square $a and square $b. @F the difference [of the two|between the two squares].
            Take the square of $a and subtract $b squared. @T the result.
        """,
        dev="""
            If $b squared is taken from $a squared, what remains?
        """,
        unseen="""
            The squares of $a and $b differ by how much?
            A square garden with side $a has a square pond with side $b in it. How much area is not pond?
        """,
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
        wordings="""
            $n coins are [shared|divided] between $name and $name2 in the ratio $a : $b. How many coins does the one with the [larger|bigger] share get?
            Divide $n in the ratio $a : $b. @T the larger part.
            @F the larger share when $n is split in the ratio $a to $b.
            The number $n is split into two parts in the ratio $a : $b. What is the [larger|greater] part?
            Two numbers have the ratio $a to $b and the sum $n. What is the larger number?
            $n $item are split in the ratio $a : $b. How many are in the bigger [part|pile]?
            If $n is divided into parts with ratio $a : $b, @f the larger part.
            Red and blue balls are in the ratio $a : $b. There are $n balls. How many balls have the more common color?
            Two friends share $n $item in the ratio $a to $b. What is the larger share?
            Split $n as $a : $b. How large is the bigger part?
        """,
        dev="""
            A sum of $n coins is paid out to two people as $a to $b. What does the luckier one get?
        """,
        unseen="""
            In a school of $n children, cats and dogs are liked in the ratio $a : $b. How many children are in the larger group?
            Two parts of $n are in the ratio $a to $b. @F the greater of the two parts.
        """,
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
