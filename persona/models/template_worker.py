"""The process in which chat templates run: a JSON request a line on stdin, a JSON reply a line on stdout.

`template_process.py` starts it as `python -P template_worker.py SECONDS BYTES CHARACTERS`. A template comes
with a downloaded model and may loop, recurse or multiply strings without end, in C code that no thread can
interrupt: a timer ends the process after that much processor time, and it gets so much memory.

Templates run in Jinja's sandbox with the names that `transformers` gives them, but `strftime_now` has one
date.
"""

import json
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# what running a template raises; anything else is a fault of this file
FAULTS: tuple[type[Exception], ...] = (TemplateError, ArithmeticError, AttributeError, LookupError)
FAULTS += (RuntimeError, SyntaxError, TypeError, ValueError)


class GenerationBlock(Extension):
    """`{% generation %}` around what the assistant says: written like any other text."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class GuardedNamespace(Namespace):
    """A namespace without names that begin with an underscore, which would lead out of the sandbox."""

    def __init__(*args: object, **values: object) -> None:  # a template may use the name `self`
        (self, *given) = args
        content = dict(*given, **values)
        for name in content:
            _require_public(name)
        Namespace.__init__(self, content)

    def __setitem__(self, name: str, value: object) -> None:
        _require_public(name)
        Namespace.__setitem__(self, name, value)


class DictMaker:
    """`dict(...)` and `dict.fromkeys(...)`, without the type itself."""

    def __call__(self, *args: object, **values: object) -> dict:
        return dict(*args, **values)

    fromkeys = staticmethod(dict.fromkeys)


def _require_public(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no name {name!r}")


def raise_exception(message: object) -> None:
    """Lets a template refuse messages."""
    raise TemplateError(str(message))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, without the escapes for web pages."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(16)
def compile_template(source: str) -> Template:
    """A template ready to render."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "dict": DictMaker(),
        "namespace": GuardedNamespace,
    }
    return environment.from_string(source)


def render(request: Mapping, characters: int) -> dict[str, str]:
    """The reply: "text", or the "error" of the template or the "limit" that it met."""
    now = datetime.fromisoformat(request["now"])
    try:
        template, variables = compile_template(request["source"]), request["variables"]
        text = template.render(variables | {"strftime_now": partial(datetime.strftime, now)})
    except MemoryError:
        return {"limit": "needs more memory than it may have"}
    except FAULTS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return {"error": reason[:400]}
    most = characters + 8 * sum(len(str(message)) for message in variables["messages"])
    if len(text) > most:
        return {"limit": f"writes {len(text):,} characters, more than {most:,}"}
    return {"text": text}


def main() -> None:
    """Answers requests until stdin ends."""
    seconds, memory, characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    status = Path("/proc/self/statm")
    own = int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() else memory
    resource.setrlimit(resource.RLIMIT_AS, (own + memory, own + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = render(request, characters)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
