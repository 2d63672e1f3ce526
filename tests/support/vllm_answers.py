"""A script that test_vllm.py starts under the Python that has vLLM: what its engine says of a model folder, as JSON.

python tests/vllm_answers.py FOLDER ASKED.json SAID.json
"""

import json
import sys
from pathlib import Path


def main(folder: str, asked: str, said: str) -> None:
    from vllm import LLM, SamplingParams

    what = json.loads(Path(asked).read_text())
    engine = LLM(folder, dtype="float32", max_model_len=what["context"], enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=what["tokens"], logprobs=5, ignore_eos=True)
    (answer,) = engine.generate([{"prompt_token_ids": what["prompt"]}], greedy)
    (chat,) = engine.chat([what["conversation"]], SamplingParams(temperature=0, max_tokens=1))
    (text,) = engine.generate([what["text"]], SamplingParams(temperature=0, max_tokens=1))
    steps = [{str(id): one.logprob for id, one in step.items()} for step in answer.outputs[0].logprobs]
    found = {
        "tokens": list(answer.outputs[0].token_ids),
        "likely": steps,
        "conversation": chat.prompt_token_ids,
        "text": text.prompt_token_ids,
    }
    Path(said).write_text(json.dumps(found))


if __name__ == "__main__":  # its engine is a process that imports this file again
    main(*sys.argv[1:])
