"""Print the gate's nominal and simulated error rates as a Markdown table, for docs/numbers.md.

    python tests/measure/gate_errors.py

Simulates 2,000 runs of each kind, in half a minute. `tests/gate/test_error_rates.py` holds most of
these rates below their limits.
"""

import sys
import zlib
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from gate_simulation import MARGIN, Draws, guards, promoted, targets_without_gain


def main() -> None:
    print("| kind | nominal | simulated |")
    print("|---|---|---|")
    for kind, draw in targets_without_gain().items():
        rate = promoted((draw(Draws(zlib.crc32(kind.encode()))), "target"))
        print(f"| no gain: {kind} | 2.5 % | {100 * rate:.1f} % |", flush=True)
    for num_guards in (1, 5, 20):
        for size in (20, 100, 200, 500):
            what = f"of {num_guards} guards with {size} questions"
            for losses, loss, nominal in (
                (1, 2 * MARGIN, "2.5 %" if num_guards > 1 else "0 %"),
                (num_guards, MARGIN, "5 %"),
                (0, 0.0, ""),
            ):
                rate = guards(
                    Draws(size), num_guards=num_guards, size=size, losses=losses, loss=loss
                )
                lost = f"{losses} {what} lost {loss:g}" if losses else f"none {what} lost anything"
                print(f"| passed: {lost} | {nominal} | {100 * rate:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
