"""Resolves a MODEL argument (hub name, local folder or GGUF file) and loads the model and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_runtime.errors import UnsupportedModelError

from medusa_exporter.extras import import_extra
from medusa_exporter.families import FAMILIES, DecoderConfig
from medusa_exporter.heads.base_model import model_names
from medusa_exporter.hub import check_revision
from medusa_exporter.library_logging import log_errors_only
from medusa_exporter.loading import rope, sizes
from medusa_exporter.loading.architecture import parse_decoder_config
from medusa_exporter.loading.config import (
    check_architecture,
    check_folder,
    check_plain_weights,
    named_model_type,
    read_object,
)
from medusa_exporter.loading.foreign_files import parsed_once, reading
from medusa_exporter.loading.gguf_metadata import read_gguf_facts
from medusa_exporter.loading.gguf_templates import gguf_templates
from medusa_exporter.loading.gguf_weights import load_gguf
from medusa_exporter.loading.memory import check_memory
from medusa_exporter.loading.sizes import DecoderSizes
from medusa_exporter.loading.weights import check_files, check_loaded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSource:
    """A resolved MODEL argument.

    Attributes:
        location: A hub name or a local folder, as transformers' `from_pretrained` accepts it.
        gguf: Name of the GGUF file in that folder, `None` for a model without one.
        local: Whether `location` is a folder.
        revision: Branch, tag or commit of a hub model, `None` for its main branch.
    """

    location: str
    gguf: str | None = None
    local: bool = True
    revision: str | None = None

    @classmethod
    def resolve(cls, model: str, revision: str | None = None) -> ModelSource:
        """Resolve a MODEL argument as the user typed it.

        Args:
            model: A hub name, a local folder or a GGUF file.
            revision: Branch, tag or commit of a hub model, `None` for its main branch.

        Raises:
            UnsupportedModelError: There is no such file or folder and it is no hub name, or a revision was asked for
                of a local model.
        """
        path = Path(model).expanduser()
        if revision is not None:
            check_revision(revision, model, "--revision")
        if path.is_file():
            with path.open("rb") as file:
                magic = file.read(4)
            if magic != b"GGUF":
                raise UnsupportedModelError(
                    f"{model}: a file, but not a GGUF (it starts with {magic!r}, expected b'GGUF'); give "
                    "a .gguf file, a folder or a hub name"
                )
            return cls(str(path.resolve().parent), path.name)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UnsupportedModelError(
                    f"{model}: a folder without config.json; expected a Hugging Face model folder: give one"
                )
            return cls(str(path.resolve()))
        if model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") != 1:
            raise UnsupportedModelError(
                f"{model}: no such file or folder, and not a hub name of the form 'owner/name'; "
                "give a folder with config.json, a .gguf file or a hub name"
            )
        return cls(model, local=False, revision=revision)

    @property
    def name(self) -> str:
        """The model's name: the hub name, or the last part of a path."""
        if self.gguf:
            return self.gguf.removesuffix(".gguf")
        return Path(self.location).name if self.local else self.location

    @property
    def described(self) -> str:
        """The model as messages name it: a file's name, a folder's path, or a hub name with its revision."""
        return self.gguf or (f"{self.location}@{self.revision}" if self.revision else self.location)

    @property
    def names(self) -> list[str]:
        """All names of the model: `name`, a folder's path, and the name in the `_name_or_path` of its config.json."""
        found = model_names(Path(self.location)) if self.local and not self.gguf else []
        return list(dict.fromkeys([self.name, *found]))

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments that every transformers `from_pretrained` needs for this source.

        No code of a model's folder or repository is ever run.
        """
        arguments: dict[str, Any] = {"trust_remote_code": False}
        if self.gguf:
            arguments["gguf_file"] = self.gguf
        if self.revision:
            arguments["revision"] = self.revision
        return arguments

    def files(self) -> list[Path]:
        """The local files that a build reads, sorted; empty for a hub name."""
        if not self.local:
            return []
        folder = Path(self.location)
        if self.gguf:
            return [folder / self.gguf]
        found = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
        return sorted(file for file in found if file.is_file() and not _is_ignored(file))


def _is_ignored(file: Path) -> bool:
    """Return whether a build ignores a file of a model's folder. Tokenizers have files of many names, so few are."""
    return file.name.startswith(".") or file.suffix.lower() in (".md", ".png", ".jpg", ".svg", ".pdf", ".py")


def check_family(source: ModelSource) -> str:
    """Return the model type if it is supported, before any weights are read or downloaded.

    GGUF's architecture `llama` covers Llama and Mistral.

    Raises:
        UnsupportedModelError: For other model types, and for weights that are quantised or belong to an adapter.
    """
    config = _config_facts(source)
    check_plain_weights(config, source.described)
    if source.local and not source.gguf:
        check_folder(Path(source.location))
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"{source.described}: model type {named_model_type(config)} is not supported; "
            f"expected one of {', '.join(FAMILIES)}: give a model of one of these families"
        )
    rope.check_rope(config, source.described)
    parse_decoder_config(config, source.described)
    return family


