"""Conversations, rollouts and the files that hold them, for the tests of chat tuning."""

import json

import numpy as np

from personatlas.training.chat.conversations import ChatExample


def turns(*texts, system=None):
    """Messages: user and assistant in turn, maybe after a system message."""
    roles = ("user", "assistant")
    front = [] if system is None else [{"role": "system", "content": system}]
    return [*front, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


GOOD = {"messages": turns("Who are you?", "A sailor.", "And then?", "A captain.", system="You are a sailor.")}
WORDS = {
    "pirate": [
        "arr",
        "matey",
        "the",
        "briny",
        "deep",
        "be",
        "calling",
        "ye",
        "scurvy",
        "dog",
        "avast",
        "hoist",
        "yon",
        "sail",
    ],
    "butler": [
        "very",
        "good",
        "sir",
        "might",
        "one",
        "suggest",
        "a",
        "pot",
        "of",
        "tea",
        "before",
        "the",
        "motor",
        "car",
        "arrives",
    ],
}


def in_character(role, number):
    """A text of a role's words; every number has its own."""
    return " ".join(np.random.default_rng([number, len(role)]).permutation(WORDS[role]))


def conversation(messages, where="a:1"):
    return ChatExample(tuple(messages), where, "a")


def rollout(key, answer="Arr.", stopped="end"):
    """A line of rollouts.jsonl."""
    system = None if key.startswith("default") else "You are a pirate."
    messages = turns(f"Question {key.split('/')[2]}?", system=system)
    ids = {"prompt_ids": [1], "answer_ids": [2]}
    return {"key": key, "messages": messages, **ids, "answer": answer, "seed": 0, "stopped": stopped}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(folder, rollouts, scores=None):
    """A folder with rollouts.jsonl, and scores.jsonl if there are scores."""
    folder.mkdir()
    write_rows(folder / "rollouts.jsonl", rollouts)
    if scores is not None:
        rows = [{"key": key, "judge": "j", "score": score} for key, score in scores.items()]
        write_rows(folder / "scores.jsonl", rows)
    return folder
