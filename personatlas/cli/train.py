"""The commands `train base`, `chat`, `eval`, `tokenizer` and `export`; `plan` is in plan.py."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from personatlas.cli.options import MODEL, OPTIONS, Json, ModelName, Out, OutFile, OutFolder
from personatlas.cli.output import (
    count_of,
    print_fields,
    print_json,
    print_line,
    print_path,
    print_table,
    with_interval,
)
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import model_name
from personatlas.training.options import (
    ChatDataOptions,
    CorpusOptions,
    FinetuneOptions,
    PretrainOptions,
    ReadingOptions,
)

if TYPE_CHECKING:
    from personatlas.training.run import TrainResult


def base(
    corpus: Path | None = None,
    *,
    depth: int | None = None,
    out: Out = None,
    reading: Annotated[ReadingOptions, OPTIONS] = ReadingOptions(),
    options: Annotated[PretrainOptions, OPTIONS] = PretrainOptions(),
    json: Json = False,
) -> None:
    """Train a GPT on a corpus. Resumes.

    Sizes, batch and rates are derived from the depth; `personatlas train plan --depth N` prints them. Under
    torchrun every process has a GPU.

    Parameters
    ----------
    corpus
        a folder or file: .txt, .jsonl, .parquet, tar archives of .txt; each plain or packed; or
        hub:OWNER/NAME[/FOLDER][@REVISION]
    depth
        number of blocks, from which all other sizes are derived; from the size of the corpus unless given (a
        CPU then trains for 4 minutes)
    out
        the run's folder, runs/NAME of the corpus unless given; its `model` is an ordinary Hugging Face
        checkpoint
    """
    from personatlas.training.chat.conversations import source_name
    from personatlas.training.pretrain import train_base

    if out is None:
        if corpus is None:
            raise UserError("give texts (personatlas train base books/), or --token-folder and --out")
        name = corpus.resolve().name if corpus.exists() else corpus.name.partition("@")[0]
        out = Path("runs") / source_name(Path(name))
    texts = CorpusOptions(corpus=corpus, **vars(reading))
    result = train_base(texts, depth=depth, out=out, options=options)
    if result is not None and json:
        print_json(result.to_json())
    elif result is not None:
        _print_base(result)


def _print_base(result: "TrainResult") -> None:
    from personatlas.training.bits_per_byte import HeldOutLoss

    loss, share = result.held_out, result.utilisation
    assert isinstance(loss, HeldOutLoss)
    size = f"{loss.tokens:,} tokens, {loss.bytes / 1e6:,.2f} MB"
    speed = f"{result.seconds:,.1f} s of training, {result.tokens_a_second:,.0f} tokens/s"
    print_fields(
        [
            ("held out", f"{loss.bits_per_byte:.4f} bits per byte, {loss.loss:.4f} nats a token  ({size})"),
            ("training", speed if share is None else f"{speed}, {share:.1%} of the peak"),
            ("tokens", f"{result.tokens:,} in {result.steps:,} steps, {result.epochs:.2f} epochs"),
        ]
    )
    print_path("model", result.model)
    print_path("report", result.folder / "report.html")
    say(f"next: personatlas train chat {result.folder} --data demo    (or conversations of your own)")


SHOWN = 12  # sources in the table; all of them are in run.json


def chat(
    base: Path,
    /,
    *,
    out: Out = None,
    chats: Annotated[ChatDataOptions, OPTIONS] = ChatDataOptions(),
    options: Annotated[FinetuneOptions, OPTIONS] = FinetuneOptions(),
    json: Json = False,
) -> None:
    """Tune a base model on conversations. Resumes.

    Only the assistant's messages are learned. Conversations of no use are counted, named and left out.

    Parameters
    ----------
    base
        the folder of `personatlas train base`, one of its checkpoints, or an exported folder
    out
        the run's folder, runs/NAME-chat unless given; its `model` is an ordinary Hugging Face checkpoint
    """
    from personatlas.training.finetune import train_chat

    out = out or Path("runs") / f"{model_name(base)}-chat"
    result = train_chat(base, chats, out=out, options=options)
    if result is not None and json:
        print_json(result.to_json())
    elif result is not None:
        _print_chat(result)


def _print_chat(result: "TrainResult") -> None:
    rows = []
    for name, loss in list(result.after.items())[: 1 + SHOWN]:
        rows.append(
            [
                name,
                with_interval(loss.loss, loss.low, loss.high, ".1f" if loss.loss >= 10 else ".3f"),
                f"{result.before[name].loss:.3f}",
                f"{loss.perplexity:.2f}",
                f"{loss.conversations:,}",
                f"{loss.met / loss.conversations:.0%}",
            ]
        )
    print_table(["held out", "nats a token", "untuned", "perplexity", "n", "known"], rows)
    if any(loss.met for loss in result.after.values()):
        print_line(
            "known: answers that training has too, to other questions or in other roles: their loss is memory"
        )
    print_line(f"training: {result.seconds:,.1f} s, {result.steps:,} steps, {result.epochs:.2f} epochs")
    print_path("model", result.model)
    talk, place = f"personatlas chat {result.folder}", f"personatlas axis {result.folder}"
    say(f"next: {talk}    (where its character lies: {place})")


def evaluate(
    model: ModelName,
    /,
    *,
    text: Path,
    text_column: str = "text",
    most: int = 4_000_000,
    context: int | None = None,
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Measure bits per byte of a text under any model, which compares models with different tokenizers.

    Parameters
    ----------
    text
        a folder or file, as a corpus; documents are cut at 65,536 characters
    text_column
        the key or column with the text in .jsonl and .parquet
    most
        bytes to read, whole documents spread over all of them
    context
        tokens that the model sees at once; its own context, at most 2,048, unless given
    """
    from personatlas.persona.models.load import load_model
    from personatlas.training.bits_per_byte import text_bits_per_byte
    from personatlas.training.data.corpus import sample_documents

    if most < 1:
        raise UserError(f"--most {most}: give how many bytes to read, 1 or more")
    texts = sample_documents(text, text_column, most)
    decoder = load_model(model, device=load.device, dtype=load.dtype, chat_template=load.chat_template)
    loss = text_bits_per_byte(decoder, texts, context)
    if json:
        print_json({"model": decoder.describe(), "text": str(text), **loss.to_json()})
        return
    low, high = loss.interval or (None, None)
    print_fields(
        [
            ("bits per byte", with_interval(loss.bits_per_byte, low, high, ".4f")),
            ("nats a token", f"{loss.loss:.4f}, {loss.bytes / loss.tokens:.2f} bytes a token"),
            (
                "read",
                f"{count_of(loss.documents, 'document')}, {loss.bytes / 1e6:,.2f} MB, {loss.tokens:,} tokens",
            ),
        ]
    )


