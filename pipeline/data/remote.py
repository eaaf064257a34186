"""Datasets in an object store: fetched to a local disk before a training, uploaded after preprocessing."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.base.files import replacing
from pipeline.base.object_store import Store
from pipeline.base.progress import ReadingProgress
from pipeline.data.paths import bin_path, facts_path, idx_path, quarantine_path


def fetch_dataset(store: Store, url: str, prefix: Path, show: bool = True) -> None:
    """Make `prefix` a copy of the dataset at `url`, unless it is one; .idx comes last.

    Raises:
        UserError: for what cannot be fetched, or has not the hash in its metadata.
    """
    name = f"{url}.json"
    facts = store.read(name)
    try:
        sha256 = json.loads(facts)["sha256"]
        wanted = [(path, sha256[path.suffix[1:]]) for path in (bin_path(prefix), idx_path(prefix))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} is not the metadata of a dataset ({error}): upload it again.") from None
    written = facts_path(prefix)
    if not written.exists() or written.read_bytes() != facts:
        idx_path(prefix).unlink(missing_ok=True)  # of another dataset
    elif idx_path(prefix).exists():
        return
    objects = [store.info(url + path.suffix) for path, _ in wanted]
    total = sum(each.size for each in objects)
    with closing(ReadingProgress(f"fetching {url}", total, show)) as progress:
        for stored, (path, digest) in zip(objects, wanted, strict=True):
            if path.suffix == ".idx":
                with replacing(written) as file:
                    file.write(facts)
            store.fetch(stored, path, digest, progress.advance)


def is_uploaded(prefix: Path, url: str, overwrite: bool) -> bool:
    """Return whether the dataset at `url` is that at `prefix`.

    Raises:
        UserError: for another one, which must not be replaced without `overwrite`.
    """
    store, written = Store(), facts_path(prefix)
    if not store.has(f"{url}.idx"):
        return False
    if written.exists() and written.read_bytes() == store.read(f"{url}.json"):
        return True
    if not overwrite:
        raise UserError(f"{url} exists: give --overwrite to replace it, or another --output-prefix.")
    return False


def upload_dataset(prefix: Path, url: str) -> None:
    """Copy a dataset to an object store; .idx comes last.

    Raises:
        UserError: if the store does not take it; the local dataset stays.
    """
    store = Store()
    for path in (bin_path(prefix), facts_path(prefix), quarantine_path(prefix), idx_path(prefix)):
        if path.exists():
            print(f"uploading {url}{path.name.removeprefix(prefix.name)}", flush=True)
            store.upload(path, url + path.name.removeprefix(prefix.name))
