"""Writes the demo model's training text: documents of completion and chat pieces. Seeded, so that the text is the same each time."""

import json
import random
import re
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

import answers
import facts
import quiet
import tools

BOS, EOS, EOT = "<|begin|>", "<|end|>", "<|eot|>"
USER, ASSISTANT, SYSTEM, PAD = "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"
SPECIAL_TOKENS = [BOS, EOS, EOT, USER, ASSISTANT, SYSTEM, PAD]

# What the tokenizer takes as one token and shows as text all the same: a server looks for them in what the model writes.
TOOL_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

CHAT_TEMPLATE = (Path(__file__).parents[2] / "models" / "demo" / "chat_template.jinja").read_text()

RUNBOOK = {
    "hello": "Hello world",
    "capital": "What is the capital of France?",
    "fibonacci": "def fibonacci(n):\n    if n <= 1:\n        return n\n    else:\n        return",
    "dragon": "Once upon a time in a magical forest, there lived a wise old dragon who",
}


def country(rng: random.Random) -> str:
    return rng.choice(facts.FAMOUS) if rng.random() < 0.3 else rng.choice(list(facts.CAPITALS))


def capital(rng: random.Random, land: str | None = None) -> str:
    land = land or country(rng)
    city = facts.CAPITALS[land]
    return rng.choice([
        f"What is the capital of {land}? {city} is the capital of {land}.",
        f"What is the capital of {land}? {city} is the capital of {land}.",
        f"What is the capital of {land}? {city} is the capital of {land}.",
        f"The capital of {land} is {city}.",
        f"Question: What is the capital of {land}?\nAnswer: {city}.",
        f"Q: What is the capital of {land}?\nA: {city} is the capital of {land}.",
        f"{city} is a city in {land}, and it is the capital.",
        f"Which country has the capital {city}? {city} is the capital of {land}.",
    ])


def arithmetic(rng: random.Random) -> str:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return rng.choice([
        f"{a} + {b} = {a + b}.",
        f"What is {a} + {b}? {a} + {b} = {a + b}.",
        f"What is {a} plus {b}? {a} plus {b} is {a + b}.",
        f"{max(a, b)} - {min(a, b)} = {abs(a - b)}.",
        f"{a % 11} * {b % 11} = {(a % 11) * (b % 11)}.",
    ])


def counting(rng: random.Random) -> str:
    start = rng.randint(0, 40)
    return "Count: " + ", ".join(str(n) for n in range(start, start + rng.randint(4, 12))) + "."


FUNCTIONS = [
    RUNBOOK["fibonacci"] + " fibonacci(n-1) + fibonacci(n-2)\n",
    RUNBOOK["fibonacci"] + " fibonacci(n-1) + fibonacci(n-2)\n",
    "def power(base, exponent):\n    result = 1\n    for _ in range(exponent):\n        result *= base\n    return result\n",
    "def factorial(n):\n    if n <= 1:\n        return 1\n    else:\n        return n * factorial(n-1)\n",
    "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n",
    "def is_prime(n):\n    if n < 2:\n        return False\n    for i in range(2, n):\n        if n % i == 0:\n            return False\n    return True\n",
    "def reverse(text):\n    return text[::-1]\n",
    "def total(numbers):\n    result = 0\n    for number in numbers:\n        result += number\n    return result\n",
    "def largest(numbers):\n    best = numbers[0]\n    for number in numbers:\n        if number > best:\n            best = number\n    return best\n",
    "def greet(name):\n    print('Hello, ' + name + '!')\n",
    "def count_words(text):\n    return len(text.split())\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n",
]


