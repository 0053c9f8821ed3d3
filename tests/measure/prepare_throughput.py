"""Compare the speed and memory of prepare with datasets.map and apply_chat_template.

    python tests/measure/prepare_throughput.py ROWS.jsonl MODEL_DIR --rows 100000 1000000

ROWS.jsonl has the columns `question` and `answer` (as GSM8K has) and is repeated up to each number
of rows. With --tools, every row defines three tools, calls one, and answers after its result. Each
engine runs in a process of its own. Memory is the proportional set size of the process and its
children, read five times per second, so shared pages count once. CPU time is the sum over these
processes, which is more reliable than wall-clock time on a machine with other work.

    map 1     datasets.map with its defaults: one process, one row at a time
    map 2     datasets.map with num_proc=2
    prepare   the prepare step, with one worker per CPU
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ENGINES = ("map 1", "map 2", "prepare")


def main() -> None:
    """Print one line per engine and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows_file", type=Path)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--rows", nargs="+", type=int, default=[20000, 100000])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--tools", action="store_true", help="rows that call a tool")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.rows_file, args.model_dir)
    columns = f"{'rows/s':>8} {'seconds':>8} {'rows/CPU s':>10} {'peak GiB':>9} {'load':>5}"
    print(f"{'rows':>9} {'engine':8} {columns}", flush=True)
    for num_rows in args.rows:
        for engine in args.engines:
            with tempfile.TemporaryDirectory() as root:
                source = Path(root, "rows.jsonl")
                repeat(args.rows_file, source, num_rows, as_tools=args.tools)
                before = cpu_seconds()
                seconds, peak = watch(engine, source, args.model_dir)
                spent = cpu_seconds() - before
            load = psutil.getloadavg()[0]
            print(
                f"{num_rows:9} {engine:8} {num_rows / seconds:8.0f} {seconds:8.1f} "
                f"{num_rows / spent:10.0f} {peak / 2**30:9.2f} {load:5.1f}",
                flush=True,
            )


def repeat(rows_file: Path, target: Path, num_rows: int, *, as_tools: bool) -> None:
    """Write `num_rows` rows with a number in each, so that no two are equal.

    Args:
        rows_file: file with questions and answers.
        target: file to write.
        num_rows: number of rows to write.
        as_tools: whether the rows are conversations that call a tool.
    """
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    with open(target, "w", encoding="utf-8") as file:
        for number, row in enumerate(itertools.islice(itertools.cycle(rows), num_rows)):
            row = {"question": f"{number}. {row['question']}", "answer": row["answer"]}
            file.write(json.dumps(with_tools(row) if as_tools else row) + "\n")


def with_tools(row: dict[str, str]) -> dict[str, Any]:
    """Return a question and an answer as a conversation that calls a tool."""
    properties = {
        "expression": {"type": "string", "description": "An expression."},
        "digits": {"type": "integer", "description": "Number of digits to round to."},
    }
    parameters = {"type": "object", "properties": properties, "required": ["expression"]}
    tools = [
        {
            "type": "function",
            "function": {"name": name, "description": "Return text.", "parameters": parameters},
        }
        for name in ("calculate", "convert", "look_up")
    ]
    arguments = {"expression": row["answer"][:40], "digits": 2}
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "calculate", "arguments": arguments},
    }
    messages = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": row["answer"][-20:]},
        {"role": "assistant", "content": row["answer"]},
    ]
    return {"messages": messages, "tools": tools}


def watch(engine: str, source: Path, model_dir: Path) -> tuple[float, int]:
    """Run an engine; return the seconds that it reports and its peak memory in bytes.

    Args:
        engine: one of ENGINES.
        source: file with the rows.
        model_dir: directory with the tokenizer.
    """
    command = [sys.executable, __file__, str(source), str(model_dir), "--child", engine]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.2)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{engine} ended with {process.returncode}")
    return float(output.split()[-1]), peak


def cpu_seconds() -> float:
    """Return the CPU time of all child processes that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory(pid: int) -> int:
    """Return the proportional set size of a process and its children, in bytes."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def child(engine: str, source: Path, model_dir: Path) -> None:
    """Process the rows and print the seconds, including imports and loading the tokenizer."""
    began = time.perf_counter()
    if engine == "prepare":
        prepare(source, model_dir)
    else:
        plain_map(source, model_dir, num_proc=int(engine.split()[1]))
    print(time.perf_counter() - began)


def prepare(source: Path, model_dir: Path) -> None:
    """Run the step."""
    from tuneline.runtime.torch_free import hide_torch

    hide_torch()  # As the step's component does.
    from tuneline.prepare import PrepareConfig
    from tuneline.prepare.run import run

    columns = {"prompt": "question", "completion": "answer"}
    if "tools" in json.loads(next(open(source, encoding="utf-8"))):
        columns = {}
    run(
        PrepareConfig.parse({"columns": columns, "heldout": {"max_rows": 0}}),
        source=str(source),
        base_model_dir=str(model_dir),
        dataset_dir=str(source.parent / "dataset"),
        statistics_path=str(source.parent / "page.html"),
    )


def plain_map(source: Path, model_dir: Path, *, num_proc: int) -> None:
    """Tokenise with the chat template, without a loss mask or checks."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    cache = str(source.parent / "cache")
    rows: Any = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=cache
    )

    def tokens(row: dict[str, Any]) -> dict[str, list[int]]:
        if "tools" in row:
            encoded = tokenizer.apply_chat_template(row["messages"], tools=row["tools"])
            return {"input_ids": encoded["input_ids"]}
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        return {"input_ids": tokenizer.apply_chat_template(messages)["input_ids"]}

    tokenised = rows.map(
        tokens, remove_columns=rows.column_names, num_proc=num_proc if num_proc > 1 else None
    )
    tokenised.to_parquet(str(source.parent / "train.parquet"))


if __name__ == "__main__":
    main()
