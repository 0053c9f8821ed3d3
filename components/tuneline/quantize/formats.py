"""The table of export formats: which tool makes each format, and which bound an export must meet.

To add a format, add an entry to `FORMATS`; the rest of the step reads this table.

A bound detects a broken file, whose KL divergence from the merged model is several nats; bounds do
not rank formats. The bounds are two to ten times the values that were measured with SmolLM2-135M
over 8 rows (the comment at each entry: mean KL divergence in nats, top-1 agreement). Small models
lose more from few bits than larger ones. A recipe can change each bound.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tuneline.kinds import ExportKind

Importance = Literal["unused", "optional", "required"]
"""Whether a format is quantised with an importance matrix. "required" includes the iq3 types:
llama.cpp also makes these without a matrix, but exports of SmolLM2 then had a KL divergence of 0.9
to 3.8 nats from the merged model."""


GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)
"""Numbers of weights per scale that the kernels for GPTQ support, largest first. Those for AWQ
support the sizes up to 128."""


@dataclass(frozen=True)
class Bound:
    """How close an export's predictions must be to the merged model's on held-out prompts."""

    max_mean_kl: float
    """Largest accepted mean KL divergence from the merged model, in nats per token."""
    min_top1_agreement: float
    """Smallest accepted fraction of positions at which export and merged model have the same most
    likely token, 0 to 1."""


@dataclass(frozen=True)
class Format:
    """One export format."""

    kind: ExportKind
    """Kind of the export, which determines the tool and the subpackage that make the export."""
    bound: Bound
    bits_per_weight: float
    """Size of an export in bits per parameter, for Llama 3.1 8B, over all tensors. For GGUF, the
    number is from llama.cpp's own tables (llama-quantize). In checkpoints, embeddings and output
    head count with 16 bits, because they are not quantised."""
    repacked: bool
    """Whether llama.cpp copies the weights in memory into another layout, for SIMD instructions
    (measured on an EPYC with AVX-512). On ARM and with AMX, llama.cpp also repacks q8_0."""
    importance: Importance = "unused"
    bits: int | None = None
    """Bits per quantised weight of a checkpoint; None for GGUF, whose types llama.cpp knows by
    name."""

    @property
    def is_calibrated(self) -> bool:
        """Return whether the rounding of a checkpoint depends on training rows."""
        return self.kind in ("gptq", "awq")


def _gguf(
    bound: Bound, bits_per_weight: float, importance: Importance = "optional", *, repacked: bool
) -> Format:
    return Format("gguf", bound, bits_per_weight, repacked, importance)


def _checkpoint(kind: ExportKind, bound: Bound, bits_per_weight: float, *, bits: int) -> Format:
    return Format(kind, bound, bits_per_weight, repacked=False, bits=bits)


_16BIT = Bound(1e-3, 0.98)
_8BIT = Bound(0.05, 0.93)
_FP8 = Bound(0.2, 0.8)
_6BIT = Bound(0.1, 0.9)
_5BIT = Bound(0.5, 0.7)
_4BIT = Bound(1.5, 0.5)
_3BIT = Bound(2.0, 0.4)
_2BIT = Bound(3.0, 0.3)
_IQ = Bound(6.0, 0.1)

FORMATS: dict[str, Format] = {
    # llama.cpp's types under llama.cpp's names, from many bits to few.
    "f16": _gguf(_16BIT, 16.0, "unused", repacked=False),  # 3.4e-6 nats, 100 %
    "bf16": _gguf(Bound(0.01, 0.95), 16.0, "unused", repacked=False),  # 1.4e-4, 99.6 %: from f16
    "q8_0": _gguf(_8BIT, 8.5, "unused", repacked=False),  # 0.0069, 97.7 %
    "q6_k": _gguf(_6BIT, 6.6, repacked=False),  # 0.017, 96.5 %
    "q5_k_m": _gguf(_5BIT, 5.7, repacked=False),  # 0.096, 86.4 %
    "q5_k_s": _gguf(_5BIT, 5.57, repacked=False),  # 0.15, 84.9 %
    "q5_1": _gguf(_5BIT, 6.04, repacked=False),  # 0.12, 87.6 %
    "q5_0": _gguf(_5BIT, 5.57, repacked=False),  # 0.090, 89.5 %
    "q4_k_m": _gguf(_5BIT, 4.9, repacked=True),  # 0.068, 91.9 %: most tensors fell back to 5 bits
    "q4_k_s": _gguf(_5BIT, 4.67, repacked=True),  # 0.12, 86.0 %
    "q4_1": _gguf(_4BIT, 5.11, repacked=True),  # 0.35, 74.0 %
    "q4_0": _gguf(_4BIT, 4.64, repacked=True),  # 0.71, 68.2 %
    "iq4_nl": _gguf(_4BIT, 4.68, repacked=True),  # 0.66, 68.2 %
    "iq4_xs": _gguf(_4BIT, 4.46, repacked=False),  # 0.65, 71.7 %
    "q3_k_l": _gguf(_3BIT, 4.3, repacked=False),  # 0.28, 76.4 %
    "q3_k_m": _gguf(_3BIT, 4.0, repacked=False),  # 0.26, 78.3 %
    "q3_k_s": _gguf(_3BIT, 3.64, repacked=False),  # 0.77, 65.9 %
    "q2_k": _gguf(_2BIT, 3.16, repacked=True),  # 0.77, 65.9 %
    # Measured with an importance matrix of 128 rows, on another SmolLM2 than the formats above
    # (q4_k_m had 0.067 nats and q2_k 0.60 nats on that model). Of that model's tensors, only the 30
    # down projections have rows of a length that these types support.
    "iq3_m": _gguf(_IQ, 3.76, "required", repacked=False),  # 2.2, 39.8 %
    "iq3_s": _gguf(_IQ, 3.66, "required", repacked=False),
    "iq3_xs": _gguf(_IQ, 3.5, "required", repacked=False),
    "iq3_xxs": _gguf(_IQ, 3.25, "required", repacked=False),
    "q2_k_s": _gguf(_IQ, 2.97, "required", repacked=True),
    "iq2_m": _gguf(_IQ, 2.93, "required", repacked=False),  # 5.0, 22.2 %
    "iq2_s": _gguf(_IQ, 2.74, "required", repacked=False),
    "iq2_xs": _gguf(_IQ, 2.59, "required", repacked=False),  # 2.5, 34.7 %
    "iq2_xxs": _gguf(_IQ, 2.38, "required", repacked=False),
    "iq1_m": _gguf(_IQ, 2.15, "required", repacked=False),  # 0.73, 57.1 %
    "iq1_s": _gguf(_IQ, 2.0, "required", repacked=False),
    "gptq-8bit": _checkpoint("gptq", _8BIT, 9.2, bits=8),
    "gptq-4bit": _checkpoint("gptq", _4BIT, 5.7, bits=4),
    "gptq-3bit": _checkpoint("gptq", _3BIT, 4.8, bits=3),
    "awq": _checkpoint("awq", _4BIT, 5.7, bits=4),  # 0.29, 70.1 %
    "fp8": _checkpoint("fp8", _FP8, 9.1, bits=8),  # 0.042, 91.6 %
}
"""All formats that this step makes, by the name that a recipe uses."""

NOT_MADE: dict[str, str] = {
    **dict.fromkeys(("tq1_0", "tq2_0", "q1_0", "q2_0"), "is for models trained in so few values"),
    **dict.fromkeys(("mxfp4_moe", "nvfp4"), "is for models published in it"),
}
"""Types of llama.cpp that this step does not make -> the reason, as the rest of a sentence."""


def names(kind: ExportKind | None = None) -> list[str]:
    """Return the names of the formats of one kind, or of all kinds."""
    return [name for name, format in FORMATS.items() if kind in (None, format.kind)]


def bound_of(
    name: str, max_mean_kl: dict[str, float], min_top1_agreement: dict[str, float]
) -> Bound:
    """Return the bound of a format; the recipe's values, if it sets any, replace the default."""
    bound = FORMATS[name].bound
    return Bound(
        max_mean_kl.get(name, bound.max_mean_kl),
        min_top1_agreement.get(name, bound.min_top1_agreement),
    )


def check_importance(wanted: Iterable[str], num_rows: int) -> None:
    """Check that an importance matrix is measured if a format in `wanted` requires a matrix.

    Raises:
        ValueError: a format requires a matrix, but `num_rows` is 0.
    """
    lacking = [name for name in wanted if FORMATS[name].importance == "required" and not num_rows]
    if lacking:
        raise ValueError(
            f"the format '{lacking[0]}' needs an importance matrix: set "
            "quantize.num_importance_rows, e.g. to 128, or take q3_k_m or q2_k, which need none"
        )


def check_name(name: str, *, kind: ExportKind | None = None) -> str:
    """Return `name` if it is the name of a format of the given kind (None: of any kind).

    Raises:
        ValueError: there is no such format. The message names the nearest format, or says why
            tuneline does not make the type.
    """
    known = names(kind)
    if name in known:
        return name
    plain = name.lower()
    if plain in NOT_MADE:
        raise ValueError(f"the format '{name}' {NOT_MADE[plain]}")
    near = difflib.get_close_matches(plain.replace("-", "_"), known, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? Choose one of" if near else "choose one of"
    raise ValueError(f"the export format '{name}' is unknown; {hint} {', '.join(known)}")
