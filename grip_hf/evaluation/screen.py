"""Where the commands print their tables."""

from rich.console import Console

console = Console()
if not console.is_terminal:
    console.width = 160  # a file or a log has no width of its own
