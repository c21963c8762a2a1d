"""Tool use for the demo corpus: familiar tools, invented ones, choosing, calling, answering from the result.

Invented names and parameters force the model to copy from the tools it is offered instead of reciting a known set.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from dsengine.demo.corpus_arithmetic import is_held_out
from dsengine.demo.corpus_chat import SYSTEM_PROMPTS, capital, smalltalk
from dsengine.demo.corpus_copying import invented_word
from dsengine.demo.corpus_everyday import CITIES, NAMES, THINGS, WORDS
from dsengine.demo.template import Conversation, Message

Json = dict[str, Any]
NO_MATCH = "None of the tools I was given fits that request."


@dataclass(frozen=True)
class Use:
    """One request for a tool: what the user says, the arguments, the tool's result, the answer made of it."""

    tool: Json
    request: str
    arguments: Json
    result: str
    answer: str
    invented: bool = False


def schema(name: str, description: str, **parameters: str | tuple[str, str]) -> Json:
    properties: Json = {}
    for key, kind in parameters.items():
        properties[key] = {"type": kind} if isinstance(kind, str) else {"type": kind[0], "description": kind[1]}
    body = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": body}}


def weather(rng: Random) -> Use:
    city, degrees, sky = rng.choice(CITIES), rng.randint(0, 35), rng.choice(("sunny", "rainy", "cloudy", "windy"))
    key = rng.choice(("city", "city", "location"))
    tool = schema(rng.choice(("get_weather", "get_weather", "weather", "get_current_weather")), rng.choice((
        "Get the weather of a city", "Get the current weather", "Get current weather for a location",
    )), **{key: "string"})  # fmt: skip
    request = rng.choice((
        "What is the weather in {c}?", "How is the weather in {c} today?", "Weather in {c}?", "Is it raining in {c}?",
        "What's the weather like in {c}?", "Tell me the weather in {c}.", "How warm is it in {c}?",
    )).format(c=city)  # fmt: skip
    result = json.dumps({"temperature": degrees, "sky": sky})
    return Use(tool, request, {key: city}, result, f"It is {sky} in {city}, {degrees} degrees.")