def tokenizer(
    corpus: Path,
    *,
    out: OutFolder,
    vocabulary: int | None = None,
    held_out: Path | None = None,
    held_share: float | None = None,
    keep_licences: bool = False,
    text_column: str = "text",
    sample: int = 1_000_000_000,
    json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on a corpus and check it on text that is held out.

    Parameters
    ----------
    corpus
        a folder or file: .txt, .jsonl, .parquet, tar archives of .txt; each plain or .gz, .xz, .zst, .bz2;
        or a data set of the hub, hub:OWNER/NAME[/FOLDER][@REVISION]
    out
        the folder to make; `AutoTokenizer.from_pretrained` reads it
    vocabulary
        number of tokens: the 256 bytes, four special tokens, and the rest learned; up to 32,768, from the
        size of the corpus, unless given
    held_out
        texts to check it on instead of a share of the corpus; taken out of the corpus if they are in it
    held_share
        the share that is held out: documents by the hash of their names, a passage of each of a few; 0.01
        unless given, more of a small corpus
    keep_licences
        keep Project Gutenberg's headers and licences in the text
    text_column
        the key or column with the text in .jsonl and .parquet
    sample
        the most bytes of text to train on, spread evenly over the corpus
    """
    from personatlas.training.data.corpus import Corpus
    from personatlas.training.data.tokenizer import make_tokenizer, require_vocabulary

    if vocabulary is not None:
        require_vocabulary(vocabulary)
    texts = Corpus.open(
        corpus, held_out=held_out, held_share=held_share, column=text_column, keep_licences=keep_licences
    )
    record = make_tokenizer(texts, out, vocabulary=vocabulary, sample=sample)
    if json:
        print_json(record)
    else:
        _print_tokenizer(record, out)


def _print_tokenizer(record: dict[str, Any], out: Path) -> None:
    from personatlas.training.data.corpus import CorpusScan, TextAmount

    scan, held = record["scan"], record["held_out"]
    low, high = held["interval"] or (None, None)
    size = (
        f"n {count_of(held['documents'], 'document')}, {held['bytes'] / 1e6:,.2f} MB, each read back exactly"
    )
    sides = {name: TextAmount(**scan[name]) for name in ("train", "held_out")}
    rows = [
        (title, f"{count_of(sides[name].documents, 'document')}, {sides[name].bytes / 1e6:,.2f} MB")
        for title, name in (("corpus", "train"), ("held out", "held_out"))
    ]
    rows.append(("bytes per token", f"{with_interval(held['bytes_per_token'], low, high)}  ({size})"))
    rows.append(("vocabulary", f"{record['asked']['vocabulary']:,}"))
    print_fields(rows)
    print_path("folder", out)
    for line in CorpusScan(**{**scan, **sides}).lines():
        say(line)


def export(
    model: Path,
    /,
    *,
    out: Out = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    gguf: OutFile | None = None,
    json: Json = False,
) -> None:
    """Write a trained model as a Hugging Face folder (--out), as one GGUF file (--gguf), or as both.

    Parameters
    ----------
    model
        a training run (its finished model, else its newest checkpoint) or a checkpoint's folder
    out
        the folder to make: for transformers, vLLM, TransformerLens and every MODEL here
    dtype
        dtype of the weights; checkpoints are fp32
    gguf
        the file to make: for llama.cpp and what is built on it; its norm weights stay fp32
    """
    import torch

    from personatlas.persona.artifacts import locked, make_folder, require_writable
    from personatlas.persona.runs import resolve_model
    from personatlas.training.export.gguf import write_gguf
    from personatlas.training.export.huggingface import export_model, is_exported, load_exported

    if out is None and gguf is None:
        raise UserError("give --out FOLDER, --gguf FILE or both")
    if not model.is_dir():
        raise UserError(f"{model} is no folder; give a training run or one of its checkpoints")
    source = Path(resolve_model(str(model)))
    if out is not None:
        make_folder(out.absolute().parent, "--out")
    if gguf is not None:
        require_writable(gguf, "--gguf")
    written = [path for path in (out, gguf) if path is not None]
    with ExitStack() as locks:
        for path in written:
            locks.enter_context(locked(path))
        found, kind = load_exported(source), torch.bfloat16 if dtype == "bf16" else torch.float32
        if out is not None and not (gguf is not None and is_exported(found, source, out, kind)):
            export_model(found, source, out, kind)
        if gguf is not None:
            write_gguf(source, gguf, "bf16" if dtype == "bf16" else "f32")
    if json:
        paths = [str(path) for path in written]
        print_json(
            {"model": str(source), "parameters": found.shape.parameters, "dtype": dtype, "written": paths}
        )
        return
    for path in written:
        print_path(f"{source}, {found.shape.parameters / 1e6:,.1f} M parameters in {dtype}", path)
