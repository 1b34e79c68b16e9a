"""Problems of `reasoning_style` told in words, and small ones about numbers, units and shapes."""

from __future__ import annotations

import random

from softprune.bench.tiny.data import arithmetic as worked
from softprune.bench.tiny.data.problems import NAMES, THINGS, Problem

_UNITS = (
    ("kilometers", "meters", 1000), ("meters", "centimeters", 100), ("centimeters", "millimeters", 10), ("kilograms", "grams", 1000),
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7), ("dozens", "pieces", 12),
    ("feet", "inches", 12), ("yards", "feet", 3), ("liters", "milliliters", 1000), ("years", "months", 12),
)  # fmt: skip


def _join(canonical: str, question: str, steps: list[str], answer: str) -> Problem:
    return Problem(canonical, question, tuple(steps), answer)


def conversion(rng: random.Random) -> Problem:
    """A unit into a smaller one, or back."""
    large, small, factor = rng.choice(_UNITS)
    n = rng.randint(2, 999)
    steps, product = worked.multiplied(max(n, factor), min(n, factor)) if factor not in (10, 100, 1000) else ([], n * factor)
    rule = f"1 of {large} is {factor} {small}"
    if rng.random() < 0.6:
        question = rng.choice((f"How many {small} are {n} {large}?", f"Convert {n} {large} to {small}."))
        lines = [rule, *steps] if steps else [rule, f"{n} * {factor} = {product}"]
        return _join(f"convert {n} {large} {small}", question, lines, f"{n} {large} are {product} {small}.")
    lines, quotient, _ = worked.divided(product, factor)
    question = rng.choice((f"How many {large} are {product} {small}?", f"Convert {product} {small} to {large}."))
    return _join(f"convert {product} {small} {large}", question, [rule, *lines], f"{product} {small} are {quotient} {large}.")


