"""Inputs in an object store, fetched to a local disk: workers read byte ranges of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.base.object_store import Store, is_remote, place_of
from pipeline.base.progress import ReadingProgress
from pipeline.corpus.sources import KNOWN, format_of


def fetch_inputs(inputs: Sequence[str], folder: Path) -> list[str]:
    """Return the inputs with local copies, in `folder`, of those in an object store.

    An input is an object, a glob or a folder; of a folder all files of known types are taken, by name. A copy
    that is there is not fetched again.

    Raises:
        UserError: for an input that cannot be fetched, or without a file of a known type.
    """
    store, found = Store(), []
    for given in inputs:
        objects = store.find(given) if is_remote(given) else []
        known = [each for each in objects if format_of(Path(each.url)) is not None]
        if objects and not known:
            raise UserError(f"--input {given} holds no file of a known type; use {KNOWN}.")
        found.append(known)
    paths: list[str] = []
    total = sum(each.size for known in found for each in known)
    with closing(ReadingProgress("fetching the corpus", total)) as progress:
        for given, known in zip(inputs, found, strict=True):
            for stored in known:
                store.fetch(stored, place_of(stored.url, folder), count=progress.advance)
            paths += [str(place_of(stored.url, folder)) for stored in known] or [given]
    return paths
