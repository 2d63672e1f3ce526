"""The model hub, asked once before a download: its own client asks a hub that does not answer for a minute.

require_model_name("nobody/nothing")  # UserError: what was looked for, and where
with hub_or_cache("org/name"):              # only the cache is read where the hub does not answer
    AutoConfig.from_pretrained("org/name")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from personatlas.persona.errors import UserError, did_you_mean, did_you_mean_path
from personatlas.persona.models.packaged import PACKAGED

PATIENCE = 2.0  # seconds for a connection, and for an answer


def is_hub_id(name: str) -> bool:
    """Whether a model's name can only be NAME or OWNER/NAME on the hub: nothing on this machine has it."""
    path = Path(name).expanduser()
    is_path = path.exists() or path.suffix == ".gguf" or name.startswith((".", "/", "~"))
    return not is_path and name not in PACKAGED and name.count("/") < 2


def require_model_name(name: str) -> bool:
    """Whether the hub can be asked for a model; also True for what is on this machine.

    Raises `UserError` for a path where nothing is, and for a hub id that is not in the cache while the hub
    does not answer.
    """
    if not is_hub_id(name):
        if name not in PACKAGED and not Path(name).expanduser().exists():
            raise UserError(
                f"{name} does not exist: give a folder, a .gguf file, a hub id or {', '.join(PACKAGED)}"
                + (did_you_mean(name, PACKAGED) or did_you_mean_path(Path(name)))
            )
        return True
    from huggingface_hub import constants, errors
    from huggingface_hub.file_download import repo_folder_name

    try:
        cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    except errors.HFValidationError:
        raise UserError(
            f"cannot load {name!r}: {describe_name(name)}, and the hub allows no such name"
        ) from None
    problem = _hub_problem()
    if problem is not None and not cached.is_dir():
        raise UserError(f"cannot load {name}: {describe_name(name)}, {cached} is not there, and {problem}")
    return problem is None


@contextmanager
def hub_or_cache(name: str) -> Iterator[None]:
    """The hub's client reads only its cache inside where the hub does not answer.

    Raises `UserError` as `require_model_name` does.
    """
    if require_model_name(name):
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cached_revision(name: str) -> str | None:
    """The commit of a model in the hub's cache, as its branch main was read last; None for other models."""
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


def describe_name(name: str) -> str:
    """What a hub id is not, with the nearest folder here or packaged name."""
    packaged = did_you_mean(name.rpartition("/")[2].lower().replace("_", "-"), PACKAGED)
    hint = (packaged or did_you_mean_path(Path(name))).removeprefix("; ") or f"there is {', '.join(PACKAGED)}"
    return f"no folder, .gguf file or packaged model has this name ({hint})"


def _hub_problem() -> str | None:
    """Why the hub cannot be asked; None where it answers, whatever it says."""
    from huggingface_hub import constants, errors, get_session

    failures: tuple[type[Exception], ...] = (OSError, *errors.HfHubHTTPError.__bases__)  # by its HTTP client
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking the hub: give a local folder, or unset it"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except failures as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        advice = "give a local folder, or HF_HUB_OFFLINE=1 to read the cache alone"
        return f"{constants.ENDPOINT} does not answer ({reason}): {advice}"
    return None
