"""An environment, its data and a reward: the model asks a calculator and then gives the answer.

python examples/calculator.py runs/calculator/data writes sft.jsonl, train.jsonl and eval.jsonl;
configs/grpo-calculator-tiny.yaml trains on them.
"""

import ast
import json
import operator
import random
import re
import sys
from pathlib import Path

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculator(completion: str) -> str | None:
    """The value of what stands in <calc>...</calc>; None, which ends the episode, where nothing does."""
    asked = re.search(r"<calc>(.*?)</calc>", completion, re.DOTALL)
    if asked is None:
        return None
    try:
        return str(value_of(ast.parse(asked[1], mode="eval").body))
    except (SyntaxError, ValueError):
        return "error"


def value_of(node: ast.expr) -> int:
    """The value of an expression of small whole numbers; ValueError for anything else."""
    match node:
        case ast.Constant(value=int() as number) if abs(number) < 10**9:
            return number
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
            return OPERATORS[type(sign)](value_of(left), value_of(right))
    raise ValueError("not an expression of whole numbers with + - *")


def right(completion: str, answer: str) -> float:
    """1 when the last turn is the answer."""
    return float(completion.strip() == answer)


def asked(turns: list[dict[str, str]], prompt: str) -> float:
    """How much of the first turn gives the calculator the question, as a share of characters in their place."""
    wanted, found = f"<calc>{prompt}</calc>", turns[0]["content"].strip()
    same = sum(left == right for left, right in zip(wanted, found, strict=False))
    return same / max(len(wanted), len(found))


def write(folder: Path, seed: int = 1, warm_up: int = 1000, train: int = 4000, held_out: int = 200) -> None:
    """Products of two numbers of two digits; no question of eval.jsonl is in the other files."""
    pairs = [(left, right) for left in range(10, 100) for right in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    rows = [{"prompt": f"{left}*{right}", "answer": str(left * right)} for left, right in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"eval": rows[:held_out], "train": rows[held_out : held_out + train]}
    parts["sft"] = [_conversation(**row) for row in rows[held_out : held_out + warm_up]]
    for name, part in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _conversation(prompt: str, answer: str) -> dict[str, object]:
    said = (
        ("user", prompt),
        ("assistant", f"<calc>{prompt}</calc>"),
        ("user", answer),
        ("assistant", answer),
    )
    return {"messages": [{"role": role, "content": content} for role, content in said]}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
