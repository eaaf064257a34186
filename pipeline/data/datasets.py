"""Examples: fixed-length sequences whose positions are prompt, answer or padding, built by megatron-core."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import MAGIC_PREFIX
from torch.utils.data import Subset

from pipeline.base.errors import UserError
from pipeline.config import DataConfig
from pipeline.data.blend import Share, as_if_alone, build_once, used_examples
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Array, ExampleDataset
from pipeline.data.facts import DatasetFacts
from pipeline.data.lengths import RandomLengths
from pipeline.data.megatron import (
    BlendedDataset,
    BlendedMegatronDatasetBuilder,
    GPTDataset,
    GPTDatasetConfig,
    IndexedDataset,
    MegatronDataset,
    Split,
)
from pipeline.data.tokenizer import Tokenizer
from pipeline.ranks import Ranks


@dataclass
class ExampleConfig(GPTDatasetConfig):
    """megatron-core's configuration with settings of the datasets below; see `DataConfig`."""

    padding: str = "ignored"
    too_long: str = "error"
    isolate_documents: bool = False
    prefixes: Sequence[str] = ()

    def source(self, prefix: str | None) -> dict[str, Array]:
        """Return what an example of the dataset `prefix` says of its source; nothing without others."""
        if len(self.prefixes) < 2:
            return {}
        return {"source": np.array(self.prefixes.index(str(prefix)))}


class PackedDataset(GPTDataset):
    """Text packed into examples of L tokens by megatron-core's GPTDataset; every position is answer."""

    def __getitem__(self, index: int) -> dict[str, Array]:
        """Return an example as `ExampleDataset` does."""
        tokens = super().__getitem__(index)["tokens"].numpy()
        example = {"tokens": tokens, "roles": np.full(len(tokens), ANSWER, np.int8)}
        if self.config.isolate_documents:
            example["documents"] = self._documents(index)
        return example | self.config.source(self.dataset_path)

    def _documents(self, index: int) -> Array:
        """Return the document of each position, [L] int32, from 0; see `sample_index` in GPTDataset."""
        place = self.shuffle_index[index]
        (first, begin), (last, end) = self.sample_index[place : place + 2].tolist()
        lengths = self.dataset.sequence_lengths[self.document_index[first : last + 1]].astype(np.int64)
        lengths[-1] = end
        lengths[0] -= begin
        lengths = lengths[lengths > 0]  # the last document may give no token
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


