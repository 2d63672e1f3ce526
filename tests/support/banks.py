"""A small role bank."""

import json

QUESTIONS = ("Who are you?", "What is rain, and where does it come from?", "Should I sell my boat?")
ROLES = {
    "default": ("", "You are {model}."),
    "pirate": ("You are a pirate who never says a plain word.", "Be a pirate."),
    "nun": ("You are a nun.",),
    "crow": ("You are a crow on a wire.", "Caw as a crow would."),
    "judge": ("You are a judge.",),
    "cook": ("You are a cook.",),
}
TRAITS = {
    "calm": ("Be calm.", "Be frantic!"),
    "terse": ("Few words.", "Go on and on about everything."),
    "warm": ("Be kind to them.", "Be cold."),
}


def write_bank(folder):
    """Makes the folder with six roles, three questions and three traits."""
    folder.mkdir()
    roles = [
        {"name": name, "prompts": prompts, "is_default": name == "default"} for name, prompts in ROLES.items()
    ]
    questions = [{"id": f"q{i}", "question": text} for i, text in enumerate(QUESTIONS)]
    traits = [{"name": name, "positive": [pos], "negative": [neg]} for name, (pos, neg) in TRAITS.items()]
    for name, rows in (("roles", roles), ("questions", questions), ("traits", traits)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
