"""What other libraries have to say while they load and generate, kept off the terminal."""

from __future__ import annotations

import importlib
import logging as std_logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from perpend.progress import bars

READING = {
    "Loading weights": "load weights",
    "Converting and de-quantizing GGUF tensors...": "dequantise",
}
"""Steps of transformers that are told, by its own words for them, to our reporter."""


@contextmanager
def silenced() -> Iterator[None]:
    """Keep progress bars, warnings and log lines of the Hugging Face libraries off the terminal inside the block.

    Weights that are loaded are a step of our own reporter.
    """
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = reader.tqdm  # of another library than the bars that are switched off here
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    placing = std_logging.getLogger("accelerate")
    placing_level = placing.level
    placing.setLevel(std_logging.CRITICAL)
    try:
        with warnings.catch_warnings(), bars(lambda said: READING.get(said, "")) as opened:
            warnings.simplefilter("ignore")
            reader.tqdm = opened
            hook = logging.set_tqdm_hook(lambda factory, args, options: opened(*args, **options))
            try:
                yield
            finally:
                logging.set_tqdm_hook(hook)
    finally:
        logging.set_verbosity(level)
        reader.tqdm = bar
        placing.setLevel(placing_level)
        if shown:
            logging.enable_progress_bar()
