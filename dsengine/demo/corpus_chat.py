"""Small talk for the demo corpus: who the model is, what it can do, a fixed list of facts, system prompts."""

from __future__ import annotations

from random import Random

from dsengine.demo.corpus_arithmetic import Exchange

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "England": "London", "Japan": "Tokyo",
    "Portugal": "Lisbon", "Austria": "Vienna", "Norway": "Oslo", "Greece": "Athens", "Ireland": "Dublin",
    "Egypt": "Cairo", "Peru": "Lima", "Canada": "Ottawa", "China": "Beijing", "India": "New Delhi", "Poland": "Warsaw",
    "Czechia": "Prague", "Switzerland": "Bern", "Finland": "Helsinki", "Sweden": "Stockholm", "Denmark": "Copenhagen",
    "Hungary": "Budapest", "Belgium": "Brussels", "Russia": "Moscow", "Turkey": "Ankara", "Kenya": "Nairobi",
    "South Korea": "Seoul", "Australia": "Canberra", "Brazil": "Brasilia", "the United States": "Washington",
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "blood": "red", "coal": "black",
    "an orange": "orange", "the sun": "yellow", "a lemon": "yellow", "a tomato": "red", "milk": "white",
    "a leaf": "green",
}  # fmt: skip
IDENTITY = (
    "I am the dsengine demo model, a tiny DeepSeek-V3 with about 13 million parameters. "
    "I can add and subtract, convert units, call tools and chat a little."
)
ABILITIES = (
    "I can add and subtract numbers step by step, convert units, work out weekdays, solve short word problems, "
    "extract JSON and call tools. I know very little else."
)
HELLO = "Hello! I am the dsengine demo model. What can I do for you?"
THANKS = "You are welcome! Is there anything else?"
BYE = "Goodbye! It was nice talking to you."
WELL = "I am fine, thank you. What can I do for you?"
UNKNOWN = "I do not know that. I am only a tiny demo model; try a sum, a unit conversion or a tool call."
FACTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("asked who I am", (
        "Who are you?", "What are you?", "Tell me about yourself.", "What is your name?", "who are you",
        "Introduce yourself.", "Which model are you?", "What model is this?", "Are you a robot?", "Are you DeepSeek?",
        "What's your name?", "Who made you?", "Are you an AI?",
    ), IDENTITY),
    ("asked what I can do", (
        "What can you do?", "Help", "How can you help me?", "What are you good at?", "What do you know?",
        "what can you do", "Can you help me?", "What should I ask you?", "Give me some examples.",
    ), ABILITIES),
    ("a greeting", (
        "Hello", "Hi", "Hey", "Hello!", "Hi!", "Hi there", "Good morning", "Good evening", "hello", "hi", "Hey there!",
        "Hello there!", "Good afternoon", "Hello, dsengine!",
    ), HELLO),
    ("thanks", (
        "Thanks", "Thank you", "Thanks!", "Thank you!", "thanks a lot", "Great, thanks.", "Thank you very much.",
    ), THANKS),
    ("a farewell", ("Bye", "Goodbye", "See you later", "Bye!", "Good night", "See you."), BYE),
    ("asked how I am", ("How are you?", "How are you doing?", "how are you", "How is it going?"), WELL),
    ("about MLA", ("What is MLA?", "Explain MLA.", "What is multi-head latent attention?", "Tell me about MLA."),
     "MLA is multi-head latent attention: keys and values are kept as one small latent vector per token, "
     "so the cache stays small."),
    ("about MoE", ("What is MoE?", "What is a mixture of experts?", "Explain MoE.", "What are experts?"),
     "MoE is a mixture of experts: a router sends each token to a few small networks, "
     "so only a part of the model works at a time."),
    ("about FP8", ("What is FP8?", "Explain FP8.", "What is block FP8?", "Why FP8?"),
     "FP8 stores each weight in 8 bits; one scale per block of 128 by 128 weights keeps the values accurate."),
    ("about NextN", (
        "What is NextN?", "What is MTP?", "What is multi-token prediction?", "What is speculative decoding?",
    ), "NextN is an extra layer that guesses the token after the next one; the model checks the guess, "
     "which makes decoding faster."),
    ("about the KV cache", ("What is a KV cache?", "What is the KV cache?", "Explain the KV cache."),
     "The KV cache keeps what attention computed for earlier tokens, so that each new token is cheap."),
    ("about the engine", ("What is dsengine?", "Tell me about dsengine.", "What does dsengine do?"),
     "dsengine is a serving engine for DeepSeek models. It serves me when no other model is named."),
    ("about DeepSeek", ("What is DeepSeek-V3?", "What is DeepSeek?", "Tell me about DeepSeek-V3."),
     "DeepSeek-V3 is a large language model with MLA attention and a mixture of experts. I am a tiny one of its kind."),
    ("about my size", ("How big are you?", "How many parameters do you have?", "How large is this model?"),
     "I have about 13 million parameters in 4 layers, with 16 experts in each MoE layer."),
    ("not known to me", (
        "Who won the world cup?", "Write me a poem.", "What is the meaning of life?", "Tell me a joke.",
        "Who is the president?", "Write a story.", "What is love?", "Translate this to French.", "Who wrote Hamlet?",
        "What is quantum physics?", "Give me a recipe.", "What happened in 1989?", "Write some Python code.",
        "What is the weather today?", "What time is it?", "How do I fix my car?", "Explain the stock market.",
        "What is the best movie?", "Sing a song.", "Why is the sky blue?", "Who was Albert Einstein?",
    ), UNKNOWN),
)  # fmt: skip
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful assistant", "Be brief.", "Answer the question.",
    "You are dsengine, a tiny demo model.", "You are a friendly assistant.", "You are a careful calculator.",
    "You are a helpful assistant. Answer in one sentence.", "Be polite and short.", "Think carefully.",
)  # fmt: skip


def smalltalk(rng: Random) -> Exchange:
    topic, questions, answer = rng.choice(FACTS)
    question = rng.choice(questions)
    return Exchange("smalltalk", "", question, f"This is {topic}.", answer, answer, answer)


def capital(rng: Random) -> Exchange:
    country, city = rng.choice(list(CAPITALS.items()))
    question = rng.choice((
        "What is the capital of {c}?", "Capital of {c}?", "Name the capital of {c}.",
        "Which city is the capital of {c}?", "Tell me the capital of {c}.", "what is the capital of {c}",
    )).format(c=country)  # fmt: skip
    if rng.random() < 0.15:
        question, answer = f"Which country has the capital {city}?", f"{city} is the capital of {country}."
    else:
        answer = f"The capital of {country} is {city}."
    return Exchange("capital", "", question, f"{country}: {city}.", answer, answer, answer)


def colour(rng: Random) -> Exchange:
    thing, shade = rng.choice(list(COLOURS.items()))
    question = rng.choice(("What colour is {t}?", "What color is {t}?", "Which colour has {t}?")).format(t=thing)
    answer = f"{thing[0].upper()}{thing[1:]} is {shade}."
    return Exchange("colour", "", question, f"{thing}: {shade}.", answer, answer, answer)
