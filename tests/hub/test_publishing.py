"""Publishing to a Hub that misbehaves."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import save

from papertrl.cli import main
from papertrl.core.errors import JobError, UsageError
from papertrl.hub import client as client_module
from papertrl.hub.publishing import default_name, publish, valid_repo_id
from papertrl.trainers.publishing import publish_checkpoint, publish_trainer

from .conftest import client, weights
from .server import OWNER, TOKEN, Fault

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
REPO = f"{OWNER}/small"
GITHUB = "ghp_" + "a1B2" * 9


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    """Waits are recorded, not waited for; those that the client itself takes are left out."""
    waits = []
    monkeypatch.setattr(client_module, "sleep", waits.append)
    hasty = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", hasty)
    return waits


def with_endpoint(hub, call):
    with mock.patch("huggingface_hub.constants.ENDPOINT", hub.endpoint):
        return call()


def send(hub, folder, **kwargs):
    ((_, sent), *_rest) = publish(folder, REPO, token=TOKEN, endpoint=hub.endpoint, **kwargs)
    return sent


class TestContent:
    def test_only_what_is_listed_arrives(self, hub, trained):
        publish(trained, f"{OWNER}/run", token=TOKEN, endpoint=hub.endpoint)
        files = set(hub.files(f"{OWNER}/run"))
        assert files == {
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            "metrics.jsonl",
            "model.safetensors",
            "recipe.yaml",
            "run.json",
            "samples.md",
            "start_model/config.json",
            "start_model/generation_config.json",
            "start_model/model.safetensors",
            "start_model/tokenizer.json",
            "start_model/tokenizer_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "training_curves.png",
        }

    def test_links_that_lead_outside_stay(self, hub, folder, tmp_path):
        secret = tmp_path / "secret.json"
        secret.write_text('{"key": 1}')
        (folder / "generation_config.json").symlink_to(secret)
        (folder / "vocab.json").symlink_to(folder / "config.json")
        ((publication, _),) = publish(folder, REPO, token=TOKEN, endpoint=hub.endpoint)
        assert publication.skipped == ["generation_config.json"]
        assert "generation_config.json" not in hub.files(REPO)
        assert hub.files(REPO)["vocab.json"] == (folder / "config.json").read_bytes()

    def test_paths_of_this_machine_are_shortened(self, hub, folder):
        config = {"base_model_name_or_path": "/home/somebody/models/base", "r": 8}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        send(hub, folder)
        assert json.loads(hub.files(REPO)["adapter_config.json"]) == config | {"base_model_name_or_path": "base"}

    def test_an_adapter_names_its_base_model_on_the_hub(self, hub, folder, trained):
        run = json.loads((trained / "run.json").read_text()) | {"base_model": "org/base", "adapter": True}
        (folder / "run.json").write_text(json.dumps(run))
        (folder / "README.md").unlink()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/tmp/x/start_model"}))
        send(hub, folder, incomplete=True)
        assert json.loads(hub.files(REPO)["adapter_config.json"]) == {"base_model_name_or_path": "org/base"}
        card = hub.files(REPO)["README.md"].decode()
        assert "base_model: org/base" in card and "base_model_relation: adapter" in card

    def test_a_token_in_a_text_is_replaced(self, hub, folder):
        (folder / "samples.md").write_text("the token hf_abcdefghijklmnop is")
        send(hub, folder)
        assert hub.files(REPO)["samples.md"] == b"the token <token> is"

    def test_dry_run_needs_no_network(self, folder, capsys):
        assert main(["publish", str(folder), "--dry_run"]) == 0
        out = capsys.readouterr().out
        assert "Would publish model small: 5 files" in out and SHARDS[0] in out

    def test_private_as_asked_or_as_the_run_says(self, hub, folder):
        send(hub, folder)
        assert not hub.repos["model", REPO].private
        publish(folder, f"{OWNER}/other", private=True, token=TOKEN, endpoint=hub.endpoint)
        assert hub.repos["model", f"{OWNER}/other"].private

    def test_the_repository_is_named_after_the_folder(self, hub, folder):
        publish(folder, token=TOKEN, endpoint=hub.endpoint)
        assert ("model", REPO) in hub.repos

    def test_a_space_goes_along(self, hub, folder, monkeypatch):
        def render_space(model, output_dir, run):
            output_dir.mkdir()
            (output_dir / "README.md").write_text("---\nsdk: gradio\n---\n")
            (output_dir / "app.py").write_text(f"MODEL = {model!r}")
            (output_dir / ".env").write_text("SECRET=1")
            return output_dir

        monkeypatch.setattr("papertrl.hub.publishing.render_space", render_space)
        send(hub, folder, with_space=True)
        files = hub.files(f"{REPO}-demo", "space")
        assert set(files) == {".gitattributes", "README.md", "app.py"}
        assert files["app.py"] == f"MODEL = {REPO!r}".encode()
        assert hub.repos["space", f"{REPO}-demo"].sdk == "gradio"

    def test_shards_of_an_earlier_model_go(self, hub, folder):
        send(hub, folder)
        for name in SHARDS:
            (folder / name).unlink()
        (folder / "model.safetensors.index.json").unlink()
        (folder / "model.safetensors").write_bytes(weights(3))
        send(hub, folder)
        assert {name for name in hub.files(REPO) if "model" in name} == {"model.safetensors"}

    def test_a_folder_without_model(self, tmp_path):
        with pytest.raises(JobError, match="holds no model"):
            publish(tmp_path, dry_run=True)

    def test_an_edited_card_is_kept(self, hub, trained):
        card = trained / "README.md"
        made = card.read_text()
        try:
            card.write_text(made + "\nMore, by hand.\n")
            publish(trained, f"{OWNER}/run", token=TOKEN, endpoint=hub.endpoint)
            assert hub.files(f"{OWNER}/run")["README.md"].decode().endswith("More, by hand.\n")
        finally:
            card.write_text(made)


ADAPTER = {"adapter_model.safetensors": weights(1), "adapter_config.json": b'{"base_model_name_or_path": "BASE"}'}


class TestRefusals:
    """What would be of no use to others, or more use than meant, is refused before anything is sent."""

    def refused(self, folder, match, **kwargs):
        with pytest.raises(JobError, match=match):
            publish(folder, REPO, dry_run=True, **kwargs)

    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            (SHARDS[0], save({"w": torch.tensor([1.0, float("nan")])}), "'w' has values that are no finite numbers"),
            (SHARDS[0], save({"w": torch.full((3,), float("-inf"), dtype=torch.bfloat16)}), "no finite numbers"),
            (SHARDS[1], weights(1)[:-1], "damaged or cut off"),
            (SHARDS[1], weights(1)[:40], "damaged or cut off"),
            (SHARDS[1], b"", "damaged or cut off"),
            (
                "model.safetensors.index.json",
                b'{"weight_map": {"a": "model-00003-of-00003.safetensors"}}',
                "lacks model",
            ),
            ("tokenizer.json", b"", "tokenizer.json' is empty"),
            ("tokenizer_config.json", b'{"eos_token": ', "tokenizer_config.json' is no JSON"),
            ("vocab.txt", b"", "vocab.txt' is empty"),
            ("config.json", b"[]", "holds no JSON object"),
            ("run.json", b"", "run.json' is empty"),
            ("evaluation.json", b'{"models"', "evaluation.json' is no JSON"),
            ("start_model/model.safetensors", save({"w": torch.tensor(float("nan"))}), "no finite numbers"),
        ],
    )
    def test_damaged_files(self, folder, name, content, match):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "start_model" / "config.json").parent.mkdir(exist_ok=True)
        (folder / "start_model" / "config.json").write_text("{}")
        publish(folder, REPO, dry_run=True)
        (folder / name).write_bytes(content)
        self.refused(folder, match)

    def test_evaluate_refuses_them_too(self, folder, capsys):
        (folder / SHARDS[0]).write_bytes(save({"w": torch.tensor(float("inf"))}))
        assert main(["evaluate", str(folder), "--task", "addition", "--num_prompts", "2"]) == 1
        assert "no finite numbers" in capsys.readouterr().err

    def test_missing_configuration(self, folder):
        (folder / "config.json").unlink()
        self.refused(folder, "without config.json")

    @pytest.mark.parametrize("name", ["training_curves.png", "metrics.jsonl", "recipe.yaml", "samples.md"])
    def test_missing_reports(self, trained, tmp_path, name):
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        (run / name).write_bytes(b"")
        self.refused(run, f"lacks {name}, which the run leaves.*--incomplete")
        (run / name).unlink()
        self.refused(run, f"lacks {name}")
        ((publication, _),) = publish(run, REPO, dry_run=True, incomplete=True)
        assert f"missing: {name}" in str(publication)

    def test_a_folder_that_is_no_run_says_so(self, folder, capsys):
        assert main(["publish", str(folder), "--dry_run"]) == 0
        assert "missing: run.json" in capsys.readouterr().out

    def test_an_adapter_of_a_local_model(self, folder, tmp_path):
        for path in folder.glob("*model*"):
            path.unlink()
        for name, content in ADAPTER.items():
            (folder / name).write_bytes(content.replace(b"BASE", str(tmp_path).encode()))
        self.refused(folder, "adapter of the local model.*--base_model OWNER/NAME.*papertrl merge")
        ((publication, _),) = publish(folder, REPO, dry_run=True, base_model="org/base")
        (config,) = [item for item in publication.items if item.path == "adapter_config.json"]
        assert json.loads(config.content)["base_model_name_or_path"] == "org/base"
        with pytest.raises(UsageError, match="--base_model"):
            publish(folder, REPO, dry_run=True, base_model=str(tmp_path))
        # With its base beside it, or on the Hub, others can load it
        (folder / "start_model").mkdir()
        (folder / "start_model" / "config.json").write_text("{}")
        publish(folder, REPO, dry_run=True)
        shutil.rmtree(folder / "start_model")
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
        publish(folder, REPO, dry_run=True)

    @pytest.mark.parametrize(
        ("name", "content", "place"),
        [
            ("chat_template.jinja", f"{{{{ messages }}}}\n{{# {GITHUB} #}}", "line 2 at column 4"),
            ("vocab.txt", f"the\na\n{GITHUB}\n", "line 3 at column 1"),
            ("merges.txt", f"#version\n{GITHUB} x\n", "line 2 at column 1"),
            ("tokenizer.json", json.dumps({"vocab": {"a": 1, GITHUB: 2}}, indent=1), "line 4 at column 4"),
            ("added_tokens.json", json.dumps({GITHUB: 5}), "line 1 at column 3"),
            ("special_tokens_map.json", json.dumps({"eos_token": GITHUB}), "line 1 at column 16"),
            ("tokenizer_config.json", json.dumps({"auth_token": "swordfish"}), "line 1 at column 17"),
            ("generation_config.json", json.dumps({"url": "https://anna:pw@host/x"}), "line 1"),
            ("config.json", json.dumps({"password": "swordfish"}), "line 1"),
            ("adapter_config.json", json.dumps({"revision": GITHUB}), "line 1"),
            ("start_model/vocab.txt", f"{GITHUB}\n", "line 1 at column 1"),
        ],
    )
    def test_secrets_in_what_the_model_computes_with(self, folder, name, content, place):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        self.refused(folder, f"'{Path(name).name}' holds what looks like a secret, in {place}")

    def test_words_of_a_vocabulary_are_no_secrets(self, hub, folder):
        words = {
            "password": 1,
            "token": 2,
            "secret": 3,
            "auth": 4,
            "hf_home": 5,
            "sk-": 6,
            "Authorization": 7,
            "key=": 8,
        }
        (folder / "vocab.json").write_text(json.dumps(words))
        (folder / "vocab.txt").write_text("\n".join(words))
        settings = {
            "eos_token": "</s>",
            "stc_token": "\u2581",
            "extra_token": "[X]",
            "max_tokens": 3,
            "bos_token": None,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        send(hub, folder)
        for name in ("vocab.json", "vocab.txt", "tokenizer_config.json"):
            assert hub.files(REPO)[name] == (folder / name).read_bytes()

    def test_a_long_report_is_scrubbed_too(self, hub, folder):
        (folder / "metrics.jsonl").write_text(" " * (1 << 20) + "\n" + json.dumps({"note": GITHUB}) + "\n")
        send(hub, folder)
        assert hub.files(REPO)["metrics.jsonl"].endswith(b'{"note": "<token>"}\n')


class TestRepetition:
    def test_nothing_is_sent_twice(self, hub, folder):
        first = send(hub, folder)
        again = send(hub, folder)
        assert (first.changed, again.changed) == (5, 0) and again.commit == first.commit
        assert len(hub.repos["model", REPO].commits) == 2
        (folder / SHARDS[0]).write_bytes(weights(3))
        assert send(hub, folder).changed == 1
        assert sum(hub.received.values()) == 600_000

    def test_an_interrupted_upload_goes_on(self, hub, folder):
        hub.faults = [Fault("POST .*/commit/", times=99, status=500)]
        with pytest.raises(JobError, match="does not work at the moment"):
            send(hub, folder)
        assert sum(hub.received.values()) == 400_000 and len(hub.repos["model", REPO].commits) == 1
        hub.faults = []
        assert send(hub, folder).changed == 5
        assert sum(hub.received.values()) == 400_000

    def test_a_connection_cut_in_the_middle_of_a_file(self, hub, folder):
        hub.faults = [Fault("PUT /objects/", times=1, cut="upload")]
        send(hub, folder)
        assert sum(hub.received.values()) == 400_000
        assert hub.files(REPO)[SHARDS[1]] == (folder / SHARDS[1]).read_bytes()

    def test_a_commit_whose_confirmation_is_lost_is_made_once(self, hub, folder):
        hub.faults = [Fault("POST .*/commit/", cut="answer")]
        assert send(hub, folder).changed == 0
        assert len(hub.repos["model", REPO].commits) == 2

    def test_a_lost_race_is_run_again(self, hub, folder):
        hub.faults = [Fault("POST .*/commit/", status=412)]
        assert send(hub, folder).changed == 5

    @pytest.mark.parametrize("status", [500, 503])
    @pytest.mark.parametrize("match", ["repos/create", "validate-yaml", "/tree/", "batch", "PUT", "/commit/"])
    def test_bursts(self, hub, folder, status, match):
        hub.faults = [Fault(match, times=2, status=status)]
        assert send(hub, folder).changed == 5

    def test_waits_as_long_as_asked(self, hub, folder, quick_retries):
        hub.faults = [Fault("/commit/", status=429, headers={"Retry-After": "7"})]
        send(hub, folder)
        assert len(quick_retries) == 1 and 7 <= quick_retries[0] <= 8

    def test_a_slow_hub(self, hub, folder):
        hub.faults = [Fault("/commit/|PUT", times=3, delay=0.3)]
        assert send(hub, folder).changed == 5


class TestMessages:
    @pytest.mark.parametrize(
        ("status", "message"),
        [(401, "hf auth login"), (403, "permission to write"), (404, "no such repository"), (507, "no storage left")],
    )
    @pytest.mark.parametrize("match", ["create", "PUT|batch", "/commit/"])
    def test_refusals(self, hub, folder, status, message, match):
        hub.faults = [Fault(match, times=99, status=status)]
        with pytest.raises(JobError, match=message):
            send(hub, folder)
        assert len(hub.requests) < 15

    def test_still_asked_to_slow_down(self, hub, folder):
        hub.faults = [Fault("/commit/", times=99, status=429)]
        with pytest.raises(JobError, match="slow down"):
            send(hub, folder)

    def test_no_network(self, hub, folder):
        with pytest.raises(JobError, match="cannot be reached") as error:
            publish(folder, REPO, token=TOKEN, endpoint="http://127.0.0.1:9")
        assert "Traceback" not in str(error.value)

    def test_no_token(self, hub, folder, monkeypatch, tmp_path):
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(JobError, match="No Hub token was found"):
            publish(folder, endpoint=hub.endpoint)

    def test_offline(self, folder):
        with pytest.raises(JobError, match="HF_HUB_OFFLINE"):
            publish(folder, REPO, token=TOKEN)

    def test_full_disk_here(self, hub, folder, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("huggingface_hub.HfApi.create_commit", full)
        with pytest.raises(JobError, match="disk is full"):
            send(hub, folder)

    def test_a_failed_push_after_training_tells_where_the_model_is(self, hub, folder):
        args = SimpleNamespace(output_dir=str(folder), hub_token="hf_wrong", hub_private_repo=True)
        with pytest.raises(JobError, match=r"hf auth login.*Nothing is lost.*papertrl publish"):
            with_endpoint(
                hub, lambda: publish_trainer(SimpleNamespace(args=args, hub_model_id=REPO), None, None, None, None)
            )

    def test_training_goes_on_without_the_hub(self, hub, folder):
        args = SimpleNamespace(hub_token="hf_wrong", hub_private_repo=None, hub_revision=None)
        trainer = SimpleNamespace(args=args, hub_model_id=REPO, state=SimpleNamespace(global_step=2))
        with_endpoint(hub, lambda: publish_checkpoint(trainer, folder))
        trainer.args.hub_token = TOKEN
        with_endpoint(hub, lambda: publish_checkpoint(trainer, folder))
        assert len(hub.repos["model", REPO].commits) == 2 and "README.md" not in hub.files(REPO)

    def test_a_card_with_broken_metadata(self, hub, folder):
        (folder / "README.md").write_text("---\ntags: [\n---\n")
        with pytest.raises(JobError, match="not valid"):
            send(hub, folder)
        assert hub.requests == []

    @pytest.mark.parametrize("name", ["a/b/c", "owner/na me", "-x", "a..b"])
    def test_repo_ids(self, name):
        with pytest.raises(UsageError, match="repo_id"):
            valid_repo_id(name)

    def test_names_made_from_folders_are_valid(self, tmp_path):
        for name in ("lp_reg-addition-1", "a b", "--x..y--", "ünïcode", "..."):
            assert valid_repo_id(default_name(tmp_path / name))

    def test_exit_codes(self, folder, capsys):
        assert main(["publish"]) == 2
        assert main(["publish", str(folder / "none")]) == 1
        assert main(["publish", str(folder), "--dry"]) == 2
        assert "Traceback" not in capsys.readouterr().err


KILLED = """
import sys
from pathlib import Path
from papertrl.hub.publishing import publish
publish(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize(("stage", "arrived"), [("PUT /objects", False), ("POST .*/commit", True)])
def test_a_killed_publisher_leaves_the_old_or_the_new_commit(hub, folder, stage, arrived):
    hub.faults = [Fault(stage, times=9, delay=1)]
    process = client(hub, KILLED, str(folder), REPO)
    deadline = time.monotonic() + 40
    while not any(re.match(stage, request) for request in list(hub.requests)):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.5)  # What the Hub had been sent by then, it still works on
    complete = {".gitattributes", "README.md", "config.json", "model.safetensors.index.json", *SHARDS}
    with hub.lock:
        history = [set(files) for _, files in hub.repos["model", REPO].commits]
    assert history == [{".gitattributes"}, complete] if arrived else [{".gitattributes"}]
    hub.faults = []
    sent = send(hub, folder)
    assert set(hub.files(REPO)) == complete and sent.changed == (0 if arrived else 5)
