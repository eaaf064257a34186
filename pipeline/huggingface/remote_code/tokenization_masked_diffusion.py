"""A SentencePiece tokenizer that leaves the text unchanged: no prefix, no normalisation."""

import shutil
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE = "\u2581"  # SentencePiece's own sign for a space: as a character of the text it is encoded in bytes


class MaskedDiffusionTokenizer(PreTrainedTokenizer):
    """Maps text to SentencePiece ids and back; recognises special tokens in the text."""

    vocab_files_names: ClassVar = {"vocab_file": "tokenizer.model"}
    model_input_names: ClassVar = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        """Load the model file."""
        self.vocab_file = vocab_file
        self.processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        pieces = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
        ids = [self.processor.piece_to_id(piece) for piece in pieces]
        is_bytes = all(self.processor.is_byte(number) for number in ids)
        self._space = pieces if is_bytes else [self.processor.id_to_piece(self.processor.unk_id())]
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including special tokens."""
        return self.processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return {self.processor.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        first, *others = self.processor.encode(text.split(SPACE), out_type=str)
        return first + [piece for part in others for piece in (*self._space, *part)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of `tokens`; special tokens appear verbatim."""
        text: list[str] = []
        run: list[str] = []
        for token in tokens:
            if token in self.all_special_tokens:
                text += [self.processor.decode(run), token]
                run = []
            else:
                run.append(token)
        return "".join([*text, self.processor.decode(run)])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the model file."""
        name = f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        path = Path(save_directory) / name
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, path)
        return (str(path),)
