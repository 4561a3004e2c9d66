"""What earlier versions wrote, as JSON values, in the form that this one writes."""

import math


def record(value: dict) -> dict:
    """A record of any earlier schema. Raises what broken values raise: they are checked afterwards."""
    return from_1(value) if value["schema"] == 1 else value


def output(value: dict) -> dict:
    """A line of outputs.jsonl. In schema 1 the numbers of its metrics stood among the rest."""
    if not isinstance(value, dict) or "bleu" not in value:
        return value
    value = dict(value)
    sums = {"bleu4": value.pop("bleu")}
    sums |= {name: [value.pop(name), 1] for name in ("rouge_l", "reward") if name in value}
    return {**value, "sums": sums}


def from_1(value: dict) -> dict:
    """Scores stood in a record; now they are derived from its outputs, and their signatures stand there. What
    was read of the data stood among the tokens, and an altered commit had a + behind it."""
    scores, start = value.get("scores", {}), value.get("start", {})
    tokens, environment = value.get("tokens", {}), value.get("environment", {})
    commit = environment.get("commit")
    return {
        **value,
        "schema": 2,
        "tokens": tokens,
        "data": {**tokens, "rows": tokens.get("splits", {})},
        "provenance": environment
        | ({"commit": commit.rstrip("+"), "dirty": commit.endswith("+")} if commit else {}),
        "signatures": {name: score["signature"] for name, score in scores.items() if "signature" in score},
        "start": {name: sums_of(name, s["value"]) for name, s in start.items() if s["value"] is not None},
        "hashes": {"outputs": None, **value.get("hashes", {})},  # early ones have none
    }


def sums_of(metric: str, score: float) -> list[float]:
    """Sums over test rows that give this score, where only the score was kept."""
    if metric == "bleu4":  # equal lengths, and this share of the n-grams of each order
        return [1, 1, *[score / 100] * 4, *[1] * 4]
    return [math.log(score) if metric == "perplexity" else score, 1]