class PairDataset(MegatronDataset):
    """Prompt/answer documents of two sequences, one example per document."""

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str | None,
        indices: Array,
        num_samples: int | None,
        index_split: Split,
        config: ExampleConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        cached = Path(config.path_to_cache) / f"pairs-{self._identity()}.npy"
        if not cached.exists():
            np.save(cached, self._first_sequences())
        # The entry after the examples says whether any of them is shorter than the sequence length.
        self.first_sequence = np.load(cached, mmap_mode="r")[:-1]
        self.has_padding = config.padding == "ignored" and bool(np.load(cached, mmap_mode="r")[-1])
        self.size = len(self.first_sequence) if num_samples is None else num_samples
        self.left_out = len(indices) - len(self.first_sequence)

    def _identity(self) -> str:
        """Return a hash of what the documents depend on, except the number of examples."""
        text = repr([self.dataset_path, self.index_split.name, self.config.split])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _first_sequences(self) -> Array:
        """Return the first sequence of each document in use; the last entry: is any shorter than L?"""
        first = self.dataset.document_indices[self.indices]
        prompt, answer = self.dataset.sequence_lengths[first], self.dataset.sequence_lengths[first + 1]
        if (answer == 0).any():
            document = int(self.indices[int(np.argmax(answer == 0))])
            raise UserError(
                f"{self.dataset_path}: document {document} has an answer of length 0 "
                f"({int((answer == 0).sum())} such documents): remove them and preprocess the corpus again."
            )
        lengths, limit = prompt.astype(np.int64) + answer, self.config.sequence_length
        fits = lengths <= limit
        return np.append(first[fits], int(lengths[fits].min(initial=limit) < limit))

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Return the number of documents: splits are counted in documents."""
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: ExampleConfig) -> IndexedDataset:
        """Open .bin and .idx; modes mark prompt (0) and answer (1)."""
        return IndexedDataset(dataset_path, multimodal=True, mmap=config.mmap_bin_files)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return ["random_seed", "sequence_length", "split", "padding", "too_long"]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Array]:
        """Return an example as `ExampleDataset` does; a blend may index more than one epoch."""
        sequence = int(self.first_sequence[index % len(self.first_sequence)])
        (prompt, _), (answer, _) = self.dataset.get(sequence), self.dataset.get(sequence + 1)
        length, used = self.config.sequence_length, len(prompt) + len(answer)
        tokens = np.full(length, self.config.tokenizer.pad, np.int64)
        roles = np.full(length, PADDING, np.int8)
        tokens[: len(prompt)], roles[: len(prompt)] = prompt, PROMPT
        tokens[len(prompt) : used], roles[len(prompt) : used] = answer, ANSWER
        if self.config.padding == "eos_targets":
            tokens[used:], roles[used:] = self.config.tokenizer.eos, ANSWER
        return {"tokens": tokens, "roles": roles} | self.config.source(self.dataset_path)


class _Builder(BlendedMegatronDatasetBuilder):
    """megatron-core's builder, made to work for blends with a dataset that has no example in a split."""

    @staticmethod
    def build_generic_dataset(
        cls: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        """Build a dataset; a blend is reduced to the datasets with examples, or to None."""
        if cls is BlendedDataset:
            datasets, weights, *more = args
            kept = [pair for pair in zip(datasets or [], weights, strict=False) if pair[1] > 0]
            empty = [dataset.dataset_path for dataset in datasets or [] if not len(dataset)]
            if empty and datasets[0].index_split == Split.train:
                raise _no_training_example(empty, datasets[0].config)
            if len(kept) < 2:
                return kept[0][0] if kept else None
            args = (*map(list, zip(*kept, strict=True)), *more)
        build = BlendedMegatronDatasetBuilder.build_generic_dataset
        return build(cls, is_built_on_rank, synchronize_ranks, *args)


def _no_training_example(prefixes: Sequence[str], config: DataConfig | ExampleConfig) -> UserError:
    return UserError(
        f"{', '.join(prefixes)} gives no training example of data.sequence_length = {config.sequence_length} "
        f"tokens with data.split = {config.split!r}: add text, remove the dataset, or lower "
        "data.sequence_length."
    )


@dataclass
class Datasets:
    """Training and validation examples of a phase.

    Attributes:
        train: one epoch of training examples.
        valid: validation examples; None if data.split gives them no share.
        has_padding: whether an example may have positions that the model must not attend to.
        fingerprint: see `data_fingerprint`.
        shares: what each dataset contributes to an epoch.
    """

    train: ExampleDataset
    valid: ExampleDataset | None
    has_padding: bool
    fingerprint: str
    shares: list[Share]

    def valid_of(self, prefixes: Collection[str]) -> ExampleDataset | None:
        """Return the validation examples of some of the datasets, in their order; None if there are none."""
        valid: Any = self.valid
        parts = getattr(valid, "datasets", [] if valid is None else [valid])
        chosen = [number for number, part in enumerate(parts) if part.dataset_path in prefixes]
        if len(chosen) in (0, len(parts)):
            return self.valid if chosen else None
        indices: Any = np.flatnonzero(np.isin(valid.dataset_index, chosen))
        return Subset(valid, indices)


def data_fingerprint(
    config: DataConfig, facts: Mapping[str, DatasetFacts], tokenizer: Tokenizer, seed: int
) -> str:
    """Return a hash that changes whenever the examples of a phase or their order do; nothing is built.

    Args:
        config: the data of the phase.
        facts: of its datasets, from `check_data`.
        tokenizer: of the run.
        seed: of the order.
    """
    contents = [facts[prefix].sha256 for prefix in config.prefixes]
    identity = repr([contents, tokenizer.sha256, config.kind, config.sequence_length, config.weights,
                     config.temperature, config.max_epochs, config.split, config.padding, config.too_long,
                     seed])  # fmt: skip
    if config.isolate_documents:  # an addition only: the fingerprints of other runs stay as they were
        identity += " isolate_documents"
    if config.random_length_share:
        identity += f" random_length_share {config.random_length_share}"
    return hashlib.sha256(identity.encode()).hexdigest()


def build_datasets(
    config: DataConfig,
    facts: Mapping[str, DatasetFacts],
    tokenizer: Tokenizer,
    seed: int,
    cache: Path,
    ranks: Ranks,
) -> Datasets:
    """Build the examples of a phase, or load their indices from `cache`; every rank calls this.

    The other arguments are those of `data_fingerprint`.

    Raises:
        UserError: on every rank, for too little data, or data that does not fit the run.
    """
    fingerprint = data_fingerprint(config, facts, tokenizer, seed)
    folder = cache / fingerprint[:16]
    build_once(folder, lambda writing: _build(config, facts, tokenizer, seed, writing), ranks)
    _check_indices(folder)
    with as_if_alone():
        train, valid, shares = _build(config, facts, tokenizer, seed, folder)
    has_padding = any(_has_padding(dataset) for dataset in (train, valid) if dataset is not None)
    if config.random_length_share:
        train, has_padding = RandomLengths(train, config.random_length_share, seed, tokenizer.pad), True
    return Datasets(train, valid, has_padding, fingerprint, shares)


def _check_indices(folder: Path) -> None:
    """Raise a `UserError` for an index that is no array: megatron-core would unpickle it and run its code."""
    for path in sorted(folder.glob("*.npy")):
        with path.open("rb") as file:
            if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
                raise UserError(f"{path} is not an array of NumPy: remove {folder}, it will be built again.")


def _build(
    config: DataConfig, facts: Mapping[str, DatasetFacts], tokenizer: Tokenizer, seed: int, folder: Path
) -> tuple[ExampleDataset, ExampleDataset | None, list[Share]]:
    """Build the examples with their indices in `folder`, or load existing indices."""
    settings = ExampleConfig(
        random_seed=seed,
        sequence_length=config.sequence_length,
        blend=(config.prefixes, None),
        split=config.split,
        tokenizer=tokenizer,
        path_to_cache=str(folder),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
        padding=config.padding,
        too_long=config.too_long,
        isolate_documents=config.isolate_documents,
        prefixes=list(facts),
    )
    train, valid = _build_splits(config, settings, [None, None, None])
    parts = getattr(train, "datasets", [train]) if train is not None else []
    examples = [len(part) for part in parts]
    left_out = [getattr(part, "left_out", 0) for part in parts]
    if train is None or len(train) == 0:
        raise _no_training_example(config.prefixes, config)
    used = used_examples(config, examples, facts)
    if used is not None:
        settings.blend = (config.prefixes, [float(count) for count in used])
        settings.__post_init__()  # normalises the weights
        train, _ = _build_splits(config, settings, [sum(used), 0, 0])
        assert train is not None
    shares = [
        Share(prefix, facts[prefix].tokens, *counts)
        for prefix, *counts in zip(config.prefixes, examples, used or examples, left_out, strict=True)
    ]
    return train, valid if valid is not None and len(valid) else None, shares


def _build_splits(
    config: DataConfig, settings: ExampleConfig, sizes: list[int | None]
) -> tuple[ExampleDataset | None, ExampleDataset | None]:
    kind = PairDataset if config.kind == "pairs" else PackedDataset
    with _only_user_errors(config):
        train, valid, _ = _Builder(kind, sizes, lambda: True, settings).build()
    return train, valid


@contextlib.contextmanager
def _only_user_errors(config: DataConfig) -> Iterator[None]:
    """Turn a failure inside megatron-core into an error that names the datasets."""
    try:
        yield
    except (AssertionError, ValueError, ZeroDivisionError, IndexError) as error:
        raise UserError(
            f"{', '.join(config.prefixes)} cannot be built with data.split = {config.split!r} and "
            f"data.sequence_length = {config.sequence_length} ({error or type(error).__name__}): check them "
            "with tools/inspect_data.py."
        ) from error


def _has_padding(dataset: Any) -> bool:
    parts = getattr(dataset, "datasets", [dataset])
    return any(getattr(part, "has_padding", False) for part in parts)
