"""How a trainer publishes itself: its model at the end, and checkpoints on the way."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.utils import logging

from ..core.errors import JobError
from ..hub.client import Sent
from ..hub.health import check_model
from ..hub.publication import MODEL, WEIGHTS, Publication, publishable
from ..hub.publishing import create_repo, default_name, publish, send, valid_repo_id

logger = logging.get_logger(__name__)


def create_trainer_repo(args: Any, token: str | None, private: bool | None) -> str:
    """Create the repository that a config names, so that a run without the right to publish fails at its start."""
    name = valid_repo_id(args.hub_model_id or default_name(Path(args.output_dir)))
    private = bool(args.hub_private_repo) if private is None else private
    return create_repo(HfApi(token=token or args.hub_token), name, private)


def publish_trainer(
    trainer: Any, message: str | None, token: str | None, revision: str | None, private: bool | None
) -> Sent:
    """Publish the output directory of a trainer that has saved model and card."""
    args = trainer.args
    try:
        ((_, sent),) = publish(
            Path(args.output_dir),
            trainer.hub_model_id,
            args.hub_private_repo if private is None else private,
            token or args.hub_token,
            message=message or "End of training",
            revision=revision,
            # A report that could not be made does not keep the model back
            incomplete=True,
        )
    except JobError as error:
        raise JobError(
            f"{error} Nothing is lost: the model is in '{args.output_dir}', and `papertrl publish {args.output_dir}` "
            "publishes it later."
        ) from error
    return sent


def publish_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """Publish a checkpoint's model; training goes on if the Hub does not take it."""
    message = f"Training in progress, step {trainer.state.global_step}"
    try:
        check_model(checkpoint)
        items, _ = publishable(checkpoint, MODEL)
        publication = Publication(trainer.hub_model_id, "model", items, owned=WEIGHTS)
        private = bool(trainer.args.hub_private_repo)
        send(HfApi(token=trainer.args.hub_token), publication, private, message, trainer.args.hub_revision)
    except JobError as error:
        logger.warning(f"Step {trainer.state.global_step} was not published: {error}")
