"""`papertrl chat`: talk to a trained model in the terminal, beside its base if asked."""

import sys
from typing import Any

import torch
from transformers import TextStreamer
from trl import apply_chat_template

from ..core.errors import JobError, UsageError
from ..core.parsing import CommandParser
from ..evaluation.models import Loaded, base_of, load_model

DESCRIPTION = """\
Answer prompts from the terminal, or one per line from a pipe. A model with a chat template keeps the conversation; one
without completes each line by itself. An empty line starts a new conversation; the end of the input ends the chat.
"""


def main(argv: list[str]) -> int:
    """
    Chat until the input ends.

    Args:
        argv (`list[str]`):
            Arguments after `papertrl chat`.

    Raises:
        [`~papertrl.core.errors.UsageError`]: for a wrong argument.
        [`~papertrl.core.errors.JobError`]: if a model cannot be loaded.
    """
    parser = CommandParser(prog="papertrl chat", description=DESCRIPTION)
    parser.add_argument("model", help="output directory of a run, folder of a model or an adapter, or Hub id")
    parser.add_argument(
        "--with_base", action="store_true", help="also show what the model it was trained from answers"
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise UsageError(f"`--max_new_tokens` must be at least 1, got {args.max_new_tokens}.")
    if not 0 <= args.temperature < float("inf"):
        raise UsageError(f"`--temperature` must be a number in [0, inf), got {args.temperature}.")
    names = {"trained": args.model}
    if args.with_base:
        base = base_of(args.model)
        if base is None:
            raise JobError(f"`--with_base`: '{args.model}' does not say what it was trained from.")
        names = {"base": base} | names
    talks = {label: Talk(load_model(name), args.system) for label, name in names.items()}
    for line in _lines():
        for label, talk in talks.items():
            if not line:
                talk.restart()
                continue
            if len(talks) > 1:
                print(f"{label}: ", end="", flush=True)
            talk.answer(line, args.max_new_tokens, args.temperature)
    return 0


def _lines():
    """Lines of the input without their ends, asked for where a person types them."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            break
        yield line.strip()
    if asks:
        print(file=sys.stderr)


class Talk:
    """
    A conversation with one model.

    Args:
        loaded ([`~papertrl.evaluation.models.Loaded`]):
            The model.
        system (`str`, *optional*):
            System prompt, for models with a chat template.

    Raises:
        [`~papertrl.core.errors.UsageError`]: if the model has no chat template for a system prompt.
    """

    def __init__(self, loaded: Loaded, system: str | None = None):
        self.loaded = loaded
        self.chats = loaded.tokenizer.chat_template is not None
        if system and not self.chats:
            raise UsageError("`--system` is for models with a chat template, which this one has not.")
        self.start = [{"role": "system", "content": system}] if system else []
        self.restart()

    def restart(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, str]] = list(self.start)

    def answer(self, text: str, max_new_tokens: int, temperature: float) -> str:
        """Answer, printing while it is written; only whole conversations are kept."""
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        said = [*self.messages, {"role": "user", "content": text}]
        prompt = apply_chat_template({"prompt": said}, tokenizer)["prompt"] if self.chats else text
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not self.chats).to(model.device)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature}
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                streamer=streamer,
                **sampling,
            )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if self.chats:
            self.messages = [*said, {"role": "assistant", "content": answer}]
        return answer
