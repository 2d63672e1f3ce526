"""Tiny random models of many decoder families, and a tokenizer with a chat template: small enough to run everything on."""

from functools import cache

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

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

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATE = COMMON | {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "intermediate_size": 48}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
ALTERNATING = LLAMA | {"num_hidden_layers": 4}
MIXED = ["mamba", "attention"] * 2
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_value_heads": 4}

# Families beyond those of every test: recurrent, hybrid, mixtures of experts, and attention of other kinds.
MORE: dict[str, tuple[str, dict]] = {
    "mamba": ("mamba", STATE),
    "mamba2": ("mamba2", STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2}),
    "falcon-mamba": ("falcon_mamba", STATE),
    "rwkv": ("rwkv", STATE | {"attention_hidden_size": 32, "context_length": 512}),
    "xlstm": ("xlstm", COMMON | {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "num_blocks": 3}),
    "recurrent-gemma": (
        "recurrent_gemma",
        LLAMA
        | {
            "lru_width": 32,
            "attention_window_size": 16,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
    "jamba": (
        "jamba",
        ALTERNATING
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 8},
    ),
    "bamba": ("bamba", ALTERNATING | MAMBA | {"attn_layer_indices": [1, 3]}),
    "zamba2": (
        "zamba2",
        ALTERNATING
        | {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_ngroups": 1, "n_mamba_heads": 8}
        | {"mamba_headdim": 8, "mamba_d_state": 8, "num_mem_blocks": 1, "use_mamba_kernels": False},
    ),
    "lfm2": (
        "lfm2",
        ALTERNATING | {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "qwen3-next": (
        "qwen3_next",
        ALTERNATING | MOE | LINEAR | {"linear_num_key_heads": 2, "shared_expert_intermediate_size": 16},
    ),
    "granite-hybrid": (
        "granitemoehybrid",
        ALTERNATING
        | MAMBA
        | {"layer_types": MIXED, "layers_block_type": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"shared_intermediate_size": 32},
    ),
    "nemotron-h": (
        "nemotron_h",
        ALTERNATING
        | {"hybrid_override_pattern": "M*M-", "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8}
        | {"n_groups": 1, "mamba_n_groups": 1},
    ),
    "falcon-h1": ("falcon_h1", LLAMA | MAMBA | {"mamba_d_ssm": 64}),
    "olmo-hybrid": ("olmo_hybrid", ALTERNATING | LINEAR | {"linear_num_key_heads": 4}),
    "minimax": ("minimax", ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": ("gpt_oss", LLAMA | {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v3": (
        "deepseek_v3",
        LLAMA
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
        | {"topk_group": 1, "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1},
    ),
    "qwen3-moe": ("qwen3_moe", LLAMA | MOE),
    "olmoe": ("olmoe", LLAMA | MOE),
    "llama4": (
        "llama4_text",
        LLAMA | {"intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 8},
    ),
    "cohere2": ("cohere2", LLAMA | {"sliding_window": 8}),
    "gemma4": (
        "gemma4_text",
        LLAMA
        | {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "sliding_window": 8}
        | {"num_kv_shared_layers": 0, "num_hidden_layers": 6},
    ),
    "bloom": ("bloom", COMMON | {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mpt": ("mpt", COMMON | {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 512}),
    "opt": ("opt", PARALLEL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}),
    "gpt-neo": (
        "gpt_neo",
        COMMON
        | {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 8}
        | {"attention_types": [[["global", "local"], 2]], "max_position_embeddings": 512},
    ),
    "gpt-bigcode": ("gpt_bigcode", GPT2),
    "glm4": ("glm4", LLAMA),
    "exaone4": ("exaone4", LLAMA | {"sliding_window": 8}),
}

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = VISION | {"image_size": 28, "patch_size": 14}
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
MARKS = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

# Models that also see; what is loaded reads text alone.
SEEING: dict[str, tuple[str, dict]] = {
    "llava": (
        "llava",
        {
            "vision_config": IMAGES | {"model_type": "clip_vision_model", "projection_dim": 32},
            "text_config": LLAMA | {"model_type": "llama"},
            "image_token_index": 300,
        },
    ),
    "gemma3-vision": (
        "gemma3",
        {
            "vision_config": IMAGES | {"model_type": "siglip_vision_model"},
            "text_config": LLAMA | {"sliding_window": 8, "query_pre_attn_scalar": 8},
            "mm_tokens_per_image": 4,
        }
        | {"image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302},
    ),
    "mistral3": (
        "mistral3",
        {
            "vision_config": IMAGES | {"model_type": "pixtral", "head_dim": 8},
            "text_config": LLAMA | {"model_type": "mistral"},
            "image_token_index": 300,
        },
    ),
    "qwen2.5-vl": (
        "qwen2_5_vl",
        {
            "vision_config": TOWER | {"fullatt_block_indexes": [1]},
            "text_config": LLAMA | {"rope_parameters": SECTIONS},
        }
        | MARKS,
    ),
    "qwen3-vl": (
        "qwen3_vl",
        {
            "vision_config": TOWER | {"deepstack_visual_indexes": [0]},
            "text_config": LLAMA | {"rope_parameters": SECTIONS | {"mrope_section": [2, 1, 1]}},
        }
        | MARKS,
    ),
    "idefics3": (
        "idefics3",
        {
            "vision_config": IMAGES | {"model_type": "idefics3_vision"},
            "text_config": LLAMA | {"model_type": "llama"},
            "image_token_id": 300,
            "scale_factor": 2,
        },
    ),
    "smolvlm": (
        "smolvlm",
        {
            "vision_config": IMAGES | {"model_type": "smolvlm_vision"},
            "text_config": LLAMA | {"model_type": "llama"},
            "image_token_id": 300,
            "scale_factor": 2,
        },
    ),
}

# Types of models that no command takes, by what is wrong with them.
REFUSED: dict[str, tuple[str, dict]] = {
    "t5": ("t5", {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "bert": ("bert", PARALLEL),
    "paligemma": (
        "paligemma",
        {
            "vision_config": IMAGES | {"model_type": "siglip_vision_model", "projection_dim": 32},
            "text_config": LLAMA | {"model_type": "gemma"},
            "image_token_index": 300,
            "projection_dim": 32,
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        LLAMA
        | {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "sliding_window": 8}
        | {"num_kv_shared_layers": 0, "laurel_rank": 4},
    ),
    "vit": ("vit", IMAGES),
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
    name, settings = (FAMILIES | MORE | SEEING | REFUSED)[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **settings)
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel)
    auto = next(auto for auto in autos if type(config) in auto._model_mapping)
    model = auto.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    if getattr(model, "generation_config", None) is not None:
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
