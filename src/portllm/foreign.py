"""The border to transformers, tokenizers and PEFT: what they are imported as, and what becomes of what they raise.

They are imported without the package `kernels`, through which a model's type alone would make them fetch code from the
hub and run it.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

import torch

from portllm.errors import MissingExtraError, PortLLMError
from portllm.installed import why_not
from portllm.messages import errors_only


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """A package that is not there to what is imported inside the block, unless it has been imported before."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


try:
    # Where bitsandbytes is installed, peft loads it, and it warns of a kernel for 4-bit weights that it lacks.
    with errors_only("bitsandbytes"), _without("kernels"):
        import transformers
        from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
        from peft.tuners.lora import Linear as LoraLinear
        from peft.tuners.lora import LoraLayer
        from transformers import (
            CONFIG_MAPPING,
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_QUESTION_ANSWERING_MAPPING,
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
            MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
            AutoConfig,
            AutoModelForCausalLM,
            AutoTokenizer,
            DynamicCache,
            PreTrainedConfig,
            PreTrainedModel,
            PreTrainedTokenizerBase,
            PreTrainedTokenizerFast,
        )
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            PrefixChange,
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
        from transformers.initialization import no_init_weights
        from transformers.models.auto import modeling_auto
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
        from transformers.pytorch_utils import Conv1D
        from transformers.utils import logging as transformers_logging
except ImportError as missing:
    raise MissingExtraError(
        f"training and evaluating need transformers and peft; {why_not(missing, 'live')}"
    ) from missing

CLASSIFIERS = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "QUESTION_ANS": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}
"""By PEFT's `task_type`, the classes of models with a head of their own."""

__all__ = [
    "CLASSIFIERS",
    "CONFIG_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "REGISTRIES",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Conv1D",
    "DynamicCache",
    "LoraConfig",
    "LoraLayer",
    "LoraLinear",
    "PeftModel",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "PreTrainedTokenizerFast",
    "PrefixChange",
    "WeightConverter",
    "WeightRenaming",
    "foreign",
    "get_model_conversion_mapping",
    "get_peft_model",
    "get_peft_model_state_dict",
    "no_init_weights",
    "quiet",
    "rename_source_key",
    "tokenizer_class_from_name",
    "transformers",
]

REGISTRIES = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "vision": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "multimodal": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}
"""Which class a model type is loaded into, by the task that an adapter may be trained for."""

PANICS = "pyo3_runtime"
"""The module of what a package in Rust raises when it gives up; it is no `Exception`."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers' and peft's messages, warnings and progress bars are off inside the block and as before after it."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def foreign(translated: Callable[[str], PortLLMError]) -> Iterator[None]:
    """Whatever the packages raise inside the block, a panic of Rust too, becomes an error of ours.

    The block holds calls of theirs alone, since it would hide faults of ours. What is no fault of a file passes:
    interrupts, the exit of the program, memory that does not suffice, and errors that are ours already.

    Args:
        translated: The error of ours, given what theirs says in one line.
    """
    try:
        yield
    except (PortLLMError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ == PANICS:
            raise translated(_first_line(error)) from error
        raise


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0].rstrip(".:") if lines else type(error).__name__) + "."
