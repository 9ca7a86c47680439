"""From training to a model that others load, through the real client in processes of their own."""

import json
import shutil

from huggingface_hub import ModelCard

from papertrl.cli import main
from papertrl.hub.publishing import publish

from .conftest import TRAIN, client
from .server import OWNER, TOKEN

REPO = f"{OWNER}/pushed"

LOAD = """
import sys
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = snapshot_download(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
output = model.generate(**tokenizer("12+34=", return_tensors="pt", return_token_type_ids=False), max_new_tokens=3)
assert output.shape[1] > 6
model.save_pretrained(sys.argv[2])
"""

RUN = "import sys; from papertrl.cli import main; sys.exit(main(sys.argv[1:]))"


def finish(process) -> str:
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    return out


def test_train_push_load(hub, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / ".env").write_text("SECRET=1")
    (output / "notes.md").write_text("mine")
    flags = ["--push_to_hub", "--hub_model_id", REPO, "--hub_private_repo", "True", "--output_dir", str(output)]
    flags += ["--save_strategy", "steps", "--save_steps", "2"]
    finish(client(hub, RUN, *TRAIN, *flags))
    files = hub.files(REPO)
    repo = hub.repos["model", REPO]
    assert repo.private
    # A new repository, the checkpoint of step 2, that of step 3, the end
    assert 3 <= len(repo.commits) <= 4 and set(repo.commits[1][1]) >= {"model.safetensors", "config.json"}
    assert not [name for _, held in repo.commits for name in held if name.startswith((".env", "optimizer", "notes"))]
    assert not [name for name in files if "optimizer" in name or "checkpoint" in name or "training_args" in name]
    assert ".env" not in files and "notes.md" not in files
    assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert f'model="{REPO}"' in card and str(tmp_path) not in card
    # Publishing the same folder afterwards finds nothing to do
    ((_, sent),) = publish(output, token=TOKEN, endpoint=hub.endpoint)
    assert sent.changed == 0

    finish(client(hub, LOAD, REPO, str(tmp_path / "loaded"), HF_HOME=str(tmp_path / "cache")))
    snapshot = next((tmp_path / "cache").glob("hub/models--tester--pushed/snapshots/*"))
    assert {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()} == set(files)
    for name, content in files.items():
        assert (snapshot / name).read_bytes() == content
    loaded = (tmp_path / "loaded" / "model.safetensors").read_bytes()
    assert loaded == (output / "model.safetensors").read_bytes()


def test_card_and_completions_are_accepted(hub, trained, monkeypatch):
    published = publish(
        trained, f"{OWNER}/run", with_completions=True, private=True, token=TOKEN, endpoint=hub.endpoint
    )
    assert [publication.repo_type for publication, _ in published] == ["model", "dataset"]
    assert hub.repos["dataset", f"{OWNER}/run-completions"].private
    files = hub.files(f"{OWNER}/run-completions", "dataset")
    rows = [json.loads(line) for line in files["completions.jsonl"].decode().splitlines()]
    assert len(rows) == 4 and set(rows[0]) >= {"prompt", "before", "after", "before_score", "after_score"}
    assert f"datasets/{OWNER}/run-completions" in hub.files(f"{OWNER}/run")["README.md"].decode()
    # The client's own validation, which asks the Hub
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.repocard.constants.ENDPOINT", hub.endpoint)
    for text in (files["README.md"], hub.files(f"{OWNER}/run")["README.md"]):
        ModelCard(text.decode()).validate("model")
    assert "POST /api/validate-yaml" in hub.requests


def test_an_adapter_is_loaded_as_its_card_says(hub, tmp_path):
    output = tmp_path / "adapter"
    flags = ["--use_peft", "--lora_target_modules", "all-linear", "--output_dir", str(output)]
    assert main([*TRAIN, *flags]) == 0
    publish(output, f"{OWNER}/adapter", token=TOKEN, endpoint=hub.endpoint)
    files = hub.files(f"{OWNER}/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "start_model"
    assert files["adapter_model.safetensors"] == (output / "adapter_model.safetensors").read_bytes()
    source = files["README.md"].decode().split("```python\n")[1].split("```")[0]
    check = 'assert model.generate(**tokenizer("1+2=", return_tensors="pt")).shape[1] > 4'
    finish(client(hub, f"{source}\n{check}", HF_HOME=str(tmp_path / "cache")))


ASK = """
import json
from pathlib import Path
from engine import Settings, load, stream
engine = load(json.loads(Path("space.json").read_text())["model"])
for side, scale in ((engine.base, 0.0), (engine.trained, 1.0)):
    *_, answer = stream(engine, side, "12+34=", scale, Settings(max_new_tokens=4))
    assert answer.finished and answer.ids, answer
print(engine.trained.name, engine.base.name)
"""


def test_evaluation_and_space_go_along_and_the_space_loads_what_was_published(hub, trained, tmp_path):
    run, space = tmp_path / trained.name, tmp_path / "space"
    shutil.copytree(trained, run)
    space.mkdir()
    assert main(["evaluate", str(run), "--num_prompts", "8"]) == 0
    evaluated = json.loads((run / "evaluation.json").read_text())["models"][run.name]
    publish(run, f"{OWNER}/tried", with_space=True, token=TOKEN, endpoint=hub.endpoint)
    card = ModelCard(hub.files(f"{OWNER}/tried")["README.md"].decode())
    measured = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert measured["kl_to_base (papertrl evaluate)"] == round(evaluated["kl_to_base"]["value"], 6)
    assert f"spaces/{OWNER}/tried-demo" in card.text
    for name, content in hub.files(f"{OWNER}/tried-demo", "space").items():
        (space / name).write_bytes(content)
    code = f"import os; os.chdir({str(space)!r}); import sys; sys.path.insert(0, '.')\n{ASK}"
    out = finish(client(hub, code, HF_HOME=str(tmp_path / "cache")))
    assert f"{OWNER}/tried start model" in out
