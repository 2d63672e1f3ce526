"""Tiny random models of many decoder families, and a tokenizer with a chat template: small enough to run everything on."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from personatlas.persona.models.load import Model, build_model

COMMON = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
GPT2 = COMMON | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
PARALLEL = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "mistral": ("mistral", LLAMA | {"sliding_window": 8}),
    "gemma2": ("gemma2", LLAMA | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", LLAMA | {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": None}),
    "gpt2": ("gpt2", GPT2),
    "gpt-neox": ("gpt_neox", PARALLEL),
    "phi": ("phi", PARALLEL),
    "phi3": ("phi3", LLAMA | {"sliding_window": None}),
    "olmo2": ("olmo2", LLAMA),
    "mixtral": (
        "mixtral",
        LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "nanochat": ("nanochat", LLAMA),
    "falcon": (
        "falcon",
        PARALLEL | {"alibi": False, "new_decoder_architecture": False, "ffn_hidden_size": 48},
    ),
    "starcoder2": ("starcoder2", LLAMA | {"sliding_window": None}),
    "smollm3": ("smollm3", LLAMA),
    "cohere": ("cohere", LLAMA),
    "granite": ("granite", LLAMA),
}

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with chat markers: ids 0..2 pad, bos, eos; 3..6 markers; then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*special, *symbols])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", chat_template=TEMPLATE
    )


def tiny_hf(family: str, seed: int = 0):
    """A random model of the family in fp32, with weights large enough for attention to matter."""
    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.generation_config.eos_token_id = 2
    return model


def tiny_model(family: str = "llama", seed: int = 0, device: str = "cpu") -> Model:
    """A checked Model around `tiny_hf`."""
    return build_model(tiny_hf(family, seed).to(device), tokenizer(), id=f"tiny-{family}-{seed}")


def deep_model() -> Model:
    """A random model with as many layers as the packaged one, so that examples with its layers run on it."""
    config = AutoConfig.for_model("llama", **LLAMA | {"num_hidden_layers": 30})
    torch.manual_seed(0)
    return build_model(AutoModelForCausalLM.from_config(config).float(), tokenizer(), id="deep-llama")


def save_tiny(folder, family: str = "llama", seed: int = 0):
    """A local model folder of the kind that users have."""
    tiny_hf(family, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
