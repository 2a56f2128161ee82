"""Files that `fsspec` reads elsewhere: `s3://`, `gs://`, `https://`, `hf://` and what else it knows.

Credentials come from the environment alone, each protocol's own way. Whoever reads the rows more than once downloads
each file once, to a directory that goes when the reading ends; an entity tag or the like says, in one request, whether
a file still is what it was, so that a second start downloads nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from lorafit.data.source_files import DataFile, FileProblem, suffix_of
from lorafit.errors import DiskError
from lorafit.storage.stage import move

Kept = TypeVar("Kept")
CHUNK = 1 << 20
TRIES = 3
SECONDS_TO_CONNECT, SECONDS_OF_SILENCE = 15, 60
ROOM_LEFT = 1 << 30
"""Bytes that downloads leave free on their disk."""
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"} | {
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN, or `hf auth login`",
    "https": "~/.netrc",
    "http": "~/.netrc",
}
TAGS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "Content-MD5", "Digest")
"""What file systems call a value that changes with the content."""
TIMES = ("Last-Modified", "LastModified", "mtime", "updated", "created")


@dataclass(frozen=True)
class RemoteFile(DataFile):
    """One file elsewhere; `path` is only its path there."""

    url: str
    downloads: Downloads | None
    """Where it is kept once it was read; None when it is read once, as it comes."""

    @property
    def is_local(self) -> bool:
        """Not here."""
        return False

    def open(self) -> io.RawIOBase:
        """The bytes as they are there. Raises FileProblem."""
        if not self.suffix:
            raise FileProblem("is not a kind of file that can be read, by its name; name the file itself")
        if self.downloads is not None:
            return self.downloads.file(self).open("rb", buffering=0)
        return asked(self.url, lambda: _Stream(file_system(self.url)[0].open(file_system(self.url)[1], "rb")))

    def identity(self) -> list[Any] | None:
        """What changes with the content, and when it last did; None where nothing says so."""
        try:
            fs, path = file_system(self.url)
            info = asked(self.url, lambda: fs.info(path))
        except FileProblem:
            return None
        tags = [str(info[name]) for name in TAGS if info.get(name)]
        changed = next((_nanoseconds(info[name]) for name in TIMES if info.get(name)), 0)
        if not tags and not changed:
            return None
        # An entity tag changes with every change; a time in seconds may not.
        rested = 0 if tags else changed
        return [hashlib.sha256(self.url.encode()).hexdigest(), info.get("size"), tags, rested, rested]


class Downloads:
    """Files that were read once, in a directory that somebody else makes and removes."""

    def __init__(self, directory: Callable[[], Path]) -> None:
        """`directory` makes it; it is asked for when there is something to download."""
        self._make = directory
        self._directory: Path | None = None

    def file(self, remote: RemoteFile) -> Path:
        """The whole file. Raises FileProblem, and DiskError when there is no room for it."""
        if self._directory is None:
            self._directory = self._make()
        path = self._directory / hashlib.sha256(remote.url.encode()).hexdigest()
        if not path.exists():
            part = path.with_suffix(".part")
            asked(remote.url, lambda: _download(remote.url, part))
            move(part, path)
        return path


class _Stream(io.RawIOBase):
    """A file of fsspec as a raw one; what goes wrong while it is read is said of the file."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = asked("", lambda: self._file.read(len(buffer)), tries=1)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def remote_files(url: str, downloads: Downloads | None) -> tuple[list[DataFile], str]:
    """The files that a URL means, sorted: itself, what it matches, or what lies beneath it; and the directory, if one.

    Raises FileProblem.
    """
    if "::" in url:
        raise FileProblem("chains protocols, which is not read; name the file itself")
    fs, path = file_system(url)
    is_web = urlsplit(url).scheme.lower() in ("http", "https")
    if re.search(r"[*\[]", path):
        found = asked(url, lambda: sorted(fs.glob(path)))
        if not found:
            raise FileProblem("matches no file; check the pattern")
        return [_remote_file(str(fs.unstrip_protocol(name)), downloads) for name in found], ""
    if not is_web and not suffix_of(path) and asked(url, lambda: fs.isdir(path)):
        found = asked(url, lambda: sorted(fs.find(path)))
        files = [_remote_file(str(fs.unstrip_protocol(name)), downloads) for name in found if suffix_of(name)]
        if not files:
            raise FileProblem("is a directory without data files")
        return list(files), shown_url(str(fs.unstrip_protocol(path)))
    return [_remote_file(url, downloads)], ""


