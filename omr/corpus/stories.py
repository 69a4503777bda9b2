"""Word problems, clocks and lists of numbers."""

from __future__ import annotations

from random import Random

from omr.corpus.family import Stumble, TwoCalls, Values, family, ints


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
        wordings="""
            $name buys $a $item at $p coins each and $b $item2 at $q coins each. How much does $name pay?
            What do $a $item for $p coins each and $b $item2 for $q coins each cost together?
            A shop sells $a $item at $p coins and $b $item2 at $q coins apiece. How many coins does it take in?
            @F the total price of $a $item at $p coins each and $b $item2 at $q coins each.
            $a tickets cost $p coins each and $b drinks cost $q coins each. What is the bill?
            @T the cost of $a pens at $p coins a piece plus $b pads at $q coins a piece.
            A school orders $a chairs for $p coins each and $b tables for $q coins each. What is the total cost?
            You take $a $item for $p coins each and also $b $item2 for $q coins each. What is the whole price?
            $name sells $a $item for $p coins each and $b $item2 for $q coins each. How much does $name earn?
            One works $a hours for $p coins an hour and $b hours for $q coins an hour. What is the total pay?
        """,
        dev="""
            For $a $item one pays $p coins each, for $b $item2 one pays $q coins each. How much is paid altogether?
        """,
        unseen="""
            How many coins are needed for $a cups at $p coins each and $b plates at $q coins each?
            $name works $a days for $p coins a day and then $b days for $q coins a day. How many coins is that altogether?
        """,
        plans="""
            We multiply each count by its price and add.
            The total is the sum of two products.
        """,
        codes=["print($a * $p {{+||-}} $b * $q)", "first = $a * $p\nsecond = $b * $q\nprint(first {{+||-}} second)"],
    ),
    family(
        "change_back",
        lambda rng: (lambda n, p: {"n": n, "p": p, "m": n * p + rng.randint(1, 300)})(rng.randint(2, 30), rng.randint(3, 60)),
        wordings="""
            $name buys $n $item at $p coins each and pays with $m coins. How much change does $name get?
            $n $item cost $p coins each. How much is left of $m coins after buying them?
            You have $m coins and buy $n $item for $p coins each. How many coins do you have left?
            @F the change from $m coins when you buy $n $item at $p coins each.
            From $m coins, $name spends $p coins on each of $n $item. How many coins remain?
            @T what remains of $m coins after $n tickets at $p coins each are paid.
            A tank has $m liters. Each of $n days $p liters are used. How many liters are left?
            A book has $m pages. $name reads $p pages a day for $n days. How many pages are still to read?
            A rope is $m long. $n pieces of length $p are cut off. How long is the rest?
            There were $m coins in a bag, and $n people took $p coins each. How many coins are still in the bag?
        """,
        dev="""
            Paying $n times $p coins out of $m coins leaves how many coins?
        """,
        unseen="""
            $name has saved $m coins and spends $p coins a week. How many coins are left after $n weeks?
            A truck carries $m boxes and unloads $p boxes at each of $n shops. How many boxes stay on the truck?
        """,
        plans="""
            We subtract the cost of all items from the amount.
            What is used is a product, the rest is a difference.
        """,
        codes=["print($m {{-||+}} $n * $p)", "cost = $n * $p\nprint($m {{-||+}} cost)"],
    ),
    family(
        "meeting",
        _meeting,
        wordings="""
            Two trains are $d miles apart and drive towards each other at $a and $b miles per hour. After how many hours do they meet?
            $name and $name2 are $d miles apart and walk towards each other at $a and $b miles per hour. When do they meet, in hours?
            Two cars start $d miles apart and go towards each other with speeds $a and $b. How many hours until they meet?
            @F the time until two bikes meet that are $d miles apart and ride towards each other at $a and $b miles per hour.
            Two ships, $d miles from each other, sail to meet at $a and $b miles per hour. How many hours does it take?
            @T the hours until two runners meet, $d miles apart at first, with speeds $a and $b towards each other.
            Two pumps fill $a and $b liters per hour into one tank of $d liters. How many hours until it is full?
            Two machines make $a and $b parts per hour. How many hours do they need together for $d parts?
            A road of $d miles is built from both ends at $a and $b miles per week. After how many weeks is it done?
            Two workers pack $a and $b boxes an hour. How long do they need for $d boxes together, in hours?
        """,
        dev="""
            At speeds $a and $b two buses approach each other from $d miles away. How many hours pass until they meet?
        """,
        unseen="""
            Two boats are $d miles apart. One goes $a miles an hour, the other $b miles an hour, towards each other. How many hours until they meet?
            $name paints $a tiles an hour and $name2 paints $b tiles an hour. How many hours do they need for $d tiles together?
        """,
        plans="""
            Both rates add up, so we divide by their sum.
            The two speeds are added, then we divide.
        """,
        codes=["print($d // ($a {{+||-}} $b))", "speed = $a {{+||-}} $b\nprint($d // speed)"],
    ),
    family(
        "heads_and_legs",
        _heads_legs,
        wordings="""
            A farm has rabbits and chickens with $h heads and $l legs in all. How many rabbits are there?
            There are $h animals, cows and ducks, with $l legs together. How many cows are there?
            A cage holds chickens and rabbits. There are $h heads and $l legs. @F the number of rabbits.
            @F the number of four legged animals if $h animals with 2 or 4 legs have $l legs.
            Bikes and cars, $h in all, have $l wheels. How many cars are there?
            @T how many cars there are when $h bikes and cars have $l wheels together.
            In a yard there are hens and goats, $h heads and $l legs. How many goats are in the yard?
            $name counts $h heads and $l legs among ducks and sheep. How many sheep are there?
            Some animals have 2 legs and some have 4. There are $h animals and $l legs. How many have 4 legs?
            A parking lot has $h vehicles, bikes with 2 wheels and cars with 4, and $l wheels. How many are cars?
        """,
        dev="""
            Geese and pigs together: $h heads, $l legs. What is the number of pigs?
        """,
        unseen="""
            On a meadow stand horses and geese. They have $h heads and $l legs altogether. How many horses are there?
            With $l wheels on $h vehicles, each a bike or a car, how many cars must there be?
        """,
        plans="""
            If all had two legs, the extra legs would come in pairs from those with four.
            We compare with the case that all have two legs.
        """,
        codes=["print(($l {{-||+}} 2 * $h) // 2)", "extra = $l {{-||+}} 2 * $h\nprint(extra // 2)"],
    ),
    family(
        "tickets",
        _tickets,
        wordings="""
            $n tickets were sold for $t coins in all. Kids pay $p coins and adults $q coins. How many adult tickets were sold?
            A show sold $n tickets, at $p coins for children and $q coins for adults, and took in $t coins. How many adults came?
            Children pay $p coins and adults pay $q coins. $n people paid $t coins. How many of them are adults?
            @F the number of adults if $n visitors paid $t coins, children $p coins and adults $q coins each.
            Small boxes hold $p $item and large boxes hold $q. $n boxes hold $t $item. How many boxes are large?
            @T how many large bottles there are among $n bottles with $t liters in all, when small ones hold $p and large ones $q liters.
            There are $n coins worth $p or $q each. They are worth $t together. How many coins are worth $q?
            A test has $n questions, some worth $p points and some worth $q points, $t points in all. How many are worth $q points?
            $name buys $n stamps at $p or $q cents and pays $t cents. How many of the stamps cost $q cents?
            On a ride $n people paid $t coins, kids $p and adults $q coins each. How many adults were there?
        """,
        dev="""
            With prices $p for a child and $q for an adult, $n tickets brought $t coins. How many were for adults?
        """,
        unseen="""
            A bus with $n riders took $t coins: a child pays $p coins, an adult pays $q coins. How many riders are adults?
            Cheap seats cost $p and good seats cost $q coins. $n seats were sold for $t coins. How many good seats were sold?
        """,
        plans="""
            If all paid the lower price, the extra money comes from the higher price.
            We compare with the case that all pay the small price.
        """,
        codes=["print(($t - $n * $p) // ($q {{-||+}} $p))", "extra = $t - $n * $p\nprint(extra // ($q {{-||+}} $p))"],
    ),
    family(
        "work_together",
        _work,
        wordings="""
            $name paints a house in $a days, $name2 in $b days. How many days do they need together, as a fraction?
            One pipe fills a tank in $a hours, another in $b hours. How long do both need together? Give a fraction of hours.
            One machine does a job in $a hours and a second one in $b hours. In how many hours do they do it together, as a fraction?
            @F the time for a job done together by two workers who need $a and $b days alone, as a fraction.
            Alone, $name needs $a hours and $name2 needs $b hours for the work. How many hours do both need side by side, as a fraction?
            @T the days that two teams need together if alone they need $a and $b days, as a reduced fraction.
            Two pumps can empty a pool in $a and $b hours. Working at the same time, how many hours do they take, as a fraction?
            A cook makes a meal in $a hours, a helper needs $b hours. How long does it take both at once, as a fraction of hours?
            Two taps fill a bath in $a and $b minutes. How many minutes does it take with both taps open, as a fraction?
            A field is mowed by one mower in $a hours, by another in $b hours. How many hours with both mowers, as a fraction?
        """,
        dev="""
            What takes $name $a hours takes $name2 $b hours. Working together, what time do they need, as a fraction?
        """,
        unseen="""
            A printer prints a book in $a hours, a second printer does it in $b hours. How many hours do they need at the same time, as a fraction?
            $name cleans the hall in $a hours, $name2 in $b hours. Together, how many hours does it take? Answer with a fraction.
        """,
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
        wordings="""
            A colony has $a cells and grows $r times as large every hour. How many cells are there after $n hours?
            $a bacteria become $r times as many each day. How many are there after $n days?
            @F the number of cells after $n steps if $a cells are multiplied by $r in each step.
            A rumor is known to $a people. Every day $r times as many people know it. How many know it after $n days?
            Start with $a and multiply by $r again and again, $n times. What number do you get?
            @T the number you reach when $a is multiplied by $r a total of $n times.
            $name has $a coins and makes them $r times as many each year. How many coins are there after $n years?
            A plant has $a leaves. Each week the number of leaves is multiplied by $r. How many leaves are there after $n weeks?
            A pond holds $a lilies, and every week there are $r times as many. How many are there $n weeks later?
            The number $a is multiplied by $r, $n times in a row. @F the result.
        """,
        dev="""
            Every hour a number of cells is multiplied by $r. At first there are $a. How many after $n hours?
        """,
        unseen="""
            An amount of $a coins grows by the factor $r each month. What is it after $n months?
            $a mice become $r times as many every season. How many mice are there after $n seasons?
        """,
        plans="""
            We multiply by the same factor again and again.
            Repeated growth is a power of the factor.
        """,
        codes=["print($a * $r ** {{$n||($n - 1)}})", "x = $a\nfor k in range({{$n||$n - 1}}):\n    x *= $r\nprint(x)"],
    ),
    family(
        "clock_minutes",
        _clock,
        wordings="""
            How many minutes are there from $a hours $b minutes to $c hours $d minutes on the same day?
            A film starts at $a h $b min and ends at $c h $d min. How many minutes long is it?
            @F the number of minutes between the times $a h $b min and $c h $d min.
            $name leaves at $a h $b min and arrives at $c h $d min. How many minutes did the trip take?
            A train departs at $a hours $b minutes and arrives at $c hours $d minutes. How long is the ride in minutes?
            @T the minutes that pass from $a h $b min until $c h $d min.
            School begins at $a h $b min and is over at $c h $d min. How many minutes is that?
            How long, in minutes, is it from $a h $b min to $c h $d min?
            A clock shows $a h $b min and later $c h $d min. How many minutes have passed?
            Work starts at $a hours $b minutes and stops at $c hours $d minutes. How many minutes of work is that?
        """,
        dev="""
            Between $a h $b min and $c h $d min of one day, what is the time in minutes?
        """,
        unseen="""
            A game lasts from $a h $b min to $c h $d min. What is its length in minutes?
            A shop is open from $a hours $b minutes until $c hours $d minutes. For how many minutes is it open?
        """,
        plans="""
            We turn both times into minutes and subtract.
            Both times are counted in minutes from midnight.
        """,
        codes=["start = $a * 60 {{+||-}} $b\nend = $c * 60 + $d\nprint(end - start)", "print(($c - $a) * 60 {{+||-}} ($d - $b))"],
    ),
    family(
        "seconds",
        ints(a=(1, 23), b=(1, 59), c=(1, 59)),
        wordings="""
            How many seconds are $a hours, $b minutes and $c seconds?
            Convert $a hours $b minutes $c seconds to seconds.
            @F the number of seconds in $a hours, $b minutes and $c seconds.
            @T $a h $b min $c s in seconds.
            A race takes $a hours, $b minutes and $c seconds. How many seconds is that?
            Express $a hours $b minutes and $c seconds in seconds.
            $name sleeps for $a hours, $b minutes and $c seconds. How many seconds does $name sleep?
            What is $a h $b min $c s, written in seconds only?
            A video is $a hours, $b minutes and $c seconds long. @F its length in seconds.
            A timer is set to $a hours $b minutes $c seconds. After how many seconds does it ring?
        """,
        dev="""
            In seconds, how long is a time of $a hours, $b minutes, $c seconds?
        """,
        unseen="""
            A flight lasts $a hours, $b minutes and $c seconds. What is that in seconds?
            How many seconds pass in $a hours $b minutes $c seconds?
        """,
        plans="""
            An hour has 3600 seconds and a minute has 60.
            We turn hours and minutes into seconds and add.
        """,
        codes=["print($a * 3600 + $b * 60 {{+||-}} $c)", "minutes = $a * 60 + $b\nprint(minutes * 60 {{+||-}} $c)"],
    ),
    family(
        "days_between",
        lambda rng: (lambda m: {"y": rng.randint(1950, 2060), "m": m, "d": rng.randint(1, 28), "n": rng.randint(m + 1, 12), "e": rng.randint(1, 28)})(rng.randint(1, 11)),
        wordings="""
            How many days are there from $y-$m-$d to $y-$n-$e (year-month-day)?
            How many days lie between the dates $y-$m-$d and $y-$n-$e?
            @F the number of days from day $d of month $m to day $e of month $n in the year $y.
            @T how many days pass from $y-$m-$d until $y-$n-$e.
            A trip begins on $y-$m-$d and ends on $y-$n-$e. How many days later is that?
            In the year $y, how many days is it from day $d of month $m to day $e of month $n?
            $name starts a job on $y-$m-$d and leaves on $y-$n-$e. How many days is that apart?
            By how many days do the dates $y-$m-$d and $y-$n-$e differ?
            The dates are $y-$m-$d and $y-$n-$e. @F the difference in days.
            From $y-$m-$d to $y-$n-$e, how many days does it take?
        """,
        dev="""
            How many days after $y-$m-$d is the date $y-$n-$e?
        """,
        unseen="""
            A seed is planted on $y-$m-$d and harvested on $y-$n-$e. How many days did it grow?
            Count the days from the date $y-$m-$d to the date $y-$n-$e.
        """,
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
        wordings="""
            How many leap years are there from $a to $b?
            [Count|Determine the number of] the leap years from $a to $b, both included.
            @F how many leap years lie between $a and $b inclusive.
            @T the number of leap years from the year $a to the year $b.
            In the years $a to $b, how many times is there a February 29?
            How many years from $a up to $b have 366 days?
            What is the number of leap years in the years from $a to $b?
            Of the years $a, ..., $b, how many are leap years?
            How often is there a leap year from $a to $b, with both ends counted?
            Between the years $a and $b inclusive, how many leap years occur?
        """,
        dev="""
            Going from year $a to year $b, how many leap years do we meet?
        """,
        unseen="""
            How many years with a leap day are there in the range $a to $b?
            A tree stands from the year $a until the year $b. How many leap years does it see, both years counted?
        """,
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
        wordings="""
            @F the median of $xs.
            What is the median of the numbers $xs?
            @T the median of this list: $xs.
            Sort the numbers $xs. Which number is in the middle?
            Which number stands in the middle when $xs are put in order?
            Given the values $xs, @f their median.
            $name scored $xs points. What is the median score?
            [The heights of some trees are|Some lengths are] $xs. @F the median.
            Put $xs in order of size. What is the middle value?
            What is the middle number, by size, of $xs?
        """,
        dev="""
            If $xs are sorted, what value is at the center?
        """,
        unseen="""
            Half of the numbers in $xs are smaller than one of them and half are larger. Which one is it?
            @F the value in the middle after sorting $xs.
        """,
        plans="""
            We sort the list and take the middle.
            The median is the middle of the sorted list.
        """,
        codes=["xs = sorted($xs)\nprint(xs[len(xs) // 2{{|| - 1}}])", "xs = $xs\nxs.sort()\nprint(xs[len(xs) // 2{{|| - 1}}])"],
    ),
    family(
        "spread",
        _distinct,
        wordings="""
            @F the range of $xs, the largest minus the smallest number.
            What is the difference between the largest and the smallest of $xs?
            By how much is the biggest number in $xs larger than the smallest?
            @T the difference of the maximum and the minimum of this list: $xs.
            Subtract the smallest of the numbers $xs from the largest.
            Take $xs. How far apart are the smallest and the largest number?
            The temperatures were $xs. What is the difference between the highest and the lowest?
            $name scored $xs points. By how much do the best and the worst score differ?
            What is the maximum of $xs minus the minimum?
            Given the numbers $xs, @f the range, that is the maximum minus the minimum.
        """,
        dev="""
            The greatest of $xs minus the least of them: what is it?
        """,
        unseen="""
            Some trees have the heights $xs. What is the difference in height of the tallest and the shortest?
            How much must be added to the smallest of $xs to get the largest?
        """,
        plans="""
            We subtract the minimum from the maximum.
            The range is the largest minus the smallest number.
        """,
        codes=["xs = $xs\nprint(max(xs) {{-||+}} min(xs))", "xs = sorted($xs)\nprint(xs[-1] {{-||+}} xs[0])"],
    ),
    family(
        "count_above",
        lambda rng: {"xs": rng.sample(range(10, 999), rng.randint(5, 8)), "k": rng.randint(200, 800)},
        wordings="""
            How many of the numbers $xs are greater than $k?
            [Count|Determine] how many numbers in $xs are larger than $k.
            @F the count of numbers above $k in the list $xs.
            @T how many of $xs are more than $k.
            The list is $xs. How many entries are bigger than $k?
            Of the numbers $xs, how many exceed $k?
            $name scored $xs points in some games. In how many games did $name get more than $k points?
            Some lengths are $xs. How many of them are over $k?
            In the list $xs, how many values lie above $k?
            How many numbers larger than $k are there among $xs?
        """,
        dev="""
            Look at $xs. What is the number of values that are higher than $k?
        """,
        unseen="""
            A shop sold $xs items on some days. On how many days were more than $k items sold?
            From $xs, pick all numbers greater than $k. How many did you pick?
        """,
        plans="""
            We count the numbers above the limit.
            We go through the list and count.
        """,
        codes=["xs = $xs\nprint(sum(1 for x in xs if x {{>||<}} $k))", "xs = $xs\nprint(len([x for x in xs if x {{>||<}} $k]))"],
    ),
    family(
        "even_sum",
        _distinct,
        wordings="""
            @F the sum of the even numbers in $xs.
            What do the even numbers among $xs add up to?
            Add all even numbers in the list $xs. What is the sum?
            @T the total of the even entries of $xs.
            The list is $xs. What is the sum of its even numbers?
            Of the numbers $xs, only the even ones are added. @F the result.
            $name adds up those of $xs which are even. What is the total?
            Leave out the odd numbers in $xs and add the rest. What do you get?
            In $xs, what is the sum of all numbers divisible by 2?
            How large is the sum of the even ones among $xs?
        """,
        dev="""
            Take the even values out of $xs and add them. What sum comes out?
        """,
        unseen="""
            From the list $xs cross out every odd number. What is the sum of what is left?
            @F the total of those numbers in $xs that are even.
        """,
        plans="""
            We add only the even numbers.
            We test each number for being even and add.
        """,
        codes=["xs = $xs\nprint(sum(x for x in xs if x % 2 == {{0||1}}))", "xs = $xs\ntotal = 0\nfor x in xs:\n    if x % 2 == {{0||1}}:\n        total += x\nprint(total)"],
    ),
    family(
        "text_total",
        _text,
        wordings="""
            @F the sum of the numbers in the text "$t".
            A file has the line "$t". What is the sum of its numbers?
            What do the numbers in the string "$t" add up to?
            @T the total of the numbers written in "$t".
            The text "$t" holds some numbers. What is their sum?
            $name reads the line "$t" from a file and adds the numbers. What is the total?
            Add up the numbers that stand in the text "$t".
            A table row reads "$t". @F the sum of the row.
            Given the string "$t", what is the sum of the numbers in it?
            [Split|Cut] the text "$t" into numbers and add them. What is the sum?
        """,
        dev="""
            The numbers in "$t" are read and summed. What is the result?
        """,
        unseen="""
            A sensor sends the text "$t". How large is the sum of the values in it?
            Parse the string "$t" as numbers and @f their sum.
        """,
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
