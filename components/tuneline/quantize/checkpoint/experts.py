"""Refuse mixtures of experts, which transformers cannot read back from a quantised checkpoint."""

from pathlib import Path

from tuneline.errors import ModelError
from tuneline.kinds import ExportKind
from tuneline.models.nf4 import empty_model


def check_experts(model_dir: Path, kind: ExportKind) -> None:
    """Check that transformers will read back all layers that are quantised.

    transformers joins the experts of a layer into one tensor when it loads them. It cannot join
    experts in the packed form of GPTQ or AWQ: it would leave them random. compressed-tensors
    quantises linear layers, and such a tensor belongs to none.

    Args:
        model_dir: the model directory.
        kind: the kind of checkpoint to make.

    Raises:
        ModelError: the model is a mixture of such experts.
    """
    experts = [
        name
        for name, weight in empty_model(model_dir).named_parameters()
        if ".experts." in name and weight.dim() == 3
    ]
    if experts:
        raise ModelError(
            f"the model is a mixture of experts ({experts[0]}), and transformers cannot read "
            f"experts that {kind.upper()} has packed: set quantize.{kind} to [], and export it as "
            "GGUF"
        )
