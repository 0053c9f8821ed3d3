"""Refuse mixtures of experts, which transformers cannot read back from a GPTQ checkpoint."""

from pathlib import Path

from tuneline.errors import ModelError
from tuneline.models.nf4 import empty_model


def check_experts(model_dir: Path) -> None:
    """Check that transformers will read back all layers that gptqmodel quantises.

    transformers joins the experts of a layer into one tensor when it loads them, but cannot join
    experts in GPTQ's packed form: it would leave them random.

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
            "experts that GPTQ has packed: set quantize.gptq to [], and export it as GGUF"
        )
