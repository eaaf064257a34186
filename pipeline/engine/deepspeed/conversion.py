"""DeepSpeed's ds_to_universal as a program that runs no code from the files that it reads.

It has the options of ``deepspeed.checkpoint.ds_to_universal``.
"""

from __future__ import annotations

from deepspeed.checkpoint import ds_to_universal

from pipeline.engine.deepspeed.private import without_foreign_code

if __name__ == "__main__":
    with without_foreign_code():  # its worker processes are forked, so they inherit this
        ds_to_universal.main(ds_to_universal.parse_arguments())
