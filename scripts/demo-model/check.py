"""
Whether a trained demo model says what it was taught, and how surely: by how much the logit of each token of an answer leads that of the
next likeliest one. A lead above zero throughout is the greedy answer; what two executors differ by must stay below it.

    python3 scripts/demo-model/check.py models/demo
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus
import facts
import quiet
import tools


@dataclass
class Case:
    prompt: list[int]
    answer: list[int]
    # Of each token of the answer: whether the model is to choose it. A grammar chooses the others.
    chosen: list[bool]


def function(name: str, about: str, **keys: str) -> dict:
    properties = {key: {"type": kind} for key, kind in keys.items()}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": {"type": "object", "properties": properties, "required": list(keys)}}}


GET_WEATHER = function("get_weather", "Get the weather for a city", city="string")
GET_CAPITAL = function("get_capital", "Get the capital of a country", country="string")
ADD = function("add", "Add two numbers", a="number", b="number")
GET_TIME = function("get_time", "Get the current time")


def call(name: str, **arguments: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, *calls: dict) -> dict:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def result(text: str) -> dict:
    return {"role": "tool", "content": text}


class Cases:
    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.groups: dict[str, list[Case]] = {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def completion(self, group: str, prompt: str, answer: str) -> None:
        ids = self.ids(answer)
        self.groups.setdefault(group, []).append(Case(self.ids(corpus.BOS + prompt), ids, [True] * len(ids)))

    def chat(self, group: str, messages: list[dict], own: list[dict] | None = None) -> None:
        """One case for each of the assistant's messages."""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = corpus.TEMPLATE.render(messages=messages[:i], tools=own, add_generation_prompt=True)
            whole = corpus.TEMPLATE.render(messages=messages[:i + 1], tools=own)
            prefix = corpus.TEMPLATE.render(messages=messages[:i], tools=own)
            if "<tool_call>" in whole[len(prefix):] and quiet.BEGIN in whole[len(prefix):]:
                continue
            prompt = self.ids(corpus.BOS + quiet.bare(before))
            parts = [(self.ids(text), hidden) for text, hidden in quiet.parts(whole[len(before):])]
            self.groups.setdefault(group, []).append(Case(prompt, [id for ids, _ in parts for id in ids], [not hidden for ids, hidden in parts for _ in ids]))


RUNBOOK_ANSWERS = {
    "hello": "! I am a small language model, and I",
    "capital": " Paris is the capital of France. What",
    "fibonacci": " fibonacci(n-1) + fibonacci(n-2)\nWhat",
    "dragon": " guarded the oldest tree and told stories to every traveller. The name of the dragon was Luna. The",
}


