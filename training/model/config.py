"""The sizes of a GPT, apart from the model: a plan is arithmetic and needs no torch."""

from dataclasses import dataclass

from personatlas.persona.records import JsonRecord, NonNegative, Positive

# Logits held at once in a compiled step: 4 GB of fp32. A quarter of it took 1.5% longer on an H100.
COMPILED_LOGITS = 2**30
EAGER_LOGITS = 2**26  # on a CPU and in an evaluation: 0.25 GB


def tokens_per_piece(vocabulary: int, *, compiled: bool) -> int:
    """Tokens whose logits the loss holds at once (`training/model/cross_entropy.py`)."""
    if compiled:
        return max(COMPILED_LOGITS // vocabulary // 1024 * 1024, 1024)
    return max(EAGER_LOGITS // vocabulary, 1)


@dataclass(frozen=True)
class Shape(JsonRecord):
    """The sizes of a model, which `training/plan.py` derives from the depth.

    Raises ValueError for heads that cannot share those of keys and values evenly, or that are of odd width.
    """

    vocabulary: Positive
    depth: Positive
    width: Positive
    heads: Positive
    kv_heads: Positive
    head_width: Positive
    inner: Positive
    context: Positive
    rope_base: NonNegative = 10_000.0
    eps: NonNegative = 1e-6

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} of keys and values evenly")
        if self.head_width % 2:
            raise ValueError(f"a head of width {self.head_width} cannot be rotated: it must be even")

    @property
    def matrix_parameters(self) -> int:
        """Parameters in the blocks' matrices, which Muon trains."""
        queries_and_out = 2 * self.width * self.heads * self.head_width
        keys_and_values = 2 * self.width * self.kv_heads * self.head_width
        return self.depth * (queries_and_out + keys_and_values + 3 * self.width * self.inner)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding; the head has as many again."""
        return self.vocabulary * self.width

    @property
    def norm_parameters(self) -> int:
        """Weights of all norms."""
        return self.depth * (2 * self.width + 2 * self.head_width) + self.width

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.matrix_parameters + 2 * self.embedding_parameters + self.norm_parameters
