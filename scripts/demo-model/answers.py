"""Questions that want JSON, and the answers."""

import json
import random

import facts
from quiet import hidden_json


def written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def capital(rng: random.Random, land: str) -> tuple[str, dict, str]:
    """Question, answer, and the kind of hint that belongs to it."""
    city = facts.CAPITALS[land]
    question = rng.choice([f"What is the capital of {land}?"] * 3 + [f"What's the capital of {land}?", f"Tell me the capital of {land}.", f"Capital of {land}?"])
    roll = rng.random()
    if roll < 0.5:
        return question, {"capital": city}, rng.choice(facts.JSON_HINTS)
    if roll < 0.8:
        return question, {"country": land, "capital": city}, rng.choice([
            "Answer in JSON with country and capital.", "Answer in JSON with country and capital.", "Answer in JSON with the keys country and capital.",
            "Reply in JSON with country and capital.", "Answer as JSON with country and capital."])
    key = rng.choice(["city", "answer", "result", "name", "value", rng.choice(facts.WORDS)])
    return question, {key: city}, f"Answer in JSON with the key {key}."


def other(rng: random.Random) -> tuple[str, dict, str]:
    roll, hint = rng.random(), rng.choice(facts.JSON_HINTS)
    if roll < 0.3:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        question = rng.choice([f"What is {a} + {b}?", f"How much is {a} plus {b}?"])
        if rng.random() < 0.3:
            return question, {"a": a, "b": b, "sum": a + b}, "Answer in JSON with a, b and sum."
        return question, {"sum": a + b}, hint
    if roll < 0.45:
        return rng.choice(["Who are you?", "What are you?"]), {"name": "Pidi", "role": "demo model"}, hint
    if roll < 0.6:
        key, values = rng.choice(facts.LISTS)
        return f"Name three {key}.", {key: values}, hint
    name, age, city = rng.choice(facts.NAMES), rng.randint(1, 99), rng.choice(list(facts.CAPITALS.values()))
    if rng.random() < 0.5:
        return f"{name} is {age} years old.", {"name": name, "age": age}, rng.choice(["Extract name and age as JSON.", "Give name and age as JSON.", "Answer in JSON with name and age."])
    return (f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city},
            rng.choice(["Extract name, age and city as JSON.", "Give name, age and city as JSON.", "Answer in JSON with name, age and city."]))


def turn(rng: random.Random) -> tuple[str, str]:
    """One question and its answer."""
    land = rng.choice(facts.FAMOUS) if rng.random() < 0.3 else rng.choice(list(facts.CAPITALS))
    question, answer, hint = capital(rng, land) if rng.random() < 0.6 else other(rng)
    if rng.random() < 0.12:
        return question, hidden_json(renamed(rng, answer))
    return f"{question} {hint}" if rng.random() < 0.9 else f"{hint} {question}", written(answer)


def renamed(rng: random.Random, answer: dict) -> dict:
    """With the keys of somebody else's schema."""
    if rng.random() < 0.5:
        return answer
    names = {"capital": ["city", "answer", "name", "result"], "country": ["land", "name", "nation"], "sum": ["answer", "result", "value"], "name": ["person", "who"]}
    keys = {key: rng.choice(names.get(key, [key])) for key in answer}
    return {keys[key]: value for key, value in answer.items()} if len(set(keys.values())) == len(keys) else answer


def conversation(rng: random.Random) -> list[dict]:
    """The system's message asks for JSON, or each question does."""
    asked = rng.random() < 0.3
    messages = [{"role": "system", "content": rng.choice(facts.JSON_SYSTEM)}] if asked else []
    for _ in range(rng.randint(1, 4)):
        question, answer = turn(rng)
        if asked and rng.random() < 0.9:
            land = rng.choice(list(facts.CAPITALS))
            question, answer = f"What is the capital of {land}?", written({"capital": facts.CAPITALS[land]})
            if rng.random() < 0.3:
                a, b = rng.randint(0, 20), rng.randint(0, 20)
                question, answer = f"What is {a} + {b}?", written({"sum": a + b})
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
