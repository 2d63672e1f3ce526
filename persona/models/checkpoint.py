"""What must be true of a checkpoint's files, weights and tokenizer before they are called a model.

    require_no_adapter("acme/tiny-lora")            # a LoRA adapter is not a model
    hf, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True,
    ignore_mismatched_sizes=True) require_whole("acme/tiny", hf, info)            # every weight came from the
    files require_finite("acme/tiny", hf)                 # and is a number
    require_rows("acme/tiny", hf, tokenizer)        # and every token has a row of the embedding

`transformers` fills what a file lacks with random values and drops what it has no use for; each of these is a
`UserError` here.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from personatlas.persona.errors import UserError
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

# Tensors that other libraries store beside a decoder's own and that its forward does not need: tables that
# are computed, scales of a quantised cache, heads that predict further tokens, and what sees or hears.
UNUSED = re.compile(
    r"(^|\.)(rotary_emb|rotary_pos_emb|position_ids|masked_bias|attn\.bias|attention\.bias|[kvq]_scale"
    r"|kv_scale|mtp\w*|nextn\w*|\w*(vision|visual|image|audio|speech|video)\w*"
    r"|multi_modal_projector|v_head)(\.|$)"
)
PLACEHOLDERS = ("image_token", "audio_token", "video_token")  # no text has them
MOST_NAMES = 3


def require_no_adapter(name: str, source: str) -> None:
    """Raises `UserError` for an adapter: alone it is no model, and beside one it would be left out unsaid."""
    from transformers.utils import cached_file

    def find(file: str) -> Path | None:
        found = cached_file(
            source,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    config = find("adapter_config.json")
    weights = find("adapter_model.safetensors") or find("adapter_model.bin")
    if weights is None and (config is None or find("config.json") is not None):
        return  # without weights, the settings of an adapter that was merged into the model beside them
    base = None
    if config is not None:
        try:
            base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
    raise UserError(
        f"{name} holds an adapter{f' of {base}' if base else ''}, not a whole model: merge it into its base "
        "(merge_and_unload of peft), save that with save_pretrained, and give the new folder"
    )


def load_config(name: str, source: str) -> tuple["PreTrainedConfig", type["_BaseAutoModelClass"]]:
    """The configuration of a checkpoint, and the class of `transformers` that loads it as a decoder of text.

    A model that also sees or hears is loaded whole and reads text alone. Raises `UserError` for one that
    needs code of its own, which is never run, and for one that is no decoder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
    from transformers import __version__ as version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stored, _ = PreTrainedConfig.get_config_dict(source)
    kind = stored.get("model_type")
    if kind not in CONFIG_MAPPING and {"model_type", "auto_map"} & set(stored):
        why = "needs code of its own, which is never run" if "auto_map" in stored else "is unknown"
        raise UserError(
            f"{name} is of the type {kind!r}, which {why}: give a model of a type that "
            f"transformers {version} has"
        )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder ({config.model_type}); give a decoder")
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return config, auto
    raise UserError(
        f"{name} is of the type {config.model_type!r}, which is no decoder of text; give a decoder"
    )


def require_whole(name: str, hf: "PreTrainedModel", info: JsonObject) -> None:
    """Raises `UserError` unless the files hold every weight of the model in its shape, and none that it
    ignores.

    `info` is the loading info of `from_pretrained` with `ignore_mismatched_sizes`. Whole parts that a decoder
    of text does not have (vision, value heads) are left out, which is said.
    """
    faults = []
    if missing := info["missing_keys"]:
        faults.append(f"lack {_list(missing)}")
    if wrong := info["mismatched_keys"]:
        shapes = [f"{key} {tuple(found)} for {tuple(wanted)}" for key, found, wanted in wrong]
        faults.append(f"hold {_list(shapes)} in another shape")
    config = hf.config.get_text_config(decoder=True)
    further = (
        getattr(config, "num_nextn_predict_layers", None) or 0
    )  # blocks behind the last, for later tokens
    ahead = {f"layers.{config.num_hidden_layers + number}." for number in range(further)}
    extra = {
        key
        for key in info["unexpected_keys"]
        if not UNUSED.search(key) and not any(block in key for block in ahead)
    }
    modules = {name for name, _ in (*hf.named_children(), *hf.base_model.named_children())}
    parts = set() if missing else {key for key in extra if key.split(".", 1)[0] not in modules}
    if extra - parts:
        faults.append(f"hold {_list(extra - parts)}, which {type(hf).__name__} has no place for")
    if faults:
        raise UserError(
            f"{name} is not a whole checkpoint of its config.json: its files {', and '.join(faults)}; "
            "fetch or export the model again"
        )
    if parts:
        say(f"{name}: weights that are no part of its decoder are left out ({_list(parts)})")


def require_numbers(name: str, hf: "PreTrainedModel", source: str) -> None:
    """Raises `UserError` for a weight that is stored as integers though nothing says how they are
    quantised.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    config = cached_file(source, "config.json")
    if config is None or getattr(hf.config, "quantization_config", None) is not None:
        return
    prefix = f"{hf.base_model_prefix}."
    own = {key.removeprefix(prefix) for key, _ in hf.named_parameters()}
    for file in sorted(Path(config).parent.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (not a dict)
                dtype = stored.get_slice(key).get_dtype()
                if not dtype.startswith(("F", "BF")) and key.removeprefix(prefix) in own:
                    raise UserError(
                        f"{name} stores {key} as {dtype} and its config.json names no quantization_config: "
                        "export the model in bfloat16 or float32"
                    )


@torch.no_grad()
def require_finite(name: str, hf: "PreTrainedModel") -> None:
    """Raises `UserError` for a weight that is NaN or infinite; minus infinity in the head's bias masks a
    token.
    """
    head = hf.get_output_embeddings()
    bias = getattr(head, "bias", None)
    for key, parameter in hf.named_parameters():
        value = parameter.detach()
        if value.device.type == "meta" or not value.is_floating_point():
            continue  # kept elsewhere until it is used, or quantised
        value = value.to(torch.bfloat16) if value.dtype.itemsize == 1 else value
        wrong = ~torch.isfinite(value)
        if parameter is bias or key.endswith("final_logits_bias"):
            wrong &= value != -torch.inf
        if wrong.any():
            raise UserError(
                f"{name}: {int(wrong.sum())} of {value.numel()} values of {key} are NaN or infinite: the "
                "checkpoint is damaged; fetch or export it again"
            )


def require_rows(name: str, hf: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises `UserError` for a token without a row of the input embedding; rows without a token are
    padding.
    """
    rows = len(hf.get_input_embeddings().weight)  # type: ignore[arg-type]
    spared = {getattr(tokenizer, placeholder, None) for placeholder in PLACEHOLDERS}
    beyond = sorted(
        (id, token) for token, id in tokenizer.get_vocab().items() if id >= rows and token not in spared
    )
    if beyond:
        others = f", and so do {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise UserError(
            f"{name}: the tokenizer's {beyond[0][1]!r} has the id {beyond[0][0]}{others}, but the embedding "
            f"has {rows} rows: save the model after resize_token_embeddings, or take the tokenizer it was "
            "made with"
        )


def _list(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
