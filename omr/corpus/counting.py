"""Choices, arrangements, paths."""

from __future__ import annotations

from random import Random

from omr.corpus.family import TwoCalls, Values, family, ints

_WORDS = """banana letter pepper coffee balloon success address bottle summer winter dinner hammer kitten mirror rabbit
ribbon tunnel yellow butter cheese street parrot school planet garden market number bridge cookie puzzle lesson
button cotton valley cactus tomato potato orange bamboo camera circle dragon engine forest guitar island jacket
ladder magnet needle office pillow rocket saddle silver spider temple turtle velvet window wizard zipper apple berry
candle donkey eleven feather giggle hidden indeed jungle kettle lemon melon noodle onion papaya quiver razor salad
tattoo teeth under vanilla wheel acacia bubble carrot daddy effect fiddle goggle horror igloo jigsaw kayak llama
mammal nanny otter paddle queue rattle sizzle toffee uncle vacuum willow yodel zigzag abacus barrel cannon dagger""".split()


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
        wordings="""
            In how many ways can $k people be chosen from $n people?
            How many ways are there to choose $k $item out of $n different $item?
            @F the binomial coefficient $n choose $k.
            What is C($n, $k)?
            @T the number of subsets with $k elements of a set with $n elements.
            How many different teams of $k players can be formed from $n players?
            A set has $n elements. How many subsets with exactly $k elements does it have?
            $name picks $k of $n $item, and order does not matter. How many choices are there?
            How many [groups|committees] of $k can be picked from $n students?
            From $n [cards|books], $k are selected without order. How many selections are possible?
        """,
        dev="""
            How many combinations of $k things from $n things exist?
        """,
        unseen="""
            $n friends want to send $k of them to a show. In how many ways can they decide who goes?
            How many hands of $k cards can be taken from a pack of $n different cards?
        """,
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
        wordings="""
            In how many ways can $k of $n people line up in a row?
            How many ordered lists of $k different $item can be made from $n different $item?
            @F the number of permutations of $k things out of $n.
            What is P($n, $k), the number of ordered selections?
            $n runners are in a race. In how many ways can the first $k places be taken?
            How many ways are there to give $k different prizes to $n people, at most one each?
            A club has $n members. In how many ways can $k different [offices|jobs] be filled?
            $name picks $k of $n $item one after another, and the order matters. How many ways are there?
            How many passwords of $k different letters can be made from $n letters?
            From $n [flags|books], $k are put in a row. How many [orders|arrangements] are possible?
        """,
        dev="""
            How many arrangements in order of $k things from $n things exist?
        """,
        unseen="""
            $n teams play in a league. How many different orders are possible for the top $k?
            $k different seats are to be taken by people from a group of $n. In how many ways can it be done?
        """,
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
        wordings="""
            A team needs $j of $a girls and $k of $b boys. How many teams are possible?
            In how many ways can $j red cards out of $a and $k black cards out of $b be chosen?
            From $a cats and $b dogs, $j cats and $k dogs are chosen. How many ways are there?
            How many ways are there to choose $j from $a teachers and $k from $b students?
            @F the number of ways to choose $j of $a books and also $k of $b pens.
            A committee has $j of $a women and $k of $b men. How many committees can be formed?
            @T the number of groups with $j of $a doctors and $k of $b nurses.
            $name takes $j of $a $item and $k of $b $item2. How many different choices are there?
            Out of $a sweet and $b salty dishes you pick $j sweet and $k salty ones. In how many ways?
            There are $a maths and $b music books. How many ways are there to pick $j maths and $k music books?
        """,
        dev="""
            We select $j from a first group of $a and $k from a second group of $b. How many selections are there?
        """,
        unseen="""
            A meal is made of $j of $a fruits and $k of $b vegetables. How many different meals can be made?
            How many juries with $j of $a judges and $k of $b guests are there?
        """,
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
        wordings="""
            In how many ways can the letters of "$w" be arranged?
            How many different arrangements do the letters of the word "$w" have?
            @F the number of distinct permutations of the letters in "$w".
            How many different words can be made by rearranging all letters of "$w"?
            @T the number of anagrams of "$w", counting every order of its letters.
            [Count|Determine] the distinct orders of the letters in "$w".
            $name shuffles the letters of "$w". How many different strings are possible?
            How many distinct strings use exactly the letters of "$w"?
            In how many different orders can you write the letters of "$w"?
            The letters of "$w" are put in a row. How many different rows are there?
        """,
        dev="""
            All the letters of "$w" are used in some order. How many distinct results can appear?
        """,
        unseen="""
            What is the number of different ways to order the letters in the word "$w"?
            If we permute the letters of "$w", how many distinct words do we get?
        """,
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
        wordings="""
            $n people meet and each shakes hands with everyone else once. How many handshakes are there?
            How many handshakes happen if $n people all shake hands with each other?
            In a league of $n teams each pair plays one game. How many games are played?
            @F the number of pairs that can be made from $n people.
            How many lines connect $n points if every two points are joined?
            At a party with $n guests everybody greets everybody else once. How many greetings [of two|between two guests] are there?
            @T the number of edges of a complete graph with $n vertices.
            $n computers are each linked to every other one by a cable. How many cables are needed?
            Every two of $n cities are joined by a road. How many roads are there?
            How many games does a tournament with $n players have, if everyone plays everyone once?
        """,
        dev="""
            Each of $n players meets each other player in exactly one match. How many matches is that?
        """,
        unseen="""
            $n friends clink glasses, each with each. How many clinks are heard?
            Between any two of $n islands there is one bridge. How many bridges are there in all?
        """,
        plans="""
            Every pair counts once, so we count pairs.
            The number of pairs is n times n minus one, halved.
        """,
        codes=["print($n * ($n {{-||+}} 1) // 2)", "n = $n\nprint(n * (n {{-||+}} 1) // 2)"],
    ),
    family(
        "grid_paths",
        ints(a=(3, 22), b=(3, 22)),
        wordings="""
            How many paths lead from one corner of a $a by $b grid to the opposite corner, moving only right and up?
            In a grid you go $a steps right and $b steps up. How many different paths are there?
            @F the number of shortest paths in a grid of $a by $b squares from corner to corner.
            A robot goes from (0, 0) to ($a, $b) with steps right and up only. How many routes [are there|does it have]?
            @T the number of lattice paths from (0, 0) to ($a, $b).
            How many ways are there to walk $a blocks east and $b blocks north in any order?
            $name walks $a blocks east and $b blocks north. How many routes are possible?
            How many lattice paths with unit steps right or up lead from the origin to ($a, $b)?
            [Count|Determine] the routes of shortest length from the bottom left to the top right of a $a by $b grid.
            A rook-like piece moves one square right or one square up at a time. How many ways lead from (0, 0) to ($a, $b)?
        """,
        dev="""
            To reach the point ($a, $b) from (0, 0), only going right or up, how many ways do we have?
        """,
        unseen="""
            An ant crawls along a grid from (0, 0) to ($a, $b), going only up or right. In how many ways can it go?
            How many strings with $a letters R and $b letters U describe a path to ($a, $b)?
        """,
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
        lambda rng: (lambda k: {"k": k, "s": rng.randint(k + 1, 6 * k - 1), "f": 6})(rng.randint(2, 4))
        | {"f": rng.choice([6, 8, 10])},
        wordings="""
            In how many ways can $k dice with $f sides give the sum $s?
            $k dice with faces 1 to $f are rolled. How many outcomes have the sum $s?
            @F the number of ways to roll a total of $s with $k dice of $f sides each.
            How many outcomes of $k rolls of a $f sided die add up to $s?
            @T the number of ordered outcomes of $k dice with $f faces whose sum is $s.
            A die has the numbers 1 to $f. It is rolled $k times. In how many ways is the total $s?
            How many lists of $k numbers from 1 to $f have the sum $s?
            $name rolls $k dice, each with $f sides. How many outcomes show a total of $s?
            How often does the sum $s occur among all outcomes of $k dice with $f sides?
            @F how many ordered ways there are to get $s from $k dice, each numbered from 1 to $f.
        """,
        dev="""
            With $k dice of $f faces, how many results sum to $s?
        """,
        unseen="""
            $k different dice, each with $f sides, are thrown. How many throws give $s points in total?
            How many ways are there to reach exactly $s points in $k throws of a die with $f sides?
        """,
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
        lambda rng: {"a": rng.choice([2, 3, 4]), "b": rng.choice([5, 6, 7]), "c": rng.choice([10, 11, 12, 15]), "n": rng.randint(20, 200)},
        wordings="""
            In how many ways can $n be paid with coins of $a, $b and $c?
            How many ways are there to make $n out of coins worth $a, $b and $c?
            @F the number of ways to pay $n with coins of value $a, $b and $c.
            @T the number of ways to write $n with coins $a, $b and $c, where order does not matter.
            Coins are worth $a, $b and $c. How many combinations have the value $n?
            $name pays $n with coins of $a, $b and $c. How many ways are there?
            How many solutions in whole numbers x, y, z >= 0 has $a x + $b y + $c z = $n?
            Stamps cost $a, $b and $c. In how many ways can you stick exactly $n on a letter?
            With coins of $a, $b and $c only, in how many ways can you get $n?
            How many different sets of coins worth $a, $b and $c add up to $n?
        """,
        dev="""
            An amount of $n shall be made from coins $a, $b and $c. How many possibilities exist?
        """,
        unseen="""
            A machine takes coins of $a, $b and $c. How many ways are there to put in exactly $n?
            How many combinations of weights $a, $b and $c balance a load of $n?
        """,
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
        wordings="""
            @F $n! / $k!.
            What is $n! divided by $k! ?
            How much is the factorial of $n divided by the factorial of $k?
            @T the value of $n!/$k!.
            Divide $n factorial by $k factorial. What do you get?
            Simplify $n! / $k! to a whole number.
            @F the quotient of $n factorial and $k factorial.
            [Evaluate|Compute] the fraction $n!/$k!.
            What number is $n! over $k! ?
            The factorial $n! is divided by $k!. @F the result.
        """,
        dev="""
            By dividing $n! by $k! we get which number?
        """,
        unseen="""
            How many times as large as $k! is $n! ?
            @F the ratio of the factorials of $n and $k.
        """,
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
