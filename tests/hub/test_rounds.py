"""What the online loop sampled, as a dataset on the Hub."""

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from papertrl.cli import main
from papertrl.core.errors import JobError
from papertrl.hub.publishing import publish

from .conftest import TRAIN
from .server import OWNER, TOKEN

ROUNDS = f"{OWNER}/run-rounds"
ONLINE = ["--online_iterations", "2", "--online_num_prompts", "6", "--online_max_new_tokens", "4"]


@pytest.fixture(scope="module")
def online_run(tmp_path_factory):
    """Output directory of a run with two rounds."""
    folder = tmp_path_factory.mktemp("runs") / "online"
    flags = [flag if flag != "lp_reg" else "dpo" for flag in TRAIN]
    assert main([*flags, *ONLINE, "--reward_funcs", "tests.hub.test_rounds.digits", "--output_dir", str(folder)]) == 0
    return folder


def digits(completions, **kwargs):
    """Varied, and exact for any text."""
    return [float(sum(map(ord, text)) % 97) for text in completions]


def send(hub, folder):
    return publish(folder, f"{OWNER}/run", with_rounds=True, token=TOKEN, endpoint=hub.endpoint)


def change(path, edit):
    """Edit the rows of a parquet file in place."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_rounds_are_loaded_as_they_were_written(hub, online_run, tmp_path):
    (_, _), (publication, sent) = send(hub, online_run)
    assert publication.repo_id == ROUNDS and publication.repo_type == "dataset" and sent.changed == 7
    files = hub.files(ROUNDS, "dataset")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for config in ("pairs", "candidates"):
        loaded = load_dataset(str(tmp_path), config, cache_dir=str(tmp_path / "cache"))
        assert list(loaded) == ["round_0", "round_1"]
        for name, split in loaded.items():
            assert split.to_list() == pq.read_table(online_run / f"rounds/{name}/{config}.parquet").to_pylist()
    # Publishing again finds nothing to do
    assert [sent.changed for _, sent in send(hub, online_run)] == [0, 0]


def test_card_states_where_the_pairs_come_from(hub, online_run):
    send(hub, online_run)
    text = hub.files(ROUNDS, "dataset")["README.md"].decode()
    card = DatasetCard(text)
    assert [config["config_name"] for config in card.data.configs] == ["pairs", "candidates"]
    for i, step in enumerate((0, 2)):
        made = json.loads((online_run / f"rounds/round_{i}/provenance.json").read_text())
        row = re.search(rf"\| `round_{i}` \|.*", text)[0]
        counts = f"{step} | {made['prompts']} | {made['candidates']} | {made['pairs']}"
        assert row == f"| `round_{i}` | {counts} | `digits` × 1.0 | initial |"
    assert "temperature 1.0" in text and f'load_dataset("{ROUNDS}", "pairs", split="round_0")' in text
    assert f"datasets/{ROUNDS}" in hub.files(f"{OWNER}/run")["README.md"].decode()


def test_private_texts_are_scrubbed_and_their_tokens_left_out(hub, online_run, tmp_path):
    folder = tmp_path / "online"
    shutil.copytree(online_run, folder)
    secret, path = "hf_secretsecretsecret", "/home/somebody/private/notes.txt"

    def edit(rows):
        rows[0]["chosen"] = f"see {path} with {secret}"

    change(folder / "rounds/round_0/pairs.parquet", edit)
    change(folder / "rounds/round_1/candidates.parquet", lambda rows: rows[1]["completions"].append(path))
    file = folder / "rounds/round_0/provenance.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": path, "hub_token": secret}))
    send(hub, folder)
    files = hub.files(ROUNDS, "dataset")
    for content in files.values():
        assert secret.encode() not in content and b"somebody" not in content
    (tmp_path / "pairs.parquet").write_bytes(files["round_0/pairs.parquet"])
    before, after = (pq.read_table(p) for p in (folder / "rounds/round_0/pairs.parquet", tmp_path / "pairs.parquet"))
    assert after.schema == before.schema
    first, *others = after.to_pylist()
    assert first["chosen"] == "see notes.txt with <token>"
    assert first["prompt_ids"] is None and first["chosen_ids"] is None and first["rejected_ids"] is None
    assert others == before.to_pylist()[1:] and others[0]["chosen_ids"]
    provenance = json.loads(files["round_0/provenance.json"])
    assert provenance["model"] == "notes.txt" and "hub_token" not in provenance


def test_unfinished_rounds_links_and_stale_files_stay_away(hub, online_run, tmp_path):
    send(hub, online_run)
    folder = tmp_path / "online"
    shutil.copytree(online_run, folder)
    (folder / "rounds/round_1/pairs.parquet").unlink()
    (folder / "rounds/round_2.partial").mkdir()
    (folder / "rounds/round_2.partial/provenance.json").write_text("{}")
    (folder / "rounds/round_3").mkdir()
    (folder / "rounds/round_3/candidates.parquet").write_bytes(b"no provenance")
    shutil.copytree(folder / "rounds/round_0", folder / "rounds/round_4")
    outside = tmp_path / "outside.parquet"
    shutil.copy(folder / "rounds/round_0/pairs.parquet", outside)
    (folder / "rounds/round_4/pairs.parquet").unlink()
    (folder / "rounds/round_4/pairs.parquet").symlink_to(outside)
    (_, _), (publication, _) = send(hub, folder)
    # What round 1 had before is removed
    assert sorted(name for name in hub.files(ROUNDS, "dataset") if not name.startswith(".")) == [
        "README.md",
        *(f"round_0/{name}" for name in ("candidates.parquet", "pairs.parquet", "provenance.json")),
        *(f"round_1/{name}" for name in ("candidates.parquet", "provenance.json")),
    ]
    assert publication.skipped == ["rounds/round_4/pairs.parquet"]
    configs = DatasetCard(hub.files(ROUNDS, "dataset")["README.md"].decode()).data.configs
    assert [[file["split"] for file in config["data_files"]] for config in configs] == [
        ["round_0"],
        ["round_0", "round_1"],
    ]


def test_a_run_without_rounds_says_so(trained):
    with pytest.raises(JobError, match="holds no rounds, which a preference run with `--online_iterations` writes"):
        publish(trained, f"{OWNER}/run", with_rounds=True, dry_run=True)


def test_flag_is_listed(online_run, capsys):
    assert main(["publish", str(online_run), "--repo_id", f"{OWNER}/run", "--with_rounds", "--dry_run"]) == 0
    listed = capsys.readouterr().out
    assert f"dataset {ROUNDS}: 7 files" in listed and "round_1/candidates.parquet" in listed
