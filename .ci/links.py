"""The README as an index of packages shows it: links and pictures by their address, for no file lies beside it there.

The address is that of the repository which the package is built from: `GRIP_HF_SOURCE=https://host/owner/name`, or the
remote `origin` of the checkout. Where neither is known, links stay as they are, for there is nothing true to say. A
wheel that is built from a source package takes over what that one says.
"""

import email
import os
import re
import subprocess
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")
REMOTE = re.compile(
    r"(?:https?://(?:[^@/]+@)?|ssh://(?:[^@/]+@)?|[^@/:]+@)([\w.-]+\.\w+)[:/](?:\d+/)?(.+?)(?:\.git)?/?$"
)


def address_of(remote: str) -> str | None:
    """The address that a browser opens for a remote of git; None for a folder and other things without one.

    Whoever's name or token stands in it is left out.
    """
    found = REMOTE.match(remote.strip())
    return f"https://{found[1]}/{found[2]}" if found else None


def absolute(text: str, address: str) -> str:
    """A README whose relative links, but for those in blocks of code, begin with the address of the repository."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    for place in range(0, len(parts), 2):
        parts[place] = LINK.sub(
            lambda link: f"{link[1]}[{link[2]}]({address}/{'raw' if link[1] else 'blob'}/HEAD/{link[3]})", parts[place]
        )
    return "".join(parts)


def address(root: Path) -> str | None:
    """The address of the repository at `root`, if it is known."""
    given = os.environ.get("GRIP_HF_SOURCE")
    if given is not None:
        if address_of(given) is None:
            raise ValueError(f"GRIP_HF_SOURCE must be a repository's address, https://host/owner/name, got {given!r}")
        return address_of(given)
    if not (root / ".git").exists():
        return None
    asked = subprocess.run(
        ["git", "-C", str(root), "remote", "get-url", "origin"], capture_output=True, text=True, check=False
    )
    return address_of(asked.stdout) if asked.returncode == 0 else None


class Readme(MetadataHookInterface):
    """Gives the package its description, and the address of its source."""

    def update(self, metadata: dict) -> None:
        """Write both into the metadata."""
        root = Path(self.root)
        told = root / "PKG-INFO"
        if told.is_file():
            source = email.message_from_bytes(told.read_bytes())
            text = source.get_payload(decode=True).decode("utf-8")
            urls = dict(one.split(", ", 1) for one in source.get_all("Project-URL", []))
        else:
            text, found = (root / "README.md").read_text(encoding="utf-8"), address(root)
            text, urls = (absolute(text, found), {"Repository": found}) if found else (text, {})
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls
