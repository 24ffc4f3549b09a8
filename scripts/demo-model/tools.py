"""Conversations in which the demo model calls tools: what is asked, the tools at hand, their calls, results, and the answer."""

import json
import random

import facts
from quiet import hidden_json, hide

CITIES = sorted({city for city in facts.CAPITALS.values()} | set(facts.CITIES))
SYLLABLES = "ba be bi bo da de do fa fe ga gi go ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe ra re ri ro sa se ta te ti to va ve vo za".split()

# Where the words stand in for what a user of the API would write: names and keys are copied, not learned.
CITY_KEYS = ["city", "city", "city", "location", "location", "place", "town", "city_name"]
COUNTRY_KEYS = ["country", "country", "country", "land", "nation", "name", "country_name"]
NUMBER_KEYS = [("a", "b"), ("a", "b"), ("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("num1", "num2")]
VERBS = ["get", "get", "get", "lookup", "find", "fetch", "query", "read"]


def invented(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()


def city_of(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.35:
        return rng.choice(facts.FAMOUS_CITIES)
    if roll < 0.8:
        return rng.choice(CITIES)
    if roll < 0.9:
        land = rng.choice(list(facts.CAPITALS))
        return f"{facts.CAPITALS[land]}, {land}"
    return invented(rng)


def country_of(rng: random.Random) -> str:
    roll = rng.random()
    return rng.choice(facts.FAMOUS) if roll < 0.4 else rng.choice(list(facts.CAPITALS)) if roll < 0.92 else invented(rng)


def name_of(rng: random.Random, noun: str) -> str:
    """A function's name about `noun` (words joined by underscores)."""
    camel = "".join(part.capitalize() for part in noun.split("_"))
    roll = rng.random()
    if roll < 0.55:
        return f"{rng.choice(VERBS)}_{noun}"
    if roll < 0.7:
        return rng.choice(VERBS) + camel
    if roll < 0.85:
        return noun
    return rng.choice([f"{noun}_of", f"get_current_{noun}", f"{noun}_lookup", f"{noun}_tool"])


def schema(rng: random.Random, name: str, about: str, parameters: dict[str, dict], required: list[str]) -> dict:
    """A tool as OpenAI's API takes it, in the manners of several clients."""
    content = {"type": "object", "properties": parameters}
    if required or rng.random() < 0.5:
        content["required"] = required
    if rng.random() < 0.05:
        content.pop("required", None)
    if rng.random() < 0.25:
        content["additionalProperties"] = False
    if rng.random() < 0.15:
        content = {"$schema": rng.choice(["http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema"]), **content}
    function = {"name": name, "description": about, "parameters": content}
    if rng.random() < 0.1:
        function.pop("description")
    if rng.random() < 0.12:
        function["strict"] = True
    if not parameters and rng.random() < 0.3:
        function.pop("parameters")
    if rng.random() < 0.12:
        function = shuffled(rng, function)
    tool = {"type": "function", "function": function}
    return shuffled(rng, tool) if rng.random() < 0.05 else tool


def shuffled(rng: random.Random, value: dict) -> dict:
    return {key: value[key] for key in rng.sample(list(value), len(value))}


def parameter(rng: random.Random, kind: str, about: str) -> dict:
    value = {"type": kind}
    if rng.random() < 0.5:
        value["description"] = about
    return shuffled(rng, value) if rng.random() < 0.1 else value


def plain_json(rng: random.Random, value) -> str:
    """As programs write it: with blanks (Python) or without (JavaScript)."""
    return json.dumps(value, ensure_ascii=False, separators=None if rng.random() < 0.5 else (",", ":"))


class Weather:
    topic = "weather"

    def __init__(self, rng: random.Random):
        self.rng, self.key = rng, rng.choice(CITY_KEYS)
        self.name = rng.choice(["get_weather", "get_weather", "get_weather", "get_current_weather", name_of(rng, "weather"), "get_forecast", "get_temperature"])
        parameters = {self.key: parameter(rng, "string", rng.choice(["The city", "Name of the city", "The name of the city", "City and country", "A place", "Where"]))}
        required = [self.key]
        self.unit = None
        if rng.random() < 0.25:
            self.unit = rng.choice(["unit", "unit", "units"])
            parameters[self.unit] = {**parameter(rng, "string", "The unit of temperature"), "enum": ["celsius", "fahrenheit"]}
            if rng.random() < 0.3:
                required.append(self.unit)
        self.unit_required = len(required) > 1
        about = rng.choice(["Current weather of a city", "Get the current weather in a given location", "Get the weather for a city", "Returns the weather",
                            "The weather in a city", "Tells the weather of a place", "Weather now", f"Weather for {' '.join(rng.sample(facts.WORDS, 3))}"])
        self.tool = schema(rng, self.name, about, parameters, required)

    def subject(self) -> str:
        return city_of(self.rng)

    def question(self, subjects: list[str]) -> str:
        where = listed(subjects)
        return self.rng.choice([f"What is the weather in {where}?", f"What is the weather in {where}?", f"What's the weather in {where}?",
                                f"What is the weather like in {where}?", f"What's the weather like in {where} today?", f"How is the weather in {where}?",
                                f"Weather in {where}?", f"Tell me the weather in {where}.", f"What is the weather in {where} today?",
                                f"What is the weather in {where} now?", f"How warm is it in {where}?", f"Is it raining in {where}?",
                                f"what is the weather in {where}", f"What is the temperature in {where}?"])

    def arguments(self, subject: str) -> dict:
        return {self.key: subject, **({self.unit: "celsius"} if self.unit_required else {})}

    def result(self, subject: str) -> tuple[str, str, dict]:
        rng = self.rng
        degrees = rng.randint(-15, 40) if rng.random() < 0.9 else rng.randint(-99, 399) / 10
        sky = rng.choice(facts.SKIES)
        city = subject.split(",")[0]
        both = f"it is {degrees} degrees and {sky} in {city}"
        roll = rng.random()
        if roll < 0.6:
            part = rng.random()
            content = {} if rng.random() < 0.6 else {rng.choice([self.key, "city", "location"]): subject}
            if part < 0.9:
                content[rng.choice(["temperature", "temperature", "temp", "temperature_c", "degrees", "celsius"])] = degrees
            if part < 0.1 or part >= 0.2:
                content[rng.choice(["condition", "condition", "conditions", "weather", "sky", "description", "forecast"])] = sky
            if rng.random() < 0.15:
                content[rng.choice(["humidity", "wind"])] = rng.randint(0, 99)
            if rng.random() < 0.1:
                content["unit"] = "celsius"
            if rng.random() < 0.2:
                content = shuffled(rng, content)
            if part >= 0.9:
                return plain_json(rng, content), f"it is {sky} in {city}", {"city": city, "condition": sky}
            if 0.1 <= part < 0.2:
                return plain_json(rng, content), f"it is {degrees} degrees in {city}", {"city": city, "temperature": degrees}
            return plain_json(rng, content), both, {"city": city, "temperature": degrees, "condition": sky}
        if roll < 0.68:
            return f"{sky}", f"it is {sky} in {city}", {"city": city, "condition": sky}
        if roll < 0.76:
            text = rng.choice([f"{degrees} degrees", f"{degrees}", f"{degrees}°C", f"{degrees} °C"])
            return text, f"it is {degrees} degrees in {city}", {"city": city, "temperature": degrees}
        text = rng.choice([f"{degrees} degrees and {sky}", f"{sky}, {degrees} degrees", f"{degrees}°C, {sky}", f"{degrees} °C and {sky}",
                           f"It is {degrees} degrees and {sky} in {city}.", f"{sky} and {degrees} degrees"])
        return text, both, {"city": city, "temperature": degrees, "condition": sky}


class Fact:
    """Any "X of Y": mostly the capital of a country."""

    def __init__(self, rng: random.Random, noun: str | None = None):
        self.rng = rng
        self.kind = "country"
        if noun is None:
            self.kind = rng.choice(list(facts.NOUNS))
            noun = rng.choice(facts.NOUNS[self.kind]) if rng.random() < 0.75 else rng.choice(facts.WORDS)
        self.noun = self.topic = noun
        keys = {"country": COUNTRY_KEYS, "city": CITY_KEYS, "product": ["product", "item", "name", "article"], "person": ["name", "person", "user", "who"]}
        self.key = rng.choice(keys[self.kind])
        self.name = name_of(rng, noun.replace(" ", "_"))
        if noun == "capital" and rng.random() < 0.4:
            self.name = "get_capital"
        about = rng.choice([f"The {noun} of a {self.kind}", f"Returns the {noun} of a {self.kind}", f"Get the {noun} of a {self.kind}",
                            f"Looks up the {noun}", f"Gets the {noun} of the given {self.kind}", f"{noun.capitalize()} of a {self.kind}"])
        self.tool = schema(rng, self.name, about, {self.key: parameter(rng, "string", rng.choice([f"The {self.kind}", f"Name of the {self.kind}", f"The name of the {self.kind}"]))}, [self.key])

    def subject(self) -> str:
        rng = self.rng
        return {"country": country_of, "city": lambda rng: city_of(rng).split(",")[0], "product": lambda rng: rng.choice(facts.PRODUCTS),
                "person": lambda rng: rng.choice(facts.NAMES) if rng.random() < 0.7 else invented(rng)}[self.kind](rng)

    def question(self, subjects: list[str]) -> str:
        of = listed(subjects)
        if len(subjects) > 1:
            return f"What are the {self.noun}s of {of}?"
        return self.rng.choice([f"What is the {self.noun} of {of}?"] * 4 + [f"What's the {self.noun} of {of}?", f"Tell me the {self.noun} of {of}.",
                                f"what is the {self.noun} of {of}", f"Do you know the {self.noun} of {of}?", f"{self.noun.capitalize()} of {of}?"])

    def arguments(self, subject: str) -> dict:
        return {self.key: subject}

    def result(self, subject: str) -> tuple[str, str, dict]:
        rng = self.rng
        if self.noun == "capital":
            value = facts.CAPITALS.get(subject, None) if rng.random() < 0.8 else None
            value = value or rng.choice(CITIES)
        else:
            value = rng.choice([rng.randint(0, 99), rng.randint(0, 9999), rng.randint(100_000, 99_999_999), rng.choice(facts.WORDS), rng.choice(CITIES),
                                rng.choice(facts.NAMES), invented(rng), " ".join(rng.sample(facts.WORDS, 2))])
        said = f"the {self.noun} of {subject} is {value}"
        key = self.noun.replace(" ", "_")
        text = rng.choice([str(value), str(value), plain_json(rng, {key: value}), plain_json(rng, {key: value}), plain_json(rng, {self.key: subject, key: value}),
                           plain_json(rng, {"result": value}), plain_json(rng, {"value": value}), f"The {self.noun} of {subject} is {value}."])
        return text, said, {key: value}


class Sum:
    def __init__(self, rng: random.Random, times: bool):
        self.rng, self.times = rng, times
        self.topic = "product" if times else "sum"
        self.key = rng.choice(NUMBER_KEYS)
        word = "multiply" if times else "add"
        self.name = rng.choice([word, word, f"{word}_numbers", f"{word}_two_numbers", f"{word}Numbers"] + (["product", "times"] if times else ["sum", "plus"]))
        about = rng.choice([f"{word.capitalize()} two numbers", f"{word.capitalize()}s two numbers", f"The {self.topic} of two numbers", f"{word.capitalize()} a and b"])
        kind = rng.choice(["number", "number", "integer"])
        self.tool = schema(rng, self.name, about, {key: parameter(rng, kind, rng.choice(["A number", f"The {place} number"])) for key, place in zip(self.key, ("first", "second"))}, list(self.key))

    def subject(self) -> tuple[int, int]:
        return tuple(self.rng.choice([self.rng.randint(0, 20), self.rng.randint(0, 99), self.rng.randint(0, 999)]) for _ in range(2))

    def question(self, subjects: list) -> str:
        (a, b), = subjects
        if self.times:
            return self.rng.choice([f"What is {a} * {b}?", f"What is {a} times {b}?", f"How much is {a} times {b}?", f"Multiply {a} and {b}.", f"Multiply {a} by {b}.", f"{a} * {b}"])
        return self.rng.choice([f"What is {a} + {b}?", f"What is {a} + {b}?", f"How much is {a} plus {b}?", f"What is {a} plus {b}?", f"Add {a} and {b}.", f"{a} + {b}"])

    def arguments(self, subject) -> dict:
        return dict(zip(self.key, subject))

    def result(self, subject) -> tuple[str, str, dict]:
        a, b = subject
        value = a * b if self.times else a + b
        text = self.rng.choice([str(value), str(value), plain_json(self.rng, {"result": value}), plain_json(self.rng, {self.topic: value})])
        return text, f"{a} {'*' if self.times else '+'} {b} = {value}", {self.topic: value}


class Clock:
    """A tool without parameters, or with a city."""
    topic = "time"

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.key = None if rng.random() < 0.5 else rng.choice(CITY_KEYS)
        self.name = rng.choice(["get_time", "get_time", "get_current_time", "current_time", "clock", "now"])
        about = rng.choice(["The time", "Returns the current time", "Tells the time", "Get the current time"]) + ("" if self.key is None else " in a city")
        self.tool = schema(rng, self.name, about, {} if self.key is None else {self.key: parameter(rng, "string", "The city")}, [] if self.key is None else [self.key])

    def subject(self) -> str:
        return city_of(self.rng).split(",")[0]

    def question(self, subjects: list[str]) -> str:
        if self.key is None:
            return self.rng.choice(["What time is it?", "What time is it?", "What time is it now?", "What is the time?", "Tell me the time."])
        return self.rng.choice([f"What time is it in {subjects[0]}?", f"What time is it in {subjects[0]} now?", f"Tell me the time in {subjects[0]}."])

    def arguments(self, subject: str) -> dict:
        return {} if self.key is None else {self.key: subject}

    def result(self, subject: str) -> tuple[str, str, dict]:
        time = f"{self.rng.randint(0, 23)}:{self.rng.randint(0, 59):02}"
        text = self.rng.choice([time, time, plain_json(self.rng, {"time": time}), f"It is {time}."])
        return text, f"it is {time}" + ("" if self.key is None else f" in {subject}"), {"time": time}


class Search:
    topic = "search"

    def __init__(self, rng: random.Random):
        self.rng, self.key = rng, rng.choice(["query", "query", "q", "text", "question"])
        self.name = rng.choice(["search", "search", "web_search", "search_web", "searchDocs", "search_documents"])
        self.tool = schema(rng, self.name, rng.choice(["Searches the web", "Search for a text", "Search the documents"]), {self.key: parameter(rng, "string", "What to search for")}, [self.key])

    def subject(self) -> str:
        rng = self.rng
        return " ".join(rng.sample(facts.WORDS, rng.randint(1, 3))) if rng.random() < 0.6 else rng.choice(facts.ANIMALS + CITIES + facts.PRODUCTS)

    def question(self, subjects: list[str]) -> str:
        return self.rng.choice([f"Search for {subjects[0]}.", f"Search the web for {subjects[0]}.", f"Look for {subjects[0]}.", f"search for {subjects[0]}"])

    def arguments(self, subject: str) -> dict:
        return {self.key: subject}

    def result(self, subject: str) -> tuple[str, str, dict]:
        said = self.rng.choice(facts.SERVING + facts.WEATHER)
        return said if self.rng.random() < 0.7 else plain_json(self.rng, {"result": said}), said.rstrip("."), {"result": said}


def compacted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def any_tool(rng: random.Random):
    roll = rng.random()
    if roll < 0.34:
        return Weather(rng)
    if roll < 0.56:
        return Fact(rng, "capital")
    if roll < 0.76:
        return Fact(rng)
    if roll < 0.86:
        return Sum(rng, rng.random() < 0.4)
    return Clock(rng) if rng.random() < 0.5 else Search(rng)


def listed(subjects: list[str]) -> str:
    return subjects[0] if len(subjects) == 1 else f"{', '.join(subjects[:-1])} and {subjects[-1]}"


def sentence(parts: list[str]) -> str:
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"
    return text[0].upper() + text[1:] + "."


def tool_turn(rng: random.Random, asked) -> list[dict]:
    """A question, one call or several, their results, the answer."""
    several = isinstance(asked, Weather) or (isinstance(asked, Fact) and asked.noun == "capital")
    subjects = [asked.subject()]
    while several and len(subjects) < 3 and rng.random() < 0.14:
        further = asked.subject()
        if further not in subjects and "," not in further + subjects[0]:
            subjects.append(further)
    question, json_wanted = asked.question(subjects), len(subjects) == 1 and rng.random() < 0.12
    if json_wanted:
        question += rng.choice([" Answer in JSON.", " Answer in JSON.", " Reply in JSON.", " Answer as JSON."])
    # Clients send arguments back as a text of their own making; the model itself always writes blanks.
    compact = rng.random() < 0.1
    calls = [{"type": "function", "function": {"name": asked.name, "arguments": hide(compacted(given)) if compact else given}}
             for given in map(asked.arguments, subjects)]
    results = [asked.result(subject) for subject in subjects]
    if rng.random() < 0.03:
        failure = rng.choice(["not found", "unknown name", "no connection", "too many requests", "timeout"])
        results = [(plain_json(rng, {"error": failure}) if rng.random() < 0.5 else f"error: {failure}", f"the tool failed: {failure}", {"error": failure})] * len(subjects)
    if json_wanted:
        answer = json.dumps(results[0][2], ensure_ascii=False)
    else:
        answer = sentence(list(dict.fromkeys(said for _, said, _ in results)))
        if len(subjects) == 1 and rng.random() < 0.05:
            answer = hidden_json(results[0][2])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "", "tool_calls": calls},
            *({"role": "tool", "content": text} for text, _, _ in results), {"role": "assistant", "content": answer}]


def conversation(rng: random.Random, plain_turn) -> tuple[list[dict], list[dict]]:
    """Messages and tools. `plain_turn`: a question and its answer without a tool, about none of the topics given."""
    own = [any_tool(rng)]
    for _ in range(rng.choice([0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4])):
        tool = any_tool(rng)
        if tool.topic not in [known.topic for known in own] and tool.name not in [known.name for known in own]:
            own.append(tool)
    rng.shuffle(own)
    messages = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(facts.SYSTEM) if rng.random() < 0.7 else " ".join(rng.choice(facts.WORDS) for _ in range(rng.randint(1, 20)))})
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.25:
            question, answer = plain_turn(rng, {tool.topic for tool in own})
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        else:
            messages += tool_turn(rng, rng.choice(own))
    return messages, [tool.tool for tool in own]
