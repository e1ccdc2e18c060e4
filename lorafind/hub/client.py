"""The Hub as one user sees it: bases are fetched from it and pushed to it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafind import __version__
from lorafind.bases.problem import BasisProblem
from lorafind.hub import cache
from lorafind.hub.address import Address, Found
from lorafind.hub.cache import CONFIG, FILE
from lorafind.index.progress import Progress, Silent

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Read when huggingface_hub is first imported: all files go over plain HTTP, which can be resumed
# and needs no hf_xet, and the Hub is not told which other programs there are.
for _variable in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_variable, "1")


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push has made. url: the commit's page; name: ``hf:owner/name@commit``."""

    url: str
    name: str


@dataclass(frozen=True, slots=True)
class _Listing:
    """A repository at one commit. files: name → (bytes, SHA-256 in hex or empty)."""

    address: Address
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Hub:
    """endpoint: None for HF_ENDPOINT or https://huggingface.co; token: None for HF_TOKEN or the
    one that ``hf auth login`` has saved; offline: never connect, as with HF_HUB_OFFLINE.
    """

    endpoint: str | None = None
    token: str | None = None
    offline: bool = False

    def fetch(self, address: Address, sha256: str = "", watch: Progress | None = None) -> Found:
        """The basis file of a repository; one that is pinned and in the cache needs no connection.

        sha256: what its bytes have to be (hex), empty where only the Hub knows.

        Raises BasisProblem.
        """
        with _hushed(), self._explained(address):
            if (self._offline() or address.pinned) and (found := self._cached(address, sha256)):
                return found
            listing = self._listing(address)
            size, digest = self._stated(listing)
            if sha256 and sha256 != digest:
                raise BasisProblem(
                    f"{listing.address} holds other bytes (SHA-256 {digest}) than lorafind knows "
                    f"of it ({sha256}): it is not used. Update lorafind."
                )
            found = self._cached(listing.address, digest)
            if found is None:
                found = self._download(listing, size, digest, watch or Silent())
            cache.remember(address, listing.address.revision)
        return found

    def facts(self, address: Address) -> tuple[dict[str, Any], Address, Path | None]:
        """What a basis says of itself, its pinned address, and its file where the cache has it.

        Where it has not, ``config.json`` alone is fetched, which leaves out the facts with one
        entry per component. Raises BasisProblem.
        """
        with _hushed(), self._explained(address):
            if (self._offline() or address.pinned) and (known := _known(address)):
                return known
            listing = self._listing(address)
            self._stated(listing)
            if known := _known(listing.address):
                return known
            if CONFIG not in listing.files:
                raise BasisProblem(
                    f"{listing.address} holds no {CONFIG}: `lorafind basis pull` fetches the basis "
                    "itself, which has all facts."
                )
            path = self._enter(listing.address, CONFIG)
        return _configured(path), listing.address, None

    def push(
        self,
        path: Path,
        address: Address,
        private: bool = False,
        message: str = "",
        pictures: Sequence[Path] = (),
        bars: bool = False,
    ) -> Pushed:
        """See :func:`lorafind.hub.names.push`; the revision of the address is the branch."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        from lorafind.bases.file import read_facts, self_test
        from lorafind.hub.card import card, config

        self_test(path)
        facts = read_facts(path)
        if not self._has_token():
            raise BasisProblem(
                f"Nobody can publish on {self.host} without a token that may write: set HF_TOKEN, "
                "give --token, or run `hf auth login`."
            )
        contents: dict[str, Path | bytes] = {
            FILE: path,
            CONFIG: (json.dumps(config(facts), indent=2) + "\n").encode(),
            "README.md": card(facts, str(address), [p.name for p in pictures]).encode(),
            **{picture.name: picture for picture in pictures},
        }
        api, branch = self._api(), address.revision or None
        with _hushed(bars), self._explained(address, writing=True):
            try:
                there = api.model_info(address.repository, timeout=_patience())
                place = there.id
                if private and not there.private:
                    raise BasisProblem(
                        f"{place} on {self.host} is there already and public: nothing was "
                        f"published. Make it private at {self._base()}/{place}/settings, or push "
                        "without --private."
                    )
            except RepositoryNotFoundError as error:
                if isinstance(error, GatedRepoError):
                    raise
                place = api.create_repo(address.repository, private=private or None).repo_id
            if branch:
                api.create_branch(place, branch=branch, exist_ok=True)
            commit = api.create_commit(
                place,
                [CommitOperationAdd(name, content) for name, content in contents.items()],
                commit_message=message or f"Basis {facts['name']} ({facts['id']})",
                revision=branch,
            )
        return Pushed(str(commit.commit_url), str(Address(place, commit.oid)))

    @property
    def host(self) -> str:
        """The Hub's name, for messages."""
        return self._base().partition("://")[2]

    def _base(self) -> str:
        from huggingface_hub import constants

        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    def _offline(self) -> bool:
        from huggingface_hub import constants

        return self.offline or constants.HF_HUB_OFFLINE

    def _identity(self) -> dict[str, Any]:
        # RFC 6750 2.1; the HTTP library would put any other into its message.
        if self.token and not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", self.token):
            raise BasisProblem("The token has characters that no token has: copy it once more.")
        return {
            "token": self.token or None,
            "library_name": "lorafind",
            "library_version": __version__,
        }

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._base(), **self._identity())

    def _has_token(self) -> bool:
        from huggingface_hub.utils import get_token_to_send  # type: ignore[attr-defined]

        return get_token_to_send(self.token or None) is not None

    def _explained(self, address: Address, writing: bool = False) -> AbstractContextManager[None]:
        from lorafind.hub.problem import explained

        here = None if writing else cache.held(address)
        return explained(
            self.host,
            address,
            token=self._has_token(),
            writing=writing,
            cached=str(address.at(here.parent.name)) if here else "",
        )

    def _listing(self, address: Address) -> _Listing:
        """Pin a revision to its commit, and list its files."""
        if self._offline():
            raise BasisProblem(_absent(address))
        info = self._api().model_info(
            address.repository,
            revision=address.revision or None,
            files_metadata=True,
            timeout=_patience(),
        )
        pinned = address.at(info.sha or "")
        if not pinned.pinned:
            raise BasisProblem(f"{self.host} names no commit for {address}: is it a Hub?")
        files = {
            file.rfilename: (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size or 0, "")
            for file in info.siblings or ()
        }
        return _Listing(pinned, files)

    def _stated(self, listing: _Listing) -> tuple[int, str]:
        """Bytes and SHA-256 (hex) of the basis, as the Hub states them."""
        if FILE not in listing.files:
            raise BasisProblem(
                f"{listing.address} on {self.host} holds no {FILE}: it is no basis of lorafind."
            )
        size, digest = listing.files[FILE]
        # It becomes the name of a file.
        if not cache.SHA256.fullmatch(digest):
            raise BasisProblem(
                f"{self.host} states no SHA-256 for {FILE} of {listing.address}, so that it cannot "
                "be checked: it has to be published with Git LFS, as `lorafind basis push` does."
            )
        return size, digest

    def _cached(self, address: Address, digest: str) -> Found | None:
        """The basis in the cache, where it is there and whole; a damaged copy is taken out.

        digest: its SHA-256 (hex), empty where only the cache knows.
        """
        from lorafind.hub.download import sha256

        path = cache.held(address)
        if path is None:
            return None
        digest = digest or cache.stated(path)
        if digest and sha256(path) != digest:
            if self._offline():
                raise BasisProblem(
                    f"The copy of {address} in the cache ({path}) is damaged: fetch it again when "
                    "there is a connection."
                )
            cache.drop(path)
            return None
        return Found(path, str(address.at(path.parent.name)))

    def _download(self, listing: _Listing, size: int, digest: str, watch: Progress) -> Found:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            WeakFileLock,
            build_hf_headers,
        )

        from lorafind.bases.file import self_test
        from lorafind.hub.download import download, sha256

        pinned = listing.address
        storage = cache.storage(pinned.repository)
        blob = storage / "blobs" / digest
        url = hf_hub_url(pinned.repository, FILE, revision=pinned.revision, endpoint=self._base())
        # The same lock as huggingface_hub's own downloads of these bytes.
        lock = cache.root() / ".locks" / storage.name / f"{digest}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)

        def check(file: Path) -> None:
            try:
                self_test(file)
            except BasisProblem as error:
                reason = str(error).replace(str(file), FILE)
                raise BasisProblem(
                    f"{pinned} came as it was published, but cannot be used, and was not kept: "
                    f"{reason}"
                ) from error

        with WeakFileLock(lock):
            if not blob.exists():
                headers = build_hf_headers(**self._identity())
                download(str(pinned), url, headers, blob, size, digest, check, watch)
        if CONFIG in listing.files:
            self._enter(pinned, CONFIG)
        path = self._enter(pinned, FILE)
        if not (blob.exists() and path.samefile(blob)):
            if sha256(path) != digest:
                cache.drop(path)
                raise BasisProblem(
                    f"{self.host} serves two different files as {pinned}: it is not used."
                )
            # Where links cannot be made the cache now has a copy.
            blob.unlink(missing_ok=True)
        return Found(path, str(pinned))

    def _enter(self, pinned: Address, file: str) -> Path:
        """Have a file of a commit in the cache; bytes that are there already are only linked."""
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                pinned.repository,
                file,
                revision=pinned.revision,
                endpoint=self._base(),
                cache_dir=cache.root(),
                **self._identity(),
            )
        )