def _remote_file(url: str, downloads: Downloads | None) -> DataFile:
    path = urlsplit(url).path
    return RemoteFile(Path(PurePosixPath(path)), shown_url(url), suffix_of(path), url, downloads)


def shown_url(url: str) -> str:
    """The URL without what may hold a secret: user, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def file_system(url: str) -> tuple[Any, str]:
    """What reads a URL, and the path it reads. Raises FileProblem."""
    protocol = urlsplit(url).scheme.lower()
    options: dict[str, Any] = {}
    if not re.match(r"[^:]+://[^/]", url) and not url.startswith("memory:"):
        raise FileProblem(f"is no URL; write {protocol}://, the host or bucket, and the path")
    if protocol in ("http", "https"):
        try:
            aiohttp = importlib.import_module("aiohttp")  # of the extra `http`
        except ImportError:
            raise FileProblem("needs aiohttp; pip install 'lorafit[http]'") from None
        # Its own limit is five minutes for a whole file. Proxies and ~/.netrc are part of the environment.
        waits = aiohttp.ClientTimeout(total=None, sock_connect=SECONDS_TO_CONNECT, sock_read=SECONDS_OF_SILENCE)
        options = {"client_kwargs": {"timeout": waits, "trust_env": True}}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        raise FileProblem(f"needs {package}; pip install {package}" if package else _clean(error)) from None
    except ValueError as error:
        raise FileProblem(f"{_clean(error)}; fsspec reads s3://, gs://, https://, hf:// and others") from None
    return fs, str(path)


def asked(url: str, question: Callable[[], Kept], *, tries: int = TRIES) -> Kept:
    """What a server answers, asked again where that may help. Raises FileProblem with what is wrong in one line."""
    for attempt in range(1, tries + 1):
        try:
            return question()
        except (FileProblem, DiskError):
            raise
        # What file systems raise shares no base class but this one: aiohttp's, botocore's, Google's own errors.
        except Exception as error:
            problem, may_pass = _problem(error, urlsplit(url).scheme.lower())
            if not may_pass or attempt == tries:
                raise FileProblem(problem) from None
            time.sleep(2**attempt / 4)
    raise AssertionError


def _problem(error: Exception, protocol: str) -> tuple[str, bool]:
    """What is wrong, and whether it may be right a moment later."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec takes every failure of a web server for a file that is not there
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "does not exist there (404); check the address", False
    if isinstance(error, PermissionError) or status in (401, 403):
        where = CREDENTIALS.get(protocol, "those of its protocol")
        return f"may not be read ({_clean(error) or status}); credentials come from the environment: {where}", False
    if isinstance(error, TimeoutError):
        return f"does not answer (silent for {SECONDS_OF_SILENCE} s); check the address and the network", False
    is_final = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    said = f"status {status}" if isinstance(status, int) else _clean(error)
    is_of_tls = "certificate" in said.lower() or "ssl" in said.lower()
    return f"cannot be read ({said}); check the address and the network", not (is_final or is_of_tls)


def _clean(error: Exception) -> str:
    """An error in one line, without the queries of URLs: storage signs those it redirects to."""
    said = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", re.sub(r"://[^\s/@]*@", "://", said))[:300]


def _download(url: str, path: Path) -> None:
    fs, there = file_system(url)
    with fs.open(there, "rb") as source, path.open("wb") as target:
        while chunk := source.read(CHUNK):
            if shutil.disk_usage(path.parent).free < ROOM_LEFT + len(chunk):
                message = f"no room for {shown_url(url)}; make some, or set LORAFIT_CACHE to another disk"
                raise DiskError(message, where=str(path.parent.parent))
            target.write(chunk)


def _nanoseconds(moment: Any) -> int:
    """A time as a file system gives it; 0 for one that cannot be read."""
    if isinstance(moment, str):
        try:
            return int(parsedate_to_datetime(moment).timestamp() * 10**9)
        except ValueError:
            return 0
    return int(float(moment.timestamp() if hasattr(moment, "timestamp") else moment) * 10**9)
