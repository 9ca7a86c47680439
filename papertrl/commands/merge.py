"""`papertrl merge`: a model of a LoRA adapter and its base."""

from pathlib import Path

from ..core.errors import JobError
from ..core.parsing import CommandParser
from ..evaluation.models import ADAPTER_CONFIG, is_adapter, load_model


def main(argv: list[str]) -> int:
    """
    Merge an adapter into its base and save the whole model.

    Args:
        argv (`list[str]`):
            Arguments after `papertrl merge`.

    Raises:
        [`~papertrl.core.errors.JobError`]: if there is no adapter, or the output directory holds something.
    """
    parser = CommandParser(
        prog="papertrl merge", description="Merge the adapter of a run into its base, and save the whole model."
    )
    parser.add_argument(
        "adapter", help="output directory of a run with `--use_peft`, one of its checkpoints, or any adapter"
    )
    parser.add_argument("--output_dir", help="where the model goes (default: the adapter's folder with `-merged`)")
    args = parser.parse_args(argv)
    print(merge(Path(args.adapter), args.output_dir and Path(args.output_dir)))
    return 0


def merge(adapter: Path, output_dir: Path | None = None) -> Path:
    """
    Merge an adapter into its base and save the whole model with its tokenizer.

    Args:
        adapter (`Path`):
            Folder of the adapter.
        output_dir (`Path`, *optional*):
            Where the model goes. Defaults to a folder beside the adapter's, called `<adapter>-merged`.

    Returns:
        `Path`: where the model is.

    Raises:
        [`~papertrl.core.errors.JobError`]: with what to do.
    """
    if not is_adapter(adapter):
        raise JobError(
            f"'{adapter}' holds no adapter: there is no '{ADAPTER_CONFIG}' in it. Give the output directory of a run "
            "with `--use_peft`; other runs have whole models already."
        )
    adapter = adapter.resolve()
    output_dir = output_dir or adapter.with_name(adapter.name + "-merged")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise JobError(f"`--output_dir`: '{output_dir}' exists and is no empty folder. Choose another.")
    loaded = load_model(str(adapter))
    loaded.model.merge_and_unload(safe_merge=True).save_pretrained(output_dir)
    loaded.tokenizer.save_pretrained(output_dir)
    return output_dir
