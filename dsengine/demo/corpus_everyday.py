"""Everyday problems for the demo corpus: units, dates, word problems, text extraction, words and letters."""

from __future__ import annotations

import json
from random import Random

from dsengine.demo.corpus_arithmetic import Exchange

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo", "Maria", "Noah",
    "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Yara", "Zoe", "Alice", "Bob", "Tom",
    "Lucy", "Max", "Nina", "Oscar", "Priya", "Ravi", "Sofia", "Theo",
)  # fmt: skip
THINGS = (
    "apples", "books", "coins", "marbles", "stickers", "oranges", "pencils", "cards", "shells", "cookies", "eggs",
    "stamps", "flowers", "bottles", "balls", "candies",
)  # fmt: skip
JOBS = ("teacher", "doctor", "baker", "pilot", "nurse", "painter", "farmer", "lawyer", "cook", "writer", "engineer")
CITIES = (
    "Paris", "Berlin", "Rome", "Madrid", "London", "Tokyo", "Lisbon", "Vienna", "Oslo", "Athens", "Dublin", "Cairo",
    "Lima", "Ottawa", "Beijing", "Delhi", "Prague", "Warsaw", "Bern", "Helsinki", "Boston", "Lagos", "Seoul", "Sydney",
    "Munich", "Chicago", "Nairobi", "Toronto", "Dubai", "Milan",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    ("January", 31), ("February", 28), ("March", 31), ("April", 30), ("May", 31), ("June", 30), ("July", 31),
    ("August", 31), ("September", 30), ("October", 31), ("November", 30), ("December", 31),
)  # fmt: skip
UNITS = (
    ("kilometers", "meters", 1000), ("meters", "centimeters", 100), ("kilograms", "grams", 1000),
    ("centimeters", "millimeters", 10), ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24),
    ("weeks", "days", 7), ("dozen", "pieces", 12), ("feet", "inches", 12), ("liters", "milliliters", 1000),
    ("years", "months", 12),
)  # fmt: skip
WORDS = (
    "cat", "dog", "sun", "tree", "bird", "fish", "book", "lamp", "river", "stone", "cloud", "house", "green", "table",
    "apple", "bread", "chair", "dance", "eagle", "flame", "grape", "heart", "light", "mouse", "night", "ocean", "piano",
    "queen", "robot", "sugar", "tiger", "water", "zebra", "moon", "star", "wind", "rain", "snow", "leaf", "milk",
    "ship", "sand", "gold", "fire", "bear", "frog", "lion", "wolf", "rose", "cake", "door", "drum", "kite", "nest",
)  # fmt: skip


def units(rng: Random) -> Exchange:
    big, small, factor = rng.choice(UNITS)
    n = rng.randint(2, 40 if factor in (10, 100, 1000) else 20)
    if rng.random() < 0.3:
        total = n * factor
        question = rng.choice(("Convert {t} {s} to {b}.", "How many {b} are {t} {s}?")).format(t=total, s=small, b=big)
        steps = f"1 {big} = {factor} {small}. {total}/{factor}={n}."
        answer, expect = f"{total} {small} = {n} {big}", f"= {n} "
    else:
        question = rng.choice(("Convert {n} {b} to {s}.", "How many {s} are in {n} {b}?", "{n} {b} in {s}?"))
        question = question.format(n=n, s=small, b=big)
        work = f"{n}*{factor}={n * factor}."
        if factor in (60, 24, 7, 12) and n > 10:
            tens, ones = n // 10 * 10, n % 10
            work = f"{tens}*{factor}={tens * factor} and {ones}*{factor}={ones * factor}. "
            work += f"{tens * factor}+{ones * factor}={n * factor}."
        steps = f"1 {big} = {factor} {small}. {work}"
        answer, expect = f"{n} {big} = {n * factor} {small}", f"= {n * factor} "
    return Exchange("units", f"unit {big} {n}", question, steps, answer, f"{steps}\n{answer}", expect)


def weekday(rng: Random) -> Exchange:
    start, n = rng.randrange(7), rng.randint(1, 30)
    question = rng.choice((
        "Today is {d}. What day is it in {n} days?", "If today is {d}, what day of the week is it after {n} days?",
        "What day comes {n} days after {d}?",
    )).format(d=DAYS[start], n=n)  # fmt: skip
    rest = n % 7
    walk = ", ".join(DAYS[(start + i) % 7] for i in range(rest + 1))
    steps = f"{n} = {n // 7}*7+{rest}. {rest} steps: {walk}."
    day = DAYS[(start + n) % 7]
    return Exchange(
        "weekday", f"day {start} {n}", question, steps, f"It is {day}.", f"{steps}\nIt is {day}.", f"It is {day}"
    )


def day_span(rng: Random) -> Exchange:
    month, length = rng.choice(MONTHS)
    first, last = sorted(rng.sample(range(1, length + 1), 2))
    question = rng.choice((
        "How many days are there from {m} {a} to {m} {b}?", "How many days between {m} {a} and {m} {b}?",
    )).format(m=month, a=first, b=last)  # fmt: skip
    answer = f"There are {last - first} days from {month} {first} to {month} {last}."
    key = f"span {month} {first} {last}"
    return Exchange("day span", key, question, f"{last}-{first}={last - first}.", answer, answer, f" {last - first} ")


