"""Text of messages, whatever form their content has."""

from typing import Any

Messages = list[dict[str, Any]]


def message_text(message: dict[str, Any]) -> str:
    """Text of one message: its content, or the text parts of a structured content; empty where there is none."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def last_text(messages: Messages, role: str) -> str:
    """
    Text of the last message of `role`.

    Raises:
        `ValueError`: if there is none; the message names the roles that are there.
    """
    for message in reversed(messages):
        if message["role"] == role:
            return message_text(message)
    raise ValueError(f"There is no message of the {role}, only of {[message['role'] for message in messages]}.")


def as_completion(prompt: str | Messages, text: str) -> str | Messages:
    """A completion of the prompt's kind: text, or a message of the assistant."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
