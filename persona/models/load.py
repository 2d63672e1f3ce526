"""A model under study: loaded once, checked once, and never modified.

    model = load_model("smollm2-135m")
    model.n_layers, model.d_model          # 30, 576

Layer l is the output of block l, 0-based. That is not `hidden_states[l]`, which is the block's input, and for
the last block not `hidden_states[-1]` either, which comes after the final norm. `Model` therefore holds the
blocks themselves, and building one runs a dummy forward that proves that every block is met once, in order,
and emits (B, T, D).
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.formats import read_text
from personatlas.persona.models.chat_template import ChatFormat, chat_format, process_date
from personatlas.persona.models.checkpoint import (
    load_config,
    require_finite,
    require_no_adapter,
    require_numbers,
    require_rows,
    require_whole,
)
from personatlas.persona.models.hooks import capture
from personatlas.persona.models.hub import cached_revision, describe_name, hub_or_cache, is_hub_id
from personatlas.persona.models.packaged import PACKAGED, gguf_folder, packaged_folder, weight_format
from personatlas.persona.models.positions import limit_reading, scale_switch
from personatlas.persona.options import DTYPE_NAMES
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject
from personatlas.persona.runs import hub_snapshot, locate, model_name, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class Model:
    """A decoder with its tokenizer. Build it with `load_model` or `model_from_bridge`; both check it.

    `weights` names the format that the weights were stored in ("bfloat16", "gguf Q4_1", ...): a quantised
    model has another axis than the original, so artefacts carry it. `name` is for people and for the default
    prompt "You are {model}.". `now` is the local time that chat
    templates are given.
    """

    hf: "PreTrainedModel"
    base: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    blocks: tuple[nn.Module, ...]
    d_model: int
    id: str
    revision: str | None
    weights: str
    name: str
    now: datetime = field(default_factory=process_date)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embedding."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self._embedding.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self._embedding.shape[0])

    @property
    def context(self) -> int | None:
        """Tokens that the model holds, where its config says so; positions have one scale up to there."""
        config = self.hf.config.get_text_config(decoder=True)
        longest, switch = getattr(config, "max_position_embeddings", None), scale_switch(config)
        return longest if switch is None else min(longest or switch, switch)

    @cached_property
    def chat(self) -> ChatFormat:
        """How the tokenizer's template writes conversations. `UserError` for a model without a template."""
        config = self.hf.generation_config
        return chat_format(self.tokenizer, None if config is None else config.eos_token_id, self.now)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names, shapes and 64 strided values of every parameter, the same in bf16 and fp32."""
        sha = hashlib.sha256()
        for name, parameter in self.hf.state_dict().items():
            flat = self._stored(name, parameter).detach().reshape(-1)
            sample = flat[:: max(flat.numel() // 64, 1)][:64]
            if sample.is_floating_point():
                sample = sample.to(torch.bfloat16).view(torch.int16)
            sha.update(f"{name}{tuple(parameter.shape)}".encode())
            sha.update(sample.to("cpu", torch.int32).numpy().tobytes())
        return sha.hexdigest()[:32]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def _embedding(self) -> Tensor:
        weight = self.hf.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def _stored(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter's values, also where a `device_map` keeps them on disk or in memory until they are
        used.
        """
        if parameter.device.type != "meta":
            return parameter
        owner, _, own = name.rpartition(".")
        hook = getattr(self.hf.get_submodule(owner), "_hf_hook", None)
        values = getattr(hook, "weights_map", None)
        if values is None:
            raise UserError(f"{self.id} has no values for {name}: it is on the meta device")
        return values[own]

    def describe(self) -> JsonObject:
        """What artefacts record about the model that they came from."""
        names = ("id", "revision", "weights", "fingerprint", "n_layers", "d_model")
        return {name: getattr(self, name) for name in names}


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    chat_template: Path | None = None,
    device_map: str | dict[str, int | str] | None = None,
) -> Model:
    """Loads a model by packaged name, local folder, training run, `.gguf` file or hub id, and checks it.

    `device` None is the first GPU, else the CPU. `dtype` None is bf16 on a GPU and whatever this CPU
    multiplies faster; "auto" is the checkpoint's own. `chat_template` is a Jinja file that replaces the
    tokenizer's template. Raises `UserError` for anything that is not a causal decoder which `transformers`
    can load.
    """
    from transformers import AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.empty(0, device=device).device  # a name may be well formed and the device not be there
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({reason}); try --device cpu") from None
    with hub_or_cache(name), quiet_transformers(), one_line(name):
        asked, name = name, resolve_model(name)
        if name != asked:
            say(f"{asked} is a training run: the model is {name}")
        source = _source(name)
        config, auto = load_config(name, source)
        if isinstance(dtype, str) and dtype != "auto":
            if dtype not in DTYPES:
                raise UserError(f"--dtype {not_one_of(dtype, (*DTYPES, 'auto'))}")
            dtype = DTYPES[dtype]
        dtype = _fastest_dtype(target, config) if dtype is None else dtype
        hf, info = auto.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        require_whole(name, hf, info)
        require_numbers(name, hf, source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if device_map is None and hf.device != target:
        hf.to(target)
    if chat_template is not None:
        tokenizer.chat_template = read_text(chat_template).replace("\r\n", "\n")
    weights = weight_format(Path(source))
    if weights is None and (quantised := getattr(config, "quantization_config", None)) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        weights = str(getattr(method, "value", method))
    elif weights is None:
        weights = str(config.dtype).removeprefix("torch.") if config.dtype is not None else "unknown"
    place = locate(name)
    is_local = name not in PACKAGED and place.exists()
    id, revision = str(place) if is_local else name, cached_revision(name)
    if is_local and (snapshot := hub_snapshot(place)) is not None:
        id, revision = snapshot
    return build_model(hf, tokenizer, id=id, revision=revision, weights=weights)


def load_tokenizer(name: str, chat_template: Path | None = None) -> "PreTrainedTokenizerBase":
    """Only the tokenizer of a model, found as `load_model` finds it."""
    from transformers import AutoTokenizer

    with hub_or_cache(name), quiet_transformers(), one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(_source(resolve_model(name)), trust_remote_code=False)
    if chat_template is not None:
        tokenizer.chat_template = read_text(chat_template).replace("\r\n", "\n")
    return tokenizer


def model_from_bridge(bridge: Any, *, id: str | None = None) -> Model:
    """A Model around a TransformerLens `TransformerBridge`.

    Do not call `enable_compatibility_mode()` on the bridge first: folding the norms changes the residual
    stream.
    """
    return build_model(bridge.original_model, bridge.tokenizer, id=id or bridge.cfg.model_name)


def build_model(
    hf: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    id: str,
    revision: str | None = None,
    weights: str = "",
) -> Model:
    """Finds the blocks of a loaded model, puts it into evaluation mode and checks it. Raises `UserError`."""
    hf.eval().requires_grad_(False)
    config = hf.config.get_text_config(decoder=True)
    decoder = hf.get_decoder() if hasattr(hf, "get_decoder") else None
    base = decoder if decoder is not None and decoder is not hf else hf.base_model  # without the head
    n_layers = config.num_hidden_layers
    lists = [
        (name.count("."), module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        raise UserError(f"{id}: no list of {n_layers} blocks in {type(base).__name__}; is it a decoder?")
    blocks = tuple(min(lists, key=lambda item: item[0])[1])
    weights = weights or str(hf.dtype).removeprefix("torch.")
    require_finite(id, hf)
    require_rows(id, hf, tokenizer)
    model = Model(
        hf, base, tokenizer, blocks, config.hidden_size, id, revision, weights, model_name(Path(id))
    )
    _check(model)
    if (switch := scale_switch(config)) is not None:
        limit_reading(base, switch, id)
    return model


@torch.no_grad()
def _check(model: Model) -> None:
    """One forward over two rows that differ in their last token: order, shape, finiteness, causality of the
    blocks, and logits that are numbers, or minus infinity for tokens that the model never says."""
    ids = torch.arange(1, 9, device=model.device).repeat(2, 1) * 7 % model.vocab_size
    ids[1, -1] = (ids[1, -1] + 1) % model.vocab_size
    try:
        with capture(model, range(model.n_layers)) as outputs:
            logits = model.hf(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model.id}: not a decoder that can be run on token ids alone ({reason})") from None
    if outputs.order != list(range(model.n_layers)):
        raise UserError(
            f"{model.id}: a forward met blocks {outputs.order}, not 0..{model.n_layers - 1} once each, in order"
        )
    # a random encoder's attention moves its neighbours by a few parts in a thousand only
    tolerance = 1e-4 if model.dtype == torch.float32 else 1e-2
    for layer, output in outputs.items():
        block = f"{model.id}: block {layer}"
        if output.shape != (2, 8, model.d_model):
            raise UserError(f"{block} emits {tuple(output.shape)}, not (2, 8, {model.d_model})")
        if not torch.isfinite(output).all():
            raise UserError(f"{block} emits NaN or infinity in {model.dtype}; try --dtype float32")
        past = output[:, :-1].float()
        if (past[0] - past[1]).abs().max() > tolerance * past.abs().max():
            raise UserError(
                f"{model.id}: a later token changes earlier ones at block {layer}: not a causal decoder"
            )
    if (logits.isnan() | (logits == torch.inf)).any() or not torch.isfinite(logits).any(-1).all():
        raise UserError(f"{model.id} emits logits of NaN or infinity in {model.dtype}; try --dtype float32")
    if logits.shape[-1] > model.vocab_size:
        raise UserError(
            f"{model.id} has {logits.shape[-1]} logits for {model.vocab_size} rows of its embedding: it would "
            "say tokens that it cannot read"
        )


def _source(name: str) -> str:
    """A folder or a hub id for `from_pretrained`."""
    if name in PACKAGED:
        return str(packaged_folder(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{name} does not exist")
        return str(gguf_folder(path))
    if path.is_dir():
        require_no_adapter(name, str(path))
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is a folder without config.json: not a model folder")
        return str(path)
    if not is_hub_id(name):
        raise UserError(
            f"{name} is not a model: neither a folder, a .gguf file, a hub id nor one of {', '.join(PACKAGED)}"
        )
    require_no_adapter(name, name)
    return name


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and warnings of `transformers` inside; its settings come back after."""
    from transformers.utils import logging as hf_logging

    bar, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turns the many errors of loading a checkpoint into one line that names the model."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (`tokenizers` raises Exception itself for a damaged file)
        text, advice = " ".join(str(error).split()).split(". ")[0].rstrip("."), ""
        if "couldn't connect" in text or "offline mode" in text:
            text = "the model hub does not answer, and its cache holds no whole copy"
        elif "not a valid model identifier" in text:
            text = f"{describe_name(name)}, and the model hub has none, or it is private (`hf auth login`)"
        elif isinstance(error, SafetensorError):
            text = f"its weights are damaged or cut short ({text})"
        elif not isinstance(error, ImportError):
            kind = f"{type(error).__name__} " if isinstance(error, LookupError) else ""
            text, advice = f"{kind}{text}", "; fetch or export the model again"
        raise UserError(f"cannot load {name}: {text[:300] or type(error).__name__}{advice}") from None


def _fastest_dtype(device: torch.device, config: "PreTrainedConfig") -> torch.dtype:
    """bf16 on a GPU. On a CPU, fp32 unless a bf16 product of the model's own width is at least 1.2 times as
    fast.

    Two machines that both advertise avx512_bf16 differed by a factor of three here: an EPYC ran bf16 twice as
    fast as fp32, a Xeon 0.6 times as fast. So the dtype is measured (about 50 ms), not looked up.
    """
    if device.type != "cpu":
        return torch.bfloat16
    width = config.get_text_config(decoder=True).hidden_size

    def seconds(dtype: torch.dtype) -> float:
        rows = torch.ones(64, width, dtype=dtype)
        weights = [torch.ones(4 * width, width, dtype=dtype) for _ in range(8)]
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(rows, weight)
            best = min(best, time.perf_counter() - start)
        return best

    return torch.bfloat16 if seconds(torch.float32) > 1.2 * seconds(torch.bfloat16) else torch.float32
