"""Every command on a folder of tiny things, as arguments relative to it, with what must be the same after a rerun.

python tests/support/every_command.py FOLDER        # makes the folder
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from banks import write_bank
from base_runs import book, train
from families import save_tiny

from personatlas.cli.app import main
from personatlas.training.loop import samples

CPU = "--device cpu --dtype float32"
AXIS = f"--plan standard --bank bank {CPU} --samples 4 --chunk 32 --max-new-tokens 8 --judge none --keep all --replicates 4"
TRAIN = "--device cpu --context 128 --batch 512 --tokens 4096"
SMALL = f"{CPU} --max-new-tokens 4"
STEERED = f"{SMALL} --axis run"
COMMANDS = {
    "axis": f"axis tiny --out out {AXIS}",
    "run rollout": f"run rollout tiny --out out --bank bank {SMALL} --samples 2",
    "run judge": "run judge rolled --bank bank --judge rules",
    "run record": "run record rolled --device cpu",
    "run fit": "run fit run --keep all --replicates 3",
    "run report": "run report run",
    "emergence": f"emergence base --out out --checkpoints 2 --bank bank {SMALL} --samples 2 --judge none --keep all --replicates 2",
    "calibrate": "calibrate run --bank bank --windows 0-1 --levels 0.5 --budget 5 --roles 4 --prompts 1 --answers 6 "
    "--steps 2 --max-new-tokens 4 --device cpu",
    "generate": f"generate tiny Hello --arm cap:p50@1 --html out.html {STEERED}",
    "chat": f"chat tiny --message Hello --message Why? {STEERED}",
    "eval": f"eval tiny --out out --bank bank --requests requests.csv --roles 4 --prompts 1 --limit 4 --answers 2 "
    f"--arm cap:p75@0-2 {STEERED}",
    "trace": f"trace tiny chats.jsonl --html out.html --axis run {CPU}",
    "drift": f"drift tiny --out out --scripts scripts.jsonl --turns 2 --false-alarms 0.4 --arm cap:p90@1,2 {STEERED}",
    "train plan": "train plan --depth 1 --tokens 4096 --corpus corpus",
    "train tokenizer": "train tokenizer --corpus corpus --out out --vocabulary 300 --held-share 0.1",
    "train base": f"train base --depth 1 --corpus corpus --vocabulary 300 --held-share 0.1 --out out {TRAIN}",
    "train chat": "train chat base --data chats.jsonl --out out --device cpu --epochs 1 --held-share 0.2",
    "train eval": f"train eval tiny --text text.txt {CPU}",
    "train export": "train export base --out out --gguf out.gguf",
    "roles --export": "roles --bank bank --export out",
    "roles --check": "roles --check bank",
    "tools spans": "tools spans tiny --user Hello",
    "tools show": "tools show run/axis",
    "tools import axis": "tools import axis axis.pt --out out",
    "tools import caps": "tools import caps caps.pt --out out",
    "tools import roles": "tools import roles paper-bank --out out",
    "tools self-test": f"tools self-test tiny {CPU}",
    "tools harm-judge fit": "tools harm-judge fit labels.csv --out out",
    "tools harm-judge check": "tools harm-judge check labels.csv --judge rules",
}  # fmt: skip
INPUTS = {
    "axis": ("tiny/config.json", "tiny/model.safetensors", "tiny/tokenizer.json", "bank/roles.jsonl"),
    "run judge": ("rolled/rollouts.jsonl", "rolled/run.json"),
    "run record": ("rolled/rollouts.jsonl",),
    "run fit": ("run/activations.json", "run/activations.safetensors"),
    "run report": ("run/fit.json",),
    "emergence": ("base/run.json",),
    "calibrate": ("run/axis.safetensors", "run/rollouts.jsonl"),
    "generate": ("run/axis.json",),
    "eval": ("requests.csv", "run/space.safetensors"),
    "trace": ("chats.jsonl",),
    "drift": ("scripts.jsonl",),
    "train tokenizer": ("corpus/0.txt",),
    "train chat": ("chats.jsonl", "base/model/model.safetensors"),
    "train eval": ("text.txt",),
    "train export": ("base/model/model.safetensors", "base/model/tokenizer.json"),
    "roles --check": ("bank/traits.jsonl",),
    "tools show": ("run/axis.json", "run/axis.safetensors"),
    "tools import axis": ("axis.pt",),
    "tools import caps": ("caps.pt",),
    "tools import roles": ("paper-bank/questions.jsonl",),
    "tools harm-judge fit": ("labels.csv",),
    "tools harm-judge check": ("labels.csv",),
}
"Files that a command reads."
# of a run they tell when and how fast it was made
TIMES = re.compile(
    r'"(created|seconds|tokens_a_second|utilisation|seconds_a_step|at)": [^,\n}]+|\d+(\.\d+)? s of training'
)
UNEQUAL = ("report.html", "samples.jsonl")  # of training: with its speed


def make_workbench(folder: Path) -> Path:
    """A folder in which all commands can be run."""
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        save_tiny(Path("tiny"))
        write_bank(Path("bank"))
        Path("corpus").mkdir()
        for number in range(40):
            Path(f"corpus/{number}.txt").write_text(book(number, words=120))
        main(f"axis tiny --out run {AXIS}".split())
        shutil.copytree("run", "rolled")
        for path in Path("rolled").iterdir():
            if path.name not in ("run.json", "rollouts.jsonl"):
                path.unlink()
        train(Path("corpus"), Path("base"), tokens=4096, depth=1, context=128)
        main(["roles", "--bank", "bank", "--export", "paper-bank"])
        vectors = {f"at{layer}": {"layer": layer, "vector": torch.ones(8) * layer} for layer in (2, 3)}
        steps = [{"vector": f"at{layer}", "cap": -0.1 * layer} for layer in (2, 3)]
        caps = {
            "vectors": vectors,
            "experiments": [{"id": name, "interventions": steps} for name in ("a-p0.5", "b-p0.5")],
        }
        torch.save(caps, "caps.pt")
        torch.save(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), "axis.pt")
        for name, count in (("chats", 24), ("scripts", 3)):
            chats = [conversation(number) for number in range(count)]
            Path(f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        Path("requests.csv").write_text(
            "goal,category\n" + "".join(f"Tie knot {n}.,rope\n" for n in range(6))
        )
        rows = "".join(
            f'"{("Never do " if n % 2 else "Here is how to do ") + str(n)}",{n % 2}\n' for n in range(40)
        )
        Path("labels.csv").write_text("answer,label\n" + rows)
        Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    finally:
        os.chdir(before)
    return folder


def conversation(number: int) -> dict[str, object]:
    texts = f"Who is number {number}?", "A cat.", "Why?", f"It is number {number}."
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return {"id": f"c{number}", "messages": messages}


def results(folder: Path) -> dict[str, bytes | str]:
    """The files in a folder, without times; of those that hold speeds only the names."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            if path.suffix in (".json", ".jsonl"):
                lines = path.read_text().splitlines(keepends=True)
                # a run that resumes says so in an event of its log
                text = "".join(line for line in lines if '"kind": "event"' not in line)
                found[name] = TIMES.sub("", text)
            else:
                found[name] = "" if path.name in UNEQUAL else path.read_bytes()
    return found


if __name__ == "__main__":
    samples.LENGTH = 4
    make_workbench(Path(sys.argv[1]))
