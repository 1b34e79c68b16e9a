"""Problems of `reasoning_style`: each maker draws one problem with its working and its answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd

from softprune.bench.tiny.data import arithmetic as worked

NAMES = tuple(
    [
        "Ada",
        "Ben",
        "Carla",
        "David",
        "Elena",
        "Farid",
        "Grace",
        "Hugo",
        "Ines",
        "Jonas",
        "Kim",
        "Lena",
        "Mateo",
        "Nora",
        "Omar",
        "Petra",
        "Quinn",
        "Rosa",
        "Sami",
        "Tara",
        "Uma",
        "Victor",
        "Wen",
        "Yara",
        "Zoe",
        "Alma",
        "Boris",
        "Chloe",
        "Dario",
        "Emil",
        "Fiona",
        "Gustav",
        "Hana",
        "Ivan",
        "Julia",
        "Karim",
        "Lucia",
        "Marta",
        "Nils",
        "Olga",
    ]
)
THINGS = tuple(
    [
        "apples",
        "books",
        "stamps",
        "marbles",
        "coins",
        "pencils",
        "cards",
        "eggs",
        "tickets",
        "shells",
        "bottles",
        "chairs",
        "plants",
        "photos",
        "keys",
        "stickers",
    ]
)


@dataclass(frozen=True)
class Problem:
    """A question with its working.

    Attributes:
        canonical: operation and numbers, the same for every wording.
        steps: lines of the analysis channel.
    """

    canonical: str
    question: str
    steps: tuple[str, ...]
    answer: str


def _problem(rng: random.Random, canonical: str, questions: tuple[str, ...], steps: list[str], answers: tuple[str, ...]) -> Problem:
    return Problem(canonical, rng.choice(questions), tuple(steps), rng.choice(answers))


def _number(rng: random.Random, most_digits: int = 4) -> int:
    """Every length equally likely."""
    digits = rng.randint(1, most_digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def addition(rng: random.Random) -> Problem:
    """a + b."""
    a, b = _number(rng, 5), _number(rng, 5)
    steps, total = worked.added(a, b)
    questions = (f"What is {a} + {b}?", f"Add {a} and {b}.", f"Compute {a} + {b}.", f"What is the sum of {a} and {b}?", f"{a} + {b} = ?")
    answers = (f"{a} + {b} = {total}", f"The sum is {total}.", f"{total}", f"The answer is {total}.")
    return _problem(rng, f"add {min(a, b)} {max(a, b)}", questions, steps, answers)


def subtraction(rng: random.Random) -> Problem:
    """a - b >= 0."""
    b, a = sorted((_number(rng, 5), _number(rng, 5)))
    steps, rest = worked.subtracted(a, b)
    questions = (f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"Compute {a} - {b}.", f"What is {a} minus {b}?")
    answers = (f"{a} - {b} = {rest}", f"The difference is {rest}.", f"{rest}", f"The answer is {rest}.")
    return _problem(rng, f"subtract {a} {b}", questions, steps, answers)


def multiplication(rng: random.Random) -> Problem:
    """a * b, b of one or two digits."""
    a, b = _number(rng, 4), rng.randint(2, 9) if rng.random() < 0.5 else rng.randint(11, 99)
    steps, product = worked.multiplied(a, b)
    questions = (f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"What is {a} times {b}?", f"Find the product of {a} and {b}.")
    answers = (f"{a} * {b} = {product}", f"The product is {product}.", f"{product}", f"The answer is {product}.")
    return _problem(rng, f"multiply {min(a, b)} {max(a, b)}", questions, steps, answers)


def division(rng: random.Random) -> Problem:
    """a / d with remainder."""
    a, d = rng.randint(10, 99999), rng.randint(2, 12)
    steps, quotient, rest = worked.divided(a, d)
    shown = f"{quotient} remainder {rest}" if rest else f"{quotient}"
    questions = (f"Divide {a} by {d}.", f"What is {a} / {d}?", f"What are quotient and remainder of {a} divided by {d}?")
    return _problem(rng, f"divide {a} {d}", questions, steps, (f"{a} / {d} = {shown}", f"The answer is {shown}."))


def greatest_divisor(rng: random.Random) -> Problem:
    """gcd of two numbers that mostly share a factor."""
    factor = rng.randint(1, 30)
    a, b = factor * rng.randint(2, 60), factor * rng.randint(2, 60)
    steps, divisor = worked.common_divisor(a, b)
    questions = (f"What is the greatest common divisor of {a} and {b}?", f"Find gcd({a}, {b}).", f"Compute the gcd of {a} and {b}.")
    return _problem(rng, f"gcd {min(a, b)} {max(a, b)}", questions, steps, (f"gcd({a}, {b}) = {divisor}", f"It is {divisor}."))


def least_multiple(rng: random.Random) -> Problem:
    """Least common multiple through the gcd."""
    a, b = rng.randint(4, 60), rng.randint(4, 60)
    steps, divisor = worked.common_divisor(a, b)
    reduced = a // divisor
    more, multiple = worked.multiplied(max(reduced, b), min(reduced, b))
    steps += [f"lcm = {a} / {divisor} * {b} = {reduced} * {b}", *more]
    questions = (f"What is the least common multiple of {a} and {b}?", f"Find lcm({a}, {b}).")
    return _problem(rng, f"lcm {min(a, b)} {max(a, b)}", questions, steps, (f"lcm({a}, {b}) = {multiple}", f"It is {multiple}."))


def prime(rng: random.Random) -> Problem:
    """Trial division up to the square root."""
    n = rng.randint(11, 2500)
    steps, divisor = [f"test the primes p with p * p <= {n}"], 0
    for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47):
        if p * p > n:
            steps.append(f"{p} * {p} = {p * p} is more than {n}, stop")
            break
        steps.append(f"{n} = {n // p} * {p} + {n % p}" + (", no" if n % p else ", yes"))
        if n % p == 0:
            divisor = p
            break
    answer = f"No, {n} is not prime: {n} = {divisor} * {n // divisor}." if divisor else f"Yes, {n} is prime."
    return _problem(rng, f"prime {n}", (f"Is {n} a prime number?", f"Is {n} prime?", f"Tell me whether {n} is prime."), steps, (answer,))


def fractions_sum(rng: random.Random) -> Problem:
    """a/b + c/d or a/b - c/d, reduced."""
    x, y = (Fraction(rng.randint(1, 15), rng.randint(2, 16)) for _ in range(2))
    if x < y:
        x, y = y, x
    sign = rng.choice("+-")
    total = x + y if sign == "+" else x - y
    (a, b), (c, d) = x.as_integer_ratio(), y.as_integer_ratio()
    top = a * d + c * b if sign == "+" else a * d - c * b
    steps = [f"common denominator: {b} * {d} = {b * d}", f"{a}/{b} = {a * d}/{b * d}", f"{c}/{d} = {c * b}/{b * d}"]
    steps.append(f"{a * d} {sign} {c * b} = {top}, so {top}/{b * d}")
    divisor = gcd(top, b * d)
    steps.append(f"gcd({top}, {b * d}) = {divisor}, so {total}" if top else f"the result is {total}")
    questions = (f"What is {x} {sign} {y}?", f"Compute {x} {sign} {y} and simplify.", f"Simplify {x} {sign} {y}.")
    return _problem(rng, f"fraction {sign} {x} {y}", questions, steps, (f"{x} {sign} {y} = {total}", f"The result is {total}."))


def fractions_product(rng: random.Random) -> Problem:
    """a/b * c/d, reduced."""
    x, y = (Fraction(rng.randint(1, 20), rng.randint(2, 20)) for _ in range(2))
    (a, b), (c, d) = x.as_integer_ratio(), y.as_integer_ratio()
    divisor = gcd(a * c, b * d)
    steps = [f"numerator: {a} * {c} = {a * c}", f"denominator: {b} * {d} = {b * d}", f"gcd({a * c}, {b * d}) = {divisor}"]
    steps.append(f"{a * c} / {divisor} = {a * c // divisor}, {b * d} / {divisor} = {b * d // divisor}")
    questions = (f"What is {x} * {y}?", f"Multiply {x} by {y} and simplify.")
    return _problem(rng, f"fraction * {min(x, y)} {max(x, y)}", questions, steps, (f"{x} * {y} = {x * y}", f"The result is {x * y}."))


def percentage(rng: random.Random) -> Problem:
    """p percent of a number, whole result."""
    p = rng.choice((5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 65, 70, 75, 80, 85, 90, 12, 24, 36))
    n = rng.randint(1, 400) * (100 // gcd(p, 100))
    steps, product = worked.multiplied(n, p)
    steps = [f"{p}% of {n} = {n} * {p} / 100", *steps, f"{product} / 100 = {product // 100}"]
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    questions = (
        f"What is {p}% of {n}?",
        f"Calculate {p} percent of {n}.",
        f"{name} has {n} {thing} and gives away {p}% of them. How many {thing} does {name} give away?",
    )
    return _problem(rng, f"percent {p} {n}", questions, steps, (f"{product // 100}", f"The answer is {product // 100}."))


def linear(rng: random.Random) -> Problem:
    """a x + b = c over the integers."""
    a, b, x = rng.randint(2, 15), rng.randint(1, 99), rng.randint(0, 60)
    letter = rng.choice("xyzntk")
    if rng.random() < 0.5 or b > a * x:
        c, sign, undo, opposite = a * x + b, "+", "subtracted", "-"
    else:
        c, sign, undo, opposite = a * x - b, "-", "added", "+"
    lines, rest = worked.subtracted(c, b) if undo == "subtracted" else worked.added(c, b)
    more, quotient, _ = worked.divided(rest, a)
    steps = [f"{a}{letter} = {c} {opposite} {b}", *lines, f"{a}{letter} = {rest}", f"{letter} = {rest} / {a}", *more[1:]]
    assert quotient == x
    questions = (
        f"Solve {a}{letter} {sign} {b} = {c}.",
        f"Find {letter}: {a}{letter} {sign} {b} = {c}",
        f"If {a}{letter} {sign} {b} = {c}, what is {letter}?",
    )
    return _problem(rng, f"linear {a} {sign}{b} {c}", questions, steps, (f"{letter} = {x}", f"The solution is {letter} = {x}."))


def system(rng: random.Random) -> Problem:
    """x + y = s and x - y = d, or x + y = s and a x + y = t, by elimination."""
    x, y, a = rng.randint(1, 80), rng.randint(1, 80), rng.randint(2, 9)
    s, t = x + y, a * x + y
    lines, difference = worked.subtracted(t, s)
    factor = a - 1
    more, quotient, _ = worked.divided(difference, factor)
    steps = ["subtract the first equation from the second", *lines, f"{factor}x = {difference}", *more[1:], f"x = {quotient}"]
    rest, value = worked.subtracted(s, x)
    steps += [f"y = {s} - {x}", *rest[1:]]
    assert (quotient, value) == (x, y)
    questions = (f"Solve the system: x + y = {s}, {a}x + y = {t}.", f"Find x and y with x + y = {s} and {a}x + y = {t}.")
    return _problem(rng, f"system {s} {a} {t}", questions, steps, (f"x = {x}, y = {y}", f"The solution is x = {x} and y = {y}."))


def sequence(rng: random.Random) -> Problem:
    """Next term of an arithmetic or geometric sequence."""
    first = rng.randint(1, 60)
    if rng.random() < 0.7:
        step = rng.randint(2, 40)
        terms = [first + step * index for index in range(5)]
        steps = [f"{b} - {a} = {b - a}" for a, b in pairwise(terms[:4])]
        lines, following = worked.added(terms[-2], step)
        steps += [f"each term is {step} more", *lines]
    else:
        step = rng.randint(2, 5)
        terms = [first * step**index for index in range(5)]
        steps = [f"{b} / {a} = {step}" for a, b in pairwise(terms[:4])]
        lines, following = worked.times_digit(terms[-2], step)
        steps += [f"each term is {step} times the one before", *lines]
    assert following == terms[-1]
    shown = ", ".join(map(str, terms[:4]))
    questions = (f"What comes next: {shown}, ?", f"Find the next term of {shown}.", f"Continue the sequence {shown}.")
    return _problem(rng, f"sequence {shown}", questions, steps, (f"{following}", f"The next term is {following}."))
