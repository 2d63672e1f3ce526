"""A small model in an exported folder, with a tokenizer trained here, and what other engines are asked about it."""

from dataclasses import replace

import torch
from corpora import CHAT, write_corpus
from tiny_gpt import lively

from personatlas.training.data.corpus import Corpus
from personatlas.training.data.tokenizer import make_tokenizer
from personatlas.training.export.huggingface import export_model
from personatlas.training.model.config import Shape

# heads of 32: transformers' reader of GGUF files by itself takes 128 for granted
SHAPE = Shape(vocabulary=320, depth=2, width=64, heads=2, kv_heads=1, head_width=32, inner=96, context=64)
PROMPT = torch.randint(4, 310, (1, 40), generator=torch.Generator().manual_seed(0))
QUESTION = [*CHAT[:-1], {"role": "user", "content": "Where is <|im_end|> the pier?"}]


def exported_in(folder, context=SHAPE.context):
    """FOLDER/model."""
    texts = Corpus.open(write_corpus(folder / "texts"), held_share=0.2)
    make_tokenizer(texts, folder / "tokenizer", vocabulary=310, quiet=True)
    return export_model(lively(replace(SHAPE, context=context)), folder / "tokenizer", folder / "model")
