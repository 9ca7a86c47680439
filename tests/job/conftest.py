import pytest

from papertrl import cli

SETTINGS = {
    "max_steps": 3,
    "logging_steps": 1,
    "start_model_steps": 120,
    "warmup_steps": 0,
    "task_size": 64,
    "task_kwargs": '{"digits": 1}',
    "held_out_prompts": 8,
    "disable_tqdm": True,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "learning_rate": 1e-3,
    "save_steps": 2,
}


def flags(**changes):
    """Command line of a job of a few steps; `None` leaves a flag out."""
    settings = {name: value for name, value in {**SETTINGS, **changes}.items() if value is not None}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


SMALL = flags()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Output directory of one finished run of the default method, three steps long."""
    output = tmp_path_factory.mktemp("small") / "run"
    assert cli.main(["train", *SMALL, "--output_dir", str(output)]) == 0
    return output
