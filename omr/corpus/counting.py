"""Choices, arrangements, paths."""

from __future__ import annotations

from random import Random

from omr.corpus.family import TwoCalls, Values, family, ints

_WORDS = [
    "banana",
    "letter",
    "pepper",
    "coffee",
    "balloon",
    "success",
    "address",
    "bottle",
    "summer",
    "winter",
    "dinner",
    "hammer",
    "kitten",
    "mirror",
    "rabbit",
    "ribbon",
    "tunnel",
    "yellow",
    "butter",
    "cheese",
    "street",
    "parrot",
    "school",
    "planet",
    "garden",
    "market",
    "number",
    "bridge",
    "cookie",
    "puzzle",
    "lesson",
    "button",
    "cotton",
    "valley",
    "cactus",
    "tomato",
    "potato",
    "orange",
    "bamboo",
    "camera",
    "circle",
    "dragon",
    "engine",
    "forest",
    "guitar",
    "island",
    "jacket",
    "ladder",
    "magnet",
    "needle",
    "office",
    "pillow",
    "rocket",
    "saddle",
    "silver",
    "spider",
    "temple",
    "turtle",
    "velvet",
    "window",
    "wizard",
    "zipper",
    "apple",
    "berry",
    "candle",
    "donkey",
    "eleven",
    "feather",
    "giggle",
    "hidden",
    "indeed",
    "jungle",
    "kettle",
    "lemon",
    "melon",
    "noodle",
    "onion",
    "papaya",
    "quiver",
    "razor",
    "salad",
    "tattoo",
    "teeth",
    "under",
    "vanilla",
    "wheel",
    "acacia",
    "bubble",
    "carrot",
    "daddy",
    "effect",
    "fiddle",
    "goggle",
    "horror",
    "igloo",
    "jigsaw",
    "kayak",
    "llama",
    "mammal",
    "nanny",
    "otter",
    "paddle",
    "queue",
    "rattle",
    "sizzle",
    "toffee",
    "uncle",
    "vacuum",
    "willow",
    "yodel",
    "zigzag",
    "abacus",
    "barrel",
    "cannon",
    "dagger",
]


def _choose(rng: Random) -> Values:
    n = rng.randint(6, 40)
    return {"n": n, "k": rng.randint(2, min(8, n - 2))}


def _teams(rng: Random) -> Values:
    a, b = rng.randint(5, 20), rng.randint(5, 20)
    return {"a": a, "b": b, "j": rng.randint(2, 4), "k": rng.randint(2, 4)}


def _letters(rng: Random) -> Values:
    word = list(rng.choice(_WORDS))
    extra = rng.choice(["", "", rng.choice("aeiourstln"), rng.choice("abcdefgh")])
    word += extra
    if rng.random() < 0.5:
        rng.shuffle(word)
    return {"w": "".join(word)}


FAMILIES = (
    family(
        "choose",
        _choose,
        plans="""
            We choose without order, so this is a binomial coefficient.
            Order does not matter: we need combinations.
        """,
        codes=[
            "import math\nprint(math.{{comb||perm}}($n, $k))",
            "from math import factorial\nprint(factorial($n) // factorial($n - $k){{ // factorial($k)||}})",
        ],
    ),
    family(
        "arrange_some",
        _choose,
        plans="""
            The order matters, so we need permutations.
            We choose with order: permutations of some out of all.
        """,
        codes=[
            "import math\nprint(math.{{perm||comb}}($n, $k))",
            "total = 1\nfor i in range($k{{|| - 1}}):\n    total *= $n - i\nprint(total)",
        ],
    ),
    family(
        "two_groups",
        _teams,
        plans="""
            We choose from both groups and multiply.
            Two independent choices: the binomial coefficients are multiplied.
        """,
        codes=[
            "import math\nprint(math.comb($a, $j) {{*||+}} math.comb($b, $k))",
            "from math import comb\nx = comb($a, $j)\ny = comb($b, $k)\nprint(x {{*||+}} y)",
        ],
    ),
    family(
        "letters_arranged",
        _letters,
        plans="""
            We divide the factorial of the length by the factorials of the letter counts.
            Equal letters can be swapped, so we divide by their factorials.
        """,
        codes=[
            'import math\nword = "$w"\nways = math.factorial(len(word){{|| - 1}})\nfor c in set(word):\n    ways //= math.factorial(word.count(c))\nprint(ways)',
        ],
    ),
    family(
        "handshakes",
        ints(n=(8, 900)),
        plans="""
            Every pair counts once, so we count pairs.
            The number of pairs is n times n minus one, halved.
        """,
        codes=["print($n * ($n {{-||+}} 1) // 2)", "n = $n\nprint(n * (n {{-||+}} 1) // 2)"],
    ),
    family(
        "grid_paths",
        ints(a=(3, 22), b=(3, 22)),
        plans="""
            A path is a choice of which steps go right.
            We count lattice paths with a binomial coefficient.
        """,
        codes=[
            "import math\nprint(math.comb($a + $b{{|| - 1}}, $a))",
            "from math import comb\nsteps = $a + $b\nprint(comb(steps{{|| - 1}}, $b))",
        ],
    ),
    family(
        "dice_ways",
        lambda rng: (
            (lambda k: {"k": k, "s": rng.randint(k + 1, 6 * k - 1), "f": 6})(rng.randint(2, 4))
            | {"f": rng.choice([6, 8, 10])}
        ),
        plans="""
            We go through all outcomes of the dice and count the sum.
            We list every roll and count those with the wanted total.
        """,
        codes=[
            "from itertools import product\nrolls = product(range({{1||0}}, $f + 1), repeat=$k)\nprint(sum(1 for r in rolls if sum(r) == $s))",
            "ways = {0: 1}\nfor i in range($k):\n    new = {}\n    for t in ways:\n        for d in range({{1||0}}, $f + 1):\n            new[t + d] = new.get(t + d, 0) + ways[t]\n    ways = new\nprint(ways.get($s, 0))",
        ],
    ),
    family(
        "change_ways",
        lambda rng: {
            "a": rng.choice([2, 3, 4]),
            "b": rng.choice([5, 6, 7]),
            "c": rng.choice([10, 11, 12, 15]),
            "n": rng.randint(20, 200),
        },
        plans="""
            We count the ways coin by coin.
            We use a table of ways for every amount.
        """,
        codes=[
            "ways = [1] + [0] * $n\nfor c in [$a, $b, $c]:\n    for s in range({{c||c + 1}}, $n + 1):\n        ways[s] += ways[s - c]\nprint(ways[$n])",
        ],
    ),
    family(
        "factorial_ratio",
        lambda rng: (lambda n: {"n": n, "k": n - rng.randint(2, 5)})(rng.randint(9, 60)),
        plans="""
            We divide two factorials.
            We need a quotient of factorials.
        """,
        codes=[
            "import math\nprint(math.factorial($n) // math.factorial($k{{||+ 1}}))",
            TwoCalls(
                first="import math\ntop = math.factorial($n)\nprint(top)",
                between="Now divide by the other factorial.",
                second="print(top // math.factorial($k{{||+ 1}}))",
            ),
        ],
    ),
)