def calculator(rng: Random) -> Use:
    a, b, op = rng.randint(10, 9999), rng.randint(10, 9999), rng.choice("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[op]
    tool = schema(rng.choice(("calculator", "calculate")), "Evaluate an arithmetic expression", expression="string")
    request = rng.choice(("Calculate {e}.", "What is {e}?", "Use the calculator for {e}.")).format(e=f"{a} {op} {b}")
    return Use(tool, request, {"expression": f"{a} {op} {b}"}, str(value), f"{a} {op} {b} = {value}")


def search(rng: Random) -> Use:
    topic = " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    tool = schema(rng.choice(("search", "web_search", "search_web")), "Search the web", query="string")
    request = rng.choice((
        "Search for {t}.", "Search the web for {t}.", "Look up {t} on the web.", "Find pages about {t}.",
    ))  # fmt: skip
    found = rng.randint(2, 99)
    return Use(tool, request.format(t=topic), {"query": topic}, json.dumps({"results": found}),
               f"I found {found} results for {topic}.")  # fmt: skip


def timer(rng: Random) -> Use:
    n = rng.randint(1, 90)
    tool = schema("set_timer", "Set a timer", minutes="integer")
    request = rng.choice(("Set a timer for {n} minutes.", "Start a {n} minute timer.", "Timer: {n} minutes, please."))
    return Use(tool, request.format(n=n), {"minutes": n}, '{"ok": true}', f"The timer is set for {n} minutes.")


def email(rng: Random) -> Use:
    name, subject = rng.choice(NAMES), " ".join(rng.sample(WORDS, 2))
    tool = schema("send_email", "Send an email", to="string", subject="string")
    request = rng.choice((
        "Send an email to {n} about {s}.", "Write to {n} with the subject {s}.", "Email {n} about {s}.",
    ))  # fmt: skip
    return Use(tool, request.format(n=name, s=subject), {"to": name, "subject": subject}, '{"sent": true}',
               f"I sent the email about {subject} to {name}.")  # fmt: skip


def currency(rng: Random) -> Use:
    amount, (source, target) = rng.randint(2, 999), rng.sample(("EUR", "USD", "JPY", "GBP", "CHF", "CNY"), 2)
    value = rng.randint(2, 2000)
    tool = schema("convert_currency", "Convert an amount between currencies", amount="number", source="string",
                  target="string")  # fmt: skip
    request = rng.choice(("Convert {a} {s} to {t}.", "How much is {a} {s} in {t}?", "Change {a} {s} into {t}."))
    arguments = {"amount": amount, "source": source, "target": target}
    return Use(tool, request.format(a=amount, s=source, t=target), arguments, str(value),
               f"{amount} {source} is {value} {target}.")  # fmt: skip


def clock(rng: Random) -> Use:
    city, time = rng.choice(CITIES), f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    tool = schema("get_time", "Get the local time of a city", city="string")
    request = rng.choice(("What time is it in {c}?", "Tell me the time in {c}.", "Local time in {c}?")).format(c=city)
    return Use(tool, request, {"city": city}, time, f"It is {time} in {city}.")


def reminder(rng: Random) -> Use:
    thing, hour = " ".join(rng.sample(WORDS, 2)), rng.randrange(24)
    tool = schema("add_reminder", "Add a reminder", text="string", hour=("integer", "hour of the day"))
    request = rng.choice(("Remind me of {t} at {h}.", "Add a reminder for {t} at {h}.")).format(t=thing, h=hour)
    return Use(tool, request, {"text": thing, "hour": hour}, "done", f"I will remind you of {thing} at {hour}.")


def stock(rng: Random) -> Use:
    symbol, price = "".join(rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", rng.randint(3, 4))), rng.randint(5, 900)
    tool = schema("get_stock_price", "Get the price of a stock", symbol="string")
    request = rng.choice(("What is the stock price of {s}?", "How much is a share of {s}?", "Price of {s} stock?"))
    return Use(tool, request.format(s=symbol), {"symbol": symbol}, str(price), f"{symbol} costs {price} per share.")


def order(rng: Random) -> Use:
    thing, n = rng.choice(THINGS), rng.randint(2, 60)
    number = rng.randint(100, 9999)
    tool = schema("order_item", "Order something from the shop", item="string", quantity="integer")
    request = rng.choice(("Order {n} {t}.", "Please order {n} {t} from the shop.", "Buy {n} {t} for me."))
    return Use(tool, request.format(n=n, t=thing), {"item": thing, "quantity": n}, json.dumps({"order": number}),
               f"I ordered {n} {thing}. The order number is {number}.")  # fmt: skip


def play_music(rng: Random) -> Use:
    title = " ".join(rng.sample(WORDS, rng.randint(1, 2)))
    tool = schema("play_music", "Play a song", title="string")
    request = rng.choice(("Play {t}.", "Play the song {t}.", "I want to hear {t}.")).format(t=title)
    return Use(tool, request, {"title": title}, "playing", f"Now playing {title}.")


def lights(rng: Random) -> Use:
    room, on = rng.choice(("kitchen", "bedroom", "office", "garden", "hall", "bathroom")), rng.random() < 0.5
    tool = schema("set_light", "Switch a light on or off", room="string", on="boolean")
    state = "on" if on else "off"
    request = rng.choice(("Turn {o} the light in the {r}.", "Switch the {r} light {o}.")).format(o=state, r=room)
    return Use(tool, request, {"room": room, "on": on}, "ok", f"The light in the {room} is {state}.")


def invented(rng: Random) -> Use:
    """A tool nobody has seen: the name, its parameters and what they mean exist only in the schema."""
    noun, verb = invented_word(rng), rng.choice(("get", "find", "check", "run", "make", "show", "update"))
    name = rng.choice((f"{verb}_{noun}", f"{noun}_{verb}", f"{verb}{noun.capitalize()}", f"{verb}-{noun}"))
    description = rng.choice(("{v} the {n}", "{v} a {n} for the user", "Can {v} the {n}")).format(v=verb, n=noun)
    arguments: Json = {}
    for key in rng.sample((*WORDS, "id", "size", "level", "mode", "user", "date", "limit", "path"), rng.randint(1, 3)):
        number = rng.random() < 0.4
        arguments[key] = rng.randint(0, 999) if number else rng.choice((invented_word(rng), *rng.sample(WORDS, 2)))
    kinds = {key: "integer" if isinstance(value, int) else "string" for key, value in arguments.items()}
    listing = " and ".join(f"{key} {value}" for key, value in arguments.items())
    request = rng.choice((
        "{v} the {n} with {l}.", "Please {v} the {n} with {l}.", "{v} a {n} with {l}.", "Use {name} with {l}.",
        "Can you {v} the {n} with {l}?", "Call {name} with {l}.",
    )).format(v=verb, n=noun, l=listing, name=name)  # fmt: skip
    value = rng.choice((str(rng.randint(1, 999)), rng.choice(WORDS)))
    return Use(schema(name, description[0].upper() + description[1:], **kinds), request[0].upper() + request[1:],
               arguments, value, f"The {noun} is {value}.", invented=True)  # fmt: skip


USES: tuple[Callable[[Random], Use], ...] = (
    weather, weather, calculator, search, timer, email, currency, clock, reminder, stock, order, play_music, lights,
    *([invented] * 9),
)  # fmt: skip


def draw_use(rng: Random, held_out: bool) -> Use:
    while True:
        use = rng.choice(USES)(rng)
        if is_held_out(f"tool {json.dumps(use.arguments)}") == held_out:
            return use


def call(use: Use) -> Json:
    return {"type": "function", "function": {"name": use.tool["function"]["name"], "arguments": use.arguments}}


def sort_keys(value: Any) -> Any:
    """Some renderers print JSON with sorted keys: the model should not mind."""
    if isinstance(value, dict):
        return {key: sort_keys(value[key]) for key in sorted(value)}
    return value


def offer(rng: Random, uses: list[Use], extra: int) -> list[Json]:
    """The tools on the table: those needed and `extra` others, in any order, no name twice."""
    tools = {use.tool["function"]["name"]: use.tool for use in uses}
    while extra > 0:
        other = rng.choice(USES)(rng).tool
        if other["function"]["name"] not in tools:
            tools[other["function"]["name"]] = other
            extra -= 1
    listing = list(tools.values())
    rng.shuffle(listing)
    return [sort_keys(tool) for tool in listing] if rng.random() < 0.25 else listing


def second_use(rng: Random, first: Use, held_out: bool) -> Use:
    """Another tool, or the same one with other arguments."""
    again = rng.random() < 0.5 and "city" in first.arguments
    while True:
        use = draw_use(rng, held_out)
        same_name = use.tool["function"]["name"] == first.tool["function"]["name"]
        if use.arguments != first.arguments and (use.tool == first.tool if again else not same_name):
            return use


def tool_conversation(rng: Random, held_out: bool = False, finish: bool = True) -> tuple[Conversation, list[Use]]:
    """A conversation with tools; returns also the uses that the last user turn asks for (empty: no tool fits).

    With `finish` the tool results and final answers are included; without, it ends in the user's request.
    """
    kind = rng.choices(("one", "two", "none", "again"), (70, 10, 12, 8))[0]
    uses = [] if kind == "none" else [draw_use(rng, held_out)]
    if kind in ("two", "again"):
        uses.append(second_use(rng, uses[0], held_out))
    tools = offer(rng, uses, rng.choices((0, 1, 2), (4, 4, 3))[0] if uses else rng.randint(1, 2))
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    if kind == "again":
        messages += turn(uses[:1])
        uses = uses[1:]
    if not uses:
        messages += no_tool_turn(rng, tools, finish)
    else:
        messages += turn(uses) if finish else [{"role": "user", "content": request_text(uses)}]
    return Conversation(messages, tools), uses


def request_text(uses: list[Use]) -> str:
    if len(uses) == 2 and uses[0].tool == uses[1].tool:
        first, second = (use.arguments["city"] for use in uses)
        if first in uses[0].request:
            return uses[0].request.replace(first, f"{first} and {second}")
    return " ".join(use.request for use in uses)


def turn(uses: list[Use]) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": request_text(uses)}]
    messages.append({"role": "assistant", "content": "", "tool_calls": [call(use) for use in uses]})
    messages += [{"role": "tool", "content": use.result} for use in uses]
    return [*messages, {"role": "assistant", "content": " ".join(use.answer for use in uses)}]


def signature(tool: Json) -> tuple[str, ...]:
    """What makes two tools the same to a user: the weather tools differ in name only."""
    name, properties = tool["function"]["name"], tool["function"]["parameters"]["properties"]
    return ("weather",) if "weather" in name else tuple(sorted(properties))


def no_tool_turn(rng: Random, tools: list[Json], finish: bool) -> list[Message]:
    """Small talk is answered as ever; a request for a tool that is not offered is refused."""
    if rng.random() < 0.6:
        exchange = rng.choice((smalltalk, capital))(rng)
        question, answer = exchange.question, exchange.plain
    else:
        offered = {signature(tool) for tool in tools}
        use = rng.choice(USES)(rng)
        while signature(use.tool) in offered:
            use = rng.choice(USES)(rng)
        question, answer = use.request, NO_MATCH
    messages: list[Message] = [{"role": "user", "content": question}]
    return [*messages, {"role": "assistant", "content": answer}] if finish else messages
