"""What a user should know while a prompt runs: in the log, and on the node that it is about."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context

logger = logging.getLogger(__name__)


class Notice:
    """A note that shows on the node that runs, for as long as there is something to say.

    Core keeps the text on the node until another takes its place, and shows no empty one.
    """

    def __init__(self, nothing: str) -> None:
        """Args: nothing: what replaces a note that doesn't hold any more."""
        self._nothing = nothing
        self._shown: dict[str, str] = {}  # node to the prompt that ran when it was told

    def tell(self, text: str) -> None:
        """Say `text` in the log and on the node; empty: nothing to say."""
        if text:
            logger.warning("S2DM: %s", text)
        context = get_executing_context()
        if context is None:  # no server runs
            return
        if text:
            self._shown[context.node_id] = context.prompt_id
            _show(text, context.node_id)
        elif self._shown.get(context.node_id, context.prompt_id) != context.prompt_id:
            # One node may read several texts: what it was told of another in this run stays.
            del self._shown[context.node_id]
            _show(self._nothing, context.node_id)


def _show(text: str, node: str) -> None:
    from server import PromptServer  # only there where core runs as a server

    PromptServer.instance.send_progress_text(text, node)