def read_decoder_config(source: ModelSource) -> DecoderConfig:
    """Return the part of the config that decides which graphs can be built, before any weights are read.

    Raises UnsupportedModelError for what `check_family` refuses.
    """
    check_family(source)
    return parse_decoder_config(_config_facts(source), source.described)


def read_sizes(source: ModelSource) -> DecoderSizes:
    """Read the sizes of a decoder from its config. Raises UnsupportedModelError if they cannot be read."""
    with reading(f"{source.described}: its config"):
        return sizes.compute_sizes(_config_facts(source))


def choose_context(source: ModelSource, wanted: int | None) -> int:
    """Return the number of tokens of a bundle's context, before any weights are read; see `loading.rope`."""
    return rope.choose_context(read_config(source), wanted, source.described)


def longest_context(source: ModelSource) -> int:
    """Return the longest context in tokens that the model supports; see `loading.rope`."""
    config = read_config(source)
    return rope.longest_context(config, config["max_position_embeddings"])


def read_config(source: ModelSource) -> dict[str, Any]:
    """Read the config of `source`, with its `max_position_embeddings`, before any weights are read."""
    config = _config_facts(source)
    if "max_position_embeddings" not in config:  # a config.json may leave out what is the family's default
        whole = import_extra("transformers", "export").AutoConfig.for_model(config["model_type"])
        config = {**config, "max_position_embeddings": whole.max_position_embeddings}
    return config


def _config_facts(source: ModelSource) -> dict[str, Any]:
    if source.gguf:
        return dict(read_gguf_facts(Path(source.location) / source.gguf).config)
    if source.local:
        return read_object(Path(source.location) / "config.json")
    transformers = import_extra("transformers", "export")
    try:
        facts, _ = transformers.PretrainedConfig.get_config_dict(source.location, revision=source.revision)
    except OSError as error:
        raise UnsupportedModelError(
            f"{source.described}: neither a local path nor a model that the hub gives ({str(error).splitlines()[0]}); "
            f"expected {'a branch, tag or commit of its repository' if source.revision else 'a hub name'}: check "
            "the name, and that the hub can be reached"
        ) from error
    return dict(facts)


def load_model(source: ModelSource, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Load a causal decoder in evaluation mode.

    Every weight comes from the model's files, and every tensor of the files is used. No code of the model's folder
    runs; pickled weights are read as tensors and nothing else.

    Args:
        source: The model.
        dtype: Data type of the weights.
        device: Device of the weights.

    Raises:
        UnsupportedModelError: For a model that is not supported or cannot be read.
        CapacityError: If memory does not suffice, before any weights are read.
    """
    with parsed_once(source.gguf):
        check_family(source)
        config = _config_facts(source)
        with reading(f"{source.described}: its weights"):
            if source.gguf:
                _check_memory(source, config, dtype)
                model = load_gguf(Path(source.location) / source.gguf, dtype)
            else:
                model = _load_files(source, config, dtype)
    model.config.eos_token_id = config.get("eos_token_id")  # transformers' default may be any word of the vocabulary
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _load_files(source: ModelSource, config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Load a model from a folder or a repository of the hub, whose config.json contains `config`."""
    transformers = import_extra("transformers", "export")
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    check_architecture(config, names[config["model_type"]], source.location)
    if source.local:
        check_files(Path(source.location), config.get("transformers_weights"))
        if (generation := Path(source.location) / "generation_config.json").is_file():
            read_object(generation)  # transformers takes a damaged one for none, and end tokens would be lost
    _check_memory(source, config, dtype)
    with log_errors_only("transformers"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            attn_implementation=FAMILIES[config["model_type"]].attention,
            ignore_mismatched_sizes=True,  # they end the loading below, by name
            output_loading_info=True,
            weights_only=True,
            **source.load_arguments,
        )
    check_loaded(model, info, source.location)
    loaded: PreTrainedModel = model
    return loaded


def _check_memory(source: ModelSource, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Raise CapacityError if the weights do not fit into memory, which they are read to for every device."""
    needed = sizes.compute_sizes(config).parameters * dtype.itemsize
    check_memory(needed, f"{source.described}: loading its weights in {dtype.itemsize * 8} bits")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. It must have a fast form (tokenizer.json), the only one that the runtime reads.

    Raises:
        UnsupportedModelError: If the model is not supported, or its tokenizer has no fast form.
    """
    transformers = import_extra("transformers", "export")
    check_family(source)
    with parsed_once(source.gguf), reading(f"{source.described}: its tokenizer"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            source.location, **source.load_arguments
        )
        if source.gguf:
            tokenizer.chat_template = gguf_templates(Path(source.location) / source.gguf)
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{source.location}: its tokenizer has no fast form (tokenizer.json); convert it first"
        )
    return tokenizer


def effective_window(model: PreTrainedModel, context: int) -> int | None:
    """Return the length of the model's sliding window if it is shorter than the context; None if it hides nothing."""
    window: int | None = getattr(model.config, "sliding_window", None)
    if not window or not getattr(model.config, "use_sliding_window", True):
        return None
    return window if window < context else None
