"""Publishing to a Hub that misbehaves."""

import json
import os
import re
import signal
import time
from types import SimpleNamespace
from unittest import mock

import pytest

from papertrl.cli import main
from papertrl.core.errors import JobError, UsageError
from papertrl.hub import client as client_module
from papertrl.hub.publishing import default_name, publish, valid_repo_id
from papertrl.trainers.publishing import publish_checkpoint, publish_trainer

from .conftest import client
from .server import OWNER, TOKEN, Fault

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
REPO = f"{OWNER}/small"


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
        send(hub, folder)
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
        (folder / "model.safetensors").write_bytes(b"small")
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


class TestRepetition:
    def test_nothing_is_sent_twice(self, hub, folder):
        first = send(hub, folder)
        again = send(hub, folder)
        assert (first.changed, again.changed) == (5, 0) and again.commit == first.commit
        assert len(hub.repos["model", REPO].commits) == 2
        (folder / SHARDS[0]).write_bytes(b"changed")
        assert send(hub, folder).changed == 1
        assert sum(hub.received.values()) == 400_000 + len(b"changed")

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