def _patience() -> float:
    """Seconds within which the Hub has to answer."""
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT


def _known(address: Address) -> tuple[dict[str, Any], Address, Path | None] | None:
    """What the cache knows of a basis; see :meth:`Hub.facts`."""
    from lorafind.bases.file import read_facts

    if path := cache.held(address):
        return read_facts(path), address.at(path.parent.name), path
    if path := cache.held(address, CONFIG):
        return _configured(path), address.at(path.parent.name), None
    return None


def _configured(path: Path) -> dict[str, Any]:
    """What a ``config.json`` says, which anybody may have written."""
    from lorafind.hub.card import LISTS

    try:
        facts = json.loads(path.read_text("utf-8"))
    except ValueError:
        facts = None
    if not (
        isinstance(facts, dict)
        and all(key in facts for key in ("architecture", "feature", "signature_version"))
        and isinstance(rows := facts.get("evaluation", []), list)
        and all(isinstance(row, dict) for row in rows)
    ):
        raise BasisProblem(f"{path} does not hold the facts of a basis.")
    return {key: value for key, value in facts.items() if key not in LISTS}


def _absent(address: Address) -> str:
    """The sentence for what is not in the cache."""
    here = ", ".join(str(address.at(commit)) for commit in cache.commits(address))
    if here:
        return f"The cache has {here} but not {address}, and nothing is fetched offline."
    return (
        f"{address} is not in the cache, and nothing is fetched offline: `lorafind basis pull "
        f"{address}` when there is a connection."
    )


@contextmanager
def _hushed(bars: bool = False) -> Iterator[None]:
    """huggingface_hub shows no bars (unless asked for) and no warnings: what matters is raised."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, hide = logging.get_verbosity(), not (bars or are_progress_bars_disabled())
    logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hide:
            enable_progress_bars()