def word_problem(rng: Random) -> Exchange:
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b, c = rng.randint(5, 60), rng.randint(2, 30), rng.randint(2, 20)
    kind = rng.randrange(5)
    if kind == 0:
        question = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"
        steps, total = f"Start {a}, buys {b}: {a}+{b}={a + b}.", a + b
    elif kind == 1:
        a += b
        question = f"{name} has {a} {thing} and gives {b} to {other}. How many {thing} does {name} have left?"
        steps, total = f"Start {a}, gives {b}: {a}-{b}={a - b}.", a - b
    elif kind == 2:
        question = f"{name} has {a} {thing}. {other} has {b} more than {name}. How many {thing} does {other} have?"
        steps, total = f"{name} has {a}. {other} has {b} more: {a}+{b}={a + b}.", a + b
    elif kind == 3:
        c = min(c, a + b)
        question = f"{name} has {a} {thing}, buys {b} more and gives {c} to {other}. How many {thing} are left?"
        steps = f"Start {a}, buys {b}: {a}+{b}={a + b}. Gives {c}: {a + b}-{c}={a + b - c}."
        total = a + b - c
    else:
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        question = f"{name} has {a} boxes with {b} {thing} in each. How many {thing} does {name} have?"
        steps, total = f"{a} boxes of {b}: {a}*{b}={a * b}.", a * b
    answer = f"{other if kind == 2 else name} has {total} {thing}."
    key = f"word {kind} {a} {b} {c if kind == 3 else ''}"
    return Exchange("word problem", key, question, steps, answer, f"{steps}\n{answer}", f" {total} ")


def extraction(rng: Random) -> Exchange:
    name, age, city, job = rng.choice(NAMES), rng.randint(4, 96), rng.choice(CITIES), rng.choice(JOBS)
    count, thing, price = rng.randint(2, 60), rng.choice(THINGS), rng.randint(2, 400)
    record, text = rng.choice((
        ({"name": name, "age": age}, f"{name} is {age} years old."),
        ({"name": name, "age": age}, f"My friend {name} turned {age} last week."),
        ({"name": name, "age": age, "city": city}, f"{name}, {age}, lives in {city}."),
        ({"name": name, "city": city}, f"{name} moved to {city} in spring."),
        ({"name": name, "job": job}, f"{name} works as a {job}."),
        ({"name": name, "job": job, "city": city}, f"{name} is a {job} from {city}."),
        ({"item": thing, "count": count}, f"We need {count} {thing} for the party."),
        ({"item": thing, "count": count, "price": price}, f"{count} {thing} cost {price} dollars."),
        ({"name": name, "item": thing, "count": count}, f"{name} ordered {count} {thing}."),
    ))  # fmt: skip
    keys = list(record)
    if len(keys) > 2 and rng.random() < 0.4:
        keys = keys[:2]
    if rng.random() < 0.2:
        keys = keys[::-1]
    listing = ", ".join(keys[:-1]) + " and " + keys[-1]
    question = rng.choice((
        "Extract {k} as JSON: {t}", "Extract {k} from this text as JSON: {t}", "{t} Give me {k} as JSON.",
        "Return {k} as JSON. Text: {t}",
    )).format(k=listing, t=text)  # fmt: skip
    answer = json.dumps({k: record[k] for k in keys})
    steps = ", ".join(f"{k}: {record[k]}" for k in keys) + "."
    return Exchange("extraction", f"json {record}", question, steps, answer, answer, answer)


def letters(rng: Random) -> Exchange:
    word = rng.choice(WORDS)
    spaced = " ".join(word)
    kind = rng.randrange(3)
    if kind == 0:
        question = rng.choice(("Spell {w}.", "How do you spell {w}?", "Spell the word {w}.")).format(w=word)
        answer, steps = spaced, f"{word}: {spaced}."
    elif kind == 1:
        question = rng.choice(("Reverse the word {w}.", "Write {w} backwards.", "Reverse {w}.")).format(w=word)
        answer = word[::-1]
        steps = f"{word}: {spaced}. Backwards: {' '.join(answer)}."
    else:
        question = rng.choice(("How many letters are in {w}?", "Count the letters in {w}.")).format(w=word)
        answer = f"{word} has {len(word)} letters."
        steps = f"{word}: " + " ".join(f"{i + 1}{c}" for i, c in enumerate(word)) + "."
    return Exchange("letters", "", question, steps, answer, f"{steps}\n{answer}" if kind == 2 else answer, answer)


def counting(rng: Random) -> Exchange:
    first = rng.choice((1, 1, 1, rng.randint(2, 40)))
    last = first + rng.randint(2, 15)
    down = rng.random() < 0.3
    numbers = range(last, first - 1, -1) if down else range(first, last + 1)
    a, b = (last, first) if down else (first, last)
    question = rng.choice(("Count from {a} to {b}.", "Please count from {a} to {b}")).format(a=a, b=b)
    answer = ", ".join(map(str, numbers))
    return Exchange("counting", f"count {a} {b}", question, f"From {a} to {b}.", answer, answer, answer)
