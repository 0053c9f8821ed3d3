"""Run llama.cpp's converter: `python -m tuneline.quantize.gguf.run_converter TOKENS SCRIPT ...`.

The converter reads special tokens from the tokenizer's files alone, where a model has one end
token. This module adds what the line knows beyond that. It runs in a child process, because the
converter brings its own version of the package `gguf`.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main(tokens: dict[str, Any], script: Path) -> None:
    """Run the converter's script with the remaining arguments.

    Args:
        tokens: "end_of_turn": ID of the token that ends a turn, or null; "adds_bos": whether
            programs put the BOS token before a prompt, or null: as the tokenizer asks.
        script: the converter's script.
    """
    # As the script does itself, which then finds the module loaded.
    sys.path.insert(0, str(script.parent))
    sys.path.insert(1, str(script.parent / "gguf-py"))
    import gguf

    adds_bos = tokens["adds_bos"]
    vocabulary: Any = gguf.SpecialVocab
    write = vocabulary.add_to_gguf

    def write_ours(self: Any, writer: Any, quiet: bool = False) -> None:
        written = {key for part in writer.kv_data for key in part}
        ours = tokens["end_of_turn"]
        # Some converters write a vocabulary in two parts, and a key may be written only once.
        if ours is not None and ours not in self.special_token_ids.values():
            for kind in ("eot", "eom"):
                is_free = f"tokenizer.ggml.{kind}_token_id" not in written
                if is_free and kind not in self.special_token_ids:
                    self.special_token_ids[kind] = ours
                    break
        if adds_bos is not None:
            self.add_special_token["bos"] = adds_bos
        write(self, writer, quiet)

    vocabulary.add_to_gguf = write_ours
    if adds_bos is not None:
        # Some converters write this key again, e.g. for every vocabulary of SmolLM's size.
        writer_class: Any = gguf.GGUFWriter
        write_flag = writer_class.add_add_bos_token
        writer_class.add_add_bos_token = lambda self, value: write_flag(self, adds_bos)
    sys.argv = [str(script), *sys.argv[3:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