def gains_and_losses(rng: random.Random) -> Problem:
    """Someone has things, gets some, gives some away."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    have, more = rng.randint(5, 900), rng.randint(2, 500)
    less = rng.randint(1, have + more)
    first, total = worked.added(have, more)
    second, rest = worked.subtracted(total, less)
    story = rng.choice((
        f"{name} has {have} {thing}. {other} gives {name} {more} more. Then {name} loses {less}. How many {thing} are left?",
        f"There are {have} {thing} in a box. {name} puts in {more} {thing} and {other} takes out {less}. How many {thing} are there now?",
        f"A shop has {have} {thing}. It buys {more} and sells {less}. How many {thing} does it have now?",
    ))  # fmt: skip
    return _join(f"gain-loss {have} {more} {less}", story, [*first, *second], f"There are {rest} {thing}.")


def purchase(rng: random.Random) -> Problem:
    """Price of two kinds of things, and the change."""
    name = rng.choice(NAMES)
    one, two = rng.sample(THINGS, 2)
    n, p, m, q = rng.randint(2, 40), rng.randint(2, 9), rng.randint(2, 40), rng.randint(2, 9)
    first, cost = worked.times_digit(n, p)
    second, more = worked.times_digit(m, q)
    third, total = worked.added(cost, more)
    steps = [*first, *second, *third]
    story = f"{name} buys {n} {one} for {p} dollars each and {m} {two} for {q} dollars each."
    if rng.random() < 0.5:
        question = rng.choice(("What is the total price?", f"How much does {name} pay?", "What does it cost in all?"))
        return _join(f"purchase {n} {p} {m} {q}", f"{story} {question}", steps, f"The total is {total} dollars.")
    paid = (total // 50 + 1) * 50
    last, change = worked.subtracted(paid, total)
    question = f"{story} {name} pays with {paid} dollars. How much change is there?"
    return _join(f"purchase {n} {p} {m} {q} {paid}", question, [*steps, *last], f"The change is {change} dollars.")


def journey(rng: random.Random) -> Problem:
    """Distance, speed and time."""
    name, speed, hours = rng.choice(NAMES), rng.randint(3, 120), rng.randint(2, 12)
    way = rng.choice(("drives", "rides", "travels", "walks" if speed < 8 else "cycles" if speed < 40 else "drives"))
    if rng.random() < 0.5:
        steps, distance = worked.multiplied(speed, hours)
        question = f"{name} {way} at {speed} kilometers per hour for {hours} hours. How far does {name} get?"
        return _join(f"distance {speed} {hours}", question, ["distance = speed * time", *steps], f"{name} gets {distance} kilometers far.")
    distance = speed * hours
    steps, time, _ = worked.divided(distance, speed)
    question = f"{name} {way} {distance} kilometers at {speed} kilometers per hour. How long does it take?"
    return _join(f"time {distance} {speed}", question, ["time = distance / speed", *steps], f"It takes {time} hours.")


def sharing(rng: random.Random) -> Problem:
    """Things shared out among people."""
    name, thing, people, total = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 12), rng.randint(20, 3000)
    steps, each, rest = worked.divided(total, people)
    question = rng.choice((
        f"{name} shares {total} {thing} equally among {people} friends. How many does each get, and how many are left over?",
        f"{total} {thing} are packed into {people} boxes, the same number in each. How many are in a box, and how many remain?",
    ))  # fmt: skip
    return _join(f"share {total} {people}", question, steps, f"Each gets {each}, and {rest} are left over.")


def rectangle(rng: random.Random) -> Problem:
    """Area or perimeter."""
    a, b = rng.randint(2, 300), rng.randint(2, 60)
    if rng.random() < 0.5:
        steps, area = worked.multiplied(a, b)
        question = rng.choice(
            (f"What is the area of a rectangle of {a} by {b} meters?", f"A field is {a} m long and {b} m wide. What is its area?")
        )
        return _join(f"area {a} {b}", question, ["area = length * width", *steps], f"The area is {area} square meters.")
    first, half = worked.added(a, b)
    second, perimeter = worked.times_digit(half, 2)
    question = rng.choice(
        (
            f"What is the perimeter of a rectangle of {a} by {b} meters?",
            f"A field is {a} m long and {b} m wide. How long is a fence around it?",
        )
    )
    return _join(f"perimeter {a} {b}", question, ["perimeter = 2 * (length + width)", *first, *second], f"It is {perimeter} meters.")


def mean(rng: random.Random) -> Problem:
    """Mean of three to five numbers, whole."""
    count = rng.randint(3, 5)
    values = [rng.randint(2, 200) for _ in range(count)]
    values[-1] += -sum(values) % count
    steps, total = [], values[0]
    for value in values[1:]:
        lines, total = worked.added(total, value)
        steps += lines
    lines, quotient, _ = worked.divided(total, count)
    shown = ", ".join(map(str, values))
    question = rng.choice(
        (f"What is the average of {shown}?", f"Find the mean of {shown}.", f"Compute the average of these numbers: {shown}.")
    )
    return _join(f"mean {sorted(values)}", question, [*steps, f"there are {count} numbers", *lines], f"The average is {quotient}.")


def expression(rng: random.Random) -> Problem:
    """Products before sums, brackets before both."""
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
    if rng.random() < 0.5:
        first, product = worked.times_digit(b, c)
        second, value = worked.added(a, product)
        text, steps = f"{a} + {b} * {c}", ["multiply first", *first, *second]
    else:
        first, total = worked.added(a, b)
        second, value = worked.times_digit(total, c)
        text, steps = f"({a} + {b}) * {c}", ["brackets first", *first, *second]
    question = rng.choice((f"What is {text}?", f"Evaluate {text}.", f"Compute {text}."))
    return _join(f"expression {text}", question, steps, f"{text} = {value}")


def polynomial(rng: random.Random) -> Problem:
    """a x^2 + b x + c at a number."""
    a, b, c, x = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 50), rng.randint(2, 20)
    square, linear = x * x, b * x
    first, lead = worked.times_digit(square, a)
    second, part = worked.added(lead, linear)
    third, value = worked.added(part, c)
    steps = [f"x^2 = {x} * {x} = {square}", *first, f"{b} * {x} = {linear}", *second, *third]
    question = rng.choice((f"Evaluate {a}x^2 + {b}x + {c} at x = {x}.", f"If x = {x}, what is {a}x^2 + {b}x + {c}?"))
    return _join(f"polynomial {a} {b} {c} {x}", question, steps, f"The value is {value}.")


def binary(rng: random.Random) -> Problem:
    """A decimal number in base two, by repeated halving."""
    n = rng.randint(5, 4000)
    steps, rest = [], n
    while rest:
        steps.append(f"{rest} = 2 * {rest // 2} + {rest % 2}")
        rest //= 2
    digits = f"{n:b}"
    steps.append("read the last digits from the bottom: " + " ".join(digits))
    question = rng.choice((f"Write {n} in binary.", f"What is {n} in base 2?", f"Convert {n} to binary."))
    return _join(f"binary {n}", question, steps, f"{n} is {digits} in binary.")


def ordering(rng: random.Random) -> Problem:
    """Numbers sorted by taking out the smallest again and again."""
    values = rng.sample(range(1, 10 ** rng.randint(2, 4)), rng.randint(4, 6))
    left, steps = list(values), []
    while left:
        least = min(left)
        steps.append(f"of {', '.join(map(str, left))} the smallest is {least}")
        left.remove(least)
    shown, ordered = ", ".join(map(str, values)), ", ".join(map(str, sorted(values)))
    question = rng.choice((f"Sort these numbers: {shown}", f"Put {shown} in ascending order.", f"Order {shown} from small to large."))
    return _join(f"sort {sorted(values)}", question, steps, ordered)


def ages(rng: random.Random) -> Problem:
    """How old is the other one."""
    one, two = rng.sample(NAMES, 2)
    age, gap, years = rng.randint(4, 60), rng.randint(1, 30), rng.randint(2, 40)
    first, older = worked.added(age, gap)
    second, later = worked.added(older, years)
    question = f"{one} is {age} years old. {two} is {gap} years older than {one}. How old will {two} be in {years} years?"
    return _join(
        f"ages {age} {gap} {years}", question, [f"{two} now:", *first, f"in {years} years:", *second], f"{two} will be {later} years old."
    )