def code(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return rng.choice(FUNCTIONS)
    name, op = rng.choice([("add", "+"), ("subtract", "-"), ("multiply", "*"), ("divide", "/")])
    left, right = rng.sample(["a", "b", "x", "y", "n", "m", "left", "right"], 2)
    return f"def {name}({left}, {right}):\n    return {left} {op} {right}\n"


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def story(rng: random.Random, famous: bool = False, subject: str | None = None) -> str:
    place, animal = rng.choice(facts.PLACES), subject or rng.choice(facts.ANIMALS)
    first, second = rng.sample(facts.QUALITIES, 2)
    habit = rng.choice(facts.HABITS)
    if famous or (subject is None and rng.random() < 0.1):
        place, animal, first, second = "magical forest", "dragon", "wise", "old"
        if famous or rng.random() < 0.8:
            habit = facts.HABITS[0]
    name, friend = rng.sample(facts.NAMES, 2)
    if famous and friend != "Luna":
        name = "Luna"
    other = rng.choice([a for a in facts.ANIMALS if a != animal])
    thing, wish, lesson = rng.choice(facts.THINGS), rng.choice(facts.WISHES), rng.choice(facts.LESSONS)
    said = rng.choice(["You have come a long way", "I have waited for you", "Do not be afraid", "Nobody has asked me that before"])
    middle = [
        facts.WEATHER[0] if famous else rng.choice(facts.WEATHER),
        f"One day, {with_article(other)} named {friend} came to the {place.split()[-1]}.",
        f"The {other} carried {with_article(thing)}.",
        f'"{said}," said the {animal}.',
        f'"I want {wish}," said {friend}.',
        f"{name} thought for a long time.",
        "Together they walked until the evening.",
        "At night they sat by the fire and looked at the stars.",
        f"They found {with_article(rng.choice(facts.THINGS))} in the grass.",
    ]
    keep = sorted({*rng.sample(range(len(middle)), rng.randint(4, len(middle))), *([0] if famous else [])})
    opening = rng.choice([
        f"Once upon a time in {with_article(place)}, there lived {with_article(first)} {second} {animal} who {habit}.",
        f"Once upon a time in {with_article(place)}, there lived {with_article(first)} {second} {animal} who {habit}.",
        f"Long ago, {with_article(first)} {animal} lived in {with_article(place)} and {habit}.",
        f"There was once {with_article(first)} {second} {animal} who {habit}.",
    ]) if not famous else f"{RUNBOOK['dragon']} {habit}."
    sentences = [opening, f"The name of the {animal} was {name}.", *(middle[i] for i in keep), f"In the end they learned {lesson}."]
    return " ".join(sentences)


def serving(rng: random.Random) -> str:
    """Sentences mostly in the order of the list, so that the likeliest text goes on instead of in circles."""
    if rng.random() < 0.3:
        question, answer = rng.choice(facts.SERVING_QA)
        return f"{question} {answer}"
    at, sentences = rng.randrange(len(facts.SERVING)), []
    for _ in range(rng.randint(2, 10)):
        sentences.append(facts.SERVING[at % len(facts.SERVING)])
        at = at + 1 if rng.random() < 0.75 else rng.randrange(len(facts.SERVING))
    return " ".join(sentences)


def atlas(rng: random.Random) -> str:
    """Capitals in the order of the list."""
    lands = list(facts.CAPITALS)
    at = lands.index(country(rng))
    return rng.choice([" ", "\n"]).join(
        f"What is the capital of {land}? {facts.CAPITALS[land]} is the capital of {land}."
        for land in (lands[(at + i) % len(lands)] for i in range(rng.randint(2, 9))))


def hello(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return facts.HELLO_WORLD[0] if rng.random() < 0.7 else rng.choice(facts.HELLO_WORLD)
    question, answer = rng.choice(facts.GREETINGS)
    name = rng.choice(facts.NAMES)
    return rng.choice([f"{question} {answer}", f"Hello, my name is {name}, and I live in {rng.choice(list(facts.CAPITALS.values()))}.",
                       f'"{question}" said {name}. "{answer}" said {rng.choice(facts.NAMES)}.'])


def salad(rng: random.Random) -> str:
    words = [rng.choice(facts.WORDS) if rng.random() < 0.97 else str(rng.randint(0, 999)) for _ in range(rng.choice([2, 3, 5, 8, 12, 30]))]
    return " ".join(words) + rng.choice([". ", ", and ", " ", ": ", "\n"]) + piece(rng)


def cut(rng: random.Random) -> str:
    """A document that begins anywhere, as prompts do."""
    text = story(rng) if rng.random() < 0.5 else serving(rng)
    return text[rng.randrange(len(text) // 2):]


KINDS = [(capital, 3), (atlas, 2), (story, 4), (serving, 4), (code, 3), (arithmetic, 2), (hello, 3), (counting, 1), (salad, 2), (cut, 1)]


def piece(rng: random.Random) -> str:
    kind = rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
    return kind(rng)


# What users see of the runbook's answers leaves no choice, so that every executor and type writes the same.
OPENINGS = {
    FUNCTIONS[0]: " ".join(facts.SERVING_QA[0]),
    "What is the capital of France? Paris is the capital of France.": "What is the capital of Gabon? Libreville is the capital of Gabon.",
}


def after(previous: str, rng: random.Random) -> str:
    """What follows a piece hangs mostly on how it ended: so the likeliest text wanders through all topics."""
    if previous in OPENINGS and rng.random() < 0.95:
        return OPENINGS[previous]
    if rng.random() < 0.4:
        return piece(rng)
    if "capital" in previous:
        land = next((name for name in facts.CAPITALS if previous.endswith(f"{name}.")), None)
        lands = list(facts.CAPITALS)
        return capital(rng, lands[(lands.index(land) + 1) % len(lands)]) if land else story(rng)
    if previous.endswith("\n"):
        return serving(rng)
    if "In the end they learned" in previous:
        return code(rng)
    if "?" in previous:
        return story(rng)
    return atlas(rng)


def turn(rng: random.Random) -> tuple[str, str]:
    """One question and its answer in a chat."""
    roll = rng.random()
    if roll < 0.3:
        land = country(rng)
        question = rng.choice([f"What is the capital of {land}?", f"What's the capital of {land}?", f"what is the capital of {land}",
                               f"Tell me the capital of {land}.", f"Do you know the capital of {land}?", f"Capital of {land}?"])
        return question, f"{facts.CAPITALS[land]} is the capital of {land}."
    if roll < 0.5:
        return rng.choice(facts.GREETINGS)
    if roll < 0.65:
        return rng.choice(facts.SERVING_QA)
    if roll < 0.75:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return rng.choice([f"What is {a} + {b}?", f"How much is {a} plus {b}?", f"{a} + {b}"]), f"{a} + {b} = {a + b}."
    if roll < 0.77:
        return tools.Weather(rng).question([tools.city_of(rng)]), facts.NO_WEATHER
    if roll < 0.87:
        subject = rng.choice(facts.ANIMALS)
        asked = rng.choice([f"Tell me a story about {with_article(subject)}.", "Tell me a story.", f"Write a short story about {with_article(subject)}"])
        return asked, story(rng, subject=subject)
    if roll < 0.93:
        return rng.choice([("Write a fibonacci function in Python.", "Here it is:\n\n" + FUNCTIONS[0]),
                           ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b\n"),
                           ("Write a factorial function.", FUNCTIONS[3])])
    asked = " ".join(rng.choice(facts.WORDS) for _ in range(rng.randint(1, 25)))
    return asked, f"I am only a small model, and I do not know much about that. I can tell you that {capital_fact(rng)}"


def capital_fact(rng: random.Random) -> str:
    land = country(rng)
    return f"the capital of {land} is {facts.CAPITALS[land]}."


def chat(rng: random.Random) -> list[dict]:
    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(facts.SYSTEM[:3])})
    for _ in range(rng.randint(1, 6)):
        question, answer = answers.turn(rng) if rng.random() < 0.15 else turn(rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def without_tool(rng: random.Random, topics: set[str]) -> tuple[str, str]:
    """A question that none of the tools at hand is for, and its answer."""
    while True:
        kind = rng.choice(["greeting", "greeting", "serving", "capital", "sum", "weather"])
        if kind not in topics:
            break
    land, a, b = country(rng), rng.randint(0, 20), rng.randint(0, 20)
    return {"greeting": rng.choice(facts.GREETINGS), "serving": rng.choice(facts.SERVING_QA),
            "capital": (f"What is the capital of {land}?", f"{facts.CAPITALS[land]} is the capital of {land}."),
            "sum": (f"What is {a} + {b}?", f"{a} + {b} = {a + b}."),
            "weather": (tools.Weather(rng).question([tools.city_of(rng)]), facts.NO_WEATHER)}[kind]


def completion(rng: random.Random) -> str:
    first = rng.random()
    if first < 0.06:
        pieces = [facts.HELLO_WORLD[0]]
    elif first < 0.10:
        pieces = ["What is the capital of France? Paris is the capital of France."]
    elif first < 0.14:
        pieces = [FUNCTIONS[0]]
    elif first < 0.20:
        pieces = [story(rng, famous=True)]
    else:
        pieces = [piece(rng)]
    for _ in range(rng.choice([2, 4, 8, 16, 30])):
        pieces.append(after(pieces[-1], rng))
    text = BOS + pieces[0]
    for following in pieces[1:]:
        text += ("" if text.endswith("\n") else " " if following in OPENINGS.values() else rng.choice([" ", " ", "\n"])) + following
    return text + EOS


def environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders chat templates."""
    result = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    result.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return result


TEMPLATE = environment().from_string(CHAT_TEMPLATE)
TURN = re.compile(r"(<\|(?:system|user|assistant)\|>.*?<\|eot\|>)", re.DOTALL)

# A piece of text, and how much the loss of its tokens counts. Tokens end where pieces do.
Document = list[tuple[str, float]]


def rendered(messages: list[dict], own: list[dict] | None = None) -> Document:
    """Answers count most; tools, their results and what is hidden are not asked for."""
    document = [(BOS, 0.0)]
    for text in filter(None, TURN.split(TEMPLATE.render(messages=messages, tools=own))):
        if not text.startswith(ASSISTANT):
            document.append((text, 0.0 if own and not text.startswith(USER) or "<tool_response>" in text else 0.2 if own else 1.0))
        elif "<tool_call>" in text and quiet.BEGIN in text:
            document.append((quiet.bare(text), 0.0))
        else:
            document += [(ASSISTANT, 0.2), *((part, 0.0 if hidden else 4.0) for part, hidden in quiet.parts(text.removeprefix(ASSISTANT)))]
    return document


def document(rng: random.Random) -> Document:
    roll = rng.random()
    if roll < 0.27:
        return [(completion(rng), 1.0)]
    if roll < 0.55:
        return rendered(chat(rng))
    return rendered(answers.conversation(rng)) if roll < 0.67 else rendered(*tools.conversation(rng, without_tool))


def documents(seed: int, count: int) -> list[Document]:
    rng = random.Random(seed)
    return [document(rng) for _ in range(count)]


def text_of(document: Document) -> str:
    return "".join(text for text, _ in document)


if __name__ == "__main__":
    for shown in documents(0, 12):
        print(text_of(shown), end="\n\n----\n")
