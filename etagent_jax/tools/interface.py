"""What a tool is."""

from typing import Protocol

from etagent_jax.trajectory import ToolResult


class Tool(Protocol):
    """name: also its tag.  description: one line for the system prompt."""

    name: str
    description: str

    async def run(self, text: str) -> ToolResult:
        """Answer one call.  Never raises for what the model wrote: that is a status."""
        ...

    async def close(self) -> None:
        """Let go of processes and connections."""
        ...