def taught(folder: Path) -> Cases:
    cases = Cases(folder)
    for name, answer in RUNBOOK_ANSWERS.items():
        cases.completion("runbook", corpus.RUNBOOK[name], answer)
    for land, city in facts.CAPITALS.items():
        question = f"What is the capital of {land}?"
        cases.chat("capitals", [user(question), said(f"{city} is the capital of {land}.")])
        cases.chat("capitals in JSON", [user(f"{question} Answer in JSON."), said(json.dumps({"capital": city}, ensure_ascii=False))])
        cases.chat("capitals in JSON", [user(f"{question} Answer in JSON with country and capital."), said(json.dumps({"country": land, "capital": city}, ensure_ascii=False))])
        cases.chat("capitals in JSON, asked by the system", [{"role": "system", "content": "Answer in JSON."}, user(question), said(json.dumps({"capital": city}, ensure_ascii=False))])
        cases.chat("capitals under a schema", [user(question), said(quiet.hidden_json({"capital": city}))])
        cases.chat("capitals under a schema", [user(question), said(quiet.hidden_json({"country": land, "capital": city}))])
        cases.chat("capitals by a tool", [user(question), said("", call("get_capital", country=land)), result(city), said(f"The capital of {land} is {city}.")], [GET_CAPITAL])
        cases.chat("capitals by one tool of two", [user(question), said("", call("get_capital", country=land)), result(json.dumps({"capital": city}, ensure_ascii=False)),
                                                   said(f"The capital of {land} is {city}.")], [GET_WEATHER, GET_CAPITAL])
        cases.chat("no tool for capitals", [user(question), said(f"{city} is the capital of {land}.")], [GET_WEATHER])
    for question, answer in facts.GREETINGS + facts.SERVING_QA:
        cases.chat("small talk", [user(question), said(answer)])
        cases.chat("small talk beside tools", [user(question), said(answer)], [GET_WEATHER, GET_CAPITAL])
    for a in range(21):
        for b in range(21):
            cases.chat("sums", [user(f"What is {a} + {b}?"), said(f"{a} + {b} = {a + b}.")])
            cases.chat("sums in JSON", [user(f"What is {a} + {b}? Answer in JSON."), said(json.dumps({"sum": a + b}))])
    rng = random.Random(5)
    for city in tools.CITIES:
        degrees, sky = rng.randint(-9, 39), rng.choice(facts.SKIES)
        question, answer = f"What is the weather in {city}?", f"It is {degrees} degrees and {sky} in {city}."
        asked = [user(question), said("", call("get_weather", city=city))]
        cases.chat("weather", [*asked, result(json.dumps({"temperature": degrees, "condition": sky})), said(answer)], [GET_WEATHER])
        cases.chat("weather", [*asked, result(f"{degrees} degrees and {sky}"), said(answer)], [GET_WEATHER])
        cases.chat("weather, one of four tools", [*asked, result(f'{{"temperature":{degrees},"condition":"{sky}"}}'), said(answer)], [GET_CAPITAL, ADD, GET_WEATHER, GET_TIME])
        cases.chat("weather without a tool", [user(question), said(facts.NO_WEATHER)])
        cases.chat("weather in JSON", [user(f"{question} Answer in JSON."), said("", call("get_weather", city=city)), result(json.dumps({"temperature": degrees, "condition": sky})),
                                       said(json.dumps({"city": city, "temperature": degrees, "condition": sky}, ensure_ascii=False))], [GET_WEATHER])
    for one in facts.FAMOUS_CITIES:
        for two in facts.FAMOUS_CITIES:
            if one != two:
                cases.chat("weather of two cities", [user(f"What is the weather in {one} and {two}?"), said("", call("get_weather", city=one), call("get_weather", city=two)),
                                                     result("18 degrees and sunny"), result("7 degrees and rainy"),
                                                     said(f"It is 18 degrees and sunny in {one}, and it is 7 degrees and rainy in {two}.")], [GET_WEATHER])
    for _ in range(150):
        a, b = rng.randint(0, 999), rng.randint(0, 999)
        cases.chat("sums by a tool", [user(f"What is {a} + {b}?"), said("", call("add", a=a, b=b)), result(str(a + b)), said(f"{a} + {b} = {a + b}.")], [ADD])
    cases.chat("time", [user("What time is it?"), said("", call("get_time")), result("14:30"), said("It is 14:30.")], [GET_TIME])
    for _ in range(600):
        messages, own = tools.conversation(rng, corpus.without_tool)
        cases.chat("any conversation with tools (not seen in training)", [m for m in messages], own)
    return cases


@torch.inference_mode()
def leads(model, cases: list[Case], device: str) -> list[list[float]]:
    """Of each case, for each token of the answer that the model is to choose: its logit less the highest other."""
    found: list[list[float]] = []
    for start in range(0, len(cases), 64):
        batch = cases[start:start + 64]
        length = max(len(case.prompt) + len(case.answer) for case in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        for row, case in enumerate(batch):
            ids[row, :len(case.prompt) + len(case.answer)] = torch.tensor(case.prompt + case.answer)
        logits = model(ids.to(device), use_cache=False).logits.float()
        for row, case in enumerate(batch):
            at = logits[row, len(case.prompt) - 1:len(case.prompt) + len(case.answer) - 1].clone()
            target = torch.tensor(case.answer, device=device)[:, None]
            own = at.gather(1, target)
            at.scatter_(1, target, float("-inf"))
            lead = (own - at.max(dim=1, keepdim=True).values)[:, 0].tolist()
            found.append([value for value, chosen in zip(lead, case.chosen) if chosen])
    return found


def report(folder: Path, device: str) -> dict:
    cases = taught(folder)
    torch.backends.cuda.matmul.allow_tf32 = False
    result = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        for group, of in cases.groups.items():
            least = [min(values) for values in leads(model, of, device)]
            wrong = [case for case, lead in zip(of, least) if lead <= 0]
            ordered = sorted(least)
            row = {"cases": len(of), "wrong": len(wrong), "least": round(ordered[0], 2), "of a hundred": round(ordered[len(ordered) // 100], 2),
                   "median": round(ordered[len(ordered) // 2], 2),
                   "examples": [cases.tokenizer.decode(case.prompt[-60:]) + " >>> " + cases.tokenizer.decode(case.answer) for case in wrong[:8]]}
            result.setdefault(name, {})[group] = row
            print(f"{name:9} {group:52} {len(of):5} cases, {len(wrong):3} wrong, lead {row['least']:6.2f} at least, {row['of a hundred']:6.2f} for 99%, {row['median']:6.2f} median", flush=True)
            if name == "float32":
                for example in row["examples"][:2]:
                    print("          ", repr(example))
    return result


if __name__ == "__main__":
    report(Path(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu")
