"""Published weights on the Hugging Face Hub: found on this machine, downloaded only by `omniconv weights fetch`."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from omniconv.core.errors import DataError, ResourceError, UsageError

__all__ = ["HubWeights"]

_PATTERN = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_FILE = "model.safetensors"


@dataclass(frozen=True)
class HubWeights:
    """A published weight file, such as `hub:timm/convnext_tiny.in12k_ft_in1k`.

    Attributes:
        repository: owner and name on the Hub.
        revision: branch, tag or commit; a commit names the very file for ever.
    """

    repository: str
    revision: str = "main"

    @classmethod
    def parse(cls, source: str) -> Self:
        """Return what `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION` means.

        Raises:
            UsageError: if `source` is written otherwise.
        """
        match = _PATTERN.fullmatch(source)
        if match is None:
            raise UsageError(f"{source} should read hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
        return cls(match["repository"], match["revision"] or "main")

    def __str__(self) -> str:
        return f"hub:{self.repository}" + ("" if self.revision == "main" else f"@{self.revision}")

    @property
    def url(self) -> str:
        """The page of the weights, with their licence."""
        return f"https://huggingface.co/{self.repository}"

    @property
    def network(self) -> str:
        """The name that timm's repositories give the network: what stands before the first dot."""
        return self.repository.partition("/")[2].partition(".")[0]

    def find(self) -> Path:
        """Return the file in the Hub's cache on this machine, after its hash was compared; nothing is downloaded.

        Raises:
            ResourceError: if it is not there; the message says what would be downloaded from where.
            DataError: if the file is not the one that was published.
        """
        found = _hub().try_to_load_from_cache(self.repository, _FILE, revision=self.revision)
        if not isinstance(found, str):
            raise ResourceError(
                f"{self} is not on this machine, and nothing was downloaded. omniconv weights fetch {self} "
                f"downloads {_FILE} from {self.url}, under the licence on that page"
            )
        path = Path(found)
        # The cache keeps a large file under the hash that it was published with.
        published = path.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", published) and sha256(path) != published:
            raise DataError(f"{path} is damaged: its hash is not {published}. Remove it and fetch it again")
        return path

    def fetch(self) -> dict[str, Any]:
        """Download the file into the Hub's cache and return its path, hash, size in bytes, licence and commit.

        Raises:
            ResourceError: if the Hub cannot be reached or does not have it.
        """
        hub = _hub()
        try:
            info = hub.model_info(self.repository, revision=self.revision)
            path = Path(hub.hf_hub_download(self.repository, _FILE, revision=self.revision))
        except Exception as error:  # the Hub's client raises what its HTTP library of the day raises
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise ResourceError(f"{self} cannot be fetched from {self.url}: {first[0]}") from None
        self.find()
        card = info.card_data.to_dict() if info.card_data else {}
        return {
            "source": f"hub:{self.repository}@{info.sha}",
            "path": str(path),
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
            "licence": card.get("license", "unknown"),
            "from": self.url,
        }


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ResourceError(
            "weights from the Hub need huggingface_hub; install it with: pip install 'omniconv[hub]'"
        ) from None
    return huggingface_hub
