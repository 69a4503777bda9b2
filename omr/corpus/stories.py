"""Word problems, clocks and lists of numbers."""

from __future__ import annotations

from random import Random

from omr.corpus.family import Stumble, Values, family, ints


def _text(rng: Random) -> Values:
    return {"t": ", ".join(str(rng.randint(10, 999)) for _ in range(rng.randint(3, 5)))}


def _distinct(rng: Random) -> Values:
    return {"xs": rng.sample(range(10, 999), rng.randint(4, 7))}


def _odd_list(rng: Random) -> Values:
    return {"xs": rng.sample(range(10, 999), rng.choice([5, 7]))}


def _heads_legs(rng: Random) -> Values:
    r, c = rng.randint(3, 300), rng.randint(3, 300)
    return {"h": r + c, "l": 4 * r + 2 * c}


def _meeting(rng: Random) -> Values:
    a, b = rng.sample(range(3, 91), 2)
    return {"a": a, "b": b, "d": (a + b) * rng.randint(2, 24)}


def _work(rng: Random) -> Values:
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    return {"a": a, "b": b}


def _tickets(rng: Random) -> Values:
    p, q = rng.randint(2, 9), rng.randint(10, 25)
    kids, adults = rng.randint(5, 300), rng.randint(5, 300)
    return {"p": p, "q": q, "n": kids + adults, "t": p * kids + q * adults}


def _clock(rng: Random) -> Values:
    start = rng.randint(0, 1200)
    end = start + rng.randint(20, 1439 - start)
    return {"a": start // 60, "b": start % 60, "c": end // 60, "d": end % 60}


FAMILIES = (
    family(
        "shopping",
        ints(a=(2, 40), p=(2, 60), b=(2, 40), q=(2, 60)),
        plans="""
            We multiply each count by its price and add.
            The total is the sum of two products.
        """,
        codes=["print($a * $p {{+||-}} $b * $q)", "first = $a * $p\nsecond = $b * $q\nprint(first {{+||-}} second)"],
    ),
    family(
        "change_back",
        lambda rng: (lambda n, p: {"n": n, "p": p, "m": n * p + rng.randint(1, 300)})(
            rng.randint(2, 30), rng.randint(3, 60)
        ),
        plans="""
            We subtract the cost of all items from the amount.
            What is used is a product, the rest is a difference.
        """,
        codes=["print($m {{-||+}} $n * $p)", "cost = $n * $p\nprint($m {{-||+}} cost)"],
    ),
    family(
        "meeting",
        _meeting,
        plans="""
            Both rates add up, so we divide by their sum.
            The two speeds are added, then we divide.
        """,
        codes=["print($d // ($a {{+||-}} $b))", "speed = $a {{+||-}} $b\nprint($d // speed)"],
    ),
    family(
        "heads_and_legs",
        _heads_legs,
        plans="""
            If all had two legs, the extra legs would come in pairs from those with four.
            We compare with the case that all have two legs.
        """,
        codes=["print(($l {{-||+}} 2 * $h) // 2)", "extra = $l {{-||+}} 2 * $h\nprint(extra // 2)"],
    ),
    family(
        "tickets",
        _tickets,
        plans="""
            If all paid the lower price, the extra money comes from the higher price.
            We compare with the case that all pay the small price.
        """,
        codes=["print(($t - $n * $p) // ($q {{-||+}} $p))", "extra = $t - $n * $p\nprint(extra // ($q {{-||+}} $p))"],
    ),
    family(
        "work_together",
        _work,
        plans="""
            The rates of both add up, and the time is the inverse.
            Together they do a sum of two rates.
        """,
        codes=[
            "from fractions import Fraction\nrate = Fraction(1, $a) {{+||*}} Fraction(1, $b)\nprint(1 / rate)",
        ],
    ),
    family(
        "compound",
        ints(a=(2, 99), r=(2, 4), n=(3, 14)),
        plans="""
            We multiply by the same factor again and again.
            Repeated growth is a power of the factor.
        """,
        codes=["print($a * $r ** {{$n||($n - 1)}})", "x = $a\nfor k in range({{$n||$n - 1}}):\n    x *= $r\nprint(x)"],
    ),
    family(
        "clock_minutes",
        _clock,
        plans="""
            We turn both times into minutes and subtract.
            Both times are counted in minutes from midnight.
        """,
        codes=[
            "start = $a * 60 {{+||-}} $b\nend = $c * 60 + $d\nprint(end - start)",
            "print(($c - $a) * 60 {{+||-}} ($d - $b))",
        ],
    ),
    family(
        "seconds",
        ints(a=(1, 23), b=(1, 59), c=(1, 59)),
        plans="""
            An hour has 3600 seconds and a minute has 60.
            We turn hours and minutes into seconds and add.
        """,
        codes=["print($a * 3600 + $b * 60 {{+||-}} $c)", "minutes = $a * 60 + $b\nprint(minutes * 60 {{+||-}} $c)"],
    ),
    family(
        "days_between",
        lambda rng: (
            lambda m: {
                "y": rng.randint(1950, 2060),
                "m": m,
                "d": rng.randint(1, 28),
                "n": rng.randint(m + 1, 12),
                "e": rng.randint(1, 28),
            }
        )(rng.randint(1, 11)),
        plans="""
            We subtract two dates.
            The difference of two dates is a number of days.
        """,
        codes=[
            "from datetime import date\nprint((date($y, $n, $e) - date($y, $m, {{$d||1}})).days)",
            "from datetime import date\nstart = date($y, $m, {{$d||1}})\nend = date($y, $n, $e)\nprint((end - start).days)",
        ],
    ),
    family(
        "leap_years",
        lambda rng: (lambda a: {"a": a, "b": a + rng.randint(20, 900)})(rng.randint(1600, 2300)),
        plans="""
            We test every year for being a leap year.
            The calendar module knows leap years.
        """,
        codes=[
            "import calendar\nprint(sum(1 for y in range($a, $b{{ + 1|| - 3}}) if calendar.isleap(y)))",
            "def leap(y):\n    return y % 4 == 0 and (y % 100 != 0 {{or||and}} y % 400 == 0)\n\nprint(sum(leap(y) for y in range($a, $b + 1)))",
        ],
    ),
    family(
        "median",
        _odd_list,
        plans="""
            We sort the list and take the middle.
            The median is the middle of the sorted list.
        """,
        codes=[
            "xs = sorted($xs)\nprint(xs[len(xs) // 2{{|| - 1}}])",
            "xs = $xs\nxs.sort()\nprint(xs[len(xs) // 2{{|| - 1}}])",
        ],
    ),
    family(
        "spread",
        _distinct,
        plans="""
            We subtract the minimum from the maximum.
            The range is the largest minus the smallest number.
        """,
        codes=["xs = $xs\nprint(max(xs) {{-||+}} min(xs))", "xs = sorted($xs)\nprint(xs[-1] {{-||+}} xs[0])"],
    ),
    family(
        "count_above",
        lambda rng: {"xs": rng.sample(range(10, 999), rng.randint(5, 8)), "k": rng.randint(200, 800)},
        plans="""
            We count the numbers above the limit.
            We go through the list and count.
        """,
        codes=[
            "xs = $xs\nprint(sum(1 for x in xs if x {{>||<}} $k))",
            "xs = $xs\nprint(len([x for x in xs if x {{>||<}} $k]))",
        ],
    ),
    family(
        "even_sum",
        _distinct,
        plans="""
            We add only the even numbers.
            We test each number for being even and add.
        """,
        codes=[
            "xs = $xs\nprint(sum(x for x in xs if x % 2 == {{0||1}}))",
            "xs = $xs\ntotal = 0\nfor x in xs:\n    if x % 2 == {{0||1}}:\n        total += x\nprint(total)",
        ],
    ),
    family(
        "text_total",
        _text,
        plans="""
            We cut the text into its parts and add them as numbers.
            The text must be turned into numbers first.
        """,
        codes=['parts = "$t".split(", ")\nprint(sum(int(p) for p in parts{{||[1:]}}))'],
        stumble=Stumble(
            code='parts = "$t".split(", ")\nprint(sum(parts))',
            remark="That failed because the parts are still text. We must turn them into numbers.",
        ),
    ),
)
