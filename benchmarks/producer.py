"""The process that produces for one peer: a call a line on standard input, an answer a line."""

from __future__ import annotations

import json
import os
import sys
import traceback


def main() -> None:
    """Answer calls until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed goes to the log
    from benchmarks import finishing, producing, upkeep

    functions = {**producing.FUNCTIONS, **finishing.FUNCTIONS, **upkeep.FUNCTIONS}
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"result": functions[call["function"]](**call["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
