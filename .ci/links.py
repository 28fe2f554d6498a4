"""The README as an index of packages shows it: links and pictures by their address, for no file lies beside it there.

The address is that of the repository which the package is built from: `GRIP_HF_SOURCE=https://host/owner/name`, or the
remote `origin` of the checkout. Where neither is known, links stay as they are, for there is nothing true to say. A
wheel that is built from a source package takes over what that one says.
"""

import email
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")
SHORT = re.compile(r"^[^@/:]+@([^@/:]+):(?!/)")  # git's short form of ssh://, user@host:owner/name


def address_of(remote: str) -> str | None:
    """The address that a browser opens for a remote of git; None for a folder and other things without one.

    Whoever's name or token stands in it is left out.
    """
    parts = urlsplit(SHORT.sub(r"ssh://\1/", remote.strip(), count=1))
    host, path = parts.hostname, parts.path.strip("/").removesuffix(".git")
    if parts.scheme not in ("https", "ssh") or not host or not path:
        return None
    port = f":{parts.port}" if parts.scheme == "https" and parts.port else ""  # that of ssh is none of a browser's
    return f"https://{host}{port}/{path}"


def absolute(text: str, address: str) -> str:
    """A README whose relative links, but for those in blocks of code, begin with the address of the repository."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    for place in range(0, len(parts), 2):
        parts[place] = LINK.sub(
            lambda link: f"{link[1]}[{link[2]}]({address}/{'raw' if link[1] else 'blob'}/HEAD/{link[3]})", parts[place]
        )
    return "".join(parts)


def source_of(root: Path) -> str | None:
    """The address of the repository at `root`, if it is known."""
    given = os.environ.get("GRIP_HF_SOURCE")
    if given is not None:
        found = address_of(given)
        if found is None:
            raise ValueError(f"GRIP_HF_SOURCE must be a repository's address, https://host/owner/name, got {given!r}")
        return found
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    words = ["git", "-C", str(root), "remote", "get-url", "origin"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
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
            text, address = (root / "README.md").read_text(encoding="utf-8"), source_of(root)
            text, urls = (absolute(text, address), {"Repository": address}) if address else (text, {})
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls
