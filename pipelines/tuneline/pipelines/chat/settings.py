"""How answers are generated: a preset, single numbers, a length and a seed."""

from dataclasses import dataclass, replace

from tuneline.errors import UserError
from tuneline.models.sampling import PRESETS, Sampling

DEFAULT_MAX_TOKENS = 512
NUMBERS = ("temperature", "top_p", "top_k", "repetition_penalty")
"""Names of the numbers of `Sampling`, which a user can set one by one."""


@dataclass(frozen=True)
class Settings:
    """How answers are generated."""

    sampling: Sampling
    max_tokens: int = DEFAULT_MAX_TOKENS
    """Largest number of tokens of an answer."""
    seed: int | None = None

    def with_numbers(self, preset: str | None, **numbers: float | None) -> "Settings":
        """Return the settings with those of a preset, and then with single numbers.

        A temperature of 0 means the most likely token, as in the APIs of servers.

        Raises:
            UserError: a number is out of its bounds, or there is no such preset.
        """
        if preset is not None and preset not in PRESETS:
            raise UserError(f"there is no preset {preset}: choose one of {', '.join(PRESETS)}")
        sampling = PRESETS[preset] if preset is not None else self.sampling
        given = {name: value for name, value in numbers.items() if value is not None}
        if given.get("temperature") == 0:
            del given["temperature"]
            given["top_k"] = 1
        elif "temperature" in given and "top_k" not in given and sampling.is_greedy:
            # A temperature has no effect on the single most likely token.
            given["top_k"] = Sampling().top_k
        return replace(self, sampling=Sampling.parse({**sampling.model_dump(), **given}))


def describe(sampling: Sampling) -> str:
    """Return how tokens are taken, in a few words."""
    name = next((name for name, preset in PRESETS.items() if preset == sampling), "custom")
    if sampling.is_greedy:
        penalty = sampling.repetition_penalty
        return "greedy" if penalty == 1 else f"greedy, repetition_penalty {penalty:g}"
    numbers = ", ".join(f"{key} {value:g}" for key, value in sampling.model_dump().items())
    return f"{name} ({numbers})"
