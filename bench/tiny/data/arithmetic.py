"""Arithmetic written out digit by digit, in steps short enough for a small model to carry out.

Every function returns (lines, value): the working as lines of text, and the number itself, computed by Python and
asserted to be what the lines end with.
"""

from __future__ import annotations

PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands", "millions")

Worked = tuple[list[str], int]


def _digits(value: int, width: int) -> list[int]:
    """Decimal digits, ones first, filled up with zeros."""
    return [value // 10**place % 10 for place in range(width)]


def _checked(lines: list[str], found: int, value: int) -> Worked:
    if found != value:
        raise AssertionError(f"the working gives {found}, not {value}: {lines}")
    return lines, value


def added(a: int, b: int) -> Worked:
    """a + b, both at least 0, column by column with carries."""
    width = max(len(str(a)), len(str(b)))
    lines, carry, total = [f"{a} + {b}"], 0, 0
    for place, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        carried = f" + {carry}" if carry else ""
        value = x + y + carry
        carry = value // 10
        total += value % 10 * 10**place
        note = f", write {value % 10}, carry 1" if carry else ""
        lines.append(f"{PLACES[place]}: {x} + {y}{carried} = {value}{note}")
    total += carry * 10**width
    lines.append(f"{a} + {b} = {total}")
    return _checked(lines, total, a + b)


def subtracted(a: int, b: int) -> Worked:
    """a - b for a >= b >= 0, column by column with borrows."""
    width = len(str(a))
    lines, borrow, total = [f"{a} - {b}"], 0, 0
    for place, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        take = y + borrow
        wanted = f"{x} - {y}" + (" - 1" if borrow else "")
        borrow = int(x < take)
        value = x + 10 * borrow - take
        total += value * 10**place
        note = f" needs a borrow: {x + 10} - {take} = {value}" if borrow else f" = {value}"
        lines.append(f"{PLACES[place]}: {wanted}{note}")
    lines.append(f"{a} - {b} = {total}")
    return _checked(lines, total, a - b)


def times_digit(a: int, d: int) -> Worked:
    """a * d for a digit d, column by column with carries."""
    width = len(str(a))
    lines, carry, total = [f"{a} * {d}"], 0, 0
    for place, x in enumerate(_digits(a, width)):
        carried = f" + {carry}" if carry else ""
        value = x * d + carry
        written = value % 10
        product = f"{x} * {d}{carried} = {value}"
        carry = value // 10
        total += written * 10**place
        lines.append(f"{PLACES[place]}: {product}" + (f", write {written}, carry {carry}" if carry else ""))
    total += carry * 10**width
    lines.append(f"{a} * {d} = {total}")
    return _checked(lines, total, a * d)


def multiplied(a: int, b: int) -> Worked:
    """a * b as one product for each digit of b, added up."""
    if b < 10:
        return times_digit(a, b)
    lines, total = [f"{a} * {b}"], 0
    for place, digit in enumerate(_digits(b, len(str(b)))):
        if digit == 0:
            continue
        steps, product = times_digit(a, digit)
        lines += steps
        part = product * 10**place
        if place:
            lines.append(f"{a} * {digit * 10**place} = {part}")
        if total:
            steps, total = added(total, part)
            lines += steps
        else:
            total = part
    lines.append(f"{a} * {b} = {total}")
    return _checked(lines, total, a * b)


def divided(a: int, d: int) -> tuple[list[str], int, int]:
    """Long division of a >= 0 by d >= 1: (lines, quotient, remainder)."""
    lines, rest, quotient = [f"{a} / {d}"], 0, 0
    for digit in map(int, str(a)):
        rest = rest * 10 + digit
        times = rest // d
        quotient = quotient * 10 + times
        lines.append(f"bring down {digit}: {rest} / {d} = {times}, {times} * {d} = {times * d}, {rest} - {times * d} = {rest - times * d}")
        rest -= times * d
    lines.append(f"{a} / {d} = {quotient}" + (f" remainder {rest}" if rest else ""))
    if (quotient, rest) != divmod(a, d):
        raise AssertionError(f"the working of {a} / {d} gives {quotient} remainder {rest}")
    return lines, quotient, rest


def common_divisor(a: int, b: int) -> Worked:
    """Greatest common divisor of two positive numbers, by Euclid's algorithm."""
    lines = [f"gcd({a}, {b})"]
    a, b = max(a, b), min(a, b)
    while b:
        lines.append(f"{a} = {a // b} * {b} + {a % b}, so gcd({b}, {a % b})")
        a, b = b, a % b
    lines.append(f"the gcd is {a}")
    return lines, a
