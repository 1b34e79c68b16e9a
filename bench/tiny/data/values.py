"""Values that users mention and tools take: drawn from lists and number ranges, so that most have to be copied."""

from __future__ import annotations

import random
from collections.abc import Callable

from softprune.bench.tiny.data.problems import NAMES

_SURNAMES = [
    "Abbott",
    "Baker",
    "Castillo",
    "Dahl",
    "Eriksen",
    "Fischer",
    "Garcia",
    "Haddad",
    "Ito",
    "Jansen",
    "Kowalski",
    "Lopez",
    "Meyer",
    "Nguyen",
    "Okafor",
    "Park",
    "Quist",
    "Rossi",
    "Silva",
    "Tanaka",
    "Unger",
    "Vargas",
    "Weber",
    "Xu",
    "Young",
    "Zimmer",
    "Novak",
    "Moreau",
    "Larsen",
    "Costa",
]
_CITIES = [
    "Paris",
    "Rome",
    "Berlin",
    "Madrid",
    "Lisbon",
    "Vienna",
    "Oslo",
    "Prague",
    "Dublin",
    "Athens",
    "Warsaw",
    "Helsinki",
    "Budapest",
    "Zurich",
    "Tokyo",
    "Osaka",
    "Seoul",
    "Delhi",
    "Mumbai",
    "Cairo",
    "Lagos",
    "Nairobi",
    "Lima",
    "Bogota",
    "Quito",
    "Toronto",
    "Boston",
    "Chicago",
    "Denver",
    "Seattle",
    "Austin",
    "Sydney",
    "Perth",
    "Auckland",
    "Hanoi",
    "Manila",
    "Bergen",
    "Porto",
    "Turin",
    "Lyon",
]
_ADJECTIVES = [
    "annual",
    "blue",
    "broken",
    "cheap",
    "cold",
    "daily",
    "digital",
    "early",
    "electric",
    "fast",
    "final",
    "free",
    "fresh",
    "green",
    "heavy",
    "hidden",
    "large",
    "late",
    "local",
    "long",
    "modern",
    "monthly",
    "narrow",
    "new",
    "old",
    "open",
    "paper",
    "personal",
    "public",
    "quiet",
    "quick",
    "red",
    "remote",
    "round",
    "sharp",
    "short",
    "silver",
    "small",
    "solar",
    "steel",
    "urgent",
    "weekly",
    "white",
    "wooden",
]
_NOUNS = [
    "agenda",
    "bicycle",
    "bottle",
    "bridge",
    "budget",
    "calendar",
    "camera",
    "carpet",
    "chair",
    "contract",
    "council",
    "desk",
    "dinner",
    "engine",
    "garden",
    "guitar",
    "harbor",
    "invoice",
    "jacket",
    "kitchen",
    "ladder",
    "lamp",
    "lecture",
    "library",
    "market",
    "meeting",
    "mirror",
    "museum",
    "newsletter",
    "notebook",
    "order",
    "picnic",
    "printer",
    "project",
    "proposal",
    "radio",
    "recipe",
    "report",
    "roof",
    "schedule",
    "shelf",
    "sofa",
    "survey",
    "table",
    "ticket",
    "training",
    "umbrella",
    "wallet",
    "window",
    "workshop",
]
_LANGUAGES = [
    "French",
    "German",
    "Spanish",
    "Italian",
    "Dutch",
    "Polish",
    "Swedish",
    "Turkish",
    "Arabic",
    "Hindi",
    "Korean",
    "Japanese",
    "Greek",
    "Danish",
    "Finnish",
    "Czech",
]
_CURRENCIES = ["USD", "EUR", "GBP", "JPY", "CHF", "SEK", "NOK", "PLN", "INR", "BRL", "CAD", "AUD"]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_ROOMS = ["kitchen", "bedroom", "office", "hallway", "bathroom", "garage", "studio", "attic", "cellar", "library"]
_GENRES = ["jazz", "rock", "folk", "blues", "opera", "reggae", "techno", "swing"]

_CAPITALS = "ABCDEFGHKLMNPRSTUVWXYZ"
_ENDINGS = ("txt", "csv", "md", "log", "json")


def _of(values: list[str] | tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(values)


def phrase(rng: random.Random) -> str:
    """Two or three words that rarely come together elsewhere."""
    words = rng.sample(_ADJECTIVES, rng.randint(1, 2))
    return " ".join([*words, rng.choice(_NOUNS)])


def full_name(rng: random.Random) -> str:
    """First name and surname."""
    return f"{rng.choice(NAMES)} {rng.choice(_SURNAMES)}"


def email(rng: random.Random) -> str:
    """An address under a name that is reserved for examples."""
    return f"{rng.choice(NAMES).lower()}.{rng.choice(_SURNAMES).lower()}@{rng.choice(_NOUNS)}.example"


def clock(rng: random.Random) -> str:
    """Hours and minutes."""
    return f"{rng.randint(6, 22):02d}:{rng.choice((0, 10, 15, 20, 30, 40, 45, 50)):02d}"


def date(rng: random.Random) -> str:
    """A day in ISO form."""
    return f"{rng.randint(2021, 2029)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def symbol(rng: random.Random) -> str:
    """Three or four letters, as shares have."""
    return "".join(rng.choices(_CAPITALS, k=rng.randint(3, 4)))


def code(rng: random.Random) -> str:
    """Letters and digits, as orders and parcels have."""
    return "".join(rng.choices(_CAPITALS, k=rng.randint(2, 3))) + f"-{rng.randint(1000, 99999)}"


VALUES: dict[str, Callable[[random.Random], str | int]] = {
    "city": _of(_CITIES), "person": full_name, "first": _of(NAMES), "email": email, "time": clock, "date": date, "code": code,
    "phrase": phrase, "language": _of(_LANGUAGES), "currency": _of(_CURRENCIES), "symbol": symbol, "day": _of(_DAYS),
    "room": _of(_ROOMS), "genre": _of(_GENRES), "noun": _of(_NOUNS), "small": lambda rng: rng.randint(2, 12),
    "number": lambda rng: rng.randint(13, 999), "large": lambda rng: rng.randint(1000, 99999), "percent": lambda rng: rng.randint(5, 95),
    "phone": lambda rng: f"{rng.randint(200, 999)}-{rng.randint(100, 999)}-{rng.randint(1000, 9999)}",
    "path": lambda rng: f"/{rng.choice(_NOUNS)}/{rng.choice(_ADJECTIVES)}_{rng.choice(_NOUNS)}.{rng.choice(_ENDINGS)}",
}  # fmt: skip
"""Kinds of values, by the names that tool_specs uses."""
