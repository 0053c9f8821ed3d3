"""Print the gate's nominal and simulated error rates as a Markdown table, for docs/numbers.md.

    python tests/measure/gate_errors.py

Simulates 2,000 runs of each kind, in half a minute. `tests/gate/test_error_rates.py` holds most of
these rates below their limits.
"""

import sys
import zlib
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from gate_simulation import (
    MARGIN,
    Draws,
    exports_passed,
    guards,
    promoted,
    targets_without_gain,
)


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
    for size in (50, 100, 200, 500, 1000):
        for share in (0.02, 0.05, 0.1, 0.2):
            for loss, nominal in ((2 * MARGIN, "5 %"), (MARGIN, ""), (0.0, "")):
                if loss > share:
                    continue
                rate = exports_passed(Draws(size), size=size, share=share, loss=loss)
                what = f"{size} rows, {100 * share:.0f} % change, true loss {loss:g}"
                print(f"| export passed: {what} | {nominal} | {100 * rate:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
