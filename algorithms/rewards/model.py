"""A reward model: a sequence classifier with one output, scored by transformers."""

import json
from pathlib import Path
from typing import Any

from algorithms.content_text import text_of
from algorithms.data import Group
from configs.errors import ConfigError

# Sequences scored at a time: a group of long completions would not fit otherwise.
_BATCH = 8


class RewardModel:
    """A model directory (`model:` in a config), called with a group. CPU only; weights are read by `load`.

    A conversation goes through the model's chat template if there is one, else prompt and completion follow each
    other as text. The score is the single logit, as in TRL.
    """

    def __init__(self, directory: str) -> None:
        """Raises ConfigError unless the directory holds a classifier with one output."""
        self._directory = directory
        self._model: Any = None
        self._tokenizer: Any = None
        path = Path(directory) / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"reward model {directory}: {path} cannot be read: {error}") from None
        kinds: list[str] = config.get("architectures") or []
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise ConfigError(
                f"reward model {directory}: is {', '.join(kinds) or 'of no known kind'}; a reward model is a "
                "...ForSequenceClassification with one label"
            )
        labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
        if labels != 1:
            raise ConfigError(f"reward model {directory}: has {labels} labels; a reward model has one")

    def load(self) -> None:
        """Read weights and tokenizer. Raises ConfigError saying what transformers said."""
        if self._model is not None:
            return
        import transformers

        try:
            auto: Any = transformers.AutoModelForSequenceClassification
            self._model = auto.from_pretrained(self._directory, local_files_only=True).eval()
            tokenizer: Any = transformers.AutoTokenizer
            self._tokenizer = tokenizer.from_pretrained(self._directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"reward model {self._directory}: {error}") from None
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id

    def __call__(self, group: Group) -> list[float]:
        """One score for each completion, in float32."""
        import torch

        self.load()
        texts = [self._text(group, rollout.text) for rollout in group.rollouts]
        scores: list[float] = []
        for first in range(0, len(texts), _BATCH):
            rows = self._tokenizer(
                texts[first : first + _BATCH],
                return_tensors="pt",
                padding=True,
                # A chat template writes its own special tokens.
                add_special_tokens=self._tokenizer.chat_template is None,
            )
            with torch.inference_mode():
                scores += self._model(**rows).logits[:, 0].float().tolist()
        return scores

    def _text(self, group: Group, completion: str) -> str:
        messages = [dict(message) for message in group.prompt.messages]
        if self._tokenizer.chat_template is None:
            return text_of(messages[-1]["content"]) + completion
        whole = [*messages, {"role": "assistant", "content": completion}]
        return self._tokenizer.apply_chat_template(whole, tokenize=False)
