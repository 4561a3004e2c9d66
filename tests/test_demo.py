"""The demo's data and tokenizer come from its generator, and what is shipped is small."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))


def test_the_generator_makes_the_shipped_data_again(tmp_path):
    import build

    build.write_data(tmp_path)
    for path in (ROOT / "demo/data").glob("*.jsonl"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_no_prompt_occurs_twice():
    prompts = []
    for path in (ROOT / "demo/data").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            asked = row["messages"][:-1] if "messages" in row else row["instruction"] + row["input"]
            prompts.append(str(asked))
    assert len(set(prompts)) == len(prompts) == 1440


def test_the_shipped_model_is_small_and_the_marks_of_a_turn_are_single_tokens():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = ROOT / "demo/model/model.safetensors"
    assert weights.stat().st_size < 8e6
    model = AutoModelForCausalLM.from_pretrained(weights.parent)
    assert model.config.model_type == "gemma3_text"
    assert 2e6 < model.num_parameters() < 4e6
    tokenizer = AutoTokenizer.from_pretrained(weights.parent)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi."}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<bos><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert [
        ids.count(i) for i in tokenizer.convert_tokens_to_ids(["<bos>", "<start_of_turn>", "<end_of_turn>"])
    ] == [1, 2, 1]


def test_build_runs_from_nothing(tmp_path, monkeypatch):
    """From a hundredth of its documents to a model and a tokenizer that can be loaded."""
    import build
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, value in {"DOCUMENTS": 1000, "HELD_OUT": 16, "BATCH": 8}.items():
        monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(sys, "argv", ["build.py", "--steps", "1", "--out", str(tmp_path)])
    build.main()
    shipped, made = (AutoModelForCausalLM.from_pretrained(at / "model") for at in (ROOT / "demo", tmp_path))
    assert made.config.to_diff_dict().keys() == shipped.config.to_diff_dict().keys()
    shapes = [{name: weight.shape[1:] for name, weight in m.state_dict().items()} for m in (made, shipped)]
    assert shapes[0] == shapes[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == build.CHAT_TEMPLATE
