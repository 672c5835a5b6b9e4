"""What a stage leaves loads without burnish, in HF and PEFT layout, and answers with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import burnish
import burnish.pipeline as pipeline
from burnish.core.runs import read_json
from burnish.forest.attention import Forest
from burnish.forest.stream import Layout
from burnish.models.load import load_policy
from tests.folders import model_folder, rows_file

RECIPE = """burnish: 1
name: {name}
model: {model}
dtype: float32
stages:
  - name: sft
    method: sft
    data: {{file: {rows}}}
    train: {{steps: 3, batch_rows: 8, learning_rate: 1.0e-2, validation_rows: 4, validate_every: 1}}
{adapter}"""


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
def test_a_trained_stage_loads_with_plain_libraries_and_equal_logits(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    template = None if kind == "merged" else "default"
    base = model_folder(tmp_path / "base", family, **({} if template else {"template": None}))
    adapter = "" if kind == "full" else f"    adapter: {{name: lora, rank: 4, save: {kind}}}"
    (tmp_path / "r.yaml").write_text(RECIPE.format(name="r", model=base, rows=rows_file(tmp_path / "rows.jsonl"), adapter=adapter))
    run = burnish.run(tmp_path / "r.yaml", quiet=True)
    folder = run.folder / "01-sft/model"
    assert (folder / "adapter_model.safetensors").exists() == (kind == "adapter")
    assert not list(folder.glob("*.bin")) and "burnish" in (folder / "README.md").read_text()

    loader = AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM
    plain = loader.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    assert words.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    ids = words("say abc", return_tensors="pt", add_special_tokens=False).input_ids
    ours, n = load_policy(folder, dtype="float32"), ids.shape[1]
    with torch.no_grad():
        theirs = plain(ids).logits[0]
        plan = Forest(Layout((n,), (-1,)))
        mine = ours.model(input_ids=ids, position_ids=torch.arange(n)[None], plan=plan, use_cache=False).logits[0]
        assert plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape[1] > n
    error = float((mine - theirs).norm() / theirs.norm())
    record_property("measured", f"export {family} {kind}: logits differ from plain transformers/peft by {error:.1e}")
    assert error < 1e-5
    before, after = (read_json(run.folder / s / "evals/held_out.json")["settings"]["nats_per_label"] for s in ("00-base", "01-sft"))
    assert after < before


@pytest.mark.parametrize("held_out", [True, False])
def test_what_was_written_is_loaded_again_where_something_judges_it(held_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = RECIPE.format(name="r", model=model_folder(tmp_path / "base"), rows=rows_file(tmp_path / "rows.jsonl"), adapter="")
    (tmp_path / "r.yaml").write_text(text if held_out else text.replace(", validation_rows: 4, validate_every: 1", ""))
    loaded: list[str] = []
    monkeypatch.setattr(pipeline, "load_policy", lambda source, **given: loaded.append(Path(source).name) or load_policy(source, **given))
    run = burnish.run(tmp_path / "r.yaml", quiet=True, under=tmp_path / "runs")
    assert loaded == ["base", "model"][: 1 + held_out]
    stage = read_json(run.folder / "01-sft/stage.json")
    assert stage["status"] == "complete" and len(stage["output"]) == 64
    assert (run.folder / "01-sft/ledger.json").exists()


def test_python_generates_and_scores(tmp_path: Path) -> None:
    loaded = burnish.load(model_folder(tmp_path / "m"))
    prompts = ["say abc", [{"role": "user", "content": "say hello"}]]
    assert len(loaded.generate(prompts, max_new_tokens=4)) == 2
    a, b = loaded.score(prompts, ["abc", "x"])
    assert a < b < 0  # more tokens of a random model are less likely
    assert loaded.generate(prompts, temperature=1.0, seed=1) == loaded.generate(prompts, temperature=1.0, seed=1)
