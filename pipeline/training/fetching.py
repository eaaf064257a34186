"""Datasets in an object store, on the disk of each node before a training begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.base.object_store import Store, is_remote, place_of
from pipeline.config import DataConfig
from pipeline.data.blend import while_others_wait
from pipeline.data.remote import fetch_dataset
from pipeline.ranks import Ranks


def fetch_datasets(config: DataConfig, cache: Path, ranks: Ranks) -> DataConfig:
    """Return the settings with a local copy in place of each dataset in an object store.

    Every rank calls this. The first rank of each node fetches to `cache`; nodes that share it fetch each file
    once. A copy that is complete, of the same metadata, is not fetched again.

    Raises:
        UserError: on every rank, for what cannot be fetched, or has not the hash in its metadata.
    """
    urls = [prefix for prefix in config.all_prefixes if is_remote(prefix)]
    if not urls:
        return config
    while_others_wait(lambda: _fetch_all(urls, cache, ranks.is_first), ranks.local_rank == 0, ranks)

    def local(prefixes: list[str]) -> list[str]:
        return [str(place_of(prefix, cache)) if is_remote(prefix) else prefix for prefix in prefixes]

    phases = [dataclasses.replace(phase, prefixes=local(phase.prefixes)) for phase in config.phases]
    return dataclasses.replace(config, prefixes=local(config.prefixes), phases=phases)


def _fetch_all(urls: list[str], cache: Path, show: bool) -> None:
    store = Store()
    for url in urls:
        fetch_dataset(store, url, place_of(url, cache), show)
